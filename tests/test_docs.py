"""The documentation's code runs as written, and everything it names exists.

Python blocks of a page run in order and share their names; `runs/mine` is a finished run. In shell
blocks, every command of this project is parsed by its own parser, and its plugins and settings are
looked up. YAML blocks are configs. A comment before a block says that it is not run
(`<!-- not run: reason -->`), or that it shows a mistake (`<!-- fails -->`).
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import pytest
import torch
import yaml
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import nexus_core
from docs.reference import first_party, with_reference
from nexus_core import Engine, NexusError, PluginError, testing
from nexus_core.cli.build import build_plugins
from nexus_core.cli.config import RunConfig
from nexus_core.cli.local import plugin_class
from nexus_core.cli.plugins import main as nexus_plugins
from nexus_core.cli.run import main as nexus_run
from nexus_core.cli.settings import presets, read_settings
from nexus_core.errors import ConfigError
from nexus_core.plan import HOOK_NAMES, installed, load
from nexus_core.sources import forget
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.jsonl import JsonlPlugin
from tests.distributed.processes import ran

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OF_THE_ROOT = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "docs/llms.txt")
PAGES = [*(ROOT / name for name in OF_THE_ROOT), *sorted(DOCS.rglob("*.md"))]
SHELLS = ("bash", "sh", "console", "")  # unnamed: lines that start with a command
PRESET = read_settings("quickstart").defaults
CONTROL = {"&&", "||", "|", ";", ">", ">>", "<", "&"}


@pytest.fixture(autouse=True)
def a_plugin_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page about one-file plugins starts with one, which its commands and configs use."""
    monkeypatch.chdir(tmp_path)
    code = blocks(DOCS / "howto/one_file.md", "python")[0].text
    Path("sparkle.py").write_text(code)
    shutil.copy(ROOT / "examples/digits/net.py", "net.py")
    Path("mine.py").write_text(code.replace("Sparkle", "Mine"))
    yield
    forget()


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment in the line before it."""

    page: Path
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        before = page.read_text()[: match.start()]
        note = re.search(r"<!-- (not run: .+|fails) -->\n$", before)
        line = before.count("\n") + 1
        found.append(Block(page, line, match[1], match[2], note[1] if note else ""))
    return [block for block in found if block.language in languages]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


# -- Python


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    model = torch.nn.Linear(2, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda model, batch: model(batch).square().mean(),
        plugins=[CheckpointPlugin(), JsonlPlugin()],
        out=folder,
    )
    engine.fit([torch.ones(4, 2)], until="2 steps", eval_data=[torch.ones(4, 2)])
    return folder


def evaluate(example: Example) -> None:
    before = example.document.text[: example.start].rstrip().rpartition("\n")[2]
    if not before.startswith("<!-- not run: "):
        PythonEvaluator()(example)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_blocks_run(
    page: Path,
    mine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if code on a page does not run, or does not do what the page says."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mine, "runs/mine", symlinks=True)
    document = Document.parse(str(page), CodeBlockParser("python", evaluate))
    document.namespace["__name__"] = "page"
    for example in document.examples():
        example.evaluate()


# -- commands and configs


def words_of(line: str) -> list[str]:
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    return list(lexer)


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of this project in a shell block, each as its words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if not line.startswith({"console": "$ ", "": "nexus-"}.get(block.language, "")):
            continue
        words = words_of(line)
        for place, word in enumerate(words):
            if word in ("nexus-run", "nexus-plugins", "nexus-data"):
                yield list(takewhile(lambda word: word not in CONTROL, words[place:]))


def check_command(words: list[str]) -> None:
    """Parse a command as the program would, without running it.

    Raises:
        ClickException, NexusError: it names something that does not exist.
    """
    tool, first, rest = words[0], words[1] if words[1:] else "", words[2:]
    if tool == "nexus-run":
        extra = {entry.name: entry for entry in entry_points(group="nexus.commands")}
        command = extra[first].load() if first in extra else nexus_run
        arguments = rest if first in extra else words[1:]
        check_run(command.make_context(tool, arguments).params)
        return
    group = nexus_plugins if tool == "nexus-plugins" else data_group()
    command = group.get_command(click.Context(group), first)
    assert command, f"no command {tool} {first}"
    parameters = command.make_context(first, rest).params
    if command is nexus_plugins.commands["show"] and parameters["plugin"].islower():
        plugin_class(parameters["plugin"])


def data_group() -> click.Group:
    from nexus_plugins.data_text import cli

    return cli._group


def check_run(parameters: dict[str, Any]) -> None:
    config = parameters.get("config") or next(iter(parameters.get("words", ())), None)
    if config is not None and not re.search(r"\.(ya?ml|toml|json)$", config):
        assert config in presets(), f"no preset {config}"
    preset = config if config in presets() else "quickstart"
    plugins, sets = parameters.get("plugins", ""), tuple(parameters.get("sets", ()))
    own = [] if config == preset else in_the_file(sets, plugins)
    build_plugins(read_settings(preset, ",".join([plugins, *own]), sets))


def in_the_file(sets: tuple[str, ...], plugins: str) -> list[str]:
    """The plugins that a reader's config must have for these settings."""
    heads = dict.fromkeys(key.split(".")[0] for key in sets if "." in key.split("=")[0])
    return [head for head in heads if head not in (*PRESET, *plugins.split(","))]


