"""`nexus-plugins new` writes packages that install, pass their tests and run, or says why not."""

from __future__ import annotations

import ast
import keyword
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from fresh_venv import FreshVenv
from nexus_core.cli.new import package_files
from nexus_core.cli.plugins import main as nexus_plugins
from nexus_core.cli.run import main as nexus_run
from nexus_core.sources import forget
from nexus_core.testing import fake_distribution

ROOT = Path(__file__).parents[2]
KINDS = ("plain", "loss", "model", "data", "optimizer", "schedule", "metric", "logger")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test writes to its own folder."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget()


def new(*arguments: str) -> Result:
    return CliRunner().invoke(nexus_plugins, ["new", *arguments])


@pytest.mark.parametrize("kind", KINDS)
def test_package_is_complete_and_goes_by_one_name(kind: str) -> None:
    """Fails if the entry point does not match the package."""
    option = [] if kind == "plain" else [f"--{kind}"]
    result = new("gold_dust", *option)
    assert result.exit_code == 0, result.output
    assert "pip install -e 'gold_dust[test]'" in result.output
    package = Path("gold_dust")
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["name"] == "gold-dust"
    assert project["entry-points"]["nexus.plugins"] == {"gold_dust": "gold_dust:GoldDustPlugin"}
    code = ast.parse((package / "src/gold_dust/plugin.py").read_text())
    classes = [node.name for node in code.body if isinstance(node, ast.ClassDef)]
    assert {"GoldDustConfig", "GoldDustPlugin"} <= set(classes)
    assert all(name.startswith("GoldDust") for name in classes)
    workflow = yaml.safe_load((package / ".github/workflows/test.yml").read_text())
    assert workflow["jobs"]["test"]["steps"][1]["with"] == {
        "python-version": "${{ matrix.python }}"
    }
    for file in ("README.md", "LICENSE", "tests/test_gold_dust.py", "src/gold_dust/py.typed"):
        assert (package / file).exists(), file


@given(
    name=st.from_regex(r"[a-z][a-z0-9]{0,12}(_[a-z0-9]{1,8}){0,2}", fullmatch=True).filter(
        lambda name: not keyword.iskeyword(name)
    ),
    kind=st.sampled_from(KINDS),
)
def test_any_good_name_gives_code_that_compiles_and_no_hole_is_left(name: str, kind: str) -> None:
    for path, text in package_files(name, kind).items():
        assert "$" not in path
        assert "$" not in text.replace("${{ matrix.python }}", "")
        if path.endswith(".py"):
            ast.parse(text)


def test_code_is_formatted_and_lints_clean() -> None:
    """Fails if the author's first `ruff` run would find faults in the template."""
    pytest.importorskip("ruff")
    for kind in KINDS:
        for path, text in package_files(f"sparkle_{kind}", kind).items():
            file = Path(kind, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    for action in (["check", "--no-cache"], ["format", "--no-cache", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *action, "."],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Sparkle", "'Sparkle' cannot be a plugin's name: expected lower-case"),
        ("spark-le", "cannot be a plugin's name"),
        ("1spark", "cannot be a plugin's name"),
        ("_spark", "cannot be a plugin's name"),
        ("spark__le", "cannot be a plugin's name"),
        ("spärkle", "cannot be a plugin's name"),
        ("", "cannot be a plugin's name"),
        ("class", "cannot be a plugin's name"),
        ("../spark", "cannot be a plugin's name"),
        ("clip", "the plugin 'clip' already exists in nexus-trainer"),
        ("json", "a module 'json' already exists"),
    ],
)
def test_bad_or_taken_name_is_one_error_and_writes_nothing(
    name: str, message: str, folder: Path
) -> None:
    result = new(name)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert list(folder.rglob("*")) == []


def test_name_of_another_ones_plugin_is_taken() -> None:
    with fake_distribution("glitter", {"sparkle": "glitter_module:SparklePlugin"}, version="2.1"):
        result = new("sparkle")
    assert result.exit_code == 2
    assert "the plugin 'sparkle' already exists in glitter 2.1; choose another" in result.output


def test_folder_that_is_there_stays_as_it_is(folder: Path) -> None:
    (folder / "work").mkdir()
    (folder / "work/mine.txt").write_text("mine")
    result = new("sparkle", "--out", "work")
    assert result.exit_code == 2
    assert "'work' already exists" in result.output
    assert [path.name for path in folder.rglob("*")] == ["work", "mine.txt"]


def test_folder_that_cannot_be_written_is_one_error(folder: Path) -> None:
    (folder / "file").write_text("in the way")
    result = new("sparkle", "--out", "file/sparkle")
    assert result.exit_code == 2
    assert "cannot write 'file/sparkle': File exists (file); choose" in result.output
    assert [path.name for path in folder.rglob("*")] == ["file"]


