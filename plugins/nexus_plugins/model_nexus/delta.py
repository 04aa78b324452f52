"""A gated delta-rule layer: its memory overwrites values by key, and can track states."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.norms import gated_rms_norm
from nexus_plugins.model_nexus.operations import Decays, causal_conv_silu, chunked, pad_time
from nexus_plugins.model_nexus.residual import widened
from nexus_plugins.model_nexus.ssm import draw_decays

__all__ = ["DeltaState", "GatedDelta", "delta_scan"]


class DeltaState(NamedTuple):
    """The recurrent state of a layer: constant in size."""

    conv: Tensor
    """(B, W - 1, C): the last inputs of the convolution, newest first."""
    memory: Tensor
    """(B, H, N, P), float32: the value stored for each key direction."""


class GatedDelta(nn.Module):
    """Mix tokens over time by a memory that decays and is corrected along the token's keys.

    `S = (I - beta k k') decay S + beta k v'`, read as `S' q`. With beta up to 2 a correction may
    reflect a direction, which sums and decays cannot: it can track parity. With several corrections
    per token (`products`) it can apply any small permutation or rotation.

    Shapes: B batch, T time, D model, E = expand * D, H = E / head_dim heads of width P, N key.

    Args:
        d_model: width D of input and output.
        d_key: size N of a head's keys.
        head_dim: width P of a head's values.
        expand: inner width E over D.
        conv_width: width of the causal convolution.
        chunk_length: corrections per chunk in `forward`; affects only speed and rounding.
        products: corrections per token.
        norm_eps: added to the mean square in the norm before the output projection.

    Source: Yang et al. 2024, "Gated Delta Networks"; beta up to 2: Grazzi et al. 2025, "Unlocking
        State-Tracking in Linear RNNs Through Negative Eigenvalues"; several corrections: Siems et
        al. 2025, "DeltaProduct". The norm is over all heads, not over each.
    """

    def __init__(
        self,
        d_model: int,
        d_key: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        conv_width: int = 4,
        chunk_length: int = 64,
        products: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.inner, self.head_dim, self.d_key = expand * d_model, head_dim, d_key
        self.heads = self.inner // head_dim
        self.chunk_length, self.products, self.norm_eps = chunk_length, products, norm_eps
        keys = self.heads * d_key
        self.sizes = [self.inner * products, keys * products, keys]  # values, keys, query
        channels, rates = sum(self.sizes), self.heads * products
        self.in_proj = nn.Linear(d_model, self.inner + channels + self.heads + rates, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, channels))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.log_rate = nn.Parameter(torch.empty(self.heads))
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialize the filters and the decays, as in `SelectiveSSM`."""
        reach = len(self.conv_weight) ** -0.5
        nn.init.uniform_(self.conv_weight, -reach, reach)
        nn.init.zeros_(self.conv_bias)
        draw_decays(self.dt_bias, self.log_rate)

    def forward(self, x: Tensor, document: Tensor | None = None) -> Tensor:
        """Mix whole sequences `(B, T, D)`; `document` as in `SelectiveSSM.forward`."""
        gate, mixed, log_decay, beta = self._project(x)
        mixed = causal_conv_silu(mixed, self.conv_weight, self.conv_bias, document)
        value, key, query = self._split(mixed)
        if self.products > 1:
            document = None if document is None else document.repeat_interleave(self.products, 1)
            log_decay = _first_of(log_decay, self.products)
            query = query.repeat_interleave(self.products, 1)
        y = delta_scan(
            query, key.flatten(1, 2), value.flatten(1, 2), beta.flatten(1, 2), log_decay,
            document, self.chunk_length,
        )  # fmt: skip
        return self._output(y[:, self.products - 1 :: self.products].to(x.dtype).flatten(-2), gate)

    def step(self, x: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        """Mix one token `(B, D)` into the state; equal to `forward` up to rounding."""
        gate, mixed, log_decay, beta = self._project(x.unsqueeze(1))
        window = torch.cat([mixed, state.conv], 1)
        mixed = F.silu((window * self.conv_weight).sum(1, keepdim=True) + self.conv_bias)
        value, key, query = self._split(mixed)
        memory = state.memory * log_decay[:, 0, :, None, None].exp()
        for k, v, b in zip(*(part[:, 0].unbind(1) for part in (key, value, beta)), strict=True):
            known = torch.einsum("bhn,bhnp->bhp", k, memory)
            memory = memory + torch.einsum("bhn,bhp->bhnp", k, b.unsqueeze(-1) * (v - known))
        y = torch.einsum("bhn,bhnp->bhp", query[:, 0], memory).to(x.dtype)
        output = self._output(y.flatten(-2).unsqueeze(1), gate).squeeze(1)
        return output, DeltaState(window[:, :-1], memory)

    def initial_state(self, batch: int) -> DeltaState:
        """The state before the first token, for `batch` sequences."""
        taps, channels = self.conv_weight.shape
        new = self.conv_weight.new_zeros
        memory = new(batch, self.heads, self.d_key, self.head_dim)
        return DeltaState(new(batch, taps - 1, channels), widened(memory))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate, the convolution's input, (B, T, H) log decay, (B, T, products, H) beta."""
        sizes = [self.inner, sum(self.sizes), self.heads, self.heads * self.products]
        gate, mixed, dt, beta = torch.split(self.in_proj(x), sizes, -1)
        dt, beta = widened(dt), widened(beta)
        log_decay = F.softplus(dt + self.dt_bias) * -self.log_rate.exp()
        beta = 2 * torch.sigmoid(torch.unflatten(beta, -1, (self.products, self.heads)))
        return gate, mixed, log_decay, beta

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, products, H, P) values and (…, N) keys of length one, (B, T, H, N) queries."""
        value, key, query = torch.split(widened(mixed), self.sizes, -1)
        value = torch.unflatten(value, -1, (self.products, self.heads, self.head_dim))
        key = torch.unflatten(key, -1, (self.products, self.heads, self.d_key))
        query = torch.unflatten(query, -1, (self.heads, self.d_key))
        return value, F.normalize(key, dim=-1), F.normalize(query, dim=-1)

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        result: Tensor = self.out_proj(gated_rms_norm(y, gate, self.norm_eps))
        return result


def _first_of(log_decay: Tensor, products: int) -> Tensor:
    """(B, T, H) to (B, T * products, H): a token decays the memory once, before its corrections."""
    rest = torch.zeros_like(log_decay).unsqueeze(2).expand(-1, -1, products - 1, -1)
    return torch.cat([log_decay.unsqueeze(2), rest], 2).flatten(1, 2)


def delta_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    document: Tensor | None,
    chunk_length: int,
) -> Tensor:
    """Run `S_t = (I - beta_t k_t k_t') decay_t S_{t-1} + beta_t k_t v_t'`, read `y_t = S_t' q_t`.

    Within a chunk all corrections are solved at once, as a triangular system; only the memory is
    passed between chunks. Time and memory are linear in T. All in float32 (or wider).

    Args:
        query: `(B, T, H, N)`.
        key: `(B, T, H, N)`, of norm one or zero.
        value: `(B, T, H, P)`.
        beta: `(B, T, H)`, how much of the key's stored value is replaced: 0 to 2.
        log_decay: `(B, T, H)`, at most 0.
        document: `(B, T)` non-decreasing numbers of documents; the memory is cleared where a new
            one starts. None: each row is one document.
        chunk_length: positions per chunk; affects only speed and rounding.

    Returns:
        `(B, T, H, P)`.

    Source: Yang et al. 2024, "Gated Delta Networks", section 3.3 (the chunkwise form).
    """
    length = query.shape[1]
    chunk = min(chunk_length, length)
    inputs = (pad_time(part, -length % chunk) for part in (query, key, value, beta, log_decay))
    query, key, value, beta, log_decay = (chunked(part, chunk) for part in inputs)
    if document is not None:
        document = chunked(pad_time(document, -length % chunk), chunk)
    with torch.autocast(query.device.type, enabled=False):
        y = _scan_chunks(query, key, value, beta, Decays.of(log_decay, document))
    return y[:, :length]


def _scan_chunks(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decays: Decays) -> Tensor:
    """`delta_scan` over (B, K, Q, H, ...)."""
    query, key, value, beta, from_start, to_end, across = (
        part.transpose(2, 3)
        for part in (
            query, key, value, beta.unsqueeze(-1), decays.from_start, decays.to_end, decays.across
        )
    )  # fmt: skip
    weights = decays.pairwise() * decays.visible().unsqueeze(-3)
    reads = (query @ key.mT) * weights
    system = beta * (key @ key.mT) * weights  # the solver takes its diagonal as one
    right = beta * torch.cat([value, key * from_start], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    fresh, known = torch.split(solved, [value.shape[-1], key.shape[-1]], -1)
    query, kept = query * from_start, (key * to_end).mT
    memory = value.new_zeros(())
    outputs = []
    for k in range(query.shape[1]):
        if k == 0:
            written = fresh[:, k]
            outputs.append(reads[:, k] @ written)
            memory = kept[:, k] @ written
            continue
        written = fresh[:, k] - known[:, k] @ memory
        outputs.append(query[:, k] @ memory + reads[:, k] @ written)
        memory = across[:, k] * memory + kept[:, k] @ written
    return torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)
