"""The sizes of the NEXUS model and of its modules."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from nexus_core.plugin import PluginConfig
from nexus_plugins.model_nexus.block import LayerKind

__all__ = ["NEXUSConfig"]

CLASSIC = {"n_predicates": 32, "n_rules": 16, "causal": True}


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
    world: bool = Field(
        True, description="have the world model, which predicts the model's own next states"
    )
    d_latent: int = Field(
        64, ge=1, description="width of the world model's hidden layers; classic: of its latents"
    )
    world_levels: int = Field(
        3,
        ge=1,
        description="tokens ahead that the world model rolls out, one after the other; classic: "
        "distances, 1, 2, 4, ... tokens ahead",
    )
    world_heads: int = Field(
        0, ge=0, description="heads that predict the tokens 2, 3, ... ahead; not classic"
    )
    reason: bool = Field(True, description="have the reasoner, which chains learned rules")
    n_predicates: int = Field(64, ge=1, description="facts that the reasoner derives; classic: 32")
    n_rules: int = Field(128, ge=1, description="rules that the reasoner applies; classic: 16")
    reasoning_steps: int = Field(
        3, ge=1, description="steps of the reasoner at most; may be raised in a trained model"
    )
    energy: bool = Field(
        True, description="have the energy module, which refines each token's code as it needs"
    )
    d_code: int = Field(32, ge=1, description="width of the energy module's codes")
    n_memories: int = Field(
        32, ge=1, description="hidden units of a refinement; classic: memories in the landscape"
    )
    energy_window: int = Field(
        8, ge=1, description="tokens whose codes a refinement reads; not classic"
    )
    max_energy_iters: int = Field(8, ge=1, description="refinements of a token's code at most")
    energy_threshold: float = Field(
        0.01,
        gt=0,
        description="a token is settled when further refinements are foreseen to gain less, in "
        "nats; classic: when a refinement moves its code by less",
    )
    causal: bool = Field(
        False, description="have the causal module, a probe that learns a graph; classic: true"
    )
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
        if not self.causal and (self.variable_names or self.mechanism_units):
            raise ValueError(
                "variable_names and mechanism_units would do nothing without the causal module; "
                "set causal to true, or leave them out"
            )
        if self.classic and (self.variable_names or self.mechanism_units):
            raise ValueError(
                "variable_names and mechanism_units would do nothing with classic=true; leave them "
                "out, or classic"
            )
        if self.classic and self.world_heads:
            raise ValueError(
                f"world_heads={self.world_heads} would do nothing with classic=true; leave out one "
                "of the two"
            )
        return self
