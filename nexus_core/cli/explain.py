"""The plan of a run in words: for each event, which plugins are called, in which order and why."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType

from nexus_core.defaults import Defaults
from nexus_core.events import Hooks
from nexus_core.places import shown
from nexus_core.plan import CORE, HOOK_NAMES, Plan, load, scan
from nexus_core.relay import Impl, implementations

__all__ = [
    "Call",
    "Event",
    "Explanation",
    "LeftOut",
    "Place",
    "explain",
    "explain_json",
    "explanation",
]

IN_REVERSE = "on_close"
NOWHERE: Mapping[str, str] = MappingProxyType({})
ROLES = {
    "wraps": "wraps the rest",
    "first": "asks to be first (tryfirst)",
    "last": "asks to be last (trylast)",
    "": "",
}


@dataclass(frozen=True)
class Place:
    """A plugin's place in the plan.

    Args:
        plugin: its name.
        slot: the role that only it can fill in a run; null: none.
        reasons: constraints that put it after others; else that it keeps the order it was named in.
        code: the file or module that it was loaded from; null: it is installed.
        topology_invariant: whether its author promises that a run in cells stays bitwise identical
            on any number of processes with it.
    """

    plugin: str
    slot: str | None
    reasons: tuple[str, ...]
    code: str | None = None
    topology_invariant: bool = True


@dataclass(frozen=True)
class LeftOut:
    """A plugin of the preset that is not in the run.

    Args:
        plugin: its name.
        slot: the role that it would fill.
        taken_by: the plugin named for this slot.
    """

    plugin: str
    slot: str
    taken_by: str


@dataclass(frozen=True)
class Call:
    """One call of an event.

    Args:
        plugin: its name, or "the core".
        role: "wraps", "first", "last", or empty if stage and plan decide.
        stage: the hook's stage in which it is called; empty if the hook has none.
        reasons: why it is called in this position.
    """

    plugin: str
    role: str
    stage: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """A hook that this run calls.

    Args:
        hook: its name.
        kind: event or seam, and whose answer counts.
        calls: in call order.
    """

    hook: str
    kind: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Explanation:
    """The plugins in their order, those left out, and every event with its calls in order."""

    plugins: tuple[Place, ...]
    left_out: tuple[LeftOut, ...]
    events: tuple[Event, ...]


def explain(plan: Plan, defaults: Sequence[str] = (), places: Mapping[str, str] = NOWHERE) -> str:
    """The explanation as a table: each event's calls in order, with role and reasons."""
    found = explanation(plan, defaults, places)
    width = max(len(name) for name in (CORE, *(place.plugin for place in found.plugins))) + 2
    lines = [f"{len(found.plugins)} plugins, in call order"]
    for place in found.plugins:
        slot = f"  [slot {place.slot}]" if place.slot else ""
        code = f"  ({shown(place.code)})" if place.code else ""
        lines.append(f"  {place.plugin:<{width}}{'; '.join(place.reasons)}{slot}{code}")
    odd = [place.plugin for place in found.plugins if not place.topology_invariant]
    lines.append(
        f"with cells, results may depend on the number of processes, because of {', '.join(odd)}"
        if odd
        else "with cells, results are bitwise identical on any number of processes"
    )
    for gone in found.left_out:
        lines.append(f"left out: {gone.plugin}, as {gone.taken_by} fills slot {gone.slot}")
    for event in found.events:
        lines += ["", f"{event.hook}  ({event.kind})"]
        digits = len(str(len(event.calls)))
        for number, call in enumerate(event.calls, start=1):
            stage = f"stage {call.stage}" if call.stage else ""
            said = "; ".join(part for part in (ROLES[call.role], stage, *call.reasons) if part)
            lines.append(f"  {number:>{digits}}. {call.plugin:<{width}}{said}")
    return "\n".join(lines)


def explain_json(
    plan: Plan, defaults: Sequence[str] = (), places: Mapping[str, str] = NOWHERE
) -> str:
    """The explanation as a JSON object with the fields of `Explanation`."""
    return json.dumps(asdict(explanation(plan, defaults, places)), indent=2)


def explanation(
    plan: Plan, defaults: Sequence[str] = (), places: Mapping[str, str] = NOWHERE
) -> Explanation:
    """What will be called when, and why; nothing is built or called.

    Args:
        plan: the run's plan.
        defaults: names of the plugins that a preset brings, whether they are in the plan or not.
        places: where plugins that are not installed live, by name.
    """
    names = [plugin.name for plugin in plan.plugins]
    found = [
        Place(
            p.name, p.slot, _reasons(plan, p.name, names), places.get(p.name), p.topology_invariant
        )
        for p in plan.plugins
    ]
    events = [_event(plan, name) for name in HOOK_NAMES]
    left_out = _left_out(plan, [name for name in defaults if name not in names])
    return Explanation(tuple(found), left_out, tuple(event for event in events if event.calls))


def _left_out(plan: Plan, names: Sequence[str]) -> tuple[LeftOut, ...]:
    owner = {plugin.slot: plugin.name for plugin in plan.plugins if plugin.slot}
    scanned = scan() if names else None
    slots = {name: load(name, scanned).slot for name in names}
    return tuple(LeftOut(name, slot, owner[slot]) for name, slot in slots.items() if slot)


def _event(plan: Plan, hook: str) -> Event:
    kind = (getattr(Hooks, hook).__doc__ or "").partition(":")[0].lower()
    impls = implementations(plan, hook, Defaults())
    if hook == IN_REVERSE:
        back = "reverse of the plan's order"
        return Event(hook, kind, tuple(Call(impl.plugin, "", "", (back,)) for impl in impls))
    calls: list[Call] = []
    for impl in impls:
        before = [call.plugin for call in calls]
        calls.append(
            Call(impl.plugin, _role(impl), _stage(impl), _reasons(plan, impl.plugin, before))
        )
    return Event(hook, kind, tuple(calls))


def _role(impl: Impl) -> str:
    return "wraps" if impl.wrapper else {-1: "first", 0: "", 1: "last"}[impl.rank]


def _stage(impl: Impl) -> str:
    return impl.stage[1] if impl.plugin != CORE else ""


def _reasons(plan: Plan, name: str, among: Collection[str]) -> tuple[str, ...]:
    if name == CORE:
        return ("default if no plugin answers",)
    return tuple(_constraints(plan, name, among)) or ("in the order given",)


def _constraints(plan: Plan, name: str, among: Collection[str]) -> Iterator[str]:
    """What puts a plugin after those in `among`: its declaration, theirs, or a chain of others."""
    seen, chains = {name}, list[tuple[str, ...]]([(name,)])
    for chain in chains:
        for (earlier, later), who in plan.declared.items():
            if later != chain[0] or earlier in seen:
                continue
            seen.add(earlier)
            if earlier not in among:
                chains.append((earlier, *chain))
            elif len(chain) > 1:
                yield f"after {earlier}, through {' and '.join(chain[:-1])}"
            else:
                yield f"after {earlier}, as {'it' if who == name else who} declares"
