"""The plan: wrong plugins are rejected with a clear message, others called in a defined order."""

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nexus_core import (
    ConfigError,
    Engine,
    Logger,
    LoggerConfig,
    Plugin,
    PluginConfig,
    PluginError,
    hookimpl,
)
from nexus_core import plan as planning
from nexus_core.cli.enabled import keep_named_of_slot
from nexus_core.cli.run import main as nexus_run
from nexus_core.plan import arrange, installed, load
from nexus_core.processes import Ranks
from tiny import Regression, tiny_engine

DATA = [{"x": Regression().x, "y": Regression().y}]


def plugin(name: str, **attributes: Any) -> Plugin[Any]:
    return type(f"{name.title()}Plugin", (Plugin,), {"name": name, **attributes})()


def order(*plugins: Plugin[Any]) -> list[str]:
    return [found.name for found in arrange(plugins).plugins]


def test_order_is_as_given_where_no_constraint_speaks() -> None:
    assert order(plugin("c"), plugin("a"), plugin("b")) == ["c", "a", "b"]
    assert order(plugin("c"), plugin("a", before=("c",)), plugin("b")) == ["a", "c", "b"]
    assert order(plugin("c", after=("b", "absent")), plugin("a"), plugin("b")) == ["a", "b", "c"]


@given(st.permutations("abcdef"), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_every_constraint_holds_in_the_order(names: list[str], pairs: set[tuple[int, int]]) -> None:
    """Constraints consistent with a hidden order never form a cycle, and all of them hold."""
    hidden = "fbdace"
    rules = [(hidden[i], hidden[j]) for i, j in pairs if i < j]
    before = {name: tuple(b for a, b in rules if a == name) for name in names}
    found = order(*(plugin(name, before=before[name]) for name in names))
    assert sorted(found) == sorted(names)
    assert all(found.index(a) < found.index(b) for a, b in rules)


class BarePlugin(Plugin[PluginConfig]):
    def on_step(self) -> None: ...


class StrangerPlugin(Plugin[PluginConfig]):
    @hookimpl
    def on_stepp(self) -> None: ...


class ArgumentPlugin(Plugin[PluginConfig]):
    @hookimpl
    def on_step(self, engin: object) -> None: ...


def first() -> Any:
    def on_step(self: object) -> None: ...

    return hookimpl(tryfirst=True)(on_step)


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ([plugin("a"), plugin("a")], "plugin 'a' is listed twice"),
        ([plugin("a", slot="lr"), plugin("b", slot="lr")], "'a' and 'b' both fill the slot 'lr'"),
        ([plugin("a", requires=("z",))], r"'a' requires 'z'.*ZPlugin\(\)"),
        ([plugin("a", conflicts=("b",)), plugin("b")], "'a' and 'b' cannot be used together"),
        ([plugin("a", before=("b",)), plugin("b", before=("a",))], "a cycle: .*before.*before"),
        ([plugin("a", on_step=first()), plugin("b", on_step=first())], "both ask to be first"),
        ([BarePlugin()], "on_step is named like a hook: mark it @hookimpl"),
        ([StrangerPlugin()], "no such hook exists. Did you mean 'on_step'"),
    ],
)
def test_impossible_company_is_refused(plugins: list[Plugin[Any]], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        arrange(plugins)


def test_misspelt_argument_of_a_hook_is_refused() -> None:
    with pytest.raises(PluginError, match=r"on_step takes 'engin', .* mean 'engine'. .*\.py:\d"):
        tiny_engine(ArgumentPlugin())


def test_named_plugin_takes_the_slot_of_a_default() -> None:
    classes = {name: type(plugin(name, slot=slot)) for name, slot in
               [("cosine", "lr"), ("linear", "lr"), ("clip", None)]}  # fmt: skip
    assert keep_named_of_slot(["cosine", "clip"], ["linear"], classes) == ["clip", "linear"]
    assert keep_named_of_slot(["cosine", "clip"], ["cosine"], classes) == ["cosine", "clip"]


FAKES = {
    "good": "class GoodPlugin(Plugin[PluginConfig]):\n    'Does good.'\n",
    "broken": "raise OSError('planted')\n",
    "notplugin": "NotpluginPlugin = 3\n",
    "misnamed": "class MisnamedPlugin(Plugin[PluginConfig]):\n    name = 'other'\n",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distributions in a temporary folder: real metadata, as pip would leave it."""
    for name, code in FAKES.items():
        source = f"from nexus_core import Plugin, PluginConfig\n{code}"
        (tmp_path / f"fake_{name}.py").write_text(source)
        info = tmp_path / f"fake_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{name}\nVersion: 1.2\n")
        entry = f"[nexus.plugins]\n{name} = fake_{name}:{name.title()}Plugin\n"
        (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("fakes")
def test_only_what_is_named_is_imported() -> None:
    assert {"good", "broken", "clip"} <= installed().keys()
    assert load("good").__doc__ == "Does good."
    assert "fake_notplugin" not in sys.modules


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("goood", "no plugin named 'goood'. Did you mean 'good'.*nexus-plugins list"),
        ("broken", "'broken' .fake-broken 1.2.* cannot be imported: OSError: planted"),
        ("notplugin", "must be a subclass of nexus_core.Plugin, got 3"),
        ("misnamed", "has the name 'other'"),
    ],
)
def test_plugin_that_cannot_be_loaded_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load(name)


@pytest.mark.usefixtures("fakes")
def test_name_given_by_two_distributions_is_refused(tmp_path: Path) -> None:
    info = tmp_path / "rival-3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 3\n")
    (info / "entry_points.txt").write_text("[nexus.plugins]\ngood = elsewhere:GoodPlugin\n")
    with pytest.raises(PluginError, match="two distributions provide a plugin 'good'.*uninstall"):
        load("good")
    assert "good" in installed(), "what does not name it continues"


class KnobConfig(PluginConfig):
    """Settings of a test plugin."""

    size: int = 3


class KnobPlugin(Plugin[KnobConfig]):
    """Has one setting."""


def test_plugin_is_made_by_hand_with_checked_settings() -> None:
    assert KnobPlugin.name == "knob"
    assert KnobPlugin(size=4).config.size == 4
    assert KnobPlugin(KnobConfig(size=5)).config.size == 5
    with pytest.raises(ConfigError, match=r"unknown key 'knob.sise'. Did you mean 'size'"):
        KnobPlugin(sise=4)
    with pytest.raises(ConfigError, match=r"knob.size: got 'big'; input should be a valid integer"):
        KnobPlugin(size="big")


class FlakyPlugin(Logger[LoggerConfig]):
    """Fails to write on the given calls."""

    def __init__(self, failing: set[int]) -> None:
        super().__init__()
        self.failing = failing
        self.calls = 0

    def write(self, engine: Any, metrics: Any) -> None:
        self.calls += 1
        if self.calls in self.failing:
            raise OSError("no space left")


@pytest.mark.filterwarnings("ignore:logger 'flaky' failed")
def test_logger_may_fail_without_stopping_the_run_and_is_switched_off_after_three() -> None:
    steady, dead = FlakyPlugin({1, 2, 4, 5}), FlakyPlugin({2, 3, 4})
    for logger in (steady, dead):
        assert tiny_engine(logger, log_every=1).fit(DATA, until="8 steps").status == "finished"
    assert steady.calls == 8
    assert dead.calls == 4
    with pytest.warns(RuntimeWarning, match="failed to write at step 1.*no space left"):
        tiny_engine(FlakyPlugin({1}), log_every=1).fit(DATA, until="1 step")


class NotebookPlugin(Logger[LoggerConfig]):
    """Stores notes, and fails at some."""

    def __init__(self, failing: set[int]) -> None:
        super().__init__()
        self.failing = failing
        self.notes: list[tuple[int, str, str]] = []
        self.logs = 0

    def write(self, engine: Any, metrics: Any) -> None:
        self.logs += 1

    def write_note(self, engine: Any, title: str, text: str) -> None:
        if engine.state.step in self.failing:
            raise OSError("no space left")
        self.notes.append((engine.state.step, title, text))


class TalkativePlugin(Plugin[PluginConfig]):
    """Writes a note after each step."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        engine.hook.on_note(engine=engine, title="talk/step", text=f"step {engine.state.step}")


def test_what_a_plugin_says_reaches_loggers_that_hold_text_and_leaves_the_others_alone() -> None:
    """Fails if `on_note` loses text or its step, or loggers are required to support text."""
    notebook, numbers = NotebookPlugin(set()), FlakyPlugin(set())
    tiny_engine(notebook, TalkativePlugin(), numbers, log_every=1).fit(DATA, until="3 steps")
    assert notebook.notes == [(step, "talk/step", f"step {step}") for step in (1, 2, 3)]
    assert notebook.logs == numbers.calls == 3
    assert numbers.failures_in_all == 0


def test_a_note_that_cannot_be_written_is_a_warning_like_any_failure_of_a_logger() -> None:
    """Fails if a note that cannot be written ends the run."""
    notebook = NotebookPlugin({2})
    engine = tiny_engine(notebook, TalkativePlugin(), log_every=1)
    with pytest.warns(RuntimeWarning, match="failed to write_note at step 2.*no space left"):
        assert engine.fit(DATA, until="3 steps").status == "finished"
    assert [step for step, *_ in notebook.notes] == [1, 3]
    (answer,) = engine.hook.summarize(engine=engine)
    assert "failed once, last to write_note at step 2" in answer["logger notebook"]


def test_of_several_processes_the_first_alone_keeps_notes() -> None:
    """Fails if every process writes the same note."""
    notebook = NotebookPlugin(set())
    engine = tiny_engine(notebook, TalkativePlugin(), log_every=1)
    engine.ranks = Ranks(rank=1)
    engine.fit(DATA, until="2 steps")
    assert notebook.notes == []


@pytest.mark.parametrize("command", [["--explain"], ["--explain", "--plugins", "lr_linear"]])
def test_a_command_looks_once_for_plugins(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if each plugin of a run causes another scan of installed packages."""
    scans: list[str] = []
    scan = planning.entry_points

    def counted(*, group: str) -> Any:
        scans.append(group)
        return scan(group=group)

    monkeypatch.setattr(planning, "entry_points", counted)
    result = CliRunner().invoke(nexus_run, ["quickstart", *command])
    assert result.exit_code == 0, result.output
    left_out = "left out" in result.output
    assert left_out is (len(command) > 1)
    assert scans == ["nexus.plugins"] * (1 + left_out)
