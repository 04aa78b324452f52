"""Which plugins implement a hook, in which order, and how they are called: `engine.hook`."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pluggy

from nexus_core.errors import PluginError, suggestion
from nexus_core.events import RENAMED, STAGES, Hooks
from nexus_core.plan import CORE, HOOK_NAMES, AnyPlugin, Plan

__all__ = ["Impl", "blame", "call_all", "call_each", "implementations", "relay"]


@dataclass(frozen=True)
class Impl:
    """One plugin's implementation of one hook.

    Args:
        plugin: its name, or "the core".
        method: the method to call.
        wrapper: whether it is a generator around the others.
        rank: -1 to be first, 1 to be last, else 0.
        stage: index and name of its stage among those of the hook; "" if there are none.
    """

    plugin: str
    method: Callable[..., Any]
    wrapper: bool = False
    rank: int = 0
    stage: tuple[int, str] = (0, "")


def implementations(plan: Plan, hook: str, defaults: object) -> list[Impl]:
    """The implementations of a hook in call order: by rank, by stage, then by the plan.

    Wrappers come first, the outermost at the head. `on_close` runs in reverse. An implementation
    without a stage whose plugin must come before or after one with a stage joins that stage.
    """
    found = [_impl(plugin, hook, method) for plugin in plan.plugins
             for method in _methods(plugin, hook)]  # fmt: skip
    if hook in STAGES:
        named = {i.plugin: i.stage for i in found if getattr(i.method, "nexus_stage", None)}
        found = [_beside(impl, plan, named) for impl in found]
    found.sort(key=lambda impl: (not impl.wrapper, impl.rank, impl.stage))
    core = getattr(defaults, hook, None)
    ordered = [*found, *([Impl(CORE, core)] if core else [])]
    return ordered[::-1] if hook == "on_close" else ordered


def relay(
    plan: Plan, defaults: object, only: Callable[[AnyPlugin], bool] = lambda plugin: True
) -> Hooks:
    """Calls the hooks of an engine's plugins: one method per hook, typed as `Hooks`.

    Args:
        plan: the plugins.
        defaults: the core's own implementations.
        only: which of the plugins to call.

    Raises:
        PluginError: an implementation has an argument that its hook does not have.
    """
    chosen = Plan(tuple(filter(only, plan.plugins)), plan.declared)
    manager = _Manager("nexus")
    manager.add_hookspecs(Hooks)
    for name in HOOK_NAMES:
        hook = getattr(manager.hook, name)
        hook.spec.argnames = tuple(inspect.signature(getattr(Hooks, name)).parameters)[1:]
        impls = implementations(chosen, name, defaults)
        for impl in impls if name == "on_close" else reversed(impls):
            _register(manager, name, impl)
    return cast(
        Hooks, SimpleNamespace(**{n: _written(getattr(manager.hook, n)) for n in HOOK_NAMES})
    )


class _Manager(pluggy.PluginManager):
    """Calls plugins last registered first, without pluggy's ordering: the plan decides.

    Only the one hook is inspected when registering: the 25 attributes of every object would take
    most of the time to create an engine.
    """

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        options = super().parse_hookimpl_opts(plugin, name) if name in vars(plugin) else None
        return None if options is None else {**options, "tryfirst": False, "trylast": False}


def _register(manager: pluggy.PluginManager, hook: str, impl: Impl) -> None:
    """Register one method under the name of its plugin and hook."""
    try:
        manager.register(SimpleNamespace(**{hook: impl.method}), f"{impl.plugin}: {hook}")
    except pluggy.PluginValidationError as error:
        code, known = impl.method.__code__, getattr(manager.hook, hook).spec.argnames
        odd = [
            f"'{name}', which this hook does not pass.{suggestion(name, known)} It passes: "
            f"{', '.join(known) or 'nothing'}"
            for name in inspect.signature(impl.method).parameters
            if name not in known
        ]
        said = f"takes {odd[0]}" if odd else f"is wrong: {str(error).splitlines()[-1]}"
        raise PluginError(
            f"plugin '{impl.plugin}': {code.co_qualname} {said} "
            f"({code.co_filename}:{code.co_firstlineno})"
        ) from error


def _methods(plugin: AnyPlugin, hook: str) -> Iterator[Callable[..., Any]]:
    """The plugin's method for a hook, under its current or an old name."""
    if getattr(getattr(plugin, hook, None), "nexus_impl", None):
        yield getattr(plugin, hook)
        return
    for earlier, now in RENAMED.items():
        if now == hook and getattr(getattr(plugin, earlier, None), "nexus_impl", None):
            warnings.warn(
                f"{type(plugin).__qualname__}.{earlier}: the hook is now called '{now}'; rename "
                "it, as the old name will be removed",
                FutureWarning,
                stacklevel=2,
            )
            yield getattr(plugin, earlier)


