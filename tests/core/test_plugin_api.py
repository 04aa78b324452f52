"""The plugin API stays compatible, and a faulty plugin gives one message to those who use it."""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pluggy
import pytest
from click.testing import CliRunner, Result

import nexus_core
from nexus_core import Engine, Plugin, PluginConfig, PluginError, hookimpl
from nexus_core.cli.listing import listed_plugins
from nexus_core.cli.plugins import main as nexus_plugins
from nexus_core.cli.run import main as nexus_run
from nexus_core.events import API_VERSIONS, RENAMED, Hooks
from nexus_core.plan import HOOK_NAMES, arrange, load
from nexus_core.relay import relay
from nexus_core.testing import fake_distribution, tiny_engine

PAGE = (Path(__file__).parents[2] / "docs/plugin_api.md").read_text()

HOOKS_OF_1_0 = {
    "make_data": "engine",
    "make_model": "engine",
    "make_optimizer": "engine",
    "load_snapshot": "engine source",
    "on_start": "engine",
    "on_finish": "engine",
    "on_error": "engine error",
    "on_close": "engine",
    "on_batch": "engine batch",
    "forward": "engine batch",
    "loss_units": "engine batch",
    "loss_terms": "engine batch output",
    "loss_weight": "engine",
    "weigh_losses": "engine terms",
    "backward": "engine loss terms",
    "after_backward": "engine",
    "lr_scale": "engine",
    "optimizer_step": "engine",
    "on_step": "engine",
    "collect_metrics": "engine",
    "on_log": "engine metrics",
    "on_eval": "engine metrics",
    "on_step_end": "engine",
    "summarize": "engine",
    "on_save": "engine snapshot",
    "on_load": "engine snapshot",
}
"""Every hook of API 1.0 with its arguments; later versions are recorded below."""

HOOKS_SINCE_1_1 = {"on_note": "engine title text"}
HOOKS_SINCE_1_2 = {
    "on_build": "engine",
    "cut_batch": "engine batch",
    "take_turns": "engine step",
    "evaluating": "engine",
    "measure": "engine split",
    "forward": "engine batch step",
    "loss_units": "engine batch step",
    "loss_terms": "engine batch output step",
    "weigh_losses": "engine terms step",
    "backward": "engine loss terms step",
    "after_backward": "engine step",
    "optimizer_step": "engine step again",
    "on_step": "engine step",
    "sum_cells": "engine step part",
    "on_image": "engine title image",
    "accumulate_gradient": "engine step",
}
HOOKS_OF_1 = {**HOOKS_OF_1_0, **HOOKS_SINCE_1_1, **HOOKS_SINCE_1_2}


# -- the promise


@pytest.mark.skipif("1.0" not in API_VERSIONS, reason="plugins for 1.x are not run any more")
@pytest.mark.parametrize("hook", HOOKS_OF_1)
def test_no_hook_or_argument_is_taken_away_within_a_major_version(hook: str) -> None:
    """Fails if existing plugins would break: rename through RENAMED, or start API 2.0."""
    spec = getattr(Hooks, RENAMED.get(hook, hook))
    arguments = inspect.signature(spec).parameters
    assert set(HOOKS_OF_1[hook].split()) <= set(arguments)


def test_a_new_hook_moves_the_version() -> None:
    """Fails if a hook was added: raise API_VERSIONS, and record the hook here."""
    assert set(HOOK_NAMES) == set(HOOKS_OF_1)
    assert API_VERSIONS == ("1.0", "1.1", "1.2")


def test_versions_are_major_and_minor_and_in_order() -> None:
    numbers = [tuple(map(int, version.split("."))) for version in API_VERSIONS]
    assert numbers == sorted(set(numbers))
    assert all(len(number) == 2 for number in numbers)
    assert Plugin.api_version == "1.0", "a plugin that says nothing was built for the first"