def test_package_goes_where_out_says() -> None:
    assert new("sparkle", "--out", "deep/down/here").exit_code == 0
    assert Path("deep/down/here/src/sparkle/plugin.py").exists()
    assert [path.name for path in Path("deep/down").iterdir()] == ["here"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_in_one_file_is_that_of_the_package(kind: str) -> None:
    option = [] if kind == "plain" else [f"--{kind}"]
    result = new("deep/gold_dust.py", *option)
    assert result.exit_code == 0, result.output
    assert "nexus-run --plugins ./deep/gold_dust.py" in result.output
    package = package_files("gold_dust", kind)["src/gold_dust/plugin.py"]
    assert Path("deep/gold_dust.py").read_text() == package
    shown = CliRunner().invoke(nexus_plugins, ["show", "./deep/gold_dust.py"]).output
    assert shown.startswith("gold_dust: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Mine.py"], "'Mine' cannot be a plugin's name"),
        (["clip.py"], "the plugin 'clip' already exists"),
        (["json.py"], "a module 'json' already exists"),
        (["sparkle.py"], "'sparkle.py' already exists; choose another name"),
        (["mine.py", "--out", "x"], "--out is for packages"),
        (["sparkle.py/mine.py"], "cannot write 'sparkle.py/mine.py': "),
    ],
)
def test_a_file_that_cannot_be_written_is_one_error(arguments: list[str], message: str) -> None:
    Path("sparkle.py").write_text("mine\n")
    result = new(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert [path.name for path in Path().rglob("*")] == ["sparkle.py"]
    assert Path("sparkle.py").read_text() == "mine\n"


@pytest.mark.slow
def test_a_plugin_in_one_file_runs_and_holds_to_the_contract(folder: Path) -> None:
    """The workflow without a package: a file, a run, the checks."""
    assert new("mine.py").exit_code == 0
    Path("corpus.txt").write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    done = CliRunner().invoke(nexus_run, ["tiny.yaml", "--plugins", "./mine.py", "--out", "one"])
    assert done.exit_code == 0, done.output
    assert Path("one/plugins/mine.py").read_text() == Path("mine.py").read_text()
    checked = CliRunner().invoke(nexus_plugins, ["check", "./mine.py"])
    assert checked.exit_code == 0, checked.output


@pytest.mark.slow
def test_code_is_typed(folder: Path) -> None:
    pytest.importorskip("mypy")
    paths = []
    for kind in KINDS:
        paths.append(f"sparkle_{kind}.py")
        Path(paths[-1]).write_text(package_files(f"sparkle_{kind}", kind)[
            f"src/sparkle_{kind}/plugin.py"
        ])  # fmt: skip
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ".cache", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_wheel_of_the_trainer_holds_the_templates(folder: Path) -> None:
    """Fails if `new` only works from a checkout."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps",
               "--quiet", "--wheel-dir", str(folder), str(ROOT)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    names = {
        Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "cli/templates" in name
    }
    assert names == {path.name for path in (ROOT / "nexus_core/cli/templates").iterdir()}


@pytest.mark.slow
def test_packages_install_pass_their_tests_run_and_go(folder: Path) -> None:
    """The whole workflow of an author in a new environment; only the packages are written."""
    fresh = FreshVenv(folder / "venv")
    names = {kind: f"sparkle{kind}" for kind in KINDS}
    for kind, name in names.items():
        option = [] if kind == "plain" else [f"--{kind}"]
        assert new(name, *option).exit_code == 0
    editable = [part for name in names.values() for part in ("-e", name)]
    fresh.pip("install", "--no-build-isolation", "--no-deps", "--no-index", *editable)

    tests = fresh.run("pytest", "-q", "-p", "no:cacheprovider", *names.values(), cwd=folder)
    assert tests.returncode == 0, tests.stdout
    assert "passed" in tests.stdout

    listed = fresh.run("nexus-plugins", "list", cwd=folder).stdout.splitlines()
    for name in names.values():
        (line,) = [line for line in listed if line.startswith(f"{name} ")]
        assert f"({name} 0.1.0)" in line
        assert "BROKEN" not in line

    Path("corpus.txt").write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    theirs = ["no:data_text", "no:model_nexus", "no:optim_adamw"]  # so that these fill the slots
    together = ["tiny.yaml", "--plugins", ",".join([*theirs, *names.values()])]
    run = fresh.run("nexus-run", *together, "--out", "one", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert {*names.values()} <= yaml.safe_load(Path("one/config.yaml").read_text())[
        "plugins"
    ].keys()
    without = fresh.run("nexus-run", "tiny.yaml", "--explain", cwd=folder)
    assert "sparkle" not in without.stdout, "installed is not active"

    fresh.pip("uninstall", "-y", *names.values())
    assert "sparkle" not in fresh.run("nexus-plugins", "list", "--no-load", cwd=folder).stdout
    gone = fresh.run("nexus-run", *together, cwd=folder)
    assert gone.returncode == 2
    assert "no plugin named 'sparkle" in gone.stderr


TINY = {
    "until": "2 steps",
    "plugins": {
        "data_text": {"train": "corpus.txt", "seq_len": 32, "batch_size": 4},
        "model_nexus": {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16},
        "loss_lm": {},
        "optim_adamw": {"lr": 1e-3},
    },
}
