"""The NEXUS model: embeddings, a backbone of state-space layers, four modules, a head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus_core.plugin import PluginConfig
from nexus_plugins.model_nexus.block import LayerKind, LayerState, NEXUSBlock, kinds, make_ngrams
from nexus_plugins.model_nexus.generate import generate
from nexus_plugins.model_nexus.inputs import check_shapes, document_numbers
from nexus_plugins.model_nexus.ngrams import NGramState
from nexus_plugins.model_nexus.parts import make_parts
from nexus_plugins.model_nexus.residual import Part
from nexus_plugins.model_nexus.world import WorldModel

__all__ = ["NEXUSConfig", "NEXUSCore", "NEXUSOutput"]

EMBEDDING_STD = 0.02
CLASSIC = {"n_predicates": 32, "n_rules": 16}


class NEXUSConfig(PluginConfig):
    """Sizes of the model and its modules; the defaults are those of the full model."""

    vocab_size: int = Field(32_000, ge=1, description="tokens that the model knows")
    d_model: int = Field(256, ge=1, description="width of the residual stream")
    ssm_n_layers: int = Field(6, ge=1, description="layers in the backbone")
    layers: tuple[LayerKind, ...] = Field(
        ("ssm",),
        min_length=1,
        description="what the layers are, repeated in this order until there are ssm_n_layers: "
        "ssm (selective state space), delta (gated delta rule, which tracks states), window "
        "(attention to the last tokens), mlp",
    )
    ssm_d_state: int = Field(64, ge=1, description="size of the state per inner channel")
    ssm_head_dim: int = Field(64, ge=1, description="inner channels that share one decay rate")
    ssm_expand: int = Field(2, ge=1, description="inner width of a layer, in times d_model")
    ssm_conv_width: int = Field(4, ge=1, description="tokens that the causal convolution sees")
    ssm_chunk_length: int = Field(
        64, ge=1, description="tokens per chunk of the scan; changes speed and rounding only"
    )
    delta_products: int = Field(
        1, ge=1, description="corrections a token of a delta layer; 2 and more track groups"
    )
    window: int = Field(128, ge=1, description="tokens that a window layer sees")
    window_head_dim: int = Field(
        64,
        ge=2,
        description="width of its heads, at most: the widest that is even and divides d_model",
    )
    mlp_expand: int = Field(4, ge=1, description="inner width of an mlp layer, in times d_model")
    ngrams: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (), description="lengths of the n-grams whose hashed embeddings join each token's"
    )
    ngram_buckets: int = Field(16_384, ge=1, description="entries in the table of each length")
    recall: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="lengths of the n-grams of which is recalled what followed them last in the "
        "document",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="part of each layer's output dropped in training"
    )
    tie_embeddings: bool = Field(
        True, description="the head uses the embedding's matrix instead of one of its own"
    )
    base_width: int | None = Field(
        None,
        ge=1,
        description="width that the learning rate was found at: logits of a wider model are as "
        "much smaller (muP); null: they are not",
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in every norm")
    world: bool = Field(True, description="have the world model, which foretells later latents")
    d_latent: int = Field(64, ge=1, description="width of the world model's latents")
    world_levels: int = Field(
        3, ge=1, description="distances that the world model foretells: 1, 2, 4, ... tokens ahead"
    )
    reason: bool = Field(True, description="have the reasoner, which chains learned rules")
    n_predicates: int = Field(64, ge=1, description="facts that the reasoner derives; classic: 32")
    n_rules: int = Field(128, ge=1, description="rules that the reasoner applies; classic: 16")
    reasoning_steps: int = Field(
        3, ge=1, description="steps of the reasoner at most; may be raised in a trained model"
    )
    energy: bool = Field(
        True, description="have the energy module, which refines a code by descent"
    )
    d_code: int = Field(32, ge=1, description="width of the energy module's codes")
    n_memories: int = Field(32, ge=1, description="memories in the energy module's landscape")
    max_energy_iters: int = Field(8, ge=1, description="refinements of a token's code at most")
    energy_threshold: float = Field(
        0.01, gt=0, description="a code is settled when a refinement moves it by less"
    )
    causal: bool = Field(True, description="have the causal module, which learns a graph")
    n_variables: int = Field(16, ge=2, description="variables in the causal module's graph")
    variable_names: tuple[str, ...] = Field(
        (), description="names of these variables; none: numbers"
    )
    mechanism_units: int = Field(
        0, ge=0, description="hidden units of each variable's equation; 0: linear"
    )
    classic: bool = Field(
        False, description="the modules as they were first, for models trained so"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_classic(cls, given: Any) -> Any:
        return {**CLASSIC, **given} if isinstance(given, dict) and given.get("classic") else given

    @model_validator(mode="after")
    def _heads_fit(self) -> NEXUSConfig:
        inner = self.ssm_expand * self.d_model
        if {"ssm", "delta"} & {*self.layers} and inner % self.ssm_head_dim:
            raise ValueError(
                f"ssm_head_dim={self.ssm_head_dim} does not divide the inner width "
                f"ssm_expand * d_model = {inner}; choose a divisor of {inner}"
            )
        if "window" in self.layers and self.d_model % 2:
            raise ValueError(f"d_model={self.d_model} is odd; a window layer needs an even width")
        if self.variable_names and len(set(self.variable_names)) != self.n_variables:
            raise ValueError(
                f"variable_names are {', '.join(self.variable_names)}; give n_variables="
                f"{self.n_variables} different ones, or set n_variables to their number"
            )
        return self


@dataclass(frozen=True)
class NEXUSOutput:
    """What a forward pass leaves for the losses; logits exist only where they are asked for."""

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

    Nothing at position t depends on a later position, on a neighbour in the batch or, where
    `segment_ids` are given, on another document of the row.

    Args:
        config: the sizes; or give them as keywords: `NEXUSCore(vocab_size=256, d_model=128)`.

    Source: the backbone is a stack of Mamba-2 blocks (Dao & Gu 2024) with RMS norms before
        each; output projections start smaller by sqrt(layers) as in GPT-2 (Radford et al. 2019).
    """

    def __init__(self, config: NEXUSConfig | None = None, /, **settings: Any) -> None:
        super().__init__()
        self.config = config if config is not None else NEXUSConfig(**settings)
        self.embedding = nn.Embedding(self.config.vocab_size, self.config.d_model)
        self.blocks = nn.ModuleList(NEXUSBlock(self.config, kind) for kind in kinds(self.config))
        self.dropout = nn.Dropout(self.config.dropout)
        self.final_norm = nn.RMSNorm(self.config.d_model, eps=self.config.norm_eps)
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
            input_ids: `(B, T)` token numbers.
            segment_ids: `(B, T)` integers; a new document starts where the number changes.
            return_all_outputs: also return what the modules report.

        Returns:
            Logits `(B, T, V)`, or `(logits, {"module_outputs": {...}})`.
        """
        output = self.hidden(input_ids, segment_ids)
        if return_all_outputs:
            return output.logits, {"module_outputs": dict(output.module_outputs)}
        return output.logits

    def hidden(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> NEXUSOutput:
        """Run everything but the head, so that a loss can do without the full logits.

        Args:
            input_ids: `(B, T)` token numbers.
            segment_ids: `(B, T)` integers; a new document starts where the number changes.

        Raises:
            ValueError: a shape is not as above.
        """
        check_shapes(input_ids, segment_ids)
        document = None if segment_ids is None else document_numbers(segment_ids)
        x = self.embedding(input_ids)
        if self.ngrams is not None:
            x = x + self.ngrams(input_ids, document)
        for block in self._layers():
            x = block(x, document)
        h = self._read(x)
        module_outputs: dict[str, Any] = {}
        for part in self._parts():
            update, reports = part(h, document)
            x = x if part.muted else x + self.dropout(update)
            module_outputs |= reports
        return NEXUSOutput(self._final(x), self.head.weight, module_outputs)

    def step(self, input_ids: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """Read one token per sequence and predict the next one, in constant memory.

        Args:
            input_ids: `(B,)` token numbers.
            states: what the last step returned, or `initial_state(B)`.

        Returns:
            Logits `(B, V)` and the new states.
        """
        x, new_states = self.embedding(input_ids), list[LayerState]()
        if self.ngrams is not None:
            update, ngram_state = self.ngrams.step(input_ids, NGramState(*states[-1]))
            x, states = x + update, states[:-1]
        for block, state in zip(self._layers(), states, strict=True):
            x, new_state = block.step(x, state)
            new_states.append(new_state)
        if self.ngrams is not None:
            new_states.append(ngram_state)
        h = self._read(x)
        for part in self._parts():
            x = x if part.muted else x + part.step(h)
        logits: Tensor = self.head(self._final(x))
        return logits, new_states

    def _final(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.final_norm(x)
        base = self.config.base_width
        return hidden if base is None else hidden * (base / self.config.d_model)

    def _read(self, x: Tensor) -> Tensor:
        """What the modules see of the stream; each has a projection of its own behind it."""
        return F.rms_norm(x, x.shape[-1:], eps=self.config.norm_eps)

    def initial_state(self, batch: int) -> list[LayerState]:
        """The states of all layers before the first token, for `batch` sequences."""
        states = [block.layer.initial_state(batch) for block in self._layers()]
        return states if self.ngrams is None else [*states, self.ngrams.initial_state(batch)]

    @property
    def active_modules(self) -> tuple[str, ...]:
        """Which of world, reason, energy and causal the model has."""
        return tuple(self.parts)

    def without(self, name: str) -> AbstractContextManager[None]:
        """Leave out what a module of `active_modules` writes to the stream, while it lasts."""
        return cast(Part, self.parts[name]).silence()

    def update_world_target(self, decay: float | Tensor) -> None:
        """Let the world model's target encoder follow its encoder; call it after each update."""
        if "world" in self.parts:
            cast(WorldModel, self.parts["world"]).update_target(decay)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt token by token; see `generate.generate` for the arguments."""
        return generate(self, prompt, max_new_tokens, temperature, top_k, top_p, generator)
