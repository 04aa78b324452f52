"""The result of a comparison: a row for each variant and metric."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_core.cli.compare.confidence import Estimate, estimate, pairs_needed
from nexus_core.cli.compare.pairs import Paired
from nexus_core.cli.runs import key_metric
from nexus_core.cli.tables import aligned, as_number
from nexus_core.errors import ConfigError, suggestion

__all__ = ["Row", "as_json", "as_text", "chosen_metrics", "rows_of", "signed", "verdict"]


@dataclass(frozen=True)
class Row:
    """A variant against the base, by one metric.

    Args:
        variant: its name.
        metric: its name.
        base, other: the means of the last values of the pairs' runs.
        found: the difference; None if no pair has the metric.
        needed: total pairs to tell the difference from zero, as things stand; None: cannot be told.
        saved: how many times larger the variance of runs with different seeds is than that of
            the paired differences; None if unknown.
        is_same: whether the value is identical in all pairs.
    """

    variant: str
    metric: str
    base: float
    other: float
    found: Estimate | None
    needed: int | None = None
    saved: float | None = None
    is_same: bool = False


def chosen_metrics(groups: Sequence[Paired], asked: Sequence[str]) -> list[str]:
    """The metrics to compare by: those given, or one that the runs share.

    Raises:
        ConfigError: no pair has one of the metrics.
    """
    runs = [run for group in groups for pair in group.pairs for run in (pair.base, pair.variant)]
    known = list(dict.fromkeys(name for run in runs for name in run.last_metrics))
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"none of these runs has a metric '{name}'.{suggestion(name, known)} "
                f"There are: {', '.join(known) or 'none yet'}"
            )
    key = key_metric(runs)
    return list(asked) or ([key] if key else [])


def rows_of(groups: Sequence[Paired], metrics: Sequence[str], confidence: float) -> list[Row]:
    """A row for each variant and metric, by variant."""
    return [_row(group, metric, confidence) for group in groups for metric in metrics]


def _row(group: Paired, metric: str, confidence: float) -> Row:
    values = [
        (pair.base.last_metrics[metric], pair.variant.last_metrics[metric])
        for pair in group.pairs
        if pair.difference(metric) is not None
    ]
    if not values:
        return Row(group.name, metric, math.nan, math.nan, None)
    ours, theirs = zip(*values, strict=True)
    differences = [other - one for one, other in values]
    found = estimate(differences, confidence)
    saved = None
    if len(values) > 2 and found.spread > 0:
        saved = (statistics.variance(ours) + statistics.variance(theirs)) / found.spread**2
    return Row(
        group.name,
        metric,
        statistics.fmean(ours),
        statistics.fmean(theirs),
        found,
        pairs_needed(found, confidence),
        saved,
        is_same=not any(differences),
    )


def verdict(row: Row) -> str:
    """What the row says, in a word or two."""
    if row.found is None:
        return "no values"
    if row.is_same:
        return "the same"
    if math.isinf(row.found.low):
        return "too few pairs"
    if row.found.is_different:
        return "lower" if row.found.high < 0 else "higher"
    return "no clear difference"


def more(row: Row) -> str:
    """How many more pairs are needed, in words."""
    if row.found is None or row.is_same:
        return ""
    if row.found.is_different:
        return "enough"
    if row.needed is None:
        return "unknown" if row.found.n < 2 else "over 100,000"
    return f"about {max(1, row.needed - row.found.n):,} more"


def gain(row: Row) -> str:
    """How many times more unpaired runs vary, in words."""
    saved = row.saved or 0.0
    return f"{saved:.1f}" if saved < 1000 else "over 1,000"


def signed(value: float) -> str:
    """A difference, with its sign."""
    if math.isinf(value):
        return "-inf" if value < 0 else "+inf"
    return f"{value:+.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:+.2e}"


def interval(found: Estimate) -> str:
    """The interval as text."""
    return f"[{signed(found.low)}, {signed(found.high)}]"


def as_text(groups: Sequence[Paired], rows: Sequence[Row], confidence: float) -> str:
    """The tables, what the variants change, and what breaks their pairing."""
    heads = ["variant", "pairs", "base", "variant", "difference", "interval", "", "pairs needed"]
    parts = []
    for metric in dict.fromkeys(row.metric for row in rows):
        table = [heads]
        for row in (row for row in rows if row.metric == metric):
            if row.found is None:
                table.append([row.variant, "0", "", "", "", "", verdict(row), ""])
                continue
            means = [as_number(row.base), as_number(row.other), signed(row.found.mean)]
            ends = [interval(row.found), verdict(row), more(row)]
            table.append([row.variant, str(row.found.n), *means, *ends])
        parts.append(f"{metric}, {confidence:.0%} interval, valid after every pair")
        parts.append(aligned(table, (1, 2, 3, 4)))
        gains = [row for row in rows if row.metric == metric and row.saved is not None]
        if gains:
            said = ", ".join(f"{row.variant}: {gain(row)}" for row in gains)
            parts.append(f"variance of unpaired runs relative to pairs: {said} times")
    parts += [line for group in groups for line in _words(group)]
    return "\n".join(parts)


def _words(group: Paired) -> list[str]:
    lines = [f"  BROKEN PAIRING: {fault}" for fault in group.faults()]
    lines += [f"  note: {remark}" for remark in group.remarks()]
    return [f"{group.name}:", *lines] if lines else []


def as_json(groups: Sequence[Paired], rows: Sequence[Row], confidence: float) -> Mapping[str, Any]:
    """The result as JSON; infinite values and nan are null."""
    return {
        "confidence": confidence,
        "variants": [
            {
                "name": group.name,
                "pairs": [
                    {"seed": p.base.seed, "base": str(p.base.path), "variant": str(p.variant.path)}
                    for p in group.pairs
                ],
                "changes": {key: list(both) for key, both in group.changes().items()},
                "broken": group.faults(),
                "notes": group.remarks(),
                "results": [_row_json(row) for row in rows if row.variant == group.name],
            }
            for group in groups
        ],
    }


def _row_json(row: Row) -> dict[str, Any]:
    found = row.found
    numbers = {
        "base": row.base,
        "variant": row.other,
        "difference": found.mean if found else None,
        "spread": found.spread if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
    }
    return {
        "metric": row.metric,
        "pairs": found.n if found else 0,
        **{k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()},
        "verdict": verdict(row),
        "pairs_needed": row.needed,
        "variance_saved": row.saved,
    }
