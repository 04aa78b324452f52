"""Build everything and try one batch: forward, backward and evaluation; write nothing."""

from __future__ import annotations

from itertools import islice

import torch

from nexus_core.cli.memory import peak_resident
from nexus_core.engine import Engine
from nexus_core.intervals import Interval

__all__ = ["dry_run"]


def dry_run(engine: Engine, until: Interval) -> str:
    """Try all parts of the run once and report parameters, tokens per step and memory."""
    assert engine.data is not None
    first = {split: list(islice(batches, 1)) for split, batches in engine.data.valid.items()}
    step, metrics = engine.rehearse(engine.data.train, until=until, eval_data=first)
    lines = [
        f"{name} loss".ljust(16) + f"{engine.ranks.sum(loss).item():.4f}"
        for name, loss in step.losses.items()
    ]
    lines += [
        f"{split}/loss".ljust(16) + f"{metrics[f'{split}/loss']:.4f} (one batch)" for split in first
    ]
    tokens = step.size()[1] * engine.ranks.size
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    return "\n".join(
        [
            f"parameters      {sum(p.numel() for p in parameters):,} trained, "
            f"{sum(p.numel() for p in engine.model.parameters()):,} in all",
            f"tokens per step {tokens:,}",
            *lines,
            f"peak memory     {_peak_memory(engine.device) / 2**20:,.0f} MiB on {engine.device}",
            "dry run done: nothing was written",
        ]
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()
