"""Measurements of the device and the clock that do not sync."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nexus_core.cli.memory import machine_memory, peak_resident
from nexus_plugins.diagnose.history import Memory, Wait

__all__ = [
    "WaitClock",
    "gradient_sizes",
    "host_limit",
    "memory_gauge",
    "silent",
    "to_host",
    "watch_outputs",
]

NO_GRADIENT = torch.finfo(torch.float32).eps
"""Share of the largest gradient below which a gradient is rounding error."""
CGROUP = Path("/sys/fs/cgroup")
Mark: TypeAlias = "float | torch.cuda.Event"


class WaitClock:
    """Measures how long steps wait for their batch, on the host's or on the device's own clock.

    On CUDA the gap between two steps is measured by device events: the time in which the device
    only copied the batch. What your own loop does between two steps counts as waiting; logs,
    evaluations and saves do not.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._ended: Mark | None = None
        self._began: Mark | None = None
        self._waits: list[tuple[Mark, Mark]] = []
        self._steps: list[tuple[Mark, Mark]] = []

    def step_ended(self) -> None:
        """Mark the end of a step and all that follows it; waiting starts."""
        self._ended = self._mark()

    def batch_came(self) -> None:
        """Mark the arrival of a micro-batch; the first one of a step ends the waiting."""
        if self._began is None:
            self._began = self._mark()
            if self._ended is not None:
                self._waits.append((self._ended, self._began))

    def step_trained(self) -> None:
        """Mark the end of the update."""
        if self._began is not None:
            self._steps.append((self._began, self._mark()))
            self._began = None

    def read(self) -> Wait | None:
        """The waiting since the last reading; call it after a device sync."""
        waits, steps = self._waits, self._steps
        self._waits, self._steps = [], []
        if not waits or not steps:
            return None
        waited = sum(_seconds(*pair) for pair in waits)
        total = waited + sum(_seconds(*pair) for pair in steps)
        return Wait(waited / total if total else 0.0, 1000 * waited / len(waits))

    def _mark(self) -> Mark:
        if not self._on_cuda:
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def gradient_sizes(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The root mean square of each parameter's gradient, 0-d, on its device; 0 without one."""
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norms = torch._foreach_norm([_dense(g) for g in found.values()]) if found else []
    sizes = {
        name: norm.float() / max(1, gradient.numel()) ** 0.5
        for (name, gradient), norm in zip(found.items(), norms, strict=True)
    }
    return {n: sizes[n] if n in sizes else p.new_zeros(()) for n, p in parameters.items()}


def silent(sizes: Mapping[str, float], matrices: Iterable[str]) -> tuple[str, ...]:
    """The matrices whose gradient is negligible relative to the largest one.

    Vectors are excluded: the gradient of a bias before a norm is always pure rounding error.
    """
    largest = max(sizes.values(), default=0.0)
    if largest == 0:
        return ()
    return tuple(name for name in matrices if sizes[name] <= NO_GRADIENT * largest)


@contextmanager
def watch_outputs(model: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """While open, record the deviation over rows of each trained module's output.

    Embeddings are excluded, since their outputs are looked up; so are outputs with fewer than two
    rows.
    """
    handles = [
        module.register_forward_hook(_noting(name, found))
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.Embedding) and any(_trained(module))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def memory_gauge(device: torch.device) -> Callable[[], Memory | None]:
    """A function that reads memory in use: the device's on CUDA, this process's elsewhere."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return lambda: Memory(torch.cuda.max_memory_allocated(device), total, f"of {device}")
    limit = host_limit()
    return lambda: Memory(_resident(), limit, "of CPU memory") if limit else None


def host_limit(cgroup: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> float:
    """The memory limit of this process, from the machine or its container; 0 if unknown.

    Source: cgroup v2, `memory.max` of the group and its ancestors; v1,
    `memory.limit_in_bytes`.
    """
    machine = machine_memory()
    files = [cgroup / "memory" / "memory.limit_in_bytes"]
    for line in _text(membership).splitlines():
        group = Path(line.rpartition(":")[2].lstrip("/"))
        files += [cgroup / part / "memory.max" for part in (group, *group.parents)]
    limits = [int(text) for text in map(_text, files) if text.isdigit()]
    return float(min([*limits, machine] if machine else limits, default=0))


def to_host(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Read 0-d tensors of one device in one transfer."""
    read = torch.stack([n.float() for n in numbers.values()]).tolist() if numbers else []
    return dict(zip(numbers, read, strict=True))


def _resident() -> float:
    """Resident bytes of this process; the peak so far if the current value is unknown."""
    pages = _text(Path("/proc/self/statm")).split()
    if pages:
        return float(int(pages[1]) * os.sysconf("SC_PAGE_SIZE"))
    return float(peak_resident())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _noting(name: str, found: dict[str, Tensor]) -> Callable[..., None]:
    @torch.no_grad()
    def note(_module: nn.Module, _arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, list | tuple) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and _has_rows(first):
            variance = first.detach().var(0, correction=0)
            found[name] = variance.mean(dtype=torch.float32).sqrt()

    return note


def _has_rows(output: Tensor) -> bool:
    return output.ndim > 1 and len(output) > 1


def _trained(module: nn.Module) -> Iterator[bool]:
    return (parameter.requires_grad for parameter in module.parameters())


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
