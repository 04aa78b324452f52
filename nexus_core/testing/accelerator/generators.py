"""Random numbers of the accelerator: a generator of its own, and others that users make for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["DeviceGenerator", "Generators", "generator_class"]


class DeviceGenerator(torch._C.Generator):
    """A generator of numbers on the accelerator; as such it says where it is."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The accelerator."""
        return torch.device("fakegpu", 0)


class Generators:
    """The default generator of the device, and which others are of it.

    Attributes:
        default: is drawn from where no other is given.
    """

    def __init__(self) -> None:
        self._own: dict[int, DeviceGenerator] = {}
        self.default = self.new()

    def new(self) -> DeviceGenerator:
        """Another generator of the device."""
        made = DeviceGenerator("cpu")
        made.manual_seed(0)
        self._own[_place(made)] = made  # kept, so that no other gets its place
        return made

    def check(self, generator: torch._C.Generator, name: str) -> None:
        """See that numbers for the device are drawn by a generator of it.

        Raises:
            RuntimeError: it is one of the host.
        """
        if _place(generator) not in self._own:
            raise RuntimeError(
                f"{name}: Expected a 'fakegpu' device type for generator but found "
                f"'{generator.device.type}'"
            )

    @contextmanager
    def in_place_of_the_hosts(self) -> Iterator[None]:
        """What is drawn from the host's default generator comes from the device's instead."""
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
    """What tells generators apart, however they are wrapped."""
    return int(generator._cdata)


def generator_class(generators: Generators) -> type:
    """What `torch.Generator` is while the accelerator is there: it can be asked for one of it."""
    original = torch._C.Generator

    class Kind(type(original)):  # type: ignore[misc]
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, original)

    class Generator(original, metaclass=Kind):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            kind = torch.device(device).type
            return generators.new() if kind == "fakegpu" else original(device)

    return Generator
