"""The settings of the text data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from nexus_core.plugin import PluginConfig
from nexus_core.signatures import Lax

__all__ = ["DataTextConfig", "SourceConfig", "SourceList"]


_LOCKED: dict[str, Any] = {"resume": "locked"}  # a resumed run must not change it


class SourceConfig(PluginConfig):
    """One source of a mixture."""

    model_config = ConfigDict(populate_by_name=True)

    path: str = Field(description='file, folder, glob, or "stdlib"')
    weight: float = Field(
        default=1.0,
        gt=0,
        description="share of the rows of an epoch, relative to the other sources",
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="its validation loss is logged as val_<name>/loss; null: name of the file",
    )
    as_: Literal["text"] | None = Field(
        default=None, alias="as", description='"text": read every file as text, whatever its suffix'
    )

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        as_text = found.pop("as_", None) or found.pop("as", None)
        return found | ({"as": as_text} if as_text else {})


SourceList = str | list[str] | Lax[list[SourceConfig]]
IdsDtype = Literal[
    "uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64", "uint16be", "uint32be"
]


class DataTextConfig(PluginConfig):
    """What to train and evaluate on, and how it becomes batches."""

    train: SourceList = Field(
        default="stdlib",
        description="training text: a file, folder, glob, list of them, or a mixture [{path, "
        'weight, name}]; "stdlib" is the source of this Python\'s standard library',
        json_schema_extra=_LOCKED,
    )
    valid: SourceList | None = Field(
        default=None, description="evaluation text; null: a share of the training documents"
    )
    valid_share: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of the training documents held out for evaluation if `valid` is null, "
        "chosen by a hash of each document; 0: no evaluation",
    )
    valid_limit: int | None = Field(
        default=None,
        ge=1,
        description="maximum tokens to evaluate on, in rows spread evenly over the evaluation "
        "text and the same each time; null: all of it",
    )
    batching: Literal["pack", "pad"] = Field(
        default="pack",
        description="pack: documents concatenated and cut into rows of seq_len; pad: one document "
        "per row, truncated to max_length",
        json_schema_extra=_LOCKED,
    )
    seq_len: int = Field(
        default=512, ge=2, description="tokens per packed row", json_schema_extra=_LOCKED
    )
    max_length: int | None = Field(
        default=None, ge=2, description="maximum tokens per padded row; null: seq_len"
    )
    batch_size: int = Field(
        default=8,
        ge=1,
        description="rows per training batch, over all processes",
        json_schema_extra=_LOCKED,
    )
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="rows per evaluation batch; null: batch_size"
    )
    tokenizer: str = Field(
        default="auto",
        description='"bytes" (259 ids), "bytes256" (256: byte 0 ends a document), or the path of '
        'a tokenizer.json; "auto": the one saved with prepared data, else bytes',
    )
    eos_token: str | None = Field(
        default=None, description="end-of-document token; null: found by its usual names"
    )
    pad_token: str | None = Field(
        default=None, description="padding token; null: found by its usual names, else eos"
    )
    vocab_size: int | None = Field(
        default=None,
        ge=1,
        le=2**32,
        description="vocabulary size of ids without a tokenizer; null: highest id + 1",
    )
    ids_dtype: IdsDtype | None = Field(
        default=None,
        description="dtype of id files that do not declare one; null: uint16, after a check",
        json_schema_extra=_LOCKED,
    )
    text_key: str = Field(
        default="text", description="key or column of the text in .jsonl and .parquet"
    )
    one_file_one_document: bool = Field(
        default=False, description="treat each text file as one document instead of one per line"
    )
    invalid_utf8: Literal["error", "replace", "skip"] = Field(
        default="error",
        description="what to do with bytes that are not UTF-8: stop, replace them with U+FFFD, or "
        "skip the document",
    )
    cache_dir: Lax[Path] | None = Field(
        default=None,
        description="folder for indexes and tokenized copies; null: nexus-trainer in the user's "
        "cache folder",
    )
    num_workers: int = Field(
        default=0, ge=0, le=1024, description="worker processes that prefetch; 0: none"
    )
    prefetch: int = Field(
        default=2, ge=1, le=1024, description="batches that each worker prefetches"
    )
