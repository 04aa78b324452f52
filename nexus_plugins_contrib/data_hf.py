"""Hugging Face datasets as training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from nexus_plugins._shared.cache import fingerprint
from nexus_plugins_contrib._shared.examples import Encoder, Example, Fault, Tokens
from nexus_plugins_contrib._shared.reading import RowsPlugin
from nexus_plugins_contrib._shared.records import Record
from nexus_plugins_contrib._shared.rows import Batching
from nexus_plugins_contrib._shared.settings import RowsConfig
from nexus_plugins_contrib._shared.tokenizer import HubTokenizer

__all__ = ["DataHfConfig", "DataHfPlugin"]


class DataHfConfig(RowsConfig):
    """What to train and evaluate on, which columns to use, and how to batch them."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"train": "corpus.parquet", "tokenizer": "models/mine"}]}
    )

    batching: Literal["pack", "pad"] = Field(
        default="pack",
        description="pack: documents concatenated and cut into rows of seq_len; pad: one document "
        "per row, truncated to seq_len",
        json_schema_extra={"resume": "locked"},
    )
    column: str = Field(default="text", description="column of the text, or of token ids")
    labels_column: str | None = Field(
        default=None,
        description="column of labels, as long as the ids and aligned with them (not shifted), "
        "-100 to ignore; null: train on all",
    )
    special_tokens: bool = Field(
        default=True,
        description="add the special tokens that the tokenizer adds to a text, such as bos",
    )
    on_bad_rows: Literal["error", "skip"] = Field(
        default="error", description="handling of unusable records; skip: leave out and count them"
    )  # fmt: skip


class DataHfPlugin(RowsPlugin[DataHfConfig]):
    """Trains on Hugging Face datasets, from a folder or the Hub.

    The order of rows is a function of the seed and the row number, even for mixtures with changing
    weights; it does not depend on the number of ranks, and a run resumes at the right row. Streams
    are read during training, and save their position.
    """

    config_class = DataHfConfig
    counts_bytes: ClassVar[bool] = True

    def encoder(self, tokenizer: HubTokenizer) -> Encoder:
        """The encoder of records."""
        return _Documents(self.config, tokenizer)

    def batching(self) -> Batching:
        """Packed rows are cut from the concatenated documents."""
        return "cut" if self.config.batching == "pack" else "pad"

    def skips(self) -> bool:
        """Whether unusable records are skipped."""
        return self.config.on_bad_rows == "skip"


class _Documents:
    """Makes a document from each record: its text as ids, or its ids."""

    sequences = 1

    def __init__(self, config: DataHfConfig, tokenizer: HubTokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        chosen = (config.column, config.labels_column, config.special_tokens)
        self.key = fingerprint("documents", tokenizer.hash, *chosen)

    def encode(self, records: Sequence[Record]) -> list[list[Example] | Fault]:
        """The document of each record, or why it has none."""
        texts = [self._value(record) for record in records]
        places = [number for number, text in enumerate(texts) if isinstance(text, str)]
        found: list[list[Example] | Fault] = [
            text if isinstance(text, Fault) else self._of_ids(text, record)
            for text, record in zip(texts, records, strict=True)
        ]
        if places:
            made = self._tokenizer.inner(
                [texts[place] for place in places],
                add_special_tokens=self._config.special_tokens,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            for place, ids in zip(places, made, strict=True):
                found[place] = self._of_text(ids)
        return found

    def _value(self, record: Record) -> Any:
        column = self._config.column
        if column not in record:
            return Fault(
                f"no column '{column}'",
                f"no value in column '{column}'; the record has "
                f"{', '.join(record) or 'none'}; set data_hf.column",
            )
        return record[column]

    def _of_text(self, ids: list[int]) -> list[Example] | Fault:
        if not ids or ids == [self._tokenizer.eos]:
            return Fault("empty text", "its text is empty")
        if ids[-1] != self._tokenizer.eos:
            ids.append(self._tokenizer.eos)
        return [(Tokens(np.array(ids, np.int64), np.ones(len(ids), np.bool_)),)]

    def _of_ids(self, value: Any, record: Record) -> list[Example] | Fault:
        if isinstance(value, str):
            return []  # encoded together with the others
        ids, fault = _numbers(value, self._config.column)
        if fault is not None:
            return fault
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= self._tokenizer.size:
            return Fault(
                "ids outside the vocabulary",
                f"its ids are empty or outside the tokenizer's {self._tokenizer.size:,}",
            )
        learnt = np.ones(len(ids), np.bool_)
        if self._config.labels_column is not None:
            labels, fault = _numbers(
                record.get(self._config.labels_column), self._config.labels_column
            )
            if fault is not None:
                return fault
            learnt = labels != -100
            if len(labels) != len(ids) or (labels != ids)[learnt].any():
                return Fault(
                    "labels that are not the ids",
                    f"its {len(labels)} labels are neither -100 nor the ids at the same positions "
                    f"({len(ids)})",
                )
        return [(Tokens(ids, learnt),)]


def _numbers(value: Any, column: str) -> tuple[np.ndarray[Any, np.dtype[np.int64]], Fault | None]:
    """A list of integers, or why it is not one."""
    if isinstance(value, list) and all(type(one) is int for one in value):
        return np.array(value, np.int64), None
    fault = Fault(
        f"column '{column}' without text or ids",
        f"its '{column}' is {type(value).__name__}; expected text, or a list of ids",
    )
    return np.zeros(0, np.int64), fault
