"""The weights of a mixture's sources, from their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nexus_core import ConfigError, Interval
from nexus_plugins_contrib._shared.mixture import Ramp
from nexus_plugins_contrib._shared.settings import SourceConfig

__all__ = ["described", "ramp"]


def ramp(source: SourceConfig, tokens: int | None, plugin: str) -> Ramp:
    """The weight of a source over the rows of a run.

    Args:
        source: a source with a weight, or points of one.
        tokens: tokens per row; None: it varies.
        plugin: the plugin's name, for messages.

    Raises:
        ConfigError: a weight is negative, or a point is invalid.
    """
    where = f"{plugin}.train: the weight of '{source.called}'"
    weight = source.weight
    points: list[tuple[str | int, float]] = [(0, weight)] if isinstance(weight, float) else weight
    rows = [_row(when, tokens, where) for when, _ in points]
    if not points or any(weight < 0 for _, weight in points):
        raise ConfigError(f"{where} is {source.weight}; expected numbers of 0 or more")
    if rows != sorted(set(rows)):
        raise ConfigError(f"{where}: its points are at rows {rows}; expected increasing rows")
    return Ramp(tuple(rows), tuple(weight for _, weight in points))


def described(ramps: Sequence[Ramp]) -> list[Any]:
    """The identity of a mixture's weights."""
    return [[list(ramp.rows), list(ramp.weights)] for ramp in ramps]


def _row(when: str | int, tokens: int | None, where: str) -> int:
    """The row of the run at a point of a weight."""
    if str(when).strip().split(" ")[0] in ("0", "0.0"):
        return 0
    point = Interval.parse(str(when))
    if point.unit == "samples":
        return int(point.amount)
    if point.unit == "tokens" and tokens is not None:
        return int(-(-point.amount // tokens))
    raise ConfigError(
        f"{where} has a point at '{when}'; expected 0, or an amount of samples (rows), such as "
        "'5000 samples', or for packed rows of tokens, such as '10M tokens'"
    )
