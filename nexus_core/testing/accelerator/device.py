"""The accelerator's PyTorch module, `torch.fakegpu`, and its registration with torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from nexus_core.errors import ConfigError
from nexus_core.testing.accelerator.autocast import register_autocast
from nexus_core.testing.accelerator.generators import Generators, generator_class
from nexus_core.testing.accelerator.graphs import Queue
from nexus_core.testing.accelerator.kernels import Kernels
from nexus_core.testing.accelerator.memory import Memory
from nexus_core.testing.accelerator.waits import Waits

__all__ = ["NAME", "Device", "Event", "Pinned", "registered"]

NAME = "fakegpu"


class Pinned:
    """The registry of pinned host memory, from which copies may be asynchronous."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: Tensor) -> None:
        """Mark a tensor's memory as pinned for its lifetime."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        self._known[place] = weakref.ref(storage, lambda _: self._known.pop(place, None))

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, or the tensor itself if it is pinned."""
        made = tensor if tensor in self else tensor.clone()
        self.add(made)
        return made

    def making(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A torch function that creates tensors, extended so that it can use pinned memory."""

        @wraps(function)
        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            tensor = function(*args, **kwargs)
            if pin_memory:
                self.add(tensor)
            return tensor

        return made

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self._known


class Event:
    """An event in the device's queue, which the host can wait for."""

    def __init__(self, *_: object, **__: object) -> None:
        self._recorded = False

    def record(self, stream: object = None) -> None:
        """Record the event after all queued work."""
        self._recorded = True

    def query(self) -> bool:
        """Whether the event has completed, which requires that the host has waited since."""
        return not self._recorded

    def synchronize(self) -> None:
        """Wait until the event has completed."""
        registered().synchronize()
        self._recorded = False

    def wait(self, stream: object = None) -> None:
        """Does nothing: the stream waits, not the host, and there is only one stream."""


class Device(Queue):
    """The device module `torch.fakegpu`, the counterpart of `torch.cuda`.

    A process has only one, since PyTorch cannot unregister it. It is unavailable until activated.
    """

    Event = Event

    def __init__(self) -> None:
        self.active = False
        self.begin()
        self._kernels = Kernels(self)
        self._autocast = register_autocast(NAME)

    def begin(self) -> None:
        """Reset all records; existing tensors remain."""
        self.memory = getattr(self, "memory", Memory())
        self.memory.limit, self.memory.share = None, 1.0
        self.memory.peak = self.memory.allocated
        self.generators, self.waits, self.pinned = Generators(), Waits(), Pinned()

    # -- the functions that torch requires of a device module

    def is_initialized(self) -> bool:
        """Whether it is active; it needs no initialization."""
        return self.active

    def is_available(self) -> bool:
        """Whether it is active."""
        return self.active

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        """Whether it computes in bfloat16."""
        return True

    def device_count(self) -> int:
        """The number of devices."""
        return int(self.active)

    def current_device(self) -> int:
        """Its index."""
        return 0

    def set_device(self, device: object) -> None:
        """Does nothing: there is only one device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """The dtypes of mixed precision."""
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        """Seed its generator."""
        self.generators.default.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: object = None) -> Tensor:
        """The state of its generator."""
        return self.generators.default.get_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        """Set the state of its generator."""
        self.generators.default.set_state(state)

    def synchronize(self, device: object = None) -> None:
        """Wait until all work is finished."""
        self.waits.wait("synchronize")

    def memory_allocated(self, device: object = None) -> int:
        """Bytes of its tensors."""
        return self.memory.allocated

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: object = None) -> int:
        """The peak size of its tensors in bytes."""
        return self.memory.peak

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Reset the peak."""
        self.memory.peak = self.memory.allocated

    def memory_stats(self, device: object = None) -> dict[str, int]:
        """Its memory statistics, in the format of `torch.accelerator.memory_stats`."""
        found = {"current": self.memory.allocated, "peak": self.memory.peak}
        kinds = ("allocated_bytes", "reserved_bytes")
        return {f"{kind}.all.{key}": n for kind in kinds for key, n in found.items()}

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """Free and total bytes; a terabyte in total if there is no limit."""
        return self.memory.total - self.memory.allocated, self.memory.total

    def get_per_process_memory_fraction(self, device: object = None) -> float:
        """The share of its memory that this process may use."""
        return self.memory.share

    def set_per_process_memory_fraction(self, fraction: float, device: object = None) -> None:
        """Set the share of its memory that this process may use."""
        self.memory.share = fraction

    def empty_cache(self) -> None:
        """Does nothing: there is no cache."""

    # -- activation

    @contextmanager
    def activated(self) -> Iterator[None]:
        """Activate the device for PyTorch, empty and without records, in a `with` block.

        Raises:
            ConfigError: it is active already.
        """
        if self.active:
            raise ConfigError("an accelerator is active: host_accelerator() cannot be nested")
        _device_constructors()  # cached before the replacements are in place
        self.begin()
        self.generators.default.manual_seed(torch.initial_seed())
        self.active = True
        with ExitStack() as stack:
            stack.callback(setattr, self, "active", False)
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(_swapping(True))
            for owner, name, replacement in self._replacements():
                stack.enter_context(patch.object(owner, name, replacement))
            yield

    def _replacements(self) -> Iterator[tuple[object, str, object]]:
        """Replacements in torch for what a device otherwise implements in C++."""
        yield torch, "Generator", generator_class(self.generators)
        yield torch.accelerator.memory, "memory_stats", self.memory_stats
        names = ("synchronize", "memory_stats", "reset_peak_memory_stats", "empty_cache")
        for name in names:
            yield torch.accelerator, name, getattr(self, name)
        yield torch.accelerator, "get_memory_info", self.mem_get_info
        yield Tensor, "is_pinned", lambda tensor, device=None: tensor in self.pinned
        yield Tensor, "pin_memory", lambda tensor, device=None: self.pinned.copy(tensor)
        for name in ("empty", "empty_like", "zeros", "zeros_like", "ones", "full", "tensor"):
            yield torch, name, self.pinned.making(getattr(torch, name))
        clone: Any = torch.UntypedStorage.clone

        def cloned(storage: torch.UntypedStorage) -> Any:
            if storage.device.type != NAME:
                return clone(storage)
            like = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
            return self.memory.over(storage, like).clone().untyped_storage()

        yield torch.UntypedStorage, "clone", cloned
        load: Any = torch.nn.Module.load_state_dict

        def loaded(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
            with _swapping(False):  # into the existing parameters, as for built-in devices
                return load(module, *arguments, **options)

        yield torch.nn.Module, "load_state_dict", loaded


@contextmanager
def _swapping(swaps: bool) -> Iterator[None]:
    """Set whether `module.to` keeps parameter objects, tied ones included, as on built-in devices.

    For other devices, PyTorch creates new parameters by default.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def registered() -> Device:
    """The device of this process, created and registered with PyTorch on the first call.

    Raises:
        ConfigError: this PyTorch does not support it, or has another device in its place.
    """
    known = getattr(torch, NAME, None)
    if isinstance(known, Device):
        return known
    from torch.utils import backend_registration as backends

    setup = getattr(backends, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        raise ConfigError(
            f"torch {torch.__version__} does not support devices implemented in Python; use 2.13"
        )
    other = torch._C._get_privateuse1_backend_name()
    if other != "privateuseone":
        raise ConfigError(
            f"PyTorch supports one custom device, and '{other}' is already registered"
        )

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_built(self) -> bool:
            return True

        def is_available(self) -> bool:
            return registered().active

        def has_primary_context(self, device_index: int) -> bool:
            return True

    setup(NAME, backend_module=Device(), hook=Hooks())
    return registered()
