"""Graphs of the accelerator: operations captured once and replayed, as with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nexus_core.testing.accelerator.memory import fill_with_garbage

if TYPE_CHECKING:
    from nexus_core.testing.accelerator.waits import Waits

__all__ = ["CUDAGraph", "Queue", "Recording", "Stream"]


class Recording:
    """A graph being captured; afterwards none of its operations has taken effect.

    Args:
        generators: generators that may be used during the capture.
    """

    def __init__(self, generators: Iterable[Any]) -> None:
        self.work: list[Callable[[], object]] = []
        self._made: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Any, Any]] = {}
        self._drawn_from = [(each, each.get_state()) for each in generators]

    def allows(self, generator: Any) -> bool:
        """Whether a generator is registered."""
        return any(each._cdata == generator._cdata for each, _ in self._drawn_from)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Save the contents of existing tensors, which an operation may overwrite."""
        for tensor in tensors:
            storage: Any = tensor.untyped_storage()
            place = storage.data_ptr()
            if place and place not in self._made and place not in self._before:
                self._before[place] = storage, storage.clone()

    def note(self, compute: Callable[[], Any], out: Any) -> None:
        """Repeat an operation in each replay, with its output in the same memory.

        Args:
            compute: the operation.
            out: its output during the capture.
        """
        for tensor in _tensors(out):
            place = tensor.untyped_storage().data_ptr()
            if place not in self._before:
                self._made.setdefault(place, tensor)
        self.work.append(lambda: _fill(out, compute()))

    def undo(self) -> None:
        """Restore memory and generators; fill tensors created during the capture with garbage."""
        for storage, before in self._before.values():
            storage.copy_(before)
        for tensor in self._made.values():
            fill_with_garbage(tensor)
        for generator, state in self._drawn_from:
            generator.set_state(state)


class CUDAGraph:
    """Device operations that are captured once and replayed by one call.

    A replay reads and writes the same memory as the capture, so inputs and outputs must be copied.
    Work of the host is not captured. As on CUDA, capturing executes nothing, the host must not
    synchronize meanwhile, and generators other than the device's default must be registered before.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self._generators: list[Any] = []
        self._work: list[Callable[[], object]] = []

    def register_generator_state(self, generator: Any) -> None:
        """Allow a device generator to be used during the capture."""
        self._generators.append(generator)

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        """Start capturing device operations.

        Raises:
            RuntimeError: another graph is being captured.
        """
        device = _module()
        if device.recording is not None:
            raise RuntimeError("another graph is being captured")
        own = device.generators.default
        device.recording = Recording([own, *self._generators])
        device.waits.capturing = True

    def capture_end(self) -> None:
        """End the capture; none of the work has been executed."""
        device = _module()
        recording, device.recording = device.recording, None
        device.waits.capturing = False
        recording.undo()
        self._work = recording.work

    def replay(self) -> None:
        """Replay the captured work."""
        from nexus_core.testing.accelerator.moves import OnTheHost

        with OnTheHost():
            for work in self._work:
                work()

    def reset(self) -> None:
        """Free its memory."""
        self._work = []

    def pool(self) -> tuple[int, int]:
        """The id of its memory pool; there is only one."""
        return (0, 0)


class Stream:
    """A stream of the device; all of them are the same queue."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, stream: object) -> None:
        """Does nothing: there is only one queue."""

    def synchronize(self) -> None:
        """Wait until all work is done."""
        _module().synchronize()


class _HasWaits(Protocol):
    waits: Waits

    def synchronize(self) -> None: ...


class Queue:
    """The part of the device module for the order of its work: streams, graphs, synchronization.

    Attributes:
        recording: the graph that is being captured.
    """

    recording: Recording | None = None
    Stream = Stream
    CUDAGraph = CUDAGraph

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        """Use a stream within the block; has no effect, as all streams are the same."""
        yield

    def current_stream(self, device: object = None) -> Any:
        """The stream."""
        return Stream()

    @contextmanager
    def graph(
        self: _HasWaits,
        cuda_graph: Any,
        pool: object = None,
        stream: object = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        """Capture a graph, as `torch.cuda.graph` does; it waits for the device first."""
        self.synchronize()
        cuda_graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            cuda_graph.capture_end()

    def set_sync_debug_mode(self: _HasWaits, debug_mode: int | str) -> None:
        """When the host synchronizes: ignore it ("default"), warn ("warn") or raise ("error")."""
        names = ("default", "warn", "error")
        self.waits.mode = names[debug_mode] if isinstance(debug_mode, int) else debug_mode

    def get_sync_debug_mode(self: _HasWaits) -> int:
        """The mode as a number: 0, 1 or 2."""
        return ("default", "warn", "error").index(self.waits.mode)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _fill(kept: Any, new: Any) -> None:
    """Copy the output of a replayed operation to the memory of its output during the capture."""
    for old, tensor in zip(_tensors(kept), _tensors(new), strict=True):
        if old.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            old.copy_(tensor)


def _module() -> Any:
    return torch.get_device_module("fakegpu")
