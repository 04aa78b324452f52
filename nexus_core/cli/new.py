"""`nexus-plugins new`: a complete plugin package with tests, or a plugin in one file."""

from __future__ import annotations

import keyword
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

import click

from nexus_core.cli.errors import reported
from nexus_core.cli.options import PATH

__all__ = ["new", "package_files"]

PLAIN = "plain"
SUFFIX = ".py"
TEMPLATES = {
    ".github/workflows/test.yml": "workflow.yml",
    ".gitignore": "gitignore",
    "LICENSE": "LICENSE",
    "README.md": "README.md",
    "pyproject.toml": "pyproject.toml",
    "src/$name/__init__.py": "init.py",
    "src/$name/plugin.py": "plugin_$kind.py",
    "src/$name/py.typed": "py.typed",
    "tests/test_$name.py": "test_$kind.py",
}
"""File of the new package: its template."""


@click.command()
@click.argument("name", metavar="NAME|FILE.py")
@click.option("--loss", "kind", flag_value="loss", help="One term of the loss.")
@click.option("--model", "kind", flag_value="model", help="The model of a run.")
@click.option("--data", "kind", flag_value="data", help="The data of a run.")
@click.option("--optimizer", "kind", flag_value="optimizer", help="An optimizer.")
@click.option("--schedule", "kind", flag_value="schedule", help="A learning rate schedule.")
@click.option("--metric", "kind", flag_value="metric", help="An evaluation metric.")
@click.option("--logger", "kind", flag_value="logger", help="Shows or stores metrics.")
@click.option("--out", type=PATH, help="Folder of the package; default: NAME.")
def new(name: str, kind: str | None, out: Path | None) -> None:
    """Create a package for a new plugin, with passing tests; or a plugin in one file.

    \b
    nexus-plugins new sparkle            a package, ready to install
    nexus-plugins new sparkle.py         a file: nexus-run --plugins ./sparkle.py
    """
    with reported(debug=False):
        kind = kind or PLAIN
        click.echo(
            _new_file(Path(name), kind, out)
            if name.endswith(SUFFIX)
            else _new_package(name, kind, out or Path(name))
        )


def _new_package(name: str, kind: str, folder: Path) -> str:
    _check_name(name)
    _write(folder, package_files(name, kind))
    return (
        f"created the package '{name}' in {folder}; next:\n"
        f"  pip install -e '{folder}[test]'\n"
        f"  pytest {folder}\n"
        f"  nexus-run --plugins {name}"
    )


def _new_file(path: Path, kind: str, out: Path | None) -> str:
    from nexus_core.errors import ConfigError

    if out is not None:
        raise ConfigError(f"--out is for packages; a file is written to the path you name: {path}")
    if path.exists():
        raise ConfigError(f"'{path}' already exists; choose another name")
    name = path.stem
    _check_name(name)
    words = _words(name, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(_template("plugin_$kind.py", words))
    except OSError as error:
        raise ConfigError(f"cannot write '{path}': {error.strerror}; choose another") from error
    place = shlex.quote(str(path) if path.is_absolute() else f"./{path}")
    return (
        f"created the plugin '{name}' in {path}; next:\n"
        f"  nexus-run --plugins {place}\n"
        f"  nexus-plugins check {place}"
    )


def package_files(name: str, kind: str = PLAIN) -> dict[str, str]:
    """The files of a plugin's package: path to text.

    Args:
        name: name of the plugin, its module and its distribution.
        kind: "plain", or one of the command's options: "loss", "model", ...
    """
    words = _words(name, kind)
    return {
        Template(path).substitute(words): _template(source, words)
        for path, source in TEMPLATES.items()
    }


def _words(name: str, kind: str) -> dict[str, str]:
    """Values for the templates' placeholders."""
    from nexus_core.events import API_VERSIONS

    return {
        "name": name,
        "Name": "".join(word.title() for word in name.split("_")),
        "distribution": name.replace("_", "-"),
        "kind": kind,
        "trainer": version("nexus-trainer"),
        "api": API_VERSIONS[-1],
        "year": str(date.today().year),
    }


def _template(source: str, words: Mapping[str, str]) -> str:
    file = f"{Template(source).substitute(words)}.tmpl"
    text = files("nexus_core.cli").joinpath("templates", file).read_text(encoding="utf-8")
    return Template(text).substitute(words)


def _check_name(name: str) -> None:
    """Reject names that are invalid or already taken.

    Raises:
        ConfigError: suggests a valid name if there is one.
    """
    from nexus_core.errors import ConfigError
    from nexus_core.plan import distribution, installed

    plain = name.isidentifier() and name.isascii() and name.islower() and name[0] != "_"
    if not plain or keyword.iskeyword(name) or "__" in name:
        raise ConfigError(
            f"'{name}' cannot be a plugin's name: expected lower-case letters, digits and single "
            "underscores, starting with a letter, not a Python keyword; such as 'gradient_noise'"
        )
    if entry := installed().get(name):
        raise ConfigError(
            f"the plugin '{name}' already exists in {distribution(entry)}; choose another name"
        )
    if find_spec(name) is not None:
        raise ConfigError(
            f"a module '{name}' already exists, and one would hide the other; "
            f"choose another name, such as '{name}_plugin'"
        )


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write all files, or nothing on an error.

    Raises:
        ConfigError: the folder already exists, or cannot be created.
    """
    from nexus_core.errors import ConfigError

    if folder.exists():
        raise ConfigError(f"'{folder}' already exists; choose another folder with --out")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as draft:
            for path, text in texts.items():
                file = Path(draft) / "package" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            shutil.move(Path(draft) / "package", folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write '{folder}': {error.strerror} ({error.filename}); choose another folder "
            "with --out"
        ) from error
