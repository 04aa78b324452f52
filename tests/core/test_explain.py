"""`--explain` is accurate: the order is that of the calls, and every reason holds."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_core import Plugin, PluginConfig, PluginError, events, hookimpl
from nexus_core.cli.explain import Explanation, explain, explain_json, explanation
from nexus_core.cli.run import main as nexus_run
from nexus_core.events import Hooks
from nexus_core.plan import HOOK_NAMES, arrange
from tiny import Regression, tiny_engine

NAMES = "abcde"
ROLES: dict[str, dict[str, bool]] = {"": {}, "first": {"tryfirst": True}, "last": {"trylast": True}}


def listener(name: str, log: list[tuple[str, str]], role: str = "", **place: Any) -> Plugin[Any]:
    """A plugin that records its calls."""

    def on_step(self: object) -> None:
        log.append(("on_step", name))

    def on_close(self: object) -> None:
        log.append(("on_close", name))

    hooks = {"on_step": hookimpl(**ROLES[role])(on_step), "on_close": hookimpl(on_close)}
    return type(f"{name.title()}Plugin", (Plugin,), {"name": name, **hooks, **place})()


def waiting(name: str, hook: str = "on_step", **place: Any) -> Plugin[Any]:
    """A plugin that implements one hook and does nothing."""

    def answer(self: object) -> None: ...

    hooks = {hook: hookimpl(answer)}
    return type(f"{name.title()}Plugin", (Plugin,), {"name": name, **hooks, **place})()


def calls(found: Explanation, hook: str) -> list[str]:
    (event,) = [event for event in found.events if event.hook == hook]
    return [call.plugin for call in event.calls]


@settings(max_examples=20)
@given(
    names=st.permutations(NAMES),
    rules=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4),
    roles=st.tuples(*[st.sampled_from(["", "last"])] * 4, st.sampled_from(["", "first"])),
)
def test_explained_order_is_that_of_the_calls_and_every_reason_holds(
    names: list[str], rules: set[tuple[int, int]], roles: tuple[str, ...]
) -> None:
    """The oracle is the sequence of calls in a run."""
    log: list[tuple[str, str]] = []
    after = {b: tuple(NAMES[a] for a, c in rules if a < c and NAMES[c] == b) for b in NAMES}
    role = dict(zip(NAMES, roles, strict=True))
    engine = tiny_engine(*(listener(n, log, role[n], after=after[n]) for n in names))
    data = Regression()
    engine.fit([{"x": data.x, "y": data.y}], until="1 step")

    found = explanation(engine.plan)
    for hook in ("on_step", "on_close"):
        assert calls(found, hook) == [name for event, name in log if event == hook]
    for event in found.events:
        for number, call in enumerate(event.calls):
            assert call.reasons
            before = [other.plugin for other in event.calls[:number]]
            for reason in call.reasons:
                if match := re.match(r"after (\w+), ", reason):
                    assert match[1] in before
                    assert match[1] in after[call.plugin] or "through" in reason


def test_reason_may_be_a_chain_through_plugins_that_the_event_does_not_call() -> None:
    plugins = [waiting("c", after=("b",)), waiting("b", "on_eval"), waiting("a", before=("b",))]
    found = explanation(arrange(plugins))
    (event,) = [event for event in found.events if event.hook == "on_step"]
    assert [(call.plugin, call.reasons) for call in event.calls] == [
        ("a", ("in the order given",)),
        ("c", ("after a, through b",)),
    ]
    assert [(place.plugin, place.reasons) for place in found.plugins] == [
        ("a", ("in the order given",)),
        ("b", ("after a, as a declares",)),
        ("c", ("after b, as it declares",)),
    ]


class WrapPlugin(Plugin[PluginConfig]):
    """Wraps every update."""

    @hookimpl(wrapper=True)
    def optimizer_step(self) -> Any:
        return (yield)


def test_table_has_kind_roles_and_the_answers_of_the_core() -> None:
    """Fails if the table does not show which plugins only wrap, or where the core answers."""
    plan = arrange([waiting("noop", "optimizer_step"), WrapPlugin()])
    lines = explain(plan).splitlines()
    start = lines.index("optimizer_step  (seam, first answer)")
    assert [re.sub(" +", " ", line) for line in lines[start + 1 : start + 4]] == [
        " 1. wrap wraps the rest; in the order given",
        " 2. noop in the order given",
        " 3. the core default if no plugin answers",
    ]


def test_json_says_the_same_as_the_table() -> None:
    plan = arrange([waiting("b", after=("a",), slot="lr"), waiting("a"), WrapPlugin()])
    table, data = explain(plan), json.loads(explain_json(plan))
    for event in data["events"]:
        assert f"\n{event['hook']}  ({event['kind']})\n" in table
        for number, call in enumerate(event["calls"], start=1):
            line = rf" +{number}\. {call['plugin']} .*{re.escape('; '.join(call['reasons']))}"
            assert re.search(line, table), (event["hook"], call)
    assert data["plugins"][1] == {
        "plugin": "b",
        "slot": "lr",
        "reasons": ["after a, as it declares"],
        "code": None,
        "topology_invariant": True,
    }
    assert "[slot lr]" in table


def test_hooks_are_declared_in_the_order_in_which_a_run_calls_them() -> None:
    """Fails if a list of hooks (--explain, show, a plan's repr, the page) is not in call order."""
    assert events.__doc__ is not None
    places = [events.__doc__.index(hook.upper()) for hook in HOOK_NAMES]
    assert places == sorted(places)


@pytest.mark.parametrize("hook", HOOK_NAMES)
def test_every_hook_says_of_which_kind_it_is(hook: str) -> None:
    """The explanation reads it from the docstring, and must mark first-answer seams."""
    kind, colon, _ = (getattr(Hooks, hook).__doc__ or "").partition(":")
    assert colon
    assert re.fullmatch(
        r"(Event|Seam, (first answer|collected|chained))"
        r"(, once per (turn|gradient)| and multiplied)?",
        kind,
    )
    first = getattr(Hooks, hook).nexus_spec["firstresult"]
    assert first == ("first answer" in kind)


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (
            [waiting("a", after=("c",)), waiting("b", after=("a",)), waiting("c", after=("b",))],
            "a cycle: '.' before '.' .as '.' says.*remove one of them, for instance drop .Plugin",
        ),
        (
            [waiting("a", before=("b",)), waiting("b", before=("a",))],
            "'a' before 'b' .as 'a' says., 'b' before 'a' .as 'b' says.|"
            "'b' before 'a' .as 'b' says., 'a' before 'b' .as 'a' says.",
        ),
        (
            [waiting("a", slot="lr"), waiting("b", slot="lr")],
            "both fill the slot 'lr'; remove one of them, such as drop APlugin",
        ),
    ],
)
def test_conflict_is_explained_with_the_way_out(plugins: list[Plugin[Any]], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        arrange(plugins)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(nexus_run, arguments)


def test_command_gives_json_and_says_which_default_left_its_slot() -> None:
    result = run("quickstart", "--explain", "--json", "--plugins", "lr_linear")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["left_out"] == [{"plugin": "lr_cosine", "slot": "lr", "taken_by": "lr_linear"}]
    (event,) = [event for event in data["events"] if event["hook"] == "lr_scale"]
    assert [call["plugin"] for call in event["calls"]] == ["lr_linear"]
    table = run("quickstart", "--explain", "--plugins", "lr_linear").output
    assert "left out: lr_cosine, as lr_linear fills slot lr" in table


def test_impossible_plan_is_one_error_on_stderr_and_no_half_json() -> None:
    result = run("quickstart", "--explain", "--json", "--plugins", "lr_linear,lr_wsd")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(
        "error: plugins 'lr_linear' and 'lr_wsd' both fill the slot 'lr'"
    )
