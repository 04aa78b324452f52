"""Random numbers of the accelerator: its default generator, and those that users create."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["DeviceGenerator", "Generators", "generator_class"]


class DeviceGenerator(torch._C.Generator):
    """A generator on the accelerator, which reports its device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The accelerator."""
        return torch.device("fakegpu", 0)


class Generators:
    """The device's default generator, and the registry of its other generators.

    Attributes:
        default: used if no other generator is passed.
    """

    def __init__(self) -> None:
        self._own: dict[int, DeviceGenerator] = {}
        self.default = self.new()

    def new(self) -> DeviceGenerator:
        """Create another generator of the device."""
        made = DeviceGenerator("cpu")
        made.manual_seed(0)
        self._own[_place(made)] = made  # kept alive, so that its address is not reused
        return made

    def check(self, generator: torch._C.Generator, name: str) -> None:
        """Check that a generator belongs to the device.

        Raises:
            RuntimeError: it is a host generator.
        """
        if _place(generator) not in self._own:
            raise RuntimeError(
                f"{name}: Expected a 'fakegpu' device type for generator but found "
                f"'{generator.device.type}'"
            )

    @contextmanager
    def in_place_of_the_hosts(self) -> Iterator[None]:
        """Redirect draws from the host's default generator to the device's."""
        host = torch.default_generator
        kept = host.get_state()
        host.set_state(self.default.get_state())
        try:
            yield
        finally:
            self.default.set_state(host.get_state())
            host.set_state(kept)

    def state(self) -> Tensor:
        """The state of the default generator, on the host."""
        return self.default.get_state()


def _place(generator: Any) -> int:
    """The identity of a generator, however it is wrapped."""
    return int(generator._cdata)


def generator_class(generators: Generators) -> type:
    """The replacement of `torch.Generator` that also creates generators of the accelerator."""
    original = torch._C.Generator

    class Kind(type(original)):  # type: ignore[misc]
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, original)

    class Generator(original, metaclass=Kind):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            kind = torch.device(device).type
            return generators.new() if kind == "fakegpu" else original(device)

    return Generator
