"""A selective state-space layer in the Mamba-2 form: whole sequences, or one token at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.norms import gated_rms_norm
from nexus_plugins.model_nexus.operations import causal_conv_silu, chunked_scan

__all__ = ["SSMState", "SelectiveSSM", "draw_decays"]

DECAY_RANGE = (1.0, 16.0)
STEP_RANGE = (1e-3, 1e-1)


class SSMState(NamedTuple):
    """The recurrent state of a layer: constant in size, however long the context."""

    conv: Tensor
    """(B, W - 1, C): the last inputs of the convolution, newest first."""
    ssm: Tensor
    """(B, N, H, P) float32."""


class SelectiveSSM(nn.Module):
    """Mix tokens over time by a gated linear recurrence whose rates depend on the input.

    Shapes: B batch, T time, D model, E = expand * D, H = E / head_dim heads, N state,
    C = E + 2 N channels of the convolution, W its width.

    Args:
        d_model: width D of input and output.
        d_state: size N of the state per channel.
        head_dim: channels per head; a head shares one decay.
        expand: inner width E over D.
        conv_width: taps W of the causal convolution.
        chunk_length: positions per chunk in `forward`; affects only speed and rounding.
        norm_eps: added to the mean square in the norm before the output projection.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 7 (the block) and Mamba-2's
        initialisation of decays and step sizes. One group: `b` and `c` are shared by the heads.
        The norm has no scale, since the projection after it can express the same.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        conv_width: int = 4,
        chunk_length: int = 64,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.inner = expand * d_model
        self.heads = self.inner // head_dim
        self.head_dim = head_dim
        self.d_state = d_state
        self.chunk_length = chunk_length
        self.norm_eps = norm_eps
        channels = self.inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.inner + channels + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, channels))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.log_rate = nn.Parameter(torch.empty(self.heads))
        self.skip = nn.Parameter(torch.empty(self.heads))
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialize all parameters: step sizes log-uniform, decay rates uniform."""
        width = self.conv_weight.shape[0]
        nn.init.uniform_(self.conv_weight, -(width**-0.5), width**-0.5)
        nn.init.zeros_(self.conv_bias)
        nn.init.ones_(self.skip)
        draw_decays(self.dt_bias, self.log_rate)

    def forward(self, x: Tensor, document: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: `(B, T, D)`.
            document: `(B, T)` non-decreasing document indices; nothing passes from one to the next.
                None: each row is one document.

        Returns:
            `(B, T, D)`.
        """
        gate, mixed, dt = self._project(x)
        x_heads, b, c = self._split_channels(self.convolve(mixed, document))
        y = self.scan(x_heads, dt, b, c, document)
        return self._output(y.flatten(-2), gate)

    def convolve(self, x: Tensor, document: Tensor | None) -> Tensor:
        """Mix neighbouring tokens `(B, T, C)`; see `operations.causal_conv_silu`."""
        return causal_conv_silu(x, self.conv_weight, self.conv_bias, document)

    def scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, document: Tensor | None) -> Tensor:
        """Run the recurrence over `(B, T, H, P)`; see `operations.chunked_scan`."""
        log_decay = dt * -self.log_rate.exp()
        return chunked_scan(x, dt, log_decay, b, c, self.skip, document, self.chunk_length)

    def step(self, x: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        """Mix one token into the state; equal to `forward` up to rounding.

        Args:
            x: `(B, D)`, the next token of each sequence.
            state: what the last step returned, or `initial_state`.

        Returns:
            The output `(B, D)` and the new state.
        """
        gate, mixed, dt = self._project(x)
        window = torch.cat([mixed.unsqueeze(1), state.conv], 1)
        mixed = F.silu((window * self.conv_weight).sum(1) + self.conv_bias)
        x_heads, b, c = self._split_channels(mixed)
        decay = torch.exp(dt * -self.log_rate.exp())
        written = torch.einsum("bn,bhp->bnhp", b, x_heads * dt.unsqueeze(-1))
        ssm = state.ssm * decay[:, None, :, None] + written
        y = torch.einsum("bn,bnhp->bhp", c, ssm) + x_heads * self.skip.unsqueeze(-1)
        output = self._output(y.flatten(-2).unsqueeze(1), gate.unsqueeze(1)).squeeze(1)
        return output, SSMState(window[:, :-1], ssm)

    def advance(self, x: Tensor, state: SSMState) -> tuple[Tensor, list[SSMState]]:
        """Mix a few tokens `(B, k, D)` into the state, with the state after each of them."""
        gate, mixed, dt = self._project(x)
        inputs = torch.cat([state.conv.flip(1), mixed], 1)
        taps = self.conv_weight.flip(0).T
        windows = inputs.unfold(1, taps.shape[1], 1)
        mixed = F.silu((windows * taps).sum(-1) + self.conv_bias)
        x_heads, b, c = self._split_channels(mixed)
        decay = torch.exp(dt * -self.log_rate.exp())[:, :, None, :, None]
        written = torch.einsum("bkn,bkhp->bknhp", b, x_heads * dt.unsqueeze(-1))
        now, after = state.ssm, []
        for place in range(x.shape[1]):
            now = torch.addcmul(written[:, place], now, decay[:, place])
            after.append(SSMState(windows[:, place, :, 1:].mT.flip(1), now))
        y = torch.einsum("bkn,bknhp->bkhp", c, torch.stack([s.ssm for s in after], 1))
        y = y + x_heads * self.skip.unsqueeze(-1)
        return self._output(y.flatten(-2), gate), after

    def initial_state(self, batch: int) -> SSMState:
        """The state before the first token, for `batch` sequences."""
        taps, channels = self.conv_weight.shape
        new = self.conv_weight.new_zeros
        return SSMState(
            conv=new(batch, taps - 1, channels),
            ssm=new(batch, self.d_state, self.heads, self.head_dim),
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels = self.conv_weight.shape[1]
        gate, mixed, dt = torch.split(self.in_proj(x), [self.inner, channels, self.heads], -1)
        return gate, mixed, F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)

    def _split_channels(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, b, c = torch.split(mixed, [self.inner, self.d_state, self.d_state], -1)
        return torch.unflatten(x, -1, (self.heads, self.head_dim)), b, c

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        result: Tensor = self.out_proj(gated_rms_norm(y, gate, self.norm_eps))
        return result


@torch.no_grad()
def draw_decays(dt_bias: Tensor, log_rate: Tensor) -> None:
    """Draw step sizes log-uniform and decay rates uniform, as Mamba-2 does."""
    low, high = (math.log(step) for step in STEP_RANGE)
    log_rate.uniform_(*DECAY_RANGE).log_()
    step = dt_bias.uniform_(low, high).exp_()
    step.copy_(step + torch.log(-torch.expm1(-step)))  # so that its softplus is the step
