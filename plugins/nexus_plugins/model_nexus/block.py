"""A backbone layer with its norm and residual, and the available kinds of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

from torch import Tensor, nn

from nexus_plugins.model_nexus.delta import GatedDelta
from nexus_plugins.model_nexus.mlp import Mlp
from nexus_plugins.model_nexus.ngrams import NGrams
from nexus_plugins.model_nexus.norms import rms_norm
from nexus_plugins.model_nexus.residual import in_turn
from nexus_plugins.model_nexus.ssm import SelectiveSSM, SSMState
from nexus_plugins.model_nexus.window import WindowAttention

if TYPE_CHECKING:
    from nexus_plugins.model_nexus.config import NEXUSConfig

__all__ = ["Layer", "LayerKind", "LayerState", "NEXUSBlock", "kinds", "make_ngrams"]

LayerKind = Literal["ssm", "delta", "window", "mlp"]
LayerState: TypeAlias = tuple[Tensor, ...]
"""What a layer remembers of the past, constant in size."""


class Layer(Protocol):
    """A layer that mixes tokens or channels in a block."""

    out_proj: nn.Linear

    def __call__(self, x: Tensor, document: Tensor | None = None) -> Tensor:
        """Update whole sequences `(B, T, D)`."""

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, LayerState]:
        """Update one token `(B, D)`, and the state."""

    def initial_state(self, batch: int) -> LayerState:
        """The state before the first token."""


class NEXUSBlock(nn.Module):
    """One residual layer: `x + dropout(layer(norm(x)))`.

    Args:
        config: the sizes.
        kind: the kind of layer, and the name of the block's attribute.
    """

    def __init__(self, config: NEXUSConfig, kind: LayerKind) -> None:
        super().__init__()
        self.norm_eps, self.kind = config.norm_eps, kind
        self.add_module(kind, _LAYERS[kind](config))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def layer(self) -> Layer:
        """The block's layer."""
        return cast("Layer", self.get_submodule(self.kind))

    def forward(self, x: Tensor, document: Tensor | None = None) -> Tensor:
        """Update the residual stream `(B, T, D)`; `document` as in `SelectiveSSM.forward`."""
        update: Tensor = self.dropout(self.layer(self._normed(x), document))
        return x + update

    def advance(self, x: Tensor, state: LayerState) -> tuple[Tensor, list[LayerState]]:
        """Update the residual stream of a few tokens, `(B, k, D)`, with the state after each."""
        normed, layer = self._normed(x), self.layer
        if isinstance(layer, SelectiveSSM) and x.shape[1] > 1:  # in one pass
            update, after = layer.advance(normed, SSMState(*state))
            return x + self.dropout(update), list(after)
        update, states = in_turn(layer.step, normed, state)
        return x + self.dropout(update), states

    def _normed(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm_eps)


def _make_ssm(config: NEXUSConfig) -> nn.Module:
    return SelectiveSSM(
        d_model=config.d_model,
        d_state=config.ssm_d_state,
        head_dim=config.ssm_head_dim,
        expand=config.ssm_expand,
        conv_width=config.ssm_conv_width,
        chunk_length=config.ssm_chunk_length,
        norm_eps=config.norm_eps,
    )


def _make_delta(config: NEXUSConfig) -> nn.Module:
    return GatedDelta(
        d_model=config.d_model,
        d_key=config.ssm_d_state,
        head_dim=config.ssm_head_dim,
        expand=config.ssm_expand,
        conv_width=config.ssm_conv_width,
        chunk_length=config.ssm_chunk_length,
        products=config.delta_products,
        norm_eps=config.norm_eps,
    )


def _make_window(config: NEXUSConfig) -> nn.Module:
    return WindowAttention(
        config.d_model, config.window_head_dim, config.window, config.window_kv_heads
    )


def _make_mlp(config: NEXUSConfig) -> nn.Module:
    return Mlp(config.d_model, config.mlp_expand)


_LAYERS: Mapping[LayerKind, Callable[[NEXUSConfig], nn.Module]] = {
    "ssm": _make_ssm,
    "delta": _make_delta,
    "window": _make_window,
    "mlp": _make_mlp,
}


def kinds(config: NEXUSConfig) -> Iterator[LayerKind]:
    """The kind of each backbone layer."""
    return islice(cycle(config.layers), config.ssm_n_layers)


def make_ngrams(config: NEXUSConfig) -> NGrams | None:
    """The n-grams added to each token's embedding; None if disabled."""
    if not config.ngrams and not config.recall:
        return None
    size, width = config.vocab_size, config.d_model
    return NGrams(size, width, config.ngrams, config.ngram_buckets, config.recall)
