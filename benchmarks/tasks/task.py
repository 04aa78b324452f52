"""The base class of tasks: rows drawn from a seed, and the model variants that compete on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_core import Plugin
from nexus_core.plan import load
from nexus_plugins.model_nexus import NEXUSConfig, NEXUSCore, NEXUSOutput
from nexus_plugins.model_nexus.residual import Part

__all__ = ["IGNORED", "MODULES", "Batch", "Seen", "Sizes", "Task", "Variant"]

MODULES = ("world", "reason", "energy", "causal")
IGNORED = -100
HELD_OUT = 10**9
"""Steps from here on are never trained on; their rows are for evaluation."""

Batch = dict[str, Tensor]
Seen = Sequence[tuple[Batch, NEXUSOutput]]
"""Held-out batches, each with the model's output."""


@dataclass(frozen=True)
class Sizes:
    """The backbone sizes shared by all variants; a backbone without a module may be widened."""

    width: int = 64
    layers: int = 2
    state: int = 16
    head: int = 8

    def config(self, vocab_size: int, width: int | None = None, **settings: Any) -> NEXUSConfig:
        """The model's config; modules are off unless the settings enable them."""
        sizes = {
            "vocab_size": vocab_size,
            "d_model": width or self.width,
            "ssm_n_layers": self.layers,
            "ssm_d_state": self.state,
            "ssm_head_dim": self.head,
        }
        return NEXUSConfig(**{**sizes, **dict.fromkeys(MODULES, False), **settings})

    @property
    def grain(self) -> int:
        """Widths are multiples of this, since heads must divide twice the width."""
        return max(1, self.head // 2)


@dataclass(frozen=True)
class Variant:
    """One competitor: a model and its losses."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `NEXUSConfig` besides the sizes."""
    losses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Loss plugins besides the cross-entropy by name, with their settings."""
    widened: bool = False
    """Whether to widen the backbone to at least the parameters of the module's variant."""
    in_place: Callable[[int, int], Part] | None = None
    """Given width and parameter count, builds a replacement for the module."""
    own_loss: Callable[[], Plugin[Any]] | None = None
    """Builds a loss that is not an installed plugin."""
    cross_entropy: bool = True
    """Whether the cross-entropy is among its losses."""

    def build(self, task: Task, sizes: Sizes, parameters: int, of_module: int) -> NEXUSCore:
        """Build the model; `parameters` is the number to reach if it is widened."""
        width = sizes.width
        while self.widened and count(task, sizes, width, self) < parameters:
            width += sizes.grain
        model = NEXUSCore(sizes.config(task.vocab_size, width, **self.settings))
        if self.in_place is not None:
            model.parts["in_place"] = self.in_place(width, of_module)
        return model

    def plugins(self) -> list[Plugin[Any]]:
        """The losses."""
        losses = [load(name)(**settings) for name, settings in self.losses.items()]
        if self.cross_entropy:
            losses.insert(0, load("loss_lm")(label_smoothing=0.0))
        return losses if self.own_loss is None else [*losses, self.own_loss()]


class PlainMLP(Part):
    """Two layers on each token's state: what parameters alone achieve in a module's place.

    Args:
        d_model: width D.
        parameters: minimum number of parameters.
    """

    def __init__(self, d_model: int, parameters: int) -> None:
        super().__init__()
        inner = max(1, -(-(parameters - d_model) // (2 * d_model + 1)))
        self.layers = nn.Sequential(nn.Linear(d_model, inner), nn.SiLU(), nn.Linear(inner, d_model))

    def forward(
        self, h: Tensor, document: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The update of the stream `(..., D)`, without reports."""
        return self.layers(h), {}


@dataclass(frozen=True)
class Task(ABC):
    """A kind of data; its sizes are fields, so that they can be changed."""

    name: ClassVar[str]
    module: ClassVar[str]
    """The module that it needs."""

    rows: int = 8
    length: int = 64
    steps: int = 400
    """Optimizer steps of the variant with the module."""
    lr: float = 3e-3

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The vocabulary size."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> Batch:
        """The rows of a step: `input_ids` and `labels` `(rows, length)`, and other entries.

        A function of its arguments only. Ignored labels are -100.
        """

    @abstractmethod
    def variants(self) -> list[Variant]:
        """The competitors: the three of `standard`, then published designs."""

    def held_out(self, seed: int) -> list[Batch]:
        """Rows to evaluate on, which are never trained on."""
        return [self.batch(seed, HELD_OUT + number) for number in range(8)]

    def measure(self, seen: Seen) -> dict[str, float]:
        """The reported measures; `nats` is the main one."""
        nats, hits, units = 0.0, 0, 0
        for batch, output in seen:
            labels, logits = batch["labels"].flatten(), output.logits.flatten(0, 1)
            nats += F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
            hits += int((logits.argmax(-1) == labels).sum())
            units += int((labels != IGNORED).sum())
        return {"nats": nats / units, "accuracy": hits / units}

    def timed(self, model: NEXUSCore, seed: int) -> dict[str, float]:
        """Further measures of the model, such as times; it is in evaluation mode."""
        return {}

    def standard(
        self,
        settings: Mapping[str, Any],
        losses: Mapping[str, Mapping[str, Any]],
        backbone: Mapping[str, Any] | None = None,
    ) -> list[Variant]:
        """The backbone with the module, without it, and with a plain MLP in its place.

        Args:
            settings: settings of the module.
            losses: losses of the module.
            backbone: settings shared by all; None: those of the sizes.
        """
        shared = backbone or {}
        return [
            Variant(self.module, {**shared, self.module: True, **settings}, losses),
            Variant("backbone", shared, widened=True),
            Variant("mlp", shared, in_place=PlainMLP),
        ]


def count(task: Task, sizes: Sizes, width: int, variant: Variant) -> int:
    """The number of trainable parameters in a model of this width."""
    with torch.device("meta"):
        model = NEXUSCore(sizes.config(task.vocab_size, width, **variant.settings))
    return trained(model)


def trained(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def generator(*numbers: int) -> torch.Generator:
    """A generator seeded by some numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)
