"""Settings shared by the plugins that train on dataset records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from nexus_core import DataError, PluginConfig
from nexus_core.signatures import Lax
from nexus_plugins_contrib._shared.sources import Wish

__all__ = ["RowsConfig", "SourceConfig", "SourceList", "listed"]

_LOCKED: dict[str, Any] = {"resume": "locked"}  # a resumed run must not change it


class SourceConfig(PluginConfig):
    """One source of a mixture."""

    path: str = Field(description="file, folder, glob, or id of a data set on the hub")
    split: str = Field(default="train", description="split, if the data set has several")
    subset: str | None = Field(default=None, description="subset of a data set on the hub")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub")
    weight: float | list[tuple[str | int, float]] = Field(
        default=1.0,
        description="share of the rows, relative to the other sources; or points [when, weight], "
        'such as [[0, 3], ["10M tokens", 1]], interpolated linearly',
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="its validation loss is logged as val_<name>/loss; null: name of the path",
    )

    @property
    def called(self) -> str:
        """Its name, by default that of its path."""
        stem = Path(self.path).name.partition(".")[0]
        return self.name or "".join(c if c.isalnum() or c in "_.-" else "_" for c in stem) or "data"

    def wish(self) -> Wish:
        """What to open."""
        return Wish(self.path, self.split, self.subset, self.revision)


SourceList = str | Lax[SourceConfig] | list[str] | Lax[list[SourceConfig]]


class RowsConfig(PluginConfig):
    """What to train and evaluate on, and how it becomes batches."""

    train: SourceList = Field(
        description="training data: a file (.jsonl, .json, .parquet, .csv, .txt, .arrow), a "
        "folder, a glob, an id of the hub, one of these with a split "
        "{path, split, subset, revision}, or a mixture [{path, weight, name}]",
        json_schema_extra=_LOCKED,
    )
    valid: SourceList | None = Field(
        default=None, description="evaluation data; null: a share of the training data"
    )
    valid_share: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of the training records held out for evaluation if `valid` is null, "
        "chosen by a hash of each; of a stream, the first records are held out; 0: no "
        "evaluation",
        json_schema_extra=_LOCKED,
    )
    valid_limit: int | None = Field(
        default=None,
        ge=1,
        description="number of evaluation rows, evenly spread; null: all, or 256 per stream with "
        "held-out records",
    )
    tokenizer: str = Field(
        min_length=1,
        description="folder of a tokenizer or model, a tokenizer.json, or an id of the hub",
    )
    tokenizer_revision: str | None = Field(
        default=None, description="commit, tag or branch on the hub"
    )
    seq_len: int = Field(
        default=1024, ge=2, description="tokens per packed row, and maximum tokens per padded row",
        json_schema_extra=_LOCKED,
    )  # fmt: skip
    batch_size: int = Field(
        default=8,
        ge=1,
        description="rows per training batch, over all processes",
        json_schema_extra=_LOCKED,
    )
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="rows per evaluation batch; null: batch_size"
    )
    streaming: bool = Field(
        default=False,
        description="read the training data while training, without storing its tokens; every "
        "process reads all of it",
        json_schema_extra=_LOCKED,
    )
    shuffle: int = Field(
        default=1000,
        ge=1,
        description="streaming: size of the shuffle buffer in records; 1: no shuffling",
        json_schema_extra=_LOCKED,
    )
    cache_dir: Lax[Path] | None = Field(
        default=None,
        description="folder for cached tokens; null: nexus-trainer in the user's cache folder",
    )
    num_workers: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="worker processes that prefetch; 0: none",
        json_schema_extra={"resume": "ignored"},
    )
    prefetch: int = Field(
        default=2,
        ge=1,
        le=1024,
        description="batches that each worker prefetches",
        json_schema_extra={"resume": "ignored"},
    )


def listed(wish: SourceList) -> list[SourceConfig]:
    """The sources of a setting.

    Raises:
        DataError: there are none.
    """
    if isinstance(wish, list):
        if not wish:
            raise DataError("the list of sources is empty; name at least one")
        return [SourceConfig(path=one) if isinstance(one, str) else one for one in wish]
    return [SourceConfig(path=wish) if isinstance(wish, str) else wish]
