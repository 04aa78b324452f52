"""Group plugins by purpose, for listings."""

from __future__ import annotations

from nexus_core.plan import AnyPlugin

__all__ = ["GROUPS", "OTHERS", "group_of"]

OTHERS = "the step and the run"
GROUPS = (
    "data",
    "models",
    "losses",
    "loss weights",
    "optimizers",
    "learning rates",
    "several processes",
    OTHERS,
    "loggers and observers",
)
"""Groups in the order shown."""

_OF_SLOT = {
    "data": "data",
    "model": "models",
    "optimizer": "optimizers",
    "lr": "learning rates",
    "processes": "several processes",
    "weighing": "loss weights",
}


def group_of(plugin: type[AnyPlugin]) -> str:
    """The group of a plugin, from its slot and its hooks."""
    if plugin.slot in _OF_SLOT:
        return _OF_SLOT[plugin.slot]
    if getattr(plugin, "only_watches", False):
        return "loggers and observers"
    marks = getattr(getattr(plugin, "loss_terms", None), "nexus_impl", None)
    return "losses" if marks and not marks["wrapper"] else OTHERS
