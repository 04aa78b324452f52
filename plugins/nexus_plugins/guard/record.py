"""The dump of a skipped step: everything needed to repeat it and see what went wrong."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor

from nexus_core import Batch
from nexus_core.device import RandomState

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["Attempt", "write_record"]


@dataclass
class Attempt:
    """A step as attempted.

    Args:
        step: its number, from 1.
        generators: the random generators before the forward pass.
        batches: its micro-batches, as the plugins left them.
        losses: the mean of each term.
        refused: whether it was skipped, 0.0 or 1.0, on the device.
        turn: the optimizer whose turn it was, if there are several.
    """

    step: int
    generators: RandomState
    batches: list[Batch] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    refused: Tensor = field(default_factory=lambda: torch.zeros(()))
    turn: str | None = None

    def verdict(self) -> str:
        """Why the step was skipped, in words."""
        bad = [name for name, loss in self.losses.items() if not math.isfinite(float(loss))]
        if bad:
            terms = "" if bad == ["loss"] else f" {' and '.join(bad)}"
            return f"the loss{terms} is not finite"
        total = sum(float(loss) for loss in self.losses.values())
        return f"the gradient is not finite, or the loss of {total:.4g} is a spike"


def write_record(engine: Engine, attempt: Attempt, root: Path, limit: int) -> Path | None:
    """Write a skipped step into its own folder.

    Args:
        engine: the run, with its gradients still present.
        attempt: the step.
        root: where the folder `step-00000123` is created.
        limit: the maximum number of dumps.

    Returns:
        The folder, or None if the limit is reached.
    """
    folder = root / f"step-{attempt.step:08d}"
    there = len(list(root.glob("step-*"))) if root.is_dir() else 0
    if there >= limit or folder.exists():
        return None
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=".") as beside:
        draft = Path(beside) / folder.name
        draft.mkdir()
        _write(engine, attempt, draft)
        draft.rename(folder)
    return folder


def _write(engine: Engine, attempt: Attempt, folder: Path) -> None:
    tensors = {"torch": attempt.generators["torch"]}
    tensors |= {f"device.{i}": s for i, s in enumerate(attempt.generators["devices"])}
    kinds: dict[str, list[str]] = {}
    for number, batch in enumerate(attempt.batches):
        found = dict(_tensors(batch))
        kinds[str(number)] = sorted(found)
        tensors |= {f"batch.{number}.{name}": t.contiguous() for name, t in found.items()}
    save_file({name: t.cpu().clone() for name, t in tensors.items()}, folder / "step.safetensors")
    save_model(engine.model, str(folder / "model.safetensors"))
    facts = {
        "step": attempt.step,
        "turn": attempt.turn,
        "weights_of_step": engine.state.step,
        "verdict": attempt.verdict(),
        "losses": {name: str(float(loss)) for name, loss in attempt.losses.items()},
        "gradient_norms": gradient_norms(engine),
        "sample_ids": [_sample_ids(batch) for batch in attempt.batches],
        "batches": kinds,
        "python": attempt.generators["python"],
        "numpy": attempt.generators["numpy"],
    }
    (folder / "record.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def gradient_norms(engine: Engine) -> dict[str, str]:
    """The gradient norm of each module that has its own parameters, as text."""
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in engine.model.named_parameters():
        if parameter.grad is not None:
            module = name.rpartition(".")[0] or "(the model)"
            squares[module] += float(parameter.grad.double().pow(2).sum())
    return {module: f"{math.sqrt(square):.6g}" for module, square in squares.items()}


def _tensors(batch: Batch, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch, by path: "input_ids" in a dict, "0" in a tuple."""
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            yield from _tensors(value, f"{path}.{index}" if path else str(index))


def _sample_ids(batch: Batch) -> list[int] | None:
    ids = batch.get("sample_ids") if isinstance(batch, Mapping) else None
    return ids.tolist() if isinstance(ids, Tensor) else None
