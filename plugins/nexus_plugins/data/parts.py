"""Interpret and check what a data function returned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from nexus_core.batches import Batch
from nexus_core.errors import ConfigError, DataError, hint_set, suggestion
from nexus_core.loaders import can_seek

__all__ = ["as_batches", "check_iterable", "parts", "sets"]

VALID = ("valid", "val", "validation")
RETURNS = (
    "return the training data, a pair (train, valid), or a dict with 'train', 'valid' and 'codec'"
)


def parts(made: Any, place: str) -> dict[str, Any]:
    """The parts of what was returned: `train`, `valid` and `codec`.

    Args:
        made: training data, a pair or triple, or a dict.
        place: import path of the function, for messages.

    Raises:
        ConfigError: it has no training data, or unknown parts.
    """
    if (
        isinstance(made, list)
        and made
        and all(isinstance(part, Dataset | DataLoader) for part in made)
    ):
        made = tuple(made)  # as returned by random_split
    if isinstance(made, tuple):
        if not 2 <= len(made) <= 3:
            raise ConfigError(f"data: {place} returned a tuple of {len(made)}; {RETURNS}")
        made = dict(zip(("train", "valid", "codec"), made, strict=False))
    if not isinstance(made, Mapping):
        made = {"train": made}
    known = {"train": "train", "codec": "codec", **dict.fromkeys(VALID, "valid")}
    if odd := [str(key) for key in made if key not in known]:
        raise ConfigError(
            f"data: {place} returned a dict with '{odd[0]}'.{suggestion(odd[0], known)} Known: "
            f"{', '.join(known)}; put several evaluation sets into 'valid', as a dict"
        )
    found = {"train": None, "valid": None, "codec": None}
    found |= {known[key]: part for key, part in made.items()}
    if found["train"] is None:
        raise ConfigError(f"data: {place} returned no training data; {RETURNS}")
    return found


def sets(valid: Any) -> dict[str, Any]:
    """The evaluation sets, by the prefix of their metrics."""
    if valid is None:
        return {}
    return dict(valid) if isinstance(valid, Mapping) else {"val": valid}


def check_iterable(data: Any, where: str, *, again: bool) -> None:
    """Reject what does not yield batches.

    Args:
        data: a part of what was returned.
        where: what it is, in words.
        again: whether it will be read more than once.

    Raises:
        DataError: it cannot be iterated, or only once.
    """
    if not (can_seek(data) or hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(f"{where} is a {type(data).__name__}, which cannot be iterated; {RETURNS}")
    if again and isinstance(data, Iterator):
        raise DataError(
            f"{where} is a {type(data).__name__}, which can be read only once; every evaluation "
            "reads it; return something that can be reread: a list, a data set, a loader"
        )


def as_batches(data: Any, where: str) -> Iterable[Batch]:
    """Check that data yields batches itself.

    Raises:
        ConfigError: it yields samples.
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ConfigError(
            f"{where} is a data set of samples; set the batch size: ",
            hint_set("data.batch_size", 32),
        )
    batches: Iterable[Batch] = data
    return batches