@pytest.mark.parametrize("block", [b for b in all_blocks(*SHELLS) if list(commands(b))], ids=str)
def test_commands_and_what_they_name_exist(block: Block) -> None:
    """Fails if a page names an option, plugin or setting that does not exist."""
    for words in commands(block):
        try:
            check_command(words)
        except click.exceptions.Exit:
            continue
        except NexusError:
            assert block.note == "fails", shlex.join(words)
        else:
            assert block.note != "fails", f"this works: {shlex.join(words)}"


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_config_blocks_are_configs(block: Block) -> None:
    """Fails if a page shows a setting that does not exist."""
    if block.note:
        pytest.skip(block.note)
    content = next(yaml.safe_load_all(block.text))
    if content.keys() & installed().keys():
        content = {"plugins": content}
    elif not content.keys() & {"preset", *RunConfig.model_fields}:
        pytest.skip("a file of another program")
    Path("my.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    try:
        build_plugins(read_settings("my.yaml"))
    except ConfigError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))


SMALL = {
    "UNTIL": "20 steps",
    "DATA_TEXT__SEQ_LEN": "64",
    "DATA_TEXT__BATCH_SIZE": "2",
    "MODEL_NEXUS__D_MODEL": "32",
    "MODEL_NEXUS__SSM_N_LAYERS": "1",
    "MODEL_NEXUS__NGRAM_BUCKETS": "64",
    "DATA_TEXT__VALID_LIMIT": "512",
    "CHECKPOINT__EVERY": "5 steps",
}


