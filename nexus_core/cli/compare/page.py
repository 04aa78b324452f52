"""A page of a comparison: one self-contained HTML file, for desktop and phone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from nexus_core.cli.compare.pairs import Paired
from nexus_core.cli.compare.pictures import svg_pictures
from nexus_core.cli.compare.result import Row, gain, interval, more, signed, verdict
from nexus_core.cli.tables import as_number

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light; --line: #d8dbe2; --soft: #5d6472; --bad: #a3341f; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: #fff; color: #1c1f26;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; overflow-wrap: normal; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
th { font-weight: 600; color: var(--soft); }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: var(--soft); padding: 0 .25rem; }
.lower, .higher { font-weight: 600; }
.broken { border-left: .3rem solid var(--bad); padding-left: .6rem; color: var(--bad); }
code { font-size: .88em; } details { margin-top: .5rem; }
@media (max-width: 40rem) {
  .results thead { display: none; }
  .results tr { display: grid; grid-template-columns: 1fr 1fr; border: 1px solid var(--line);
    border-radius: .5rem; padding: .4rem; margin-bottom: .6rem; }
  .results td { border: 0; text-align: left; white-space: normal; padding: .2rem .4rem; }
  .results td:first-child { grid-column: 1 / -1; font-weight: 600; }
  .results td[data-name]:not(:first-child)::before { content: attr(data-name); display: block;
    color: var(--soft); font-size: .8rem; }
}
"""
_HEADS = ("variant", "pairs", "mean of the base", "mean of the variant", "difference", "interval",
          "verdict", "pairs needed")  # fmt: skip


def page(title: str, groups: Sequence[Paired], rows: Sequence[Row], confidence: float) -> str:
    """Write a comparison as HTML: tables, curves and bands, each pair, and what was changed.

    Args:
        title: of the page.
        groups: the pairs, by variant.
        rows: as shown in the terminal.
        confidence: of the intervals.
    """
    metrics = list(dict.fromkeys(row.metric for row in rows))
    parts = [f"<h1>{escape(title)}</h1>", *map(_broken, groups)]
    for metric in metrics:
        mine = [row for row in rows if row.metric == metric]
        parts += [f"<h2>{escape(metric)}</h2>", _results(mine), _charts(groups, metric, confidence)]
        parts.append(_each_pair(groups, metric))
    parts += ["<h2>What the variants change</h2>", *map(_changes, groups)]
    parts.append(
        f'<p class="soft">Intervals are {confidence:.0%} confidence sequences for normal '
        "differences: they hold however often you look and whenever you stop adding pairs. "
        "Each holds separately: among many variants, some may miss. The curves treat each step "
        "separately, too.</p>"
    )
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _results(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        found = row.found
        numbers = ["0", "", "", "", ""]
        if found is not None:
            means = [as_number(row.base), as_number(row.other)]
            numbers = [str(found.n), *means, signed(found.mean), interval(found)]
        cells = [row.variant, *numbers, verdict(row), more(row)]
        style = verdict(row) if verdict(row) in ("lower", "higher") else ""
        lines.append(
            "<tr>"
            + "".join(
                f'<td data-name="{head}"{f" class={style}" if head == "verdict" and style else ""}>'
                f"{escape(cell)}</td>"
                for head, cell in zip(_HEADS, cells, strict=True)
            )
            + "</tr>"
        )
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    table = f'<table class="results"><thead><tr>{heads}</tr></thead>{"".join(lines)}</table>'
    said = ", ".join(f"{escape(r.variant)} {gain(r)} times" for r in rows if r.saved is not None)
    remark = f'<p class="soft">Unpaired runs vary more than pairs: {said} the variance.</p>'
    return f'<div class="wide">{table}</div>' + (remark if said else "")


def _charts(groups: Sequence[Paired], metric: str, confidence: float) -> str:
    pictures = svg_pictures(groups, metric, confidence)
    if not pictures:
        return '<p class="soft">matplotlib draws the curves: pip install nexus-trainer[plot]</p>'
    figures = [
        f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>"
        for title, picture in pictures.items()
    ]
    return f'<div class="charts">{"".join(figures)}</div>'


def _each_pair(groups: Sequence[Paired], metric: str) -> str:
    lines = []
    for group in groups:
        for pair in group.pairs:
            value = pair.difference(metric)
            if value is None:
                continue
            values = (pair.base.last_metrics[metric], pair.variant.last_metrics[metric])
            cells = [group.name, str(pair.base.seed), *map(as_number, values), signed(value)]
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{h}</th>" for h in ("variant", "seed", "base", "variant", "difference"))
    return (
        f'<details><summary>Each pair</summary><div class="wide"><table><thead><tr>{heads}</tr>'
        f"</thead>{''.join(lines)}</table></div></details>"
    )


def _broken(group: Paired) -> str:
    faults = "".join(f"<br>{escape(fault)}" for fault in group.faults())
    notes = "".join(
        f'<p class="soft">{escape(group.name)}: {escape(n)}</p>' for n in group.remarks()
    )
    name = escape(group.name)
    return (
        f'<p class="broken">{name}: the pairs do not match{faults}</p>' if faults else ""
    ) + notes


def _changes(group: Paired) -> str:
    changed = "".join(
        f"<br><code>{escape(key)}</code>: {escape(json.dumps(here))} → {escape(json.dumps(there))}"
        for key, (here, there) in group.changes().items()
    )
    return f"<p><b>{escape(group.name)}</b>{changed or ' changes nothing'}</p>"
