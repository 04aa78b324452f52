"""Text as training data."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from nexus_core.bases.loader import ResumableLoader
from nexus_core.data import RunData
from nexus_core.errors import CheckpointError, ConfigError, hint_out
from nexus_core.plugin import Plugin, hookimpl
from nexus_plugins._shared.files import write_whole
from nexus_plugins.data_text.baselines import (
    bigram_bits_per_byte,
    compared,
    gzip_bits_per_byte,
    xz_bits_per_byte,
)
from nexus_plugins.data_text.config import DataTextConfig
from nexus_plugins.data_text.dataset import TextData, open_data
from nexus_plugins.data_text.load import load_tokenizer
from nexus_plugins.data_text.rows import Rows, as_it_is
from nexus_plugins.data_text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.plugin import StateDict

__all__ = ["DATA", "DataTextPlugin"]

DATA = "data.json"  # in the run folder: fingerprints of its initial data
TOKENIZER = "tokenizer.json"  # likewise

_SAMPLE = 4 << 20  # bytes of training text that the bigram model counts


class DataTextPlugin(Plugin[DataTextConfig]):
    """Trains on text: files are split into documents, tokenized, and packed into rows.

    The order of rows is a function of the engine's seed and the epoch. The tokenizer is saved with
    the run; resuming with a different tokenizer is an error.
    """

    config_class = DataTextConfig
    slot: ClassVar[str | None] = "data"
    _data: TextData | None = None
    _resumed: StateDict | None = None

    @hookimpl
    def make_data(self, engine: Engine) -> RunData:
        """Open and check the sources, and tokenize them if needed.

        Raises:
            DataError: a source cannot be read or used.
        """
        self._data = data = open_data(self.config)
        if engine.ranks.is_main:
            for remark in data.remarks:
                warnings.warn(remark, RuntimeWarning, stacklevel=2)
        self._check_resumed()
        config = self.config
        train = ResumableLoader(
            data.train,
            config.batch_size,
            engine.seed,
            collate=as_it_is,
            num_workers=config.num_workers,
            prefetch=config.prefetch,
            pin_memory=engine.device.type == "cuda",
            ranks=engine.ranks,
        )
        valid = {
            name: ResumableLoader(
                rows,
                max(config.eval_batch_size or config.batch_size, engine.ranks.size),
                shuffle=False,
                collate=as_it_is,
                pin_memory=engine.device.type == "cuda",
                ranks=engine.ranks,
            )
            for name, rows in data.valid.items()
        }
        return RunData(train, valid, data.tokenizer)

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Save the tokenizer with the run, or check that it matches the one saved there.

        Raises:
            CheckpointError: the run folder contains a different tokenizer.
            ConfigError: the model's vocabulary is smaller than the data's.
        """
        if self._data is not None:
            _check_model(engine.model, self._data.tokenizer)
        if self._data is None or engine.out is None or not engine.ranks.is_main:
            return
        path = engine.out / DATA
        if not path.exists():
            valid = {name: rows.fingerprint for name, rows in self._data.valid.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"train": self._data.fingerprint, "valid": valid}
            write_whole(path, json.dumps(facts).encode() + b"\n")
        path = engine.out / TOKENIZER
        raw = self._data.tokenizer.to_json().encode()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, raw)
        elif path.read_bytes() != raw:
            raise CheckpointError(
                f"{path} is not the {self._data.tokenizer} of this run's data; use another "
                "folder, ",
                hint_out(),
                ", or the tokenizer with which the run in that folder started",
            )

    def state_dict(self) -> StateDict:
        if self._data is None:
            return {}
        tokenizer = self._data.tokenizer
        return {
            "tokenizer": tokenizer.hash,
            "vocabulary": tokenizer.size,
            "kind": tokenizer.kind,
            "rows": len(self._data.train),
            "fingerprint": self._data.fingerprint,
            "valid": {name: rows.fingerprint for name, rows in self._data.valid.items()},
        }

    def load_state_dict(self, state: StateDict) -> None:
        self._resumed = state
        self._check_resumed()

    def _check_resumed(self) -> None:
        if self._data is None or self._resumed is None:
            return
        tokenizer, saved = self._data.tokenizer, self._resumed
        if saved["tokenizer"] != tokenizer.hash or saved["vocabulary"] != tokenizer.size:
            raise CheckpointError(
                f"the checkpoint was trained with a {saved['kind']} tokenizer of "
                f"{saved['vocabulary']} ids, hash {str(saved['tokenizer'])[:12]}, but the data has "
                f"a {tokenizer}; set data_text.tokenizer to the one saved in the run folder"
            )
        for what in self._differences(saved):
            warnings.warn(what, RuntimeWarning, stacklevel=2)

    def _differences(self, saved: StateDict) -> Iterator[str]:
        """How the data differs from the checkpoint's, if that has fingerprints."""
        assert self._data is not None
        train = self._data.train
        if saved["rows"] != len(train):
            yield (
                f"the checkpoint was trained on {saved['rows']} rows per epoch, but the data "
                f"now has {len(train)}: the rows will not come in the order of an uninterrupted run"
            )
        elif saved.get("fingerprint", train.fingerprint) != train.fingerprint:
            yield (
                "the training text is not that of the checkpoint (as many rows, but other content "
                f"or another order of files: fingerprint {train.fingerprint}, not "
                f"{saved['fingerprint']}): the run will differ from an uninterrupted one"
            )
        valid = {name: rows.fingerprint for name, rows in self._data.valid.items()}
        if saved.get("valid", valid) != valid:
            yield (
                "the evaluation text is not that of the checkpoint: losses before and after, and "
                "the best of them, cannot be compared"
            )

    def codec_in(self, run: Path) -> Tokenizer:
        """The tokenizer saved in a run folder."""
        names = self.config.eos_token, self.config.pad_token
        return load_tokenizer(str(run / TOKENIZER), *names)

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Report the baselines on the evaluation text, and notes about the data."""
        reached = engine.metrics.get("val/bits_per_byte", math.nan)
        rows = {"compared": compared(reached, self.baselines()), "data": "\n".join(self.notes())}
        return {label: text for label, text in rows.items() if text}

    def notes(self) -> list[str]:
        """Notes about the data: tokens left out, a limited evaluation."""
        return self._data.notes() if self._data is not None else []

    def baselines(self) -> dict[str, float]:
        """Bits per byte of gzip, xz and a bigram model on the evaluation text "val".

        The bigram model counts rows spread evenly over the training text, 4 MB at most.
        """
        if self._data is None or "val" not in self._data.valid:
            return {}
        valid = _text(self._data, self._data.valid["val"])
        train = _text(self._data, self._data.train, _SAMPLE)
        if not valid or not train:
            return {}
        return {
            "gzip": gzip_bits_per_byte(valid),
            "xz": xz_bits_per_byte(valid),
            "bigram": bigram_bits_per_byte(train, valid),
        }


def _check_model(model: object, tokenizer: Tokenizer) -> None:
    """Check that the model's vocabulary, if it reports one, covers the data's."""
    inner = getattr(model, "module", model)
    embeddings = getattr(inner, "get_input_embeddings", None)
    known = getattr(embeddings(), "num_embeddings", None) if callable(embeddings) else None
    if isinstance(known, int) and known < tokenizer.size:
        raise ConfigError(
            f"the model has {known:,} ids, but the data has {tokenizer.size:,} ({tokenizer}); "
            "enlarge the model's embedding (resize_token_embeddings), or set data_text.tokenizer "
            "to the model's own"
        )


def _text(data: TextData, rows: Rows, limit: int | None = None) -> bytes:
    """The text of evenly spaced rows, about `limit` tokens."""
    count = len(rows) if limit is None else min(len(rows), max(1, limit // rows.length))
    picked = np.arange(count) * len(rows) // count
    return b"".join(map(data.tokenizer.text_bytes, rows.tokens(picked.tolist())))