def names_in(row: str) -> list[str]:
    """The names in the first column of one row of the page's table."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row}")]
    return re.findall(r"`(\w+)`", line.split("|")[1].partition(":")[2])


def test_page_lists_what_is_exported() -> None:
    assert names_in("what `nexus_core` exports") == sorted(nexus_core.__all__)


@pytest.mark.parametrize("row", ["engine attributes for hooks", "engine methods for hooks"])
def test_what_the_page_promises_of_the_engine_is_there(row: str) -> None:
    engine, names = tiny_engine(), names_in(row)
    assert len(names) > 5
    assert [name for name in names if not hasattr(engine, name)] == []


@pytest.mark.parametrize(
    "row", ["class attributes of a plugin", "methods of a plugin besides hooks"]
)
def test_what_the_page_promises_of_plugins_is_there(row: str) -> None:
    names = names_in(row)
    assert len(names) > 2
    assert [name for name in names if not hasattr(Plugin, name)] == []


# -- renamed hooks and arguments


class EarlierPlugin(Plugin[PluginConfig]):
    """Uses the old name of a hook, and of a seam that it wraps."""

    before = ("later",)

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    @hookimpl
    def on_update(self, engine: Engine) -> None:
        self.called.append(f"step {engine.state.step}")

    @hookimpl(wrapper=True)
    def apply_update(self) -> Generator[None, bool, bool]:
        self.called.append("before the update")
        done = yield
        self.called.append("after the update")
        return done


class LaterPlugin(Plugin[PluginConfig]):
    """Uses the current name."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        earlier = engine.plugins["earlier"]
        assert isinstance(earlier, EarlierPlugin)
        earlier.called.append("later")


class BothPlugin(Plugin[PluginConfig]):
    """Has both the old and the current name, to work with both releases."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    @hookimpl(optionalhook=True)
    def on_update(self) -> None:
        self.called.append("earlier")

    @hookimpl(optionalhook=True)
    def on_step(self) -> None:
        self.called.append("present")

    @hookimpl(optionalhook=True)
    def on_later_still(self) -> None:
        self.called.append("future")


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release in which two hooks have just been renamed."""
    names = {"on_update": "on_step", "apply_update": "optimizer_step"}
    for module in ("plan", "relay"):
        monkeypatch.setattr(f"nexus_core.{module}.RENAMED", names)


@pytest.mark.usefixtures("renamed")
def test_earlier_name_of_a_hook_is_called_in_its_place_and_warned_of() -> None:
    """Fails if a plugin is silently dropped, or called in another order than declared."""
    earlier = EarlierPlugin()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = tiny_engine(LaterPlugin(), earlier)
    engine.fit(until="1 step")
    assert earlier.called == ["before the update", "after the update", "step 1", "later"]
    said = sorted(str(warning.message) for warning in caught)
    assert said == [
        "EarlierPlugin.apply_update: the hook is now called 'optimizer_step'; rename it, as the "
        "old name will be removed",
        "EarlierPlugin.on_update: the hook is now called 'on_step'; rename it, as the old name "
        "will be removed",
    ]
    assert {warning.category for warning in caught} == {FutureWarning}


@pytest.mark.usefixtures("renamed")
def test_plugin_with_both_names_is_called_once_and_not_warned_of() -> None:
    both = BothPlugin()
    tiny_engine(both).fit(until="2 steps")
    assert both.called == ["present", "present"]


def test_plugin_with_both_names_runs_where_one_of_them_is_not_known() -> None:
    """Fails if one version of a plugin cannot support trainers from before and after a rename."""
    both = BothPlugin()
    tiny_engine(both).fit(until="2 steps")
    assert both.called == ["present", "present"]


def test_earlier_name_is_refused_once_it_is_gone() -> None:
    with pytest.raises(PluginError, match=r"EarlierPlugin.apply_update .* no such hook"):
        arrange([EarlierPlugin()])


def test_earlier_name_of_an_argument_still_comes_and_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As documented for maintainers: both names are in the specification, the old one warns."""
    hookspec = pluggy.HookspecMarker("nexus")

    class NextHooks(Hooks):
        @hookspec(warn_on_impl_args={"metrics": FutureWarning("on_log: take 'values' instead")})
        def on_log(self, engine: Engine, metrics: Any, values: Any) -> None: ...

    class ArgumentPlugin(Plugin[PluginConfig]):
        seen: Any = None

        @hookimpl
        def on_log(self, metrics: Any) -> None:
            self.seen = metrics

    monkeypatch.setattr("nexus_core.relay.Hooks", NextHooks)
    plugin = ArgumentPlugin()
    with pytest.warns(FutureWarning, match="take 'values' instead"):
        hook = relay(arrange([plugin]), object())
    hook.on_log(engine=None, metrics={"a": 1.0}, values={"a": 1.0})
    assert plugin.seen == {"a": 1.0}


def test_an_engine_looks_at_hooks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if every attribute of an object is inspected, which dominates the construction time."""
    looked_at: list[str] = []
    look = pluggy.PluginManager.parse_hookimpl_opts

    def counted(manager: pluggy.PluginManager, plugin: object, name: str) -> Any:
        looked_at.append(name)
        return look(manager, plugin, name)

    monkeypatch.setattr(pluggy.PluginManager, "parse_hookimpl_opts", counted)
    tiny_engine()
    assert "forward" in looked_at
    assert {*looked_at} <= {*HOOK_NAMES}


