"""The search space of a sweep: settings and their possible values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nexus_core.cli import yaml12
from nexus_core.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["Dimension", "read_dimension"]

_FORM = re.compile(r"(?P<kind>log|uniform|int|intlog|choice)\((?P<values>.*)\)", re.DOTALL)
_EXPECTED = (
    "expected KEY=log(1e-4,1e-2), uniform(0,1), int(1,8), int(64,512,64) with its step, "
    "intlog(16,1024), or choice(a,b,c)"
)


@dataclass(frozen=True)
class Dimension:
    """One setting that is searched.

    Args:
        key: key of the setting.
        kind: distribution of its values: "log", "uniform", "int", "intlog" or "choice".
        values: minimum and maximum, optionally a step; or the choices as written.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution(self.values)
        low, high, *step = self.values
        if self.kind in ("int", "intlog"):
            return IntDistribution(low, high, log=self.kind == "intlog", step=(*step, 1)[0])
        return FloatDistribution(low, high, log=self.kind == "log", step=(*step, None)[0])

    def edges(self) -> tuple[Any, ...]:
        """The values to check before training: the ends, or each choice."""
        return self.values if self.kind == "choice" else self.values[:2]

    def admits(self, value: object) -> Any:
        """A value in Optuna's form if it is in this dimension, else None."""
        if self.kind == "choice":
            return next((v for v in self.values if yaml12.parse_value(v).value == value), None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if self.distribution()._contains(value) else None


def read_dimension(text: str) -> Dimension:
    """Read `KEY=log(1e-4,1e-2)`.

    Raises:
        ConfigError: it is not a search dimension.
    """
    key, sign, form = (part.strip() for part in text.partition("="))
    match = _FORM.fullmatch(form)
    if not sign or not key or match is None:
        raise ConfigError(f"--over '{text}' cannot be read; {_EXPECTED}")
    words = [word.strip() for word in match["values"].split(",")]
    kind = match["kind"]
    if kind == "choice":
        if len(set(words)) < 2 or "" in words:
            raise ConfigError(f"--over '{text}': a choice needs at least two values")
        return Dimension(key, kind, tuple(words))
    return Dimension(key, kind, _numbers(text, kind, words))


def _numbers(text: str, kind: str, words: list[str]) -> tuple[float, ...]:
    whole = kind in ("int", "intlog")
    most = 2 if kind in ("log", "intlog") else 3
    values = [yaml12.parse_value(word).value for word in words]
    fits = all(
        isinstance(v, int | float) and not isinstance(v, bool) and (v == int(v) or not whole)
        for v in values
    )
    if not fits or not 2 <= len(values) <= most:
        what = "whole numbers" if whole else "numbers"
        last = " and optionally a step" if most == 3 else ""
        raise ConfigError(f"--over '{text}': {kind} takes {what}: minimum, maximum{last}")
    numbers: list[float] = [int(value) if whole else float(value) for value in values]
    low, high, *step = numbers
    if not low < high:
        raise ConfigError(f"--over '{text}': the minimum, {low}, is not below {high}")
    if kind in ("log", "intlog") and low <= 0:
        raise ConfigError(f"--over '{text}': a logarithm needs values above 0, got {low}")
    if step and not 0 < step[0] <= high - low:
        raise ConfigError(f"--over '{text}': a step must be above 0 and at most {high - low}")
    return (low, high, *step)
