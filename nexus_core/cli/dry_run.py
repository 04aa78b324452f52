"""Build everything and try one batch, forward, backward and in evaluation; write nothing."""

from __future__ import annotations

import resource
import sys
from itertools import islice

import torch

from nexus_core.data import batch_size, to_device
from nexus_core.engine import Engine
from nexus_core.errors import DataError
from nexus_core.step import backward, measure, merge, step_units

__all__ = ["dry_run"]


def dry_run(engine: Engine) -> str:
    """Try the run's parts together and report parameters, tokens of a step and memory."""
    assert engine.data is not None
    if (batch := next(iter(engine.data.train), None)) is None:
        raise DataError("the training data holds no batch; add data or make batches smaller")
    batch = to_device(batch, engine.device)
    engine.hook.on_batch(engine=engine, batch=batch)
    units = merge(engine.hook.loss_units(engine=engine, batch=batch))
    weights = engine.hook.weigh_losses(engine=engine, terms=tuple(units))
    backward(engine, batch, units, step_units([units], engine.ranks), weights)
    lines = [
        f"{name} loss".ljust(16) + f"{engine.ranks.sum(loss).item():.4f}"
        for name, loss in engine.losses.items()
    ]
    for split, batches in engine.data.valid.items():
        metrics = measure(engine, split, islice(batches, 1))
        lines.append(f"{split}/loss".ljust(16) + f"{metrics[f'{split}/loss']:.4f} (one batch)")
    tokens = batch_size(batch)[1] * engine.accumulate * engine.ranks.size
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    return "\n".join(
        [
            f"parameters      {sum(p.numel() for p in parameters):,} trained, "
            f"{sum(p.numel() for p in engine.model.parameters()):,} in all",
            f"tokens a step   {tokens:,}",
            *lines,
            f"peak memory     {_peak_memory(engine.device) / 2**20:,.0f} MiB on {engine.device}",
            "dry run done: nothing was written",
        ]
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
