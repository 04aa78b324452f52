"""The sizes of the NEXUS model and of its modules."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from nexus_core.plugin import PluginConfig
from nexus_core.signatures import Several
from nexus_plugins.model_nexus.block import LayerKind
from nexus_plugins.model_nexus.window import head_width

__all__ = ["NEXUSConfig"]

CLASSIC = {"n_rules": 16, "reason": True, "causal": True}
IDLE = {
    True: {"world_heads": 0, "world_stride": 1, "world_memory": 0, "reason_window": 64},
    False: {"n_predicates": 32},
}
"""Settings without effect and their defaults, by `classic`."""


class NEXUSConfig(PluginConfig):
    """Sizes of the model and its modules; the defaults are those of the full model."""

    vocab_size: int = Field(default=32_000, ge=1, description="vocabulary size")
    d_model: int = Field(default=256, ge=1, description="width of the residual stream")
    ssm_n_layers: int = Field(default=6, ge=1, description="layers in the backbone")
    layers: Several[LayerKind] = Field(
        default=("ssm",),
        min_length=1,
        description="layer types, repeated in this order up to ssm_n_layers: ssm (selective state "
        "space), delta (gated delta rule, which tracks states), window (attention to "
        "the last tokens), mlp",
    )
    ssm_d_state: int = Field(default=64, ge=1, description="state size per inner channel")
    ssm_head_dim: int = Field(
        default=64, ge=1, description="inner channels that share one decay rate"
    )
    ssm_expand: int = Field(
        default=2, ge=1, description="inner width of a layer, as a multiple of d_model"
    )
    ssm_conv_width: int = Field(
        default=4, ge=1, description="width of the causal convolution in tokens"
    )
    ssm_chunk_length: int = Field(
        default=64,
        ge=1,
        description="tokens per chunk of the scan; only affects speed and rounding",
    )
    delta_products: int = Field(
        default=1,
        ge=1,
        description="corrections per token of a delta layer; 2 or more can track groups",
    )
    window: int = Field(default=128, ge=1, description="tokens that a window layer attends to")
    window_kv_heads: int | None = Field(
        default=None,
        ge=1,
        description="key and value heads of a window layer, each shared by a group of query heads; "
        "null: one for each query head",
    )
    window_head_dim: int = Field(
        default=64,
        ge=2,
        description="maximum width of its heads, and of the reasoner's: the largest even divisor "
        "of d_model up to this",
    )
    mlp_expand: int = Field(
        default=4, ge=1, description="inner width of an mlp layer, as a multiple of d_model"
    )
    ngrams: Several[Annotated[int, Field(ge=2)]] = Field(
        default=(), description="n-gram lengths whose hashed embeddings are added to each token's"
    )
    ngram_buckets: int = Field(default=16_384, ge=1, description="table entries per n-gram length")
    recall: Several[Annotated[int, Field(ge=1)]] = Field(
        default=(),
        description="n-gram lengths for recalling what followed the same n-gram last in the "
        "document",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout after each layer")
    tie_embeddings: bool = Field(default=True, description="tie the head to the embedding matrix")
    base_width: int | None = Field(
        default=None,
        ge=1,
        description="width at which the learning rate was tuned: logits of wider models are "
        "scaled down accordingly (muP); null: off",
    )
    norm_eps: float = Field(
        default=1e-5, gt=0, description="term added to the mean square in every norm"
    )
    world: bool = Field(
        default=True,
        description="enable the world model, which predicts the model's own next states",
    )
    d_latent: int = Field(
        default=64,
        ge=1,
        description="hidden width of the world model; classic: width of its latents",
    )
    world_levels: int = Field(
        default=3,
        ge=1,
        description="tokens ahead that the world model rolls out, one after another; classic: "
        "number of distances 1, 2, 4, ... ahead",
    )
    world_heads: int = Field(
        default=0,
        ge=0,
        description="number of heads that predict tokens 2, 3, ... ahead; not classic",
    )
    world_stride: int = Field(
        default=1,
        ge=1,
        description="roll out from one position of each block of this many; not classic",
    )
    world_memory: int = Field(
        default=0,
        ge=0,
        description="width of the world model's memory of each document's own moves, which updates "
        "the stream; 0: none; not classic",
    )
    reason: bool = Field(
        default=False, description="enable the reasoner, which chains learned rules; classic: true"
    )
    n_predicates: int = Field(
        default=32, ge=1, description="number of facts that the reasoner derives; only classic"
    )
    n_rules: int = Field(
        default=128, ge=1, description="number of rules that the reasoner applies; classic: 16"
    )
    reasoning_steps: int = Field(
        default=3,
        ge=1,
        description="maximum steps of the reasoner; may be raised in a trained model",
    )
    reason_window: int = Field(
        default=64,
        ge=1,
        description="number of tokens that a step of the reasoner recalls from; not classic",
    )
    energy: bool = Field(
        default=True,
        description="enable the energy module, which refines each token's code as needed",
    )
    d_code: int = Field(default=32, ge=1, description="width of the energy module's codes")
    n_memories: int = Field(
        default=32,
        ge=1,
        description="hidden units of a refinement; classic: number of memories in the landscape",
    )
    energy_window: int = Field(
        default=8, ge=1, description="number of tokens whose codes a refinement reads; not classic"
    )
    max_energy_iters: int = Field(
        default=8, ge=1, description="maximum refinements of a token's code"
    )
    energy_threshold: float = Field(
        default=0.01,
        gt=0,
        description="stop refining a token when further refinements are predicted to change "
        "its prediction by less than this, in nats; classic: when its code moves less than this",
    )
    causal: bool = Field(
        default=False,
        description="enable the causal module, a probe that learns a graph; classic: true",
    )
    n_variables: int = Field(
        default=16, ge=2, description="number of variables in the causal graph"
    )
    variable_names: Several[str] = Field(
        default=(), description="names of these variables; none: numbers"
    )
    mechanism_units: int = Field(
        default=0, ge=0, description="hidden units of each variable's equation; 0: linear"
    )
    classic: bool = Field(
        default=False, description="the original modules, for models trained with them"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_classic(cls, given: Any) -> Any:
        return {**CLASSIC, **given} if isinstance(given, dict) and given.get("classic") else given

    @model_validator(mode="after")
    def _window_heads_fit(self) -> NEXUSConfig:
        reasons = self.reason and not self.classic
        if self.d_model % 2 and (reasons or "window" in self.layers):
            needed_by = "the reasoner" if reasons else "a window layer"
            raise ValueError(f"d_model={self.d_model} is odd; {needed_by} needs an even width")
        if "window" not in self.layers:
            return self
        heads = self.d_model // head_width(self.d_model, self.window_head_dim)
        if heads % (self.window_kv_heads or heads):
            raise ValueError(
                f"window_kv_heads={self.window_kv_heads} does not divide the {heads} query heads; "
                f"choose a divisor of {heads}"
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> NEXUSConfig:
        inner = self.ssm_expand * self.d_model
        if {"ssm", "delta"} & {*self.layers} and inner % self.ssm_head_dim:
            raise ValueError(
                f"ssm_head_dim={self.ssm_head_dim} does not divide the inner width "
                f"ssm_expand * d_model = {inner}; choose a divisor of {inner}"
            )
        if self.variable_names and len(set(self.variable_names)) != self.n_variables:
            raise ValueError(
                f"variable_names are {', '.join(self.variable_names)}; give n_variables="
                f"{self.n_variables} different ones, or set n_variables to their number"
            )
        if not self.causal and (self.variable_names or self.mechanism_units):
            raise ValueError(
                "variable_names and mechanism_units have no effect without the causal module; "
                "set causal to true, or remove them"
            )
        if self.classic and (self.variable_names or self.mechanism_units):
            raise ValueError(
                "variable_names and mechanism_units have no effect with classic=true; remove them "
                "or classic"
            )
        for name, default in IDLE[self.classic].items():
            value = getattr(self, name)
            if value != default:
                raise ValueError(
                    f"{name}={value} has no effect with classic={str(self.classic).lower()}; "
                    f"remove it, or set classic to {str(not self.classic).lower()}"
                )
        return self
