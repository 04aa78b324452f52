"""Tasks whose answers take a number of equal steps, and one step more to generalize to."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Generator

from benchmarks.deep_thinking import DeepThinking, ProgressiveLoss
from benchmarks.tasks.task import HELD_OUT, Batch, PlainMLP, Task, Variant, generator
from nexus_plugins.model_nexus import NEXUSCore
from nexus_plugins.model_nexus.reasoning import Reasoner

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain(Task):
    """Answers that take 1 to `most` steps in training; those of one step more are never trained on.

    The reasoner and Deep Thinking read tokens by themselves, on one `mlp` layer. They are compared
    with transformers of the same width: `backbone`, with two layers of attention and one `mlp`;
    `mlp`, with one layer of attention and an MLP in place of the rules; and `deeper`, which has
    layers of its own for each step of the reasoner. All but `deeper` and Deep Thinking have as many
    parameters as the reasoner, up to 1%.
    """

    module: ClassVar[str] = "reason"

    steps: int = 800
    lr: float = 2e-3
    most: int = 3
    n_rules: int = 128
    loops: int = 4
    """Steps of the reasoner, iterations of Deep Thinking."""
    reach: int = 64
    """Tokens that a step or layer reads."""
    progressive: float = 0.5
    """The share of Deep Thinking's progressive loss."""

    @abstractmethod
    def drawn(self, seed: int, draw: Generator, further: bool) -> Batch:
        """Random rows.

        Args:
            seed: determines the rules.
            draw: the random generator.
            further: only answers of `most + 1` steps count, instead of those of 1 to `most`.
        """

    def batch(self, seed: int, step: int) -> Batch:
        """The rows of a step."""
        return self.drawn(seed, generator(seed, step), further=False)

    def variants(self) -> list[Variant]:
        """The reasoner, a backbone, an MLP, a deeper backbone, and Deep Thinking."""
        shared = {"window": self.reach, "window_head_dim": 16, "mlp_expand": 2}
        alone = {**shared, "layers": ["mlp"], "ssm_n_layers": 1}
        mixing = {**shared, "layers": ["mlp", "window"], "ssm_n_layers": 2}
        backbone = {**shared, "layers": ["window", "mlp"], "ssm_n_layers": 3}
        deeper = {**mixing, "ssm_n_layers": 2 * self.loops + 1}
        sizes = {
            "n_rules": self.n_rules,
            "reasoning_steps": self.loops,
            "reason_window": self.reach,
        }
        return [
            Variant("reason", {**alone, "reason": True, **sizes}, {"loss_reason": {}}),
            Variant("backbone", backbone),
            Variant("mlp", mixing, in_place=lambda width, _: PlainMLP(width, self._rules(width))),
            Variant("deeper", deeper),
            Variant(
                "deep_thinking",
                alone,
                in_place=lambda width, _: DeepThinking(width, self.n_rules, self.loops, self.reach),
                own_loss=lambda: ProgressiveLoss(share=self.progressive),
                cross_entropy=False,
            ),
        ]

    def _rules(self, width: int) -> int:
        """The number of parameters of the rules."""
        return (2 * width + 1) * self.n_rules + width

    def documents(self, size: int) -> int:
        """How many documents of a size fit into a row, at least one."""
        return max(1, self.length // size)

    def timed(self, model: NEXUSCore, seed: int) -> dict[str, float]:
        """How it answers what is one step further, and in a loop with one more iteration."""
        measures = self._further(model, seed, "one step further")
        for part in model.parts.values():
            if isinstance(part, Reasoner | DeepThinking):
                part.steps += 1
                measures |= self._further(model, seed, "one step further, one more iteration")
                part.steps -= 1
        return measures

    def _further(self, model: NEXUSCore, seed: int, name: str) -> dict[str, float]:
        more = replace(self, rows=8 * self.rows)
        rows = [more.drawn(seed, generator(seed, HELD_OUT - n), further=True) for n in range(1, 5)]
        seen = [(row, model.hidden(row["input_ids"], row.get("segment_ids"))) for row in rows]
        return {f"{name}: {kind}": value for kind, value in Task.measure(self, seen).items()}
