"""Plugins by path: named by file or module, stored with the run, never loaded from elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from nexus_core.cli.plugins import main as nexus_plugins
from nexus_core.cli.run import main as nexus_run
from nexus_core.cli.settings import read_settings
from nexus_core.sources import forget
from nexus_core.testing import fake_distribution
from nexus_plugins.checkpoint.command import main as export_command

HEAD = "from nexus_core import Plugin, PluginConfig, hookimpl\n"
SPARKLE = f"""{HEAD}from pydantic import Field
from words import WORD


class SparkleConfig(PluginConfig):
    \"\"\"Settings.\"\"\"

    size: int = Field(1, description="how much")


class SparklePlugin(Plugin[SparkleConfig]):
    \"\"\"Says that it is there.\"\"\"

    api_version = "1.2"

    @hookimpl
    def summarize(self) -> dict[str, str]:
        return {{"sparkle": f"{{WORD}} {{self.config.size}}"}}

    def state_dict(self) -> dict[str, int]:
        return {{"size": self.config.size}}
"""
WORLD = f"""{HEAD}import torch
from nexus_core import RunData


class WorldPlugin(Plugin[PluginConfig]):
    \"\"\"Everything that a run needs.\"\"\"

    api_version = "1.2"

    @hookimpl
    def make_data(self) -> RunData:
        return RunData([torch.full((2, 3), float(i)) for i in range(9)])

    @hookimpl
    def make_model(self) -> torch.nn.Module:
        return torch.nn.Linear(3, 1)

    @hookimpl
    def make_optimizer(self, engine) -> torch.optim.Optimizer:
        return torch.optim.SGD(engine.model.parameters(), lr=0.01)

    @hookimpl
    def loss_terms(self, batch: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
        return {{"square": output.square().sum()}}

    @hookimpl
    def loss_units(self, batch: torch.Tensor) -> dict[str, int]:
        return {{"square": len(batch)}}
"""
TINY: dict[str, Any] = {
    "until": "4 steps",
    "plugins": {"./world.py": {}, "checkpoint": {"every": "2 steps", "best": None}},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in its own folder with a user's files."""
    monkeypatch.chdir(tmp_path)
    Path("world.py").write_text(WORLD)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    Path("mine.py").write_text(SPARKLE)
    Path("words.py").write_text('WORD = "hello"\n')
    (tmp_path / "pack").mkdir()
    Path("pack/__init__.py").write_text("")
    Path("pack/glow.py").write_text(f"{HEAD}\n\nclass GlowPlugin(Plugin[PluginConfig]): ...\n")
    yield tmp_path
    forget()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(nexus_run, arguments)


def of_run(out: str, name: str = "sparkle") -> dict[str, Any]:
    lock = json.loads(Path(out, "checkpoints/final/lock.json").read_text())
    found: dict[str, Any] = lock["plugins"][name]
    return found


def with_block(place: str, block: Any, path: str = "my.yaml") -> None:
    world = f"{Path.cwd()}/world.py"
    plugins = {world: {}, **dict(list(TINY["plugins"].items())[1:]), place: block}
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(yaml.safe_dump({**TINY, "plugins": plugins}, sort_keys=False))


@pytest.mark.parametrize(
    "place", ["./mine.py", "mine.py", "mine.py:SparklePlugin", "mine:SparklePlugin", "{}/mine.py"]
)
def test_a_place_is_as_good_as_a_name(place: str, folder: Path) -> None:
    place = place.format(folder)
    settings = read_settings("tiny.yaml", place, ("sparkle.size=3",), {"NEXUS_SPARKLE__SIZE": "2"})
    assert settings.run.plugins["sparkle"] == {"size": 3}
    assert settings.named[-1] == "sparkle"
    result = run("tiny.yaml", "-p", place, "--explain")
    assert re.search(r"sparkle +in the order given  \(.*mine(.py)?:SparklePlugin\)", result.output)
    shown = CliRunner().invoke(nexus_plugins, ["show", place]).output
    assert shown.startswith("sparkle: Says that it is there.")
    assert "size: int, default 1" in shown


def test_a_place_in_a_file_is_relative_to_the_file(folder: Path) -> None:
    """Fails if a config only works from one folder, or loses how settings were written."""
    (folder / "conf").mkdir()
    with_block("../mine.py", {"size": 3}, "conf/my.yaml")
    settings = read_settings("conf/my.yaml")
    assert settings.places["sparkle"] == f"{folder}/mine.py:SparklePlugin"
    assert settings.run.plugins["sparkle"] == {"size": 3}
    assert settings.written["plugins", "sparkle", "size"] == "3"
    with_block("../pack/glow.py", None, "conf/other.yaml")
    assert read_settings("conf/other.yaml").named[-1] == "glow"
    with_block("pack.glow:GlowPlugin", True)
    assert read_settings("my.yaml").named[-1] == "glow"


def test_the_command_line_wins_over_a_file_and_a_file_may_hold_the_settings_alone() -> None:
    shutil.copy("mine.py", "newer.py")
    with_block("./mine.py:SparklePlugin", {"size": 3})
    settings = read_settings("my.yaml", "./newer.py")
    assert settings.places["sparkle"].endswith("/newer.py:SparklePlugin")
    assert settings.run.plugins["sparkle"] == {"size": 3}
    with_block("sparkle", {"size": 4})
    assert read_settings("my.yaml", "mine.py").run.plugins["sparkle"] == {"size": 4}


def test_a_run_keeps_its_code_and_its_config_repeats_it_from_anywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run cannot be repeated after its files change or it is moved."""
    first = run("tiny.yaml", "-p", "./mine.py", "-s", "sparkle.size=3", "--out", "one")
    assert first.exit_code == 0, first.output
    assert "hello 3" in first.output
    for name in ("mine.py", "words.py"):
        copy = Path("one/plugins", name).read_bytes()
        assert copy == Path(name).read_bytes()
        assert of_run("one")["files"][name] == hashlib.sha256(copy).hexdigest()
    config = yaml.safe_load(Path("one/config.yaml").read_text())
    assert config["plugins"]["./plugins/mine.py:SparklePlugin"] == {"size": 3}
    Path("words.py").write_text('WORD = "bye"\n')
    Path("mine.py").unlink()
    shutil.move("one", "moved")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    for source in ("config.yaml", "checkpoints/final/config.yaml"):
        again = run(f"../moved/{source}", "--out", source[:5])
        assert again.exit_code == 0, again.output
        assert "hello 3" in again.output
    weights = "checkpoints/final/model.safetensors"
    assert Path("confi", weights).read_bytes() == (folder / "moved" / weights).read_bytes()


def test_a_model_by_place_is_exported_with_its_settings_and_no_code() -> None:
    """Fails if an export needs the code, or omits the model's settings."""
    world = Path("world.py").read_text().replace("WorldPlugin", "ModelWorldPlugin")
    Path("net.py").write_text(world)
    plugins = {"./net.py": {}, "checkpoint": {"best": None}}
    Path("my.yaml").write_text(yaml.safe_dump({**TINY, "plugins": plugins}))
    assert run("my.yaml", "--out", "one").exit_code == 0
    Path("one/plugins/net.py").write_text("open('executed', 'w').close()\n")
    done = CliRunner().invoke(export_command, ["one", "--out", "model"])
    assert done.exit_code == 0, done.output
    assert json.loads(Path("model/config.json").read_text())["model_plugin"] == "model_world"
    assert not Path("executed").exists()


@pytest.mark.filterwarnings("default:resuming")
def test_a_changed_file_is_a_difference(folder: Path) -> None:
    """Fails if a run silently continues with different code."""
    with_block("./mine.py", {"size": 3})
    assert run("my.yaml", "--out", "one").exit_code == 0
    Path("words.py").write_text('WORD = "bye"\n')
    resume = ["--out", "one", "--resume", "auto", "-s", "until=6"]
    refused = run("my.yaml", *resume)
    assert refused.exit_code == 2
    assert "the file words.py of plugin 'sparkle' has changed" in refused.output
    assert Path("one/plugins/words.py").read_text() == 'WORD = "hello"\n'
    accepted = run("my.yaml", *resume, "--resume-policy", "compatible")
    assert accepted.exit_code == 0, accepted.output
    assert "resuming: the file words.py of plugin 'sparkle' has changed" in accepted.output
    assert "bye 3" in accepted.output
    assert Path("one/plugins/words.py").read_text() == 'WORD = "bye"\n'


@pytest.mark.filterwarnings("default:resuming")
def test_code_beside_a_checkpoint_runs_only_where_the_user_names_it(folder: Path) -> None:
    """Fails if resuming somebody else's run executes code that came with it."""
    assert run("tiny.yaml", "-p", "./mine.py", "--out", "one").exit_code == 0
    planted = Path("one/plugins/mine.py").read_text() + "\nopen('planted', 'w').close()\n"
    Path("one/plugins/mine.py").write_text(planted)
    for source in ("one", "one/checkpoints/final"):
        refused = run("--resume", source, "-s", "until=6")
        assert refused.exit_code == 2, refused.output
        assert "'./plugins/world.py:WorldPlugin' is not loaded: the config of" in refused.output
        assert f"add --trust: nexus-run resume {source} --trust\n" in refused.output
    assert not Path("planted").exists()
    own = run("--resume", "one", "-s", "until=6", "-p", "./mine.py,./world.py")
    assert own.exit_code == 0, own.output
    assert "hello 1" in own.output
    assert not Path("planted").exists()
    Path("one/plugins/mine.py").write_text(planted)
    named = run("one/config.yaml", "--resume", "one", "-s", "until=8")
    assert named.exit_code == 2, named.output
    assert "the file mine.py of plugin 'sparkle' has changed" in named.output
    assert Path("planted").exists(), "a config that is named may name code"
    Path("planted").unlink()
    trusted = run("--resume", "one", "-s", "until=8", "--trust", "--resume-policy", "compatible")
    assert (trusted.exit_code, Path("planted").exists()) == (0, True), trusted.output
    assert "--trust is for the config found by" in run("tiny.yaml", "--trust").output


def test_a_planted_config_can_neither_name_modules_nor_have_a_folder_looked_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("tiny.yaml", "--out", "one").exit_code == 0
    config = yaml.safe_load(Path("one/config.yaml").read_text())
    for place in ("planted:PlantedPlugin", "os:system", "/etc/x.py", "./planted.py"):
        config["plugins"] = {**TINY["plugins"], place: {"note": "planted:x"}}
        Path("one/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for home in ("one", "."):
            Path(home, "planted.py").write_text("open('executed', 'w').close()\n")
        result = run("--resume", "one")
        assert result.exit_code == 2
        assert "is not loaded: the config of 'one' loads it" in result.output
    assert not Path("executed").exists()


BROKEN = {
    "none.py": "x = 1\n",
    "two.py": f"{HEAD}class APlugin(Plugin[PluginConfig]): ...\n"
    "class BPlugin(Plugin[PluginConfig]): ...\n",
    "clips.py": f"{HEAD}class ClipPlugin(Plugin[PluginConfig]): ...\n",
    "raises.py": f"{HEAD}\nraise OSError('no disk')\n",
    "other.py": f"{HEAD}class SparklePlugin(Plugin[PluginConfig]): ...\n",
    "wrong.py": f"{HEAD}class WrongPlugin(Plugin[PluginConfig]):\n    @hookimpl\n"
    "    def on_step(self, stp): ...\n",
    "syntax.py": "x = (",
    "bare.py": f"{HEAD}class BarePlugin(Plugin[PluginConfig]):\n    def __init__(self): ...\n",
    "wraps.py": f"{HEAD}class WrapsPlugin(Plugin[PluginConfig]):\n    @hookimpl(wrapper=True)\n"
    "    def loss_terms(self, batch): ...\n",
    "slips.py": f"{HEAD}class SlipsPlugin(Plugin[PluginConfig]):\n    def on_step(self): ...\n",
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("./mime.py", "no file './mime.py'. Did you mean 'mine.py'?"),
        ("./pack", "'./pack' cannot be loaded; expected file.py:name or package.module:name"),
        ("./none.py", "'./none.py' has no plugin class, such as class SparklePlugin(Plugin"),
        ("./mine.py@f-1", "'sparkle@f-1': a label has letters, digits and underscores"),
        ("./two.py", "'./two.py' has 2 plugins, APlugin, BPlugin; choose one: ./two.py:APlugin"),
        ("./mine.py:SparklPlugin", "'./mine.py' has no 'SparklPlugin'. Did you mean 'SparkleP"),
        ("./mine.py:SparkleConfig", "must be a subclass of nexus_core.Plugin, got <class 'mine.Sp"),
        ("./mine.py:WORD", "must be a subclass of nexus_core.Plugin, got 'hello'"),
        ("./clips.py", "has the name 'clip', like a plugin of nexus-trainer"),
        ("./raises.py", "cannot be imported: OSError: no disk (./raises.py, line 3)"),
        (
            "./mine.py,./other.py",
            "'./mine.py:SparklePlugin' and './other.py:SparklePlugin' are bot",
        ),
        ("./slips.py", "SlipsPlugin.on_step is named like a hook"),
        ("no:./mine.py", "no:./mine.py: './mine.py' is not in this run"),
        ("sparkle", "name one in a file by its path, such as ./mine.py"),
        ("mine", "no plugin named 'mine'; to use the file: ./mine.py"),
        (
            "./wrong.py",
            "WrongPlugin.on_step takes 'stp', which this hook does not pass. Did you mean "
            "'step'? It passes: engine, step (FOLDER/wrong.py:3)",
        ),
        ("./bare.py", "plugin 'bare': its __init__ must call super().__init__()"),
        (
            "./syntax.py",
            "'./syntax.py' cannot be imported: SyntaxError: '(' was never closed (./syn",
        ),
        ("./wraps.py", "WrapsPlugin.loss_terms is wrong: Declared as wrapper=True"),
        ("nowhere.at_all:SparklePlugin", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_mistake_is_one_message(words: str, message: str, folder: Path) -> None:
    for name, text in BROKEN.items():
        Path(name).write_text(text)
    result = run("tiny.yaml", "-p", words)
    assert result.exit_code == 2
    assert message.replace("FOLDER", str(folder)) in result.output
    assert result.output.count("error:") == 1
    assert "Traceback" not in result.output
    assert not Path("runs").exists()


def test_a_further_instance_goes_by_the_name_of_the_plugin() -> None:
    """Fails if only installed plugins can have instances, or the run's config loses one."""
    words = ["-p", "./mine.py,sparkle@late", "-s", "sparkle@late.size=3", "--out", "one"]
    made = run("tiny.yaml", *words)
    assert made.exit_code == 0, made.output
    again = run("one/config.yaml", "--out", "two")
    assert again.exit_code == 0, again.output
    for folder in ("one", "two"):
        kept = yaml.safe_load(Path(folder, "config.yaml").read_text())["plugins"]
        assert {"./plugins/mine.py:SparklePlugin", "sparkle@late"} <= kept.keys()
        assert kept["sparkle@late"]["size"] == 3


def test_a_file_gives_several_instances_of_its_plugin() -> None:
    """Fails if a label is read as part of a file, or is lost in the run's own config."""
    words = ["-p", "./mine.py@a,./mine.py:SparklePlugin@b", "-s", "sparkle@b.size=7"]
    assert run("tiny.yaml", "--out", "run", *words).exit_code == 0
    repeated = run("run/config.yaml", "--out", "again")
    assert repeated.exit_code == 0, repeated.output
    sizes = [of_run("again", name)["config"]["size"] for name in ("sparkle@a", "sparkle@b")]
    assert sizes == [1, 7]


def test_one_plugin_twice_in_a_file_is_refused() -> None:
    with_block("./mine.py", {})
    text = Path("my.yaml").read_text()
    Path("my.yaml").write_text(f"{text}  sparkle: {{}}\n")
    assert "plugins: 'sparkle' is the plugin 'sparkle' again; keep one" in run("my.yaml").output


def test_a_class_that_is_installed_too_may_be_named_by_its_place(folder: Path) -> None:
    """Fails if the author of an installed package cannot run its file."""
    with fake_distribution("glow", {"glow": "pack.glow:GlowPlugin"}):
        assert run("tiny.yaml", "-p", "pack.glow:GlowPlugin", "--explain").exit_code == 0


def test_a_folder_with_another_file_of_that_name_is_not_written_to(folder: Path) -> None:
    (folder / "plugins").mkdir()
    Path("plugins/mine.py").write_text("theirs = 1\n")
    result = run("tiny.yaml", "-p", "./mine.py", "--out", ".")
    assert result.exit_code == 2
    assert "'plugins/mine.py' already exists and differs from the copy" in result.output
    assert Path("plugins/mine.py").read_text() == "theirs = 1\n"
    assert not Path("config.yaml").exists()


def test_a_run_that_comes_to_nothing_takes_its_copies_along(folder: Path) -> None:
    (folder / "full").mkdir()
    bad = "    @hookimpl\n    def on_batch(self):\n        raise nexus_core.DataError('planted')\n"
    bad = f"import nexus_core\n{HEAD}\n\nclass BadPlugin(Plugin[PluginConfig]):\n{bad}"
    Path("bad.py").write_text(bad)
    result = run("tiny.yaml", "-p", "./bad.py,./pack/glow.py", "--out", "full")
    assert result.exit_code == 2, result.output
    assert "planted" in result.output
    assert [path.name for path in Path("full").iterdir()] in ([], ["run.lock"])


def test_check_proves_a_plugin_in_a_file() -> None:
    Path("mine.py").write_text(SPARKLE.replace('    """Says that it is there."""\n', ""))
    only = ["--only", "config_is_strict,config_is_described,hooks_are_known"]
    result = CliRunner().invoke(nexus_plugins, ["check", "./mine.py", *only])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("sparkle (./mine.py:SparklePlugin)\n")
    assert "plugin 'sparkle': SparklePlugin has no docstring\n" in result.output
    assert "3 passed, 1 with a hint, 0 failed, 0 skipped\n" in result.output
    bare = CliRunner().invoke(nexus_plugins, ["show", "mine"])
    assert bare.output == "error: no plugin named 'mine'; to use the file: ./mine.py\n"
    wrong = CliRunner().invoke(nexus_plugins, ["check", "./mien.py"])
    assert wrong.exit_code == 2
    assert "no file './mien.py'. Did you mean 'mine.py'?" in wrong.output
