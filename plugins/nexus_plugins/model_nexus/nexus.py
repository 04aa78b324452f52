"""The NEXUS model: embeddings, a backbone of state-space layers, four modules, a head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins._shared.sampling import Sampling
from nexus_plugins.model_nexus.block import LayerState, NEXUSBlock, kinds, make_ngrams
from nexus_plugins.model_nexus.classic_world import ClassicWorldModel
from nexus_plugins.model_nexus.config import NEXUSConfig
from nexus_plugins.model_nexus.drafting import generate_drafting
from nexus_plugins.model_nexus.generate import generate
from nexus_plugins.model_nexus.inputs import check_shapes, document_numbers
from nexus_plugins.model_nexus.ngrams import NGramState
from nexus_plugins.model_nexus.norms import RMSNorm, rms_norm
from nexus_plugins.model_nexus.parts import make_parts
from nexus_plugins.model_nexus.residual import Final, Part, in_turn
from nexus_plugins.model_nexus.world import WorldModel

__all__ = ["NEXUSConfig", "NEXUSCore", "NEXUSOutput"]

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class NEXUSOutput:
    """The output of a forward pass; logits are computed only on access."""

    hidden: Tensor
    """(B, T, D) the residual stream after the final norm."""
    head_weight: Tensor
    """(V, D) the head: `logits = hidden @ head_weight.T`."""
    module_outputs: Mapping[str, Any] = field(default_factory=dict)
    """What each active module reports, by its name."""

    @property
    def logits(self) -> Tensor:
        """(B, T, V), computed at each access."""
        return F.linear(self.hidden, self.head_weight)


class NEXUSCore(nn.Module):
    """A language model with cost linear in length and generation in constant memory.

    On a backbone of state-space layers, four modules read its states and update the stream before
    the head: a world model, a reasoner, an energy module and a causal module.

    No position depends on later positions, on other rows of the batch or, if `segment_ids` are
    given, on other documents of the row.

    Args:
        config: the sizes; or pass them as keywords: `NEXUSCore(vocab_size=256, d_model=128)`.

    Source: the backbone is a stack of Mamba-2 blocks (Dao & Gu 2024) with RMS norms before
        each; output projections start smaller by sqrt(layers) as in GPT-2 (Radford et al. 2019).
    """

    def __init__(self, config: NEXUSConfig | None = None, /, **settings: Any) -> None:
        super().__init__()
        self.config = config if config is not None else NEXUSConfig(**settings)
        self.embedding = nn.Embedding(self.config.vocab_size, self.config.d_model)
        self.blocks = nn.ModuleList(NEXUSBlock(self.config, kind) for kind in kinds(self.config))
        self.dropout = nn.Dropout(self.config.dropout)
        self.final_norm = RMSNorm(self.config.d_model, eps=self.config.norm_eps)
        self.head = nn.Linear(self.config.d_model, self.config.vocab_size, bias=False)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._scale_initial_weights()
        self.ngrams = make_ngrams(self.config)
        # Last, so that a seed gives the same backbone with and without them.
        self.parts = make_parts(self.config)

    def _scale_initial_weights(self) -> None:
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=EMBEDDING_STD)
        with torch.no_grad():
            for block in self._layers():
                block.layer.out_proj.weight /= math.sqrt(self.config.ssm_n_layers)

    def _layers(self) -> Iterator[NEXUSBlock]:
        return cast("Iterator[NEXUSBlock]", iter(self.blocks))

    def _parts(self) -> Iterator[Part]:
        return cast("Iterator[Part]", iter(self.parts.values()))

    def _writers(self) -> Iterator[Part]:
        return (part for part in self._parts() if part.writes)

    def _part(self, name: str) -> nn.Module | None:
        return self.parts[name] if name in self.parts else None  # noqa: SIM401

    @overload
    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        return_all_outputs: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        *,
        return_all_outputs: Literal[True],
    ) -> tuple[Tensor, dict[str, Any]]: ...

    def forward(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, return_all_outputs: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Predict the next token at every position.

        Args:
            input_ids: `(B, T)` token ids.
            segment_ids: `(B, T)` integers; a new document starts where the number changes.
            return_all_outputs: also return what the modules report.

        Returns:
            Logits `(B, T, V)`, or `(logits, {"module_outputs": {...}})`.
        """
        output = self.hidden(input_ids, segment_ids, return_all_outputs)
        if return_all_outputs:
            return output.logits, {"module_outputs": dict(output.module_outputs)}
        return output.logits

    def hidden(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, observed: bool = True
    ) -> NEXUSOutput:
        """Run everything but the head, so that a loss does not need the full logits.

        Args:
            input_ids: `(B, T)` token ids.
            segment_ids: `(B, T)` integers; a new document starts where the number changes.
            observed: also report what modules derive from the final states, for their losses.

        Raises:
            ValueError: an input has the wrong shape.
        """
        check_shapes(input_ids, segment_ids)
        document = None if segment_ids is None else document_numbers(segment_ids)
        x = embedded = self.embedding(input_ids)
        if self.ngrams is not None:
            x = x + self.ngrams(input_ids, document)
        for block in self._layers():
            x = block(x, document)
        h = self._read(x) if self.writing_modules else x
        module_outputs: dict[str, Any] = {}
        for part in self._writers():
            update, reports = part(h, document)
            x = x if part.muted else x + self.dropout(update)
            module_outputs |= reports
        hidden = self._final(x)
        reports = dict(module_outputs)
        final = Final(x, hidden, self._final, input_ids, embedded, document, reports)
        for part in self._parts() if observed else ():
            module_outputs |= part.observe(final)
        return NEXUSOutput(hidden, self.head.weight, module_outputs)

    def step(self, input_ids: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """Read one token per sequence and predict the next one, in constant memory.

        Args:
            input_ids: `(B,)` token ids.
            states: what the last step returned, or `initial_state(B)`.

        Returns:
            Logits `(B, V)` and the new states.
        """
        hidden, after = self.read(input_ids.unsqueeze(1), states)
        logits: Tensor = self.head(hidden.squeeze(1))
        return logits, after[0]

    def read(
        self, input_ids: Tensor, states: list[LayerState]
    ) -> tuple[Tensor, list[list[LayerState]]]:
        """Read a few tokens per sequence in one pass, to verify drafts.

        Args:
            input_ids: `(B, k)` token ids.
            states: what the last step returned, or `initial_state(B)`.

        Returns:
            The final hidden states `(B, k, D)`, and the states after each token: k lists.
        """
        x, given, after = self.embedding(input_ids), iter(states), list[list[LayerState]]()
        if self.ngrams is not None:
            update, reached = in_turn(self.ngrams.step, input_ids, NGramState(*next(given)))
            x = x + update
            after.append(list(reached))
        for block in self._layers():
            x, of_layer = block.advance(x, next(given))
            after.append(of_layer)
        h = self._read(x) if self.writing_modules else x
        for part in self._writers():
            update, of_part = in_turn(part.step, h, next(given))
            x = x if part.muted else x + update
            after.append(of_part)
        return self._final(x), [list(states) for states in zip(*after, strict=True)]

    def foresee(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """The final hidden state `(B, D)` after a token `(B,)`, predicted by the world model.

        Raises:
            ValueError: the model has no world model that can.
        """
        world = self._part("world")
        if not isinstance(world, WorldModel):
            raise ValueError(
                "drafting needs the world model; build the model with world=True and classic=False,"
                " or generate with draft=0"
            )
        return world.move(hidden, self.embedding(input_ids))

    @property
    def shrunk_heads(self) -> tuple[Tensor, ...]:
        """The weights whose outputs are scaled by width instead of their learning rates (muP)."""
        return () if self.config.base_width is None else (self.head.weight,)

    def _final(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.final_norm(x)
        base = self.config.base_width
        return hidden if base is None else hidden * (base / self.config.d_model)

    def _read(self, x: Tensor) -> Tensor:
        """The states that the modules read; each module has its own projection after them."""
        return rms_norm(x, self.config.norm_eps)

    def initial_state(self, batch: int) -> list[LayerState]:
        """The states of layers and modules before the first token, for `batch` sequences."""
        first = [] if self.ngrams is None else [self.ngrams.initial_state(batch)]
        states = [block.layer.initial_state(batch) for block in self._layers()]
        return [*first, *states, *(part.initial_state(batch) for part in self._writers())]

    @property
    def active_modules(self) -> tuple[str, ...]:
        """Which of world, reason, energy and causal the model has."""
        return tuple(self.parts)

    @property
    def writing_modules(self) -> tuple[str, ...]:
        """Those of `active_modules` that update the stream, so that ablating them has an effect."""
        return tuple(name for name in self.parts if cast(Part, self.parts[name]).writes)

    def without(self, name: str) -> AbstractContextManager[None]:
        """Ablate a module of `active_modules` in this context: it writes nothing to the stream."""
        return cast(Part, self.parts[name]).silence()

    def update_world_target(self, decay: float | Tensor) -> None:
        """Update the classic world model's target encoder; call it after each optimizer step."""
        world = self._part("world")
        if isinstance(world, ClassicWorldModel):
            world.update_target(decay)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        draft: int = 0,
    ) -> Tensor:
        """Continue a prompt; see `generate.generate` for the arguments.

        With a `draft`, the world model drafts that many tokens at a time, and the model reads them
        in one pass: the distribution of tokens is unchanged, and at temperature 0 they are
        identical.
        """
        if draft:
            sampling = Sampling(temperature, top_k, top_p)
            return generate_drafting(self, prompt, max_new_tokens, sampling, generator, draft)
        return generate(self, prompt, max_new_tokens, temperature, top_k, top_p, generator)
