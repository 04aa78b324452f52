"""Data from your own function or class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import isgenerator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field
from torch.utils.data import DataLoader, IterableDataset, default_collate

from nexus_core.bases.loader import ResumableLoader
from nexus_core.data import RunData
from nexus_core.errors import ConfigError, hint_set
from nexus_core.holders import access_to
from nexus_core.loaders import can_seek
from nexus_core.plugin import Plugin, hookimpl
from nexus_core.signatures import Lax
from nexus_plugins._shared.calls import Call, callee
from nexus_plugins.data.parts import as_batches, check_iterable, parts, sets
from nexus_plugins.data.streams import Called, StatefulStream, Stream

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["DataConfig", "DataPlugin"]

OF_SAMPLES = {"eval_batch_size", "shuffle", "drop_last", "num_workers", "collate"}


class DataConfig(Call):
    """The function or class that returns the data, and how samples are batched."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"call": "./net.py:digits", "args": {"held_out": 360}, "batch_size": 64}]
        }
    )

    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="samples per batch, over all processes; null: the callable yields batches",
    )
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="samples per evaluation batch; null: batch_size"
    )
    shuffle: bool | None = Field(
        default=None, description="shuffle the samples each epoch; null: if they can be indexed"
    )
    drop_last: bool = Field(default=False, description="drop the last incomplete batch")
    num_workers: int = Field(
        default=0,
        ge=0,
        description="worker processes that prefetch; 0: none",
        json_schema_extra={"resume": "ignored"},
    )
    collate: Lax[Call] | None = Field(
        default=None, description="collate function; null: PyTorch's default_collate"
    )


class DataPlugin(Plugin[DataConfig]):
    """Trains on the data returned by a function or class that you name.

    It returns training data, a pair of training and evaluation data, or a dict of `train`, `valid`
    (one set, or several by name) and `codec`. With `batch_size` these are datasets, whose samples
    are batched in an order that is a function of seed and epoch, so that a run resumes instantly at
    the right sample. Without it, they are batches: a `DataLoader`, a list, or a generator function,
    which is called once per epoch.
    """

    config_class = DataConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "data"

    def __post_init__(self) -> None:
        self._make = callee(self.name, self.config)
        chosen = self.config.collate
        self._collate: Callable[[list[Any]], Batch] = (
            default_collate if chosen is None else callee("data.collate", chosen, ("the samples",))
        )
        given = self.config.model_dump(include=OF_SAMPLES, exclude_defaults=True)
        if self.config.batch_size is None and given:
            raise ConfigError(
                f"data.{min(given)} only has an effect with data.batch_size; set that, such as ",
                hint_set("data.batch_size", 32),
                f", or remove {min(given)}",
            )

    @hookimpl
    def make_data(self, engine: Engine) -> RunData:
        """Call the function or class, and batch the samples.

        Raises:
            ConfigError, DataError: it does not return usable data.
        """
        made = self._make()
        if isgenerator(made):
            made = Called(self._make)
        if isinstance(made, RunData):
            made = {"train": made.train, "valid": made.valid, "codec": made.codec}
        found = parts(made, self._make.place)
        train = self._batches(found["train"], "train", engine)
        valid = {name: self._batches(d, name, engine) for name, d in sets(found["valid"]).items()}
        return RunData(train, valid, found["codec"])

    def _batches(self, data: Any, name: str, engine: Engine) -> Iterable[Batch]:
        size = self.config.batch_size
        where = f"data: the '{name}' data of {self._make.place}"
        trains = name == "train"
        check_iterable(data, where, again=not trains)
        if size is None:
            return as_batches(data, where)
        if isinstance(data, DataLoader) or can_seek(data):
            raise ConfigError(
                f"{where} is a {type(data).__name__}, which already yields batches; remove "
                "data.batch_size, or return its data set"
            )
        if not trains:
            size = max(self.config.eval_batch_size or size, engine.ranks.size)
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            self._check_stream(where)
            kind = StatefulStream if access_to(data) else Stream
            return kind(data, size, self._collate, engine.ranks)
        return ResumableLoader(
            data,
            size,
            engine.seed,
            shuffle=trains and self.config.shuffle is not False,
            drop_last=trains and self.config.drop_last,
            collate=self._collate,
            num_workers=self.config.num_workers,
            pin_memory=engine.device.type == "cuda",
            ranks=engine.ranks,
        )

    def _check_stream(self, where: str) -> None:
        """Reject settings that need indexed samples, if the samples come as a stream."""
        for key in ("shuffle", "num_workers"):
            if getattr(self.config, key):
                raise ConfigError(
                    f"{where} is a stream without __getitem__, so data.{key} has no effect; remove "
                    "it, and do that in the stream itself"
                )