@pytest.mark.slow
def test_tutorial_can_be_followed(tmp_path: Path) -> None:
    """Every step of the tutorial, as typed, in order, with a small model."""
    tutorial = DOCS / "tutorial.md"
    (config,) = blocks(tutorial, "yaml")
    (tmp_path / "my.yaml").write_text(config.text)
    for block in blocks(tutorial, "bash"):
        if block.note.startswith("not run"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            done = typed(line, tmp_path)
            assert done.returncode == (2 if block.note == "fails" else 0), f"{block}: {done.stderr}"
            if block.note == "fails":
                (said,) = blocks(tutorial, "text")
                assert done.stderr == said.text


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line; this project's commands in forked processes, which need no imports."""
    small = {f"NEXUS_{key}": value for key, value in SMALL.items()}
    tool, *arguments = words_of(line)
    if tool in ("nexus-run", "nexus-plugins", "nexus-data"):
        installed_as = Path(sys.executable).with_name(tool)
        return ran(installed_as, *arguments, folder=folder, environment=small)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", "-euo", "pipefail", "-c", line]
    return subprocess.run(
        script, cwd=folder, env={**os.environ, **path}, capture_output=True, text=True, timeout=300
    )


# -- links


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_hold(page: Path) -> None:
    """Fails if a page links to a missing file; building the site checks anchors."""
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.slow
def test_site_builds_without_a_warning() -> None:
    """Fails if a page is not in the navigation, or a link or anchor is broken."""
    pytest.importorskip("sphinx", reason="the site needs the extra: pip install -e '.[docs]'")
    with TemporaryDirectory() as out:  # read and resolved, but not written: half the time
        command = [sys.executable, "-m", "sphinx", "-b", "dummy", "-W", "--keep-going", "-q"]
        ran = subprocess.run(
            [*command, "docs", out], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
    assert ran.returncode == 0, ran.stderr


def test_the_picture_of_the_loop_leads_to_hooks() -> None:
    targets = re.findall(r'href="#([\w-]+)"', with_reference("<!-- loop -->"))
    assert len(targets) > 20
    assert {target.replace("-", "_") for target in targets} <= set(HOOK_NAMES)


# -- the reference


@pytest.mark.parametrize("name", first_party())
def test_every_plugin_has_a_page_with_its_settings(name: str) -> None:
    """Fails if a plugin has no page, or its page does not show its settings."""
    page = DOCS / "plugins" / f"{name}.md"
    assert page.exists(), f"write {page.relative_to(ROOT)}"
    assert f"<!-- settings: {name} -->" in page.read_text()


@pytest.mark.parametrize("name", first_party())
def test_settings_tables_show_every_setting_with_its_meaning(name: str) -> None:
    try:
        plugin = load(name)
    except PluginError as error:
        pytest.skip(str(error))
    shown = with_reference(f"<!-- settings: {name} -->")
    for key, field in plugin.config_class.model_fields.items():
        (row,) = (line for line in shown.splitlines() if line.startswith(f"| `{name}.{key}` |"))
        assert (field.description or "").split("\n")[0].split("|")[0].split("<")[0] in row
        assert ("required" in row) == field.is_required()
    assert all(f"#{hook})" in shown for hook in HOOK_NAMES if hasattr(plugin, hook))


def test_reference_shows_the_engine_and_every_hook() -> None:
    config, hooks, loop = (
        with_reference(f"<!-- {name} -->") for name in ("config", "hooks", "loop")
    )
    assert all(f"| `{key}` |" in config for key in RunConfig.model_fields if key != "plugins")
    assert re.findall(r"^### `(\w+)`", hooks, flags=re.M) == list(HOOK_NAMES)
    assert [hook for hook in HOOK_NAMES if hook.upper() not in loop] == []
    assert '"1000 steps"' in config, "intervals are shown as they are written"


def test_every_public_name_and_command_is_in_the_reference() -> None:
    """Fails if a page of the API or commands lost its marker, or a name has no docstring."""
    pages = {page.stem: with_reference(page.read_text()) for page in (DOCS / "api").glob("*.md")}
    for module, page in {nexus_core: "index", testing: "testing"}.items():
        assert [n for n in module.__all__ if not re.search(rf"\.{n}\b", pages[page])] == []
    below = re.findall(r"py:data:: nexus_core\.(\w+)\n\n   (\w)", pages["index"])
    assert dict(below).keys() == {"Batch", "IntervalField", "StateDict"}
    commands = with_reference((DOCS / "commands.md").read_text())
    extra = {f"nexus-run {entry.name}" for entry in entry_points(group="nexus.commands")}
    found = set(re.findall(r"^## `(.+)`$", commands, flags=re.M))
    assert found >= {*extra, "nexus-run", "nexus-plugins check", "nexus-data prepare"}


def test_the_readme_of_a_release_leads_into_the_repository() -> None:
    absolute = runpy.run_path(str(ROOT / ".ci/absolute_links.py"))["absolute"]
    text = absolute((ROOT / "README.md").read_text(), "https://example.org/it", "v1")
    assert "![A terminal" in text
    assert re.findall(r"\]\((?!https://)", text) == []
    assert "(https://example.org/it/raw/v1/docs/images/terminal.svg)" in text


def test_a_page_without_a_marker_stays_as_it_is() -> None:
    assert with_reference("# Title\n\n`<!-- settings: clip -->` in a line\n").startswith("# Title")
    assert with_reference("plain") == "plain"


def test_the_files_of_a_page_are_those_of_its_example() -> None:
    page, example = DOCS / "howto/own.md", ROOT / "examples/digits"
    (code,), config = blocks(page, "python"), blocks(page, "yaml")[0]
    assert code.text == (example / "net.py").read_text()
    assert config.text == (example / "my.yaml").read_text()
