"""The cells of recurrent networks, which PyTorch expects as one fused operation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gru_cell", "gru_cell_backward", "lstm_cell", "lstm_cell_backward"]


def lstm_cell(
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new hidden and cell state, and the gates, which the backward pass needs."""
    gates = _biased(inputs, input_bias) + _biased(hidden, hidden_bias)
    enter, forget, new, leave = gates.chunk(4, 1)
    enter, forget, new, leave = enter.sigmoid(), forget.sigmoid(), new.tanh(), leave.sigmoid()
    cell = forget * cell + enter * new
    return leave * cell.tanh(), cell, torch.cat([enter, forget, new, leave], 1)


def lstm_cell_backward(
    state: Tensor | None,
    cell: Tensor | None,
    before: Tensor,
    after: Tensor,
    gates: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gates, previous cell state and bias, given those of the new states."""
    enter, forget, new, leave = gates.chunk(4, 1)
    bent = after.tanh()
    state = torch.zeros_like(bent) if state is None else state
    through = state * leave * (1 - bent.square())
    through = through if cell is None else through + cell
    found = torch.cat(
        [
            through * new * enter * (1 - enter),
            through * before * forget * (1 - forget),
            through * enter * (1 - new.square()),
            state * bent * leave * (1 - leave),
        ],
        1,
    )
    return found, through * forget, found.sum(0) if has_bias else None


def gru_cell(
    inputs: Tensor,
    hidden: Tensor,
    state: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The new hidden state, and what the backward pass needs."""
    to_reset, to_keep, to_new = _biased(inputs, input_bias).chunk(3, 1)
    own_reset, own_keep, own_new = _biased(hidden, hidden_bias).chunk(3, 1)
    reset, keep = (to_reset + own_reset).sigmoid(), (to_keep + own_keep).sigmoid()
    new = (to_new + reset * own_new).tanh()
    return (1 - keep) * new + keep * state, torch.cat([reset, keep, new, own_new, state], 1)


def gru_cell_backward(
    gradient: Tensor, kept: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of the input and hidden gates, the previous state, and both biases."""
    reset, keep, new, own_new, state = kept.chunk(5, 1)
    of_new = gradient * (1 - keep) * (1 - new.square())
    of_keep = gradient * (state - new) * keep * (1 - keep)
    of_reset = of_new * own_new * reset * (1 - reset)
    inputs = torch.cat([of_reset, of_keep, of_new], 1)
    hidden = torch.cat([of_reset, of_keep, of_new * reset], 1)
    biases = (inputs.sum(0), hidden.sum(0)) if has_bias else (None, None)
    return inputs, hidden, gradient * keep, *biases


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias
