"""The operations of the accelerator, computed on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nexus_core.testing.accelerator import cells
from nexus_core.testing.accelerator.memory import Memory, fill_with_garbage
from nexus_core.testing.accelerator.moves import Moves, OnTheHost

if TYPE_CHECKING:
    from nexus_core.testing.accelerator.device import Device

__all__ = ["Kernels"]

Library: Any = torch.library.Library
_aten = torch.ops.aten
_NUMBERS = {int, float, bool, complex}
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.layout, torch.device}

WAITED_FOR = {
    **{"aten::_local_scalar_dense": "the value of a tensor (item, bool, int, float)"},
    **{f"aten::{name}": name for name in ("equal", "nonzero", "masked_select", "multinomial")},
    **{f"aten::{name}": "unique" for name in ("_unique", "_unique2", "unique_dim")},
    **{f"aten::{name}": "unique" for name in ("unique_consecutive", "unique_dim_consecutive")},
    **{f"aten::{name}": name for name in ("bincount", "histc")},
    "aten::repeat_interleave": "the lengths of repeat_interleave (no output_size)",
}
"""Operations whose result goes to the host, or whose output shape depends on values."""
DIRECT = ("native_layer_norm", "native_group_norm", "convolution", "convolution_backward",
          "mse_loss", "smooth_l1_loss")  # fmt: skip
"""Operations that are one kernel on the host, but that PyTorch would decompose for this device."""
CELLS: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": cells.lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": cells.lstm_cell_backward,
    "_thnn_fused_gru_cell": cells.gru_cell,
    "_thnn_fused_gru_cell_backward": cells.gru_cell_backward,
}
REPEATING = "aten::repeat_interleave"
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
            "aten::_unsafe_index", "aten::_unsafe_index_put")  # fmt: skip
MAKING = ("aten::empty", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")


class _Kind(NamedTuple):
    """Properties of an operation, looked up each time that it runs."""

    name: str
    waits: str | None
    indexes: bool
    draws: bool
    makes: bool
    is_fused: bool
    tensors: tuple[int, ...]


class Kernels:
    """Runs operations on the memory of the device's tensors, and rejects what a GPU would reject.

    Args:
        device: the device, with its memory, generators and waits.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kinds: dict[Any, _Kind] = {}
        self._aten = Library("aten", "IMPL")
        self._others = Library("_", "IMPL")
        self._others.fallback(self.run, "PrivateUse1")
        self._others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        own = Moves(device).kernels()
        own |= {name: partial(self.run, getattr(_aten, name).default) for name in DIRECT}

        own |= CELLS
        for name, kernel in own.items():
            self._aten.impl(name, kernel, "PrivateUse1")

    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Check an operation, run it on the host, and return its output on the device.

        Raises:
            RuntimeError: tensors of the host and of the device are mixed.
        """
        with OnTheHost():
            kind = self._kinds.get(op) or self._kinds.setdefault(op, _kind(op))
            call = _Call(self._device.memory)
            on_host = call.on_host
            host_args = [on_host(value) for value in args]
            host_kwargs = {key: on_host(value) for key, value in kwargs.items()}
            for place in kind.tensors:
                if place < len(args) and type(args[place]) in _NUMBERS:
                    host_args[place] = _as_tensor(args[place], host_args[0])
            if kind.name != REPEATING or kwargs.get("output_size") is None:
                self._check(kind, args, call)
            if "device" in kwargs and kwargs["device"] is not None:
                host_kwargs["device"] = torch.device("cpu")
                call.is_ours = torch.device(kwargs["device"]).type == "fakegpu"
            if "pin_memory" in kwargs:
                host_kwargs["pin_memory"] = None
            compute = self._drawn if kind.draws else _computed
            recording = self._device.recording
            if recording is not None:
                recording.keep(view for _, view in call.tensors)
                host_args, host_kwargs = call.kept(host_args), call.kept(host_kwargs)
            out = compute(op, host_args, host_kwargs)
            if kind.makes:
                fill_with_garbage(out)
            if recording is not None:
                recording.note(partial(compute, op, host_args, host_kwargs), out)
            return call.handed_on(out)

    def _drawn(self, op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run a random operation with the given generator, or with the device's default."""
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch._C.Generator)]
        recording = self._device.recording
        for generator in given:
            self._device.generators.check(generator, op.name())
            if recording is not None and not recording.allows(generator):
                raise RuntimeError(
                    f"{op.name()}: the generator is not registered with the graph that is being "
                    "captured: call graph.register_generator_state(generator) before"
                )
        if given:
            return op(*args, **kwargs)
        with self._device.generators.in_place_of_the_hosts():
            return op(*args, **kwargs)

    def _check(self, kind: _Kind, args: Sequence[Any], call: _Call) -> None:
        """Reject what a GPU rejects, and record a synchronization."""
        if not call.tensors:
            return
        if call.strangers and not kind.indexes:
            strangers = [t for t in call.strangers if t.dim() or kind.is_fused]
            if strangers:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, fakegpu:0 and {strangers[0].device}! (in {kind.name})"
                )
        what = _waits_of_index(kind.name, args) if kind.indexes else kind.waits
        if what:
            self._device.waits.wait(what)