# -- plugins that are wrong

HEAD = "from pydantic import Field\nfrom nexus_core import Plugin, PluginConfig, hookimpl\n"
FAULTY = {
    "raising": "raise OSError('no licence found')",
    "exiting": "raise SystemExit('not on this machine')",
    "lacking": "",
    "number": "NumberPlugin = 3",
    "function": "def FunctionPlugin(): ...",
    "misnamed": "class MisnamedPlugin(Plugin[PluginConfig]):\n    name = 'other'",
    "future": "class FuturePlugin(Plugin[PluginConfig]):\n    api_version = '7.3'\n"
    "    @hookimpl\n    def on_something_new(self): ...",
    "misspelt": "class MisspeltPlugin(Plugin[PluginConfig]):\n"
    "    @hookimpl\n    def on_stepp(self): ...",
}
SAID = {
    "raising": r"cannot be imported: OSError: no licence found; .*--plugins no:raising",
    "exiting": r"cannot be imported: SystemExit: not on this machine",
    "lacking": r"cannot be imported: AttributeError: .*LackingPlugin",
    "number": r"must be a subclass of nexus_core.Plugin, got 3",
    "function": r"must be a subclass of nexus_core.Plugin, got <function FunctionPlugin",
    "misnamed": r"has the name 'other'; give both the same name",
    "future": r"for plugin API 7.3; nexus-trainer [\d.]+ supports 1.0 and 1.1 and 1.2: install",
    "misspelt": r"no such hook exists. Did you mean 'on_step'",
    "twice": r"two distributions provide a plugin 'twice': one-of-two 1.0 and two-of-two 2.0",
}
SETTING = """
class SettingConfig(PluginConfig):
    strength: float = Field(1.0, gt=0, description="factor")
class SettingPlugin(Plugin[SettingConfig]):
    '''Has a setting.'''
"""


@pytest.fixture
def faulty() -> Iterator[None]:
    """Installed packages with one of each fault, a duplicate name, and a good one."""
    with ExitStack() as stack:
        for name, code in {**FAULTY, "setting": SETTING}.items():
            module = f"faulty_{name}"
            plugins = {name: f"{module}:{name.title()}Plugin"}
            stack.enter_context(
                fake_distribution(f"a-{name}", plugins, modules={module: HEAD + code})
            )
        for dist, version in (("one-of-two", "1.0"), ("two-of-two", "2.0")):
            plugins = {"twice": f"{dist.replace('-', '_')}:TwicePlugin"}
            stack.enter_context(fake_distribution(dist, plugins, version=version))
        yield


def run(*arguments: str) -> Result:
    return CliRunner().invoke(nexus_run, ["quickstart", *arguments])


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("name", SAID)
def test_faulty_plugin_is_one_clear_message_to_those_who_name_it(name: str) -> None:
    result = run("--explain", "--plugins", name)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert re.search(rf"^error: .*'{name}'.*{SAID[name]}|^error: .*{SAID[name]}", result.stderr)
    assert "Traceback" not in result.stderr
    shown = CliRunner().invoke(nexus_plugins, ["show", name])
    assert shown.exit_code == 2
    assert shown.stderr == result.stderr


