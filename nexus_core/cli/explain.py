"""The plan of a run in words: every event, who is called, in which order, and why."""

from __future__ import annotations

from nexus_core.defaults import Defaults
from nexus_core.registry import HOOK_NAMES, Plan, plugin_manager

__all__ = ["explain"]


def explain(plan: Plan) -> str:
    """A table of every hook that is answered: place, plugin, role, reason."""
    hooks = plugin_manager(plan, Defaults()).hook
    lines = [f"{len(plan.plugins)} plugins, in the order in which they are called"]
    for plugin in plan.plugins:
        slot = f"  [slot {plugin.slot}]" if plugin.slot else ""
        lines.append(f"  {plugin.name:<20} {plan.reasons[plugin.name]}{slot}")
    for name in HOOK_NAMES:
        implementations = list(reversed(getattr(hooks, name).get_hookimpls()))
        if not implementations:
            continue
        lines += ["", name]
        for place, impl in enumerate(implementations, start=1):
            roles = {"wraps the rest": impl.wrapper, "asks first": impl.tryfirst}
            said = [role for role, applies in roles.items() if applies]
            reason = plan.reasons.get(impl.plugin_name, "the answer where no plugin gives one")
            lines.append(f"  {place}. {impl.plugin_name:<20} {'; '.join([*said, reason])}")
    return "\n".join(lines)
