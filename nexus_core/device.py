"""Everything that depends on the device: choice, random generators, and copies to it."""

from __future__ import annotations

import ctypes
import random
import warnings
from collections.abc import Mapping
from typing import Any, NotRequired, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nexus_core.errors import ConfigError

__all__ = [
    "RandomState",
    "Undo",
    "check_values",
    "pick_device",
    "random_state",
    "seed_everything",
    "set_random_state",
]

_PYTHON: Any = getattr(random.getstate, "__self__")  # noqa: B009  the one behind the functions
_MT19937_BYTES = 2500  # its 624 words and its position
_PEEK_BYTES = 64  # of these: each draw moves the position, each 624th rewrites every word

Words: TypeAlias = list[Any]
"""Numbers, nested as in the states of Python's and NumPy's generators."""


class RandomState(TypedDict):
    """The state of every global random generator of this process."""

    python: Words
    numpy: Words
    torch: Tensor
    devices: list[Tensor]  # one for each accelerator of this process
    accelerator: NotRequired[str]  # their kind: "cuda", "mps", "xpu", ...


def pick_device(wish: str | torch.device | None, model: nn.Module | None) -> torch.device:
    """The device to train on: "auto" is an accelerator if available, None the model's own.

    Raises:
        ConfigError: this machine has no such device.
    """
    if wish is None:
        own = [p.device for p in model.parameters()] if model is not None else []
        return next((d for d in own if d.type != "meta"), torch.device("cpu"))
    if wish == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=wish).device
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"cannot use the device '{wish}': {said}; try device=auto") from error


def check_values(model: nn.Module) -> None:
    """Check that the model's parameters have values.

    Raises:
        ConfigError: the model is on the meta device.
    """
    if name := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise ConfigError(
            f"'{name}' is on the meta device and has no values; call model.to_empty(device=...), "
            "initialize the parameters, then create the optimizer"
        )


def seed_everything(seed: int) -> None:
    """Seed the generators of python, numpy, torch and its devices.

    Like `torch.manual_seed`, but without the stack trace that it records for each missing kind of
    device: that takes milliseconds, and a step in cells seeds several times.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if (kind := _accelerators()[0]) and not (
        own := torch.get_device_module(kind)
    )._is_in_bad_fork():
        getattr(own, "manual_seed_all", torch.manual_seed)(seed)


def random_state() -> RandomState:
    """Read the generators of python, numpy, torch and each accelerator of this process."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state: RandomState = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "devices": [],
    }
    kind, count = _accelerators()
    if kind:
        module = torch.get_device_module(kind)
        state["devices"] = [module.get_rng_state(index) for index in range(count)]
        state["accelerator"] = kind
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore every generator to a `random_state`; warns about those that it cannot restore."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].clone())  # torch misreads views with an offset
    saved, kind = state["devices"], state.get("accelerator", "cuda")
    here, count = _accelerators()
    if saved and (here != kind or count < len(saved)):
        found = f"{count} of kind {here}" if here else "none"
        warnings.warn(
            f"the generators of {len(saved)} {kind} devices were saved, and this process has "
            f"{found}: random numbers on the device will differ from the saved run",
            RuntimeWarning,
            stacklevel=2,
        )
    if here == kind:
        for index, generator in enumerate(saved[:count]):
            torch.get_device_module(kind).set_rng_state(generator.clone(), index)


class Undo:
    """Restores what a step changes besides weights: random generators and buffers.

    It is taken before every step, so it must be fast: nothing is turned into lists, and the
    generators of Python and NumPy, which take 20 and 40 microseconds to read, are only read if a
    peek at their memory shows that they were used (or if NumPy's has cached the second number of a
    normal pair, which the peek cannot see).
    """

    def __init__(self, model: nn.Module) -> None:
        self._devices: list[Tensor] = []
        self._owners = [(m, name) for m in model.modules() for name in m._buffers]
        self._buffers: list[Tensor | None] = [None for _ in self._owners]
        self._copies = list(self._buffers)
        self._versions = [0 for _ in self._owners]  # -1: treat as changed
        self._accelerator, self._count = _accelerators()
        self._numpy_generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        self._numpy_words, self._python_words = _numpy_words(self._numpy_generator), _python_words()
        self._read_numpy()
        self._read_python()
        self.take()

    def take(self) -> None:
        """Record the current state."""
        words = self._python_words
        if not words or words.raw != self._seen_python or _PYTHON.gauss_next != self._python[2]:
            self._read_python()
        self._torch = torch.default_generator.get_state()
        if self._accelerator:
            module = torch.get_device_module(self._accelerator)
            self._devices = [module.get_rng_state(index) for index in range(self._count)]
        words = self._numpy_words
        if not words or words.raw != self._seen_numpy or self._numpy["has_gauss"]:
            self._read_numpy()
        for place in self._changed() if self._owners else ():
            module, name = self._owners[place]
            buffer = self._buffers[place] = module._buffers.get(name)
            self._copies[place] = None if buffer is None or is_lazy(buffer) else buffer.clone()
            self._versions[place] = (
                -1 if buffer is None or buffer.is_floating_point() else buffer._version
            )

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the last recorded state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for index, generator in enumerate(self._devices):
            torch.get_device_module(self._accelerator).set_rng_state(generator, index)
        for place in self._changed():
            module, name = self._owners[place]
            buffer = module._buffers[name] = self._buffers[place]
            if buffer is not None and (copy := self._copies[place]) is not None:
                buffer.copy_(copy)

    def _read_python(self) -> None:
        self._python = random.getstate()
        self._seen_python = self._python_words.raw if self._python_words else b""

    def _read_numpy(self) -> None:
        self._numpy = np.random.get_state(legacy=False)
        self._seen_numpy = self._numpy_words.raw if self._numpy_words else b""

    def _changed(self) -> list[int]:
        """Indices of buffers that may have changed; not every change bumps the version."""
        return [
            place
            for place, (buffer, (module, name)) in enumerate(
                zip(self._buffers, self._owners, strict=True)
            )
            if module._buffers.get(name) is not buffer
            or (buffer is not None and buffer._version != self._versions[place])
        ]


def _words_at(address: int, count: int) -> ctypes.Array[ctypes.c_char]:
    """Bytes of a generator's memory, for comparison."""
    return (ctypes.c_char * count).from_address(address)


def _numpy_words(generator: Any) -> ctypes.Array[ctypes.c_char] | None:
    """The last words and position of NumPy's generator, if it is an MT19937."""
    if not isinstance(generator, np.random.MT19937):
        return None
    return _words_at(generator.ctypes.state_address + _MT19937_BYTES - _PEEK_BYTES, _PEEK_BYTES)


def _python_words() -> ctypes.Array[ctypes.c_char] | None:
    """The position and first words of Python's generator, if laid out as in CPython."""
    address = id(_PYTHON) + object.__basicsize__
    if type(_PYTHON).__basicsize__ < object.__basicsize__ + _MT19937_BYTES:
        return None
    _, words, _ = random.getstate()
    index, *state = np.frombuffer(_words_at(address, _MT19937_BYTES).raw, np.uint32).tolist()
    return _words_at(address, _PEEK_BYTES) if [*state, index] == list(words) else None


def _accelerators() -> tuple[str, int]:
    """The kind and number of this process's accelerators; "" and 0 if there are none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return (found.type, torch.accelerator.device_count()) if found else ("", 0)
