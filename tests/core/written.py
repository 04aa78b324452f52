"""Handwritten run folders, for tests of commands that read runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def write_run(
    path: Path,
    values: Sequence[float] = (3.0, 2.0, 1.0),
    *,
    metric: str = "val/loss",
    seed: int = 0,
    tokens: int = 100,
    status: str | None = "finished",
    settings: Mapping[str, Any] | None = None,
    fingerprint: str | None = "data-1",
    parent: Mapping[str, Any] | None = None,
) -> Path:
    """A run that logged a metric every 10 steps, with `tokens` tokens per step."""
    path.mkdir(parents=True)
    config = {"seed": seed, "until": "30 steps", "accumulate": 1, **(settings or {})}
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "out": str(path)}))
    steps = [10 * (number + 1) for number in range(len(values))]
    lines = [
        {"step": step, "time": 1.0, "tokens": step * tokens, metric: value}
        for step, value in zip(steps, values, strict=True)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status is not None:
        summary = {"status": status, "reason": "", "steps": steps[-1], "seconds": 65.0,
                   "tokens": steps[-1] * tokens, "metrics": {metric: values[-1]}}  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))
    if fingerprint is not None:
        checkpoint = path / f"checkpoints/step-{steps[-1]:08d}"
        checkpoint.mkdir(parents=True)
        state = {"data": {"fingerprint": fingerprint, "batch_size": 4}}
        (checkpoint / "state.json").write_text(json.dumps(state))
    if parent is not None:
        (path / "lineage.jsonl").write_text(json.dumps({"parent": parent}) + "\n")
    return path
