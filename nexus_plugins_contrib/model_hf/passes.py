"""Run a transformers model on a batch: with or without logits, and with packed rows.

Both are determined by experiments on the model, since no configuration attribute says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HeadOutput", "Inputs", "Rows", "find_rows", "full_logits_because", "run"]

Rows: TypeAlias = Literal["isolated", "unpacked"]
"""How documents of a packed row are isolated: by the model's attention, or in separate rows.
"""
_LOUD = 50.0  # logits of this size reveal a soft cap, which is invisible near zero
_TOKENS = 24  # tokens used by the checks
_NO_BETTER = 0.1  # share of a neighbour's effect that counts as rounding


@dataclass(frozen=True)
class HeadOutput:
    """The states before the output layer, and its weight.

    Args:
        hidden: `(B, T, D)`.
        head_weight: `(V, D)`.
    """

    hidden: Tensor
    head_weight: Tensor

    @property
    def logits(self) -> Tensor:
        """`(B, T, V)`, computed on access."""
        return F.linear(self.hidden.to(self.head_weight.dtype), self.head_weight)


@dataclass(frozen=True)
class Inputs:
    """The part of a batch that a model reads.

    Args:
        ids: `(B, T)` int64.
        mask: `(B, T)`, 1 on tokens and 0 on padding; None: all are tokens.
        segments: `(B, T)` integers that change where a document starts; None: a row is one
            document.
    """

    ids: Tensor
    mask: Tensor | None = None
    segments: Tensor | None = None


def run(model: PreTrainedModel, inputs: Inputs, *, headless: bool, rows: Rows | None) -> Any:
    """Run a model on a batch.

    Args:
        model: a causal language model.
        inputs: the inputs of the batch.
        headless: return hidden states instead of logits; see `full_logits_because`.
        rows: how documents of a packed row are isolated; see `find_rows`.

    Returns:
        A `HeadOutput`, or logits `(B, T, V)`.
    """
    with _headless(model) if headless else nullcontext():
        if inputs.segments is None:
            found = _called(model, inputs.ids, inputs.mask)
        elif rows == "isolated":
            found = _called(model, inputs.ids, None, positions_of(inputs.segments))
        else:
            found = _unpacked(model, inputs.ids, inputs.segments)
    return HeadOutput(found, _head(model).weight) if headless else found


def positions_of(segments: Tensor) -> Tensor:
    """The position of each token in its document, `(B, T)`, from 0."""
    index = torch.arange(segments.shape[1], device=segments.device)
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(1).values


def full_logits_because(model: PreTrainedModel, ids: Tensor) -> str | None:
    """Why a loss needs the model's full logits; None: they are hidden states times head weight.

    Compares the model's logits with the product of states and head weight, with the states scaled
    up before the head.

    Args:
        model: the model, in any mode, which is restored.
        ids: `(B, T)`, some real tokens.
    """
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or type(head) is not nn.Linear:
        return f"its output layer is {'missing' if head is None else f'a {type(head).__name__}'}"
    if head.bias is not None:
        return "its output layer has a bias"
    if model.base_model is model:
        return "it is not split into a body and an output layer"
    seen: list[Tensor] = []

    def louder(_: nn.Module, __: object, output: Any) -> Any:
        hidden = output[0]
        peak = F.linear(hidden.to(head.weight.dtype), head.weight).abs().max().clamp_min(1e-6)
        seen.append(hidden * (_LOUD / peak))
        output[next(iter(output))] = seen[0]
        return output

    hook = model.base_model.register_forward_hook(louder)
    try:
        with _undisturbed(model, training=True):
            own = _called(model, ids[:1, :_TOKENS], None).float()
            if not seen:
                return "its body is not called as a whole"
            expected = HeadOutput(seen[0], head.weight).logits.float()
    finally:
        hook.remove()
    error = (own - expected).abs().max().item()
    allowed = 32 * torch.finfo(head.weight.dtype).eps * _LOUD
    if error <= allowed:
        return None
    return f"its logits are not head weight times hidden states (they differ by {error:.2g})"


def find_rows(model: PreTrainedModel, ids: Tensor) -> Rows:
    """How to isolate documents of a packed row in this model.

    Compares the second of two documents in one row, with positions that restart at zero, with the
    same document alone; the scale of the difference is the effect of the first document if nothing
    isolates them.

    Args:
        model: the model, in any mode, which is restored.
        ids: `(B, T)`, some real tokens.
    """
    row = ids[:1, :_TOKENS]
    if row.shape[1] < 3 or "position_ids" not in _parameters(model):
        return "unpacked"
    cut = row.shape[1] // 2
    segments = (torch.arange(row.shape[1], device=row.device) >= cut).long()[None]
    with _undisturbed(model, training=False):
        alone = _called(model, row[:, cut:], None)
        parted = _called(model, row, None, positions_of(segments))[:, cut:]
        mixed = _called(model, row, None)[:, cut:]
    change, rest = (mixed - alone).abs().max().item(), (parted - alone).abs().max().item()
    return "isolated" if rest <= _NO_BETTER * change else "unpacked"


@contextmanager
def _headless(model: PreTrainedModel) -> Iterator[None]:
    """Make the output layer return its input, so that the model returns hidden states.

    The whole model is called, not its body, since it may be compiled or gather sharded weights.
    """
    own = vars(_head(model))
    before = {"forward": own["forward"]} if "forward" in own else {}
    own["forward"] = _as_it_is
    try:
        yield
    finally:
        del own["forward"]
        own.update(before)


def _as_it_is(states: Tensor) -> Tensor:
    return states


def _unpacked(what: nn.Module, ids: Tensor, segments: Tensor) -> Tensor:
    """Run each document as a separate row, and scatter the results back.

    In a causal model, padding after a document does not affect it.
    """
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True).flatten()
    document = starts.long().cumsum(0) - 1
    position = positions_of(segments).flatten()
    shape = (int(document[-1]) + 1, int(position.max()) + 1)
    rows = ids.new_zeros(shape)
    rows[document, position] = ids.flatten()
    found = _called(what, rows, None)[document, position]
    return found.view(*ids.shape, -1)


def _called(
    what: nn.Module, ids: Tensor, mask: Tensor | None, positions: Tensor | None = None
) -> Tensor:
    """The first output of the model: its states, or its logits."""
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if mask is not None:
        given["attention_mask"] = mask
    if positions is not None:
        given["position_ids"] = positions
    found: Tensor = what(**given)[0]
    return found


def _parameters(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(type(module).forward).parameters)


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(head, nn.Linear)
    return head


@contextmanager
def _undisturbed(model: nn.Module, *, training: bool) -> Iterator[None]:
    """A context for experiments on the model that restores modes, generators and gradients."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            model.train(training)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