@pytest.mark.usefixtures("faulty")
def test_message_names_distribution_and_place() -> None:
    for name in FAULTY:
        with pytest.raises(PluginError, match=rf"'{name}' \(a-{name} 1.0, faulty_{name}:") as error:
            load(name)
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("faulty")
def test_invalid_setting_is_one_clear_message() -> None:
    result = run("--explain", "--plugins", "setting", "--set", "setting.strength=-1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "setting.strength: got -1; input should be greater than 0" in result.stderr
    result = run("--explain", "--plugins", "setting", "--set", "setting.strenght=1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "unknown key 'setting.strenght'. Did you mean 'strength'?" in result.stderr


@pytest.mark.usefixtures("faulty")
def test_runs_that_do_not_name_them_do_not_notice() -> None:
    """Fails if a broken package or a duplicate name affects runs that do not use it."""
    result = run("--explain", "--plugins", "setting")
    assert result.exit_code == 0, result.output
    assert "setting" in result.stdout
    assert result.stderr == ""
    assert not {f"faulty_{name}" for name in FAULTY} & set(sys.modules)


@pytest.mark.slow
@pytest.mark.usefixtures("faulty")
def test_schema_describes_the_others() -> None:
    schema = run("--schema")
    assert schema.exit_code == 0
    blocks = json.loads(schema.stdout)["properties"]["plugins"]["properties"]
    assert {"setting", "clip"} <= set(blocks)
    assert not set(SAID) & set(blocks)


@pytest.mark.slow
@pytest.mark.usefixtures("faulty")
def test_list_shows_each_as_broken_with_its_reason_and_the_others_as_they_are() -> None:
    result = CliRunner().invoke(nexus_plugins, ["list"])
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.output.splitlines() if line}
    for name, said in SAID.items():
        assert re.search(rf"^{name} +BROKEN: .*{said}", lines[name])
    assert re.search(r"^setting +Has a setting. \(a-setting 1.0\)$", lines["setting"])
    assert re.search(r"^lr_cosine +Warms .*[^)]$", lines["lr_cosine"])
    rows = json.loads(CliRunner().invoke(nexus_plugins, ["list", "--json"]).stdout)
    found = {row["name"]: (row["status"], row["group"]) for row in rows}
    assert found["lr_cosine"] == ("ready", "learning rates")
    assert found["loss_lm"] == ("ready", "losses")
    assert found["console"] == ("ready", "loggers and observers")
    assert {found[name][0] for name in SAID} == {"broken"}


def test_a_plugin_whose_package_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    for name in [name for name in sys.modules if name.startswith("nexus_plugins_contrib.trackio")]:
        monkeypatch.delitem(sys.modules, name)
    found = {row.name: row for row in listed_plugins()}["trackio"]
    assert (found.status, found.what) == ("missing", "pip install 'nexus-trainer[trackio]'")


@pytest.mark.usefixtures("faulty")
def test_list_of_metadata_imports_nothing_and_shows_a_name_given_twice() -> None:
    result = CliRunner().invoke(nexus_plugins, ["list", "--no-load"])
    assert result.exit_code == 0
    assert not {f"faulty_{name}" for name in (*FAULTY, "setting")} & set(sys.modules)
    lines = {line.split()[0]: line for line in result.output.splitlines() if line}
    assert re.search(rf"^twice +BROKEN: {SAID['twice']}", lines["twice"])
    assert re.search(r"^raising +faulty_raising:RaisingPlugin \(a-raising 1.0\)$", lines["raising"])


class AheadPlugin(Plugin[PluginConfig]):
    """Built for a later API."""

    api_version = "1.3"

    @hookimpl
    def on_something_new(self) -> None: ...


def test_plugin_made_by_hand_for_another_api_is_refused_by_the_engine() -> None:
    """The version is checked first, since the unknown hook is only a consequence."""
    with pytest.raises(
        PluginError, match=r"'ahead' is built for plugin API 1.3;.* supports 1.0 and 1.1 and 1.2"
    ):
        tiny_engine(AheadPlugin())


# -- show


def test_show_tells_settings_hooks_order_and_state() -> None:
    shown = CliRunner().invoke(nexus_plugins, ["show", "ema"]).output
    for said in (
        r"^from +nexus-trainer [\d.]+, nexus_plugins.ema:EmaPlugin$",
        r"^built for +plugin API 1.2$",
        r"^state +version 1: The average and the number of steps it covers\.$",
        r"^  decay: float >= 0 < 1, default 0.999\n      decay of the average",
        r"^  evaluating +Evaluate with the averaged weights.*$",
    ):
        assert re.search(said, shown, re.MULTILINE), said
    amp = CliRunner().invoke(nexus_plugins, ["show", "amp"]).output
    assert re.search(r"^  forward +Run the model under autocast.* \[wraps\]$", amp, re.MULTILINE)


def test_show_writes_types_and_defaults_as_one_sets_them() -> None:
    shown = CliRunner().invoke(nexus_plugins, ["show", "checkpoint"]).output
    assert 'every: Interval, default "1000 steps"' in shown
    assert "mode: 'min' | 'max', default \"min\"" in shown
    assert "keep_every: Interval | null, default null" in shown
    clip = CliRunner().invoke(nexus_plugins, ["show", "clip"]).output
    assert re.search(r"^state +nothing to save$", clip, re.MULTILINE)
    data = CliRunner().invoke(nexus_plugins, ["show", "data_text"]).output
    assert re.search(r"^state +version 1$", data, re.MULTILINE)
    block = r"\n      SourceConfig\n        path: str, required\n            "
    assert re.search(block, data), "the settings within a setting"
    assert re.search(r"^slot +data: only one plugin of a run can fill it$", data, re.MULTILINE)
