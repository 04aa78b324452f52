"""A tiny run for trying plugins: a model of 600 parameters, 24 rows of ids, two loss terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nexus_core import (
    Batch,
    Engine,
    Interval,
    Loss,
    LossConfig,
    Plugin,
    PluginConfig,
    ResumableLoader,
    RunData,
    hookimpl,
)

__all__ = [
    "Parts",
    "PartsPlugin",
    "TinyModel",
    "TinyNextPlugin",
    "TinySizePlugin",
    "tiny_data",
    "tiny_engine",
    "tiny_losses",
    "tiny_model",
    "tiny_optimizer",
]

EVALUATED = 2  # batches
VOCABULARY, WIDTH, LENGTH = 13, 8, 8
NO_LABEL = -100
FUSED_ON = ("cpu", "cuda", "fakegpu")


class _Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        updated: Tensor = hidden + self.dropout(torch.tanh(self.linear(hidden)))
        return updated


class TinyModel(nn.Module):
    """An embedding, two residual blocks in a `ModuleList` and a head: `input_ids` to logits.

    Args:
        vocabulary: V, vocabulary size.
        dropout: dropout of the blocks, so that random numbers matter.
    """

    def __init__(self, vocabulary: int = VOCABULARY, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(_Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits `(B, T, V)` of ids `(B, T)`; no position sees another."""
        hidden: Tensor = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class _Rows:
    """A map-style data set of `input_ids` and `labels` `(T,)`; some rows have fewer labels."""

    def __init__(self, rows: int, vocabulary: int, length: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self._ids = torch.randint(vocabulary, (rows, length + 1), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self._ids[index]
        labels = ids[1:].clone()
        labels[len(labels) - index % 3 :] = NO_LABEL
        return {"input_ids": ids[:-1], "labels": labels}


class TinyNextPlugin(Loss[LossConfig]):
    """The cross-entropy of the next id, in nats: the term `tiny_next`."""

    config_class = LossConfig

    def units(self, batch: Batch) -> Tensor:
        """The number of labels that are not ignored."""
        counted: Tensor = (batch["labels"] != NO_LABEL).sum()
        return counted

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The cross-entropy summed over these labels."""
        labels = batch["labels"].flatten()
        logits = _logits(output).flatten(0, -2).float()
        return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")


class TinySizePlugin(Loss[LossConfig]):
    """The size of the logits: a second term, `tiny_size`."""

    config_class = LossConfig

    def units(self, batch: Batch) -> float:
        """The number of positions."""
        return float(batch["input_ids"].numel())

    def loss(self, batch: Batch, output: Any) -> Tensor:
        """The mean square of a position's logits, summed over positions."""
        return _logits(output).float().square().mean(-1).sum()


def tiny_model(vocabulary: int = VOCABULARY, dropout: float = 0.1) -> TinyModel:
    """A tiny model; its weights are drawn from torch's generator."""
    return TinyModel(vocabulary, dropout)


def tiny_data(
    rows: int = 24, batch_size: int = 4, vocabulary: int = VOCABULARY, length: int = LENGTH
) -> ResumableLoader:
    """Shuffled batches of `input_ids` and `labels`, `(B, T)`; labels of -100 are ignored.

    Args:
        rows: rows per epoch.
        batch_size: B, rows per batch.
        vocabulary: V, vocabulary size.
        length: T, ids per row.
    """
    return ResumableLoader(_Rows(rows, vocabulary, length), batch_size)


def tiny_optimizer(model: nn.Module) -> Optimizer:
    """AdamW over the trainable parameters, fused if the device supports it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdamW(trained, lr=1e-2, fused=trained[0].device.type in FUSED_ON)


def tiny_losses() -> list[Plugin[Any]]:
    """Two loss terms over logits, so that plugins that weight or combine terms have an effect."""
    return [TinyNextPlugin(), TinySizePlugin(weight=0.1)]


@dataclass(frozen=True)
class Parts:
    """The default parts of a run, used if no plugin makes them; each is called once per engine."""

    model: Callable[[], nn.Module] = tiny_model
    data: Callable[[], Iterable[Batch]] = tiny_data
    optimizer: Callable[[nn.Module], Optimizer] = tiny_optimizer
    losses: Callable[[], Iterable[Plugin[Any]]] = tiny_losses


class PartsPlugin(Plugin[PluginConfig]):
    """Provides model, data and optimizer, unless an earlier plugin does."""

    name = "parts_of_the_kit"

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts = parts

    @hookimpl
    def make_model(self) -> nn.Module:
        """The model of the parts."""
        return self._parts.model()

    @hookimpl
    def make_data(self) -> RunData:
        """The data of the parts for training, and its first batches for evaluation."""
        data = self._parts.data()
        return RunData(data, {"val": list(islice(iter(data), EVALUATED))})

    @hookimpl
    def make_optimizer(self, engine: Engine) -> Optimizer:
        """The optimizer of the parts."""
        return self._parts.optimizer(engine.model)


def tiny_engine(
    *plugins: Plugin[Any],
    parts: Parts | None = None,
    model: nn.Module | None = None,
    seed: int = 5,
    accumulate: int = 1,
    cells: int | None = None,
    log_every: Interval | str | int = "2 steps",
    device: str | torch.device | None = None,
    out: str | Path | None = None,
) -> Engine:
    """An engine that is ready to train: `tiny_engine(MyPlugin()).fit(until="6 steps")`.

    What a plugin makes (`make_model`, `make_data`, `make_optimizer`) replaces the kit's default;
    the kit's loss terms are added to those of the plugins.

    Args:
        plugins: plugins to try, in order.
        parts: replacements of the kit's parts.
        model: model to train; None: the one made by plugins or parts.
        seed: seed of the run; equal seeds give equal weights.
        accumulate: micro-batches per step.
        cells: cells per step; None: no cells.
        log_every: interval of `on_log`.
        device: device to train on; None: the model's.
        out: run folder, for plugins that write files.
    """
    parts = parts or Parts()
    company = [*plugins, *parts.losses(), PartsPlugin(parts)]
    return Engine(
        model,
        plugins=company,
        seed=seed,
        device=device,
        accumulate=accumulate,
        cells=cells,
        log_every=log_every,
        out=out,
    )


def _logits(output: Any) -> Tensor:
    """The logits of a model output: the output itself, its `logits`, or the first of a tuple."""
    output = output[0] if isinstance(output, tuple) else output
    logits: Tensor = getattr(output, "logits", output)
    return logits
