"""Digests of the cells of a step: the same, whichever rank computes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nexus_core.cli.digests import Digester, hexadecimal

if TYPE_CHECKING:
    from nexus_core import Step
    from nexus_core.engine import Engine

__all__ = ["gathered", "inputs_of", "of_run", "read"]


def of_run(engine: Engine, generators: Mapping[str, str]) -> dict[str, str]:
    """The generators that a cell draws from, under rank-independent names.

    Args:
        engine: this rank's engine.
        generators: the digests of all generators of this rank, by name.
    """
    device = engine.device
    own = f"{device.type}:{device.index or 0}"
    found = {name: digest for name, digest in generators.items() if ":" not in name}
    return found | ({device.type: generators[own]} if own in generators else {})


def gathered(engine: Engine, step: Step, own: Sequence[Sequence[str]]) -> Tensor:
    """Digests of all cells of a step, on the device, without a sync: `(cells, digests)`.

    Args:
        engine: this rank's engine; every rank must call this.
        step: the step, in cells.
        own: the digests of each of its micro-batches, 16 digits each.
    """
    found = torch.zeros(sum(step.cells), len(own[0]), dtype=torch.int64)
    for micro, digests in zip(step.micro, own, strict=True):
        if not micro.borrowed:
            found[micro.cell] = torch.tensor([_signed(digest) for digest in digests])
    return engine.ranks.sum(found.to(engine.device))


def inputs_of(
    engine: Engine, step: Step, own: Sequence[list[Tensor]], digester: Digester
) -> dict[str, Tensor]:
    """The digest of each cell's inputs that are already on a device; every rank must call this."""
    groups: list[list[Tensor]] = [[] for _ in range(sum(step.cells))]
    for micro, tensors in zip(step.micro, own, strict=True):
        if micro.cell is not None and not micro.borrowed:
            groups[micro.cell] = tensors
    digests = engine.ranks.sum(digester(groups, engine.device))
    return dict(zip(map(str, range(len(groups))), digests.unbind(), strict=True))


def read(found: Tensor, generators: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The digest of the batch of each cell, and one of each generator over all of them.

    Args:
        found: as returned by `gathered`: per cell, the digest of its batch and of its generators.
        generators: their names.
    """
    batches, *rest = zip(*([hexadecimal(n) for n in cell] for cell in found.tolist()), strict=True)
    joined = ("".join(digests).encode() for digests in rest)
    hashes = [hashlib.blake2b(text, digest_size=8).hexdigest() for text in joined]
    return list(batches), dict(zip(generators, hashes, strict=True))


def _signed(digest: str) -> int:
    """A digest as a signed int64; the inverse of `hexadecimal`."""
    return int.from_bytes(bytes.fromhex(digest), "big", signed=True)
