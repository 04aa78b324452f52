"""HTML tables for notebooks, and readable numbers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

__all__ = ["Html", "by_metric", "counted", "headlines", "metric_table", "number", "table"]

Value = TypeVar("Value")
_LEFT = "text-align:left;vertical-align:top"


class Html(str):
    """Text that is HTML already, so tables do not escape it."""


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> Html:
    """An HTML table; the first column holds the row headers."""
    lines = ["".join(f"<th style='{_LEFT}'>{_cell(name)}</th>" for name in head)] if head else []
    for name, *values in rows:
        cells = "".join(f"<td style='{_LEFT}'>{_cell(value)}</td>" for value in values)
        lines.append(f"<th style='{_LEFT}'>{_cell(name)}</th>{cells}")
    return Html("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")


def by_metric(values: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Group values by metric and split, losses first; drop a total loss equal to its only term."""
    found: dict[str, dict[str, Value]] = {}
    for name in sorted(values, key=lambda name: ("loss" not in name, _training_first(name))):
        split, _, metric = name.rpartition("/")
        found.setdefault(metric, {})[split] = values[name]
    for one, other in (("total_loss", "loss"), ("loss", "total_loss")):
        if one in found and found[one].items() <= found.get(other, {}).items():
            del found[one]
    return found


def metric_table(metrics: Mapping[str, float]) -> Html:
    """A table of metrics with one column per split, training first."""
    splits = sorted({name.rpartition("/")[0] for name in metrics}, key=_training_first)
    rows = [
        [name, *(number(values[split]) if split in values else "" for split in splits)]
        for name, values in by_metric(metrics).items()
    ]
    return table(rows, ["", *splits]) if rows else Html("no metric yet")


def headlines(metrics: Mapping[str, float], most: int = 4) -> str:
    """The first few metrics on one line, losses first."""
    shown = [
        f"{split}/{name} {number(value)}"
        for name, values in by_metric(metrics).items()
        for split, value in values.items()
    ]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def number(value: float) -> str:
    """Format a metric to about four digits: 0.0123, 3.1416, 1.20e-05, 12,345."""
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4f}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.2e}"


def counted(amount: float, unit: str) -> str:
    """Format an amount with its unit: "1 step", "1,000 steps"."""
    return f"{amount:,.0f} {unit}" + ("" if amount == 1 else "s")


def _training_first(name: str) -> tuple[int, str]:
    order = ("train", "val")
    split = name.partition("/")[0]
    return order.index(split) if split in order else len(order) + (split == "system"), split


def _cell(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))
