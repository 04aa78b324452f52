"""The weights of a mixture's sources, as their settings say them."""

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
        source: with a weight, or points of one.
        tokens: in a row; None: rows have as many as they happen to have.
        plugin: for messages.

    Raises:
        ConfigError: a weight is below 0, or a point is not where it can be.
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
    """What tells the weights of a mixture from others."""
    return [[list(ramp.rows), list(ramp.weights)] for ramp in ramps]


def _row(when: str | int, tokens: int | None, where: str) -> int:
    """The row of a run at which a point of a weight lies."""
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
