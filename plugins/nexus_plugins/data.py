"""Data that the user's own function or class makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import isgenerator
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import ConfigDict, Field
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from nexus_core.bases.loader import ResumableLoader
from nexus_core.data import RunData, can_seek, holds_its_place
from nexus_core.errors import ConfigError, DataError, hint_set, suggestion
from nexus_core.plugin import Plugin, hookimpl
from nexus_plugins._shared.calls import Call, callee

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine
    from nexus_core.processes import Ranks

__all__ = ["DataConfig", "DataPlugin"]

VALID = ("valid", "val", "validation")
PARTS = ("train", *VALID, "codec")
OF_SAMPLES = ("eval_batch_size", "shuffle", "drop_last", "num_workers", "collate")
RETURNS = (
    "return the training data, a pair (train, valid), or a dict with 'train', 'valid' and 'codec'"
)


class DataConfig(Call):
    """Which function or class makes the data, and how its samples become batches."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"call": "./net.py:digits", "args": {"held_out": 360}, "batch_size": 64}]
        }
    )

    batch_size: int | None = Field(
        None,
        ge=1,
        description="samples of a batch, over all processes; null: what is called gives batches",
    )
    eval_batch_size: int | None = Field(
        None, ge=1, description="samples of a batch in evaluation; null: batch_size"
    )
    shuffle: bool = Field(True, description="train on the samples in another order each epoch")
    drop_last: bool = Field(False, description="leave out a last batch that is not full")
    num_workers: int = Field(0, ge=0, description="processes that read ahead; 0: none")
    collate: Call | None = Field(
        None, description="makes a batch of a list of samples; null: PyTorch's default_collate"
    )


class DataPlugin(Plugin[DataConfig]):
    """Trains on what a function or class of yours gives.

    It gives training data, a pair of training and evaluation data, or a dict of `train`, `valid`
    (one set or several by name) and `codec`. With `batch_size` these are data sets, whose samples
    are put into batches in an order that is a function of seed and epoch, so that a run resumes at
    once at the right sample. Without, they are batches: a `DataLoader`, a list, a generator
    function, which is called anew for each epoch.
    """

    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "data"

    def __init__(self, config: DataConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self._make = callee(self.name, self.config)
        chosen = self.config.collate
        self._collate: Callable[[list[Any]], Batch] = (
            default_collate if chosen is None else callee("data.collate", chosen, ("the samples",))
        )
        given = [key for key in OF_SAMPLES if key in self.config.model_fields_set]
        if self.config.batch_size is None and given:
            raise ConfigError(
                f"data.{given[0]} acts where data.batch_size puts samples into batches; set that, "
                f"such as {hint_set('data.batch_size', 32)}, or leave {given[0]} out"
            )

    @hookimpl
    def make_data(self, engine: Engine) -> RunData:
        """Call what makes the data, and put samples into batches.

        Raises:
            ConfigError, DataError: it makes something that is no data.
        """
        made = self._make()
        if isgenerator(made):
            made = _Called(self._make)
        if isinstance(made, RunData):
            made = {"train": made.train, "valid": made.valid, "codec": made.codec}
        parts = _parts(made, self._make.place)
        train = self._batches(parts["train"], "train", engine)
        sets = {name: self._batches(d, name, engine) for name, d in _sets(parts["valid"]).items()}
        return RunData(train, sets, parts["codec"])

    def _batches(self, data: Any, name: str, engine: Engine) -> Iterable[Batch]:
        size = self.config.batch_size
        where = f"data: the '{name}' data of {self._make.place}"
        trains = name == "train"
        _check_iterable(data, where, again=not trains)
        if size is None:
            return _as_batches(data, where)
        if isinstance(data, DataLoader) or can_seek(data):
            raise ConfigError(
                f"{where} is a {type(data).__name__}, which makes batches itself; leave out "
                "data.batch_size, or return its data set"
            )
        if not trains:
            size = max(self.config.eval_batch_size or size, engine.ranks.size)
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            self._check_stream(where)
            kind = _StatefulStream if holds_its_place(data) else _Stream
            return kind(data, size, self._collate, engine.ranks)
        return ResumableLoader(
            data,
            size,
            engine.seed,
            shuffle=trains and self.config.shuffle,
            drop_last=trains and self.config.drop_last,
            collate=self._collate,
            num_workers=self.config.num_workers,
            pin_memory=engine.device.type == "cuda",
            ranks=engine.ranks,
        )

    def _check_stream(self, where: str) -> None:
        """Refuse what acts on samples that have numbers, where they come as a stream."""
        for key in ("shuffle", "num_workers"):
            if getattr(self.config, key) and key in self.config.model_fields_set:
                raise ConfigError(
                    f"{where} is a stream without __getitem__, so data.{key} cannot act; leave it "
                    "out, and do that in the stream itself"
                )


class _Called:
    """Batches of a generator function: it is called anew for each epoch."""

    def __init__(self, make: Callable[[], Iterator[Batch]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Batch]:
        return self._make()


class _Stream:
    """Batches of samples that come one after another.

    Args:
        dataset: gives the samples of an epoch, each time it is iterated.
        batch_size: samples of a batch, over all processes.
        collate: makes a batch of samples.
        ranks: this process among its peers; each takes its slice of every batch. The rest of an
            epoch that has fewer samples than there are processes is left out.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        batch_size: int,
        collate: Callable[[list[Any]], Batch],
        ranks: Ranks,
    ) -> None:
        self.dataset = dataset
        self._size, self._collate, self._ranks = batch_size, collate, ranks

    def __iter__(self) -> Iterator[Batch]:
        samples = iter(self.dataset)
        while len(rows := list(islice(samples, self._size))) >= self._ranks.size:
            yield self._collate(rows[self._ranks.rank :: self._ranks.size])


class _StatefulStream(_Stream):
    """The same of a data set that holds its own place."""

    def state_dict(self) -> Any:
        return cast(Any, self.dataset).state_dict()

    def load_state_dict(self, state: Any) -> None:
        cast(Any, self.dataset).load_state_dict(state)


def _parts(made: Any, place: str) -> dict[str, Any]:
    """What was returned, by its part: `train`, `valid` and `codec`."""
    if isinstance(made, list) and all(isinstance(part, Dataset | DataLoader) for part in made):
        made = tuple(made)  # as random_split gives them
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
            f"{', '.join(known)}; further evaluation sets go into 'valid', a dict of them"
        )
    parts = {"train": None, "valid": None, "codec": None}
    parts |= {known[key]: part for key, part in made.items()}
    if parts["train"] is None:
        raise ConfigError(f"data: {place} returned no training data; {RETURNS}")
    return parts


def _sets(valid: Any) -> dict[str, Any]:
    """The evaluation sets, by the prefix of their metrics."""
    if valid is None:
        return {}
    return dict(valid) if isinstance(valid, Mapping) else {"val": valid}


def _check_iterable(data: Any, where: str, *, again: bool) -> None:
    if not (can_seek(data) or hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(f"{where} is a {type(data).__name__}, which cannot be iterated; {RETURNS}")
    if again and isinstance(data, Iterator):
        raise DataError(
            f"{where} is a {type(data).__name__}, which can be read once, and each evaluation "
            "reads it; return what can be read again: a list, a data set, a loader"
        )


def _as_batches(data: Any, where: str) -> Iterable[Batch]:
    """What gives batches itself."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ConfigError(
            f"{where} is a data set of samples; say how many make a batch: "
            f"{hint_set('data.batch_size', 32)}"
        )
    batches: Iterable[Batch] = data
    return batches