class _Call:
    """The tensors of one operation: those on the device with their host views, and others."""

    def __init__(self, memory: Memory) -> None:
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.strangers: list[Tensor] = []
        self.is_ours = False
        self._memory = memory

    def on_host(self, value: Any) -> Any:
        """An argument, with device tensors replaced by their host views."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is list or kind is tuple:
            return [self.on_host(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        if value.device.type != "fakegpu":
            self.strangers.append(value)
            return value
        view = self._memory.host_view(value)
        self.tensors.append((value, view))
        self.is_ours = True
        return view

    def kept(self, value: Any) -> Any:
        """Arguments as a graph stores them: host tensors are copied, as they may change later."""
        if isinstance(value, list | tuple):
            return [self.kept(part) for part in value]
        if isinstance(value, dict):
            return {key: self.kept(part) for key, part in value.items()}
        return value.clone() if any(value is each for each in self.strangers) else value

    def handed_on(self, value: Any) -> Any:
        """The output on the device: each tensor is an argument, a view of one, or a new tensor."""
        if isinstance(value, list | tuple):
            return type(value)(self.handed_on(part) for part in value)
        if not isinstance(value, Tensor) or not self.is_ours:
            return value
        for tensor, view in self.tensors:
            if view is value:
                return self._renewed(tensor, view)
        place = value.untyped_storage().data_ptr()
        below = [t for t, view in self.tensors if place == view.untyped_storage().data_ptr()]
        return self._memory.alias(below if place else (), value)

    def _renewed(self, tensor: Tensor, view: Tensor) -> Tensor:
        """An argument that was written to, with its new shape if the operation resized it."""
        if tensor.shape != view.shape or tensor.stride() != view.stride():
            _aten.set_data(tensor, self._memory.adopt(view))
        return tensor


def _as_tensor(number: complex, beside: Tensor) -> Tensor:
    """A Python number as a tensor, where PyTorch passes one for a tensor argument."""
    return torch.tensor(number, dtype=torch.result_type(beside, number))


def _computed(op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return op(*args, **kwargs)


def _kind(op: Any) -> _Kind:
    name = op.name().partition(".")[0]
    fused = name.startswith("aten::_fused_")
    draws = torch.Tag.nondeterministic_seeded in op.tags
    takes = [str(argument.type) == "Tensor" for argument in op._schema.arguments]
    places = tuple(place for place, is_tensor in enumerate(takes) if is_tensor)
    return _Kind(name, WAITED_FOR.get(name), name in INDEXING, draws, name in MAKING, fused, places)


def _waits_of_index(name: str, args: Sequence[Any]) -> str | None:
    """Why indexing synchronizes: to count a mask's entries, or to copy an index to the device."""
    indices = [index for index in args[1] if index is not None]
    if any(index.device.type != "fakegpu" and index.dim() for index in indices):
        return "a copy of an index to the device"
    masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    fills = "put" in name and args[2].numel() == 1 and not any(args[3:4])
    return "the number of entries of a mask" if masked and not fills else None