def _impl(plugin: AnyPlugin, hook: str, method: Callable[..., Any]) -> Impl:
    marks = method.nexus_impl  # type: ignore[attr-defined]
    return Impl(
        plugin.name,
        method,
        wrapper=bool(marks["wrapper"]),
        rank=bool(marks["trylast"]) - bool(marks["tryfirst"]),
        stage=_stage(hook, method),
    )


def _stage(hook: str, method: Callable[..., Any]) -> tuple[int, str]:
    stages = STAGES.get(hook, ())
    names = [stage.rstrip("*") for stage in stages]
    wanted = getattr(method, "nexus_stage", None)
    if wanted is None:
        place = next((i for i, stage in enumerate(stages) if stage.endswith("*")), 0)
        return place, names[place] if names else ""
    return names.index(wanted), wanted


def _beside(impl: Impl, plan: Plan, named: Mapping[str, tuple[int, str]]) -> Impl:
    """The implementation, assigned to a stage that satisfies its constraints if it names none."""
    if impl.plugin in named:
        return impl
    pairs = [pair for pair in plan.declared if impl.plugin in pair]
    floors = [named[first] for first, _ in pairs if first in named]
    ceilings = [named[then] for _, then in pairs if then in named]
    return replace(impl, stage=max([min([impl.stage, *ceilings]), *floors]))


def _written(hook: pluggy.HookCaller) -> Callable[..., Any]:
    """The hook as one unrolled function; pluggy's own call if there is a wrapper.

    More than ten hooks are called at every step, so their calls are unrolled into source code, as
    `dataclasses` does for `__init__`: an implementation then costs one call and nothing else.
    """
    impls = hook.get_hookimpls()[::-1]
    if hook.spec is None or any(impl.wrapper or impl.hookwrapper for impl in impls):
        return hook
    if hook.spec.opts["firstresult"] and [set(i.argnames) for i in impls] == [
        {*hook.spec.argnames}
    ]:
        return impls[0].function
    names: dict[str, Any] = {f"f{place}": impl.function for place, impl in enumerate(impls)}
    calls = [f"f{place}({', '.join(impl.argnames)})" for place, impl in enumerate(impls)]
    lines = _body(hook.name, calls, bool(hook.spec.opts["firstresult"]))
    source = "\n    ".join([f"def {hook.name}(*, {', '.join(hook.spec.argnames)}):", *lines])
    exec(compile(source, f"<hook {hook.name}>", "exec"), names)
    return cast(Callable[..., Any], names[hook.name])


def _body(hook: str, calls: Sequence[str], is_first: bool) -> list[str]:
    """The lines of a function that calls a hook's implementations in order."""
    if hook == "on_batch":  # each gets the batch returned by the one before
        return [*(f"batch = batch if (new := {call}) is None else new" for call in calls),
                "return batch"]  # fmt: skip
    if hook == "on_step":  # each is called once per step, even if one raises in between
        return [
            *(f"if step.followed == {place}: step.followed += 1; {call}"
              for place, call in enumerate(calls)),
            "return []",
        ]  # fmt: skip
    if is_first:
        return [*(f"if (answer := {call}) is not None: return answer" for call in calls),
                "return None"]  # fmt: skip
    return [
        "answers = []",
        *(f"if (answer := {call}) is not None: answers.append(answer)" for call in calls),
        "return answers",
    ]


def call_each(impls: Iterable[Impl], done: Callable[[str], None], /, **arguments: object) -> None:
    """Call implementations one by one, and `done` with the plugin's name after each."""
    for impl in impls:
        impl.method(*(arguments[name] for name in argument_names(impl.method)))
        done(impl.plugin)


def call_all(
    impls: Iterable[Impl], hook: str, failure: BaseException | None, /, **arguments: object
) -> BaseException | None:
    """Call every implementation of an event; later errors become notes on the first.

    Returns:
        The first error: `failure`, if there already is one.
    """
    first = failure
    for impl in impls:
        try:
            impl.method(*(arguments[name] for name in argument_names(impl.method)))
        except BaseException as raised:
            note = f"plugin '{impl.plugin}', {hook}"
            (first or raised).add_note(f"{note}: {raised!r}" if first else note)
            first = first or raised
    return first


def argument_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments that an implementation takes."""
    taken = inspect.signature(method).parameters
    return tuple(name for name, parameter in taken.items() if parameter.default is parameter.empty)


def blame(error: BaseException, plan: Plan, step: int) -> None:
    """Add a note to an error: which plugin raised it, in which method, at which step."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for plugin in plan.plugins:
            if frame.f_locals.get("self") is plugin:
                error.add_note(f"plugin '{plugin.name}', {frame.f_code.co_name}, step {step}")
                return
