"""From the settings of a data plugin to the loaders of a run."""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from nexus_core import CheckpointError, ConfigError, DataError, Plugin, RunData, hookimpl
from nexus_core.bases.loader import ResumableLoader
from nexus_plugins._shared.cache import cache_folder, fingerprint
from nexus_plugins._shared.files import write_whole
from nexus_plugins._shared.paths import of_setting
from nexus_plugins_contrib._shared.examples import Encoder, Examples, encoded, first_held_out
from nexus_plugins_contrib._shared.mixture import Mixture, MixtureOrder, Ramp
from nexus_plugins_contrib._shared.rows import Batching, Cut, Layout, One, Rows, Together
from nexus_plugins_contrib._shared.settings import RowsConfig, SourceConfig, listed
from nexus_plugins_contrib._shared.sources import open_records, open_stream
from nexus_plugins_contrib._shared.streams import Streamed, StreamLoader
from nexus_plugins_contrib._shared.tokenizer import HubTokenizer, open_tokenizer
from nexus_plugins_contrib._shared.weights import described, ramp

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.plugin import StateDict

__all__ = ["RowsPlugin"]

TOKENIZER = "tokenizer"  # subfolder of the run folder
_OF_STREAM = 256  # rows of a stream to evaluate on, unless a limit is set


ConfigT = TypeVar("ConfigT", bound=RowsConfig)


@dataclass(frozen=True)
class _Opened:
    """The data of a run, and what the user should know about it."""

    data: RunData
    fingerprint: str
    notes: list[str]


class RowsPlugin(Plugin[ConfigT]):
    """The base of the plugins that train on dataset records."""

    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "data"
    counts_bytes: ClassVar[bool] = False
    """Whether evaluation batches count the bytes of text of their labels."""
    tokenizer: HubTokenizer | None = None
    _opened: _Opened | None = None
    _resumed: StateDict | None = None

    @abstractmethod
    def encoder(self, tokenizer: HubTokenizer) -> Encoder:
        """The encoder of records."""

    @abstractmethod
    def batching(self) -> Batching:
        """How examples become rows."""

    def skips(self) -> bool:
        """Whether unusable records are skipped and counted."""
        return False

    @hookimpl
    def make_data(self, engine: Engine) -> RunData:
        """Open and check the sources, and tokenize them if needed.

        Raises:
            DataError: a source cannot be read or used.
        """
        config = self.config
        self.tokenizer = of_setting(
            f"{self.name}.tokenizer", open_tokenizer, config.tokenizer, config.tokenizer_revision
        )
        opener = _Opener(self, self.encoder(self.tokenizer), self.tokenizer, engine)
        self._opened = opener.open()
        if engine.ranks.is_main:
            for note in self._opened.notes:
                warnings.warn(note, RuntimeWarning, stacklevel=2)
        self._check_resumed()
        return self._opened.data

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Save the tokenizer, with its chat template, in the run folder.

        Raises:
            ConfigError: the model's vocabulary is smaller than the data's.
        """
        if self.tokenizer is None:
            return
        _check_model(engine.model, self.tokenizer, self.name)
        if engine.out is None or not engine.ranks.is_main:
            return
        folder = engine.out / TOKENIZER
        if not folder.exists():
            self.tokenizer.save(folder)
            write_whole(folder / "hash.json", json.dumps(self.tokenizer.hash).encode())

    @staticmethod
    def codec_in(run: Path) -> HubTokenizer:
        """The tokenizer saved in a run folder."""
        return open_tokenizer(str(run / TOKENIZER))

    @hookimpl
    def summarize(self) -> dict[str, str]:
        """Notes about the data: what was skipped or truncated."""
        notes = self._opened.notes if self._opened is not None else []
        return {"data": "\n".join(notes)} if notes else {}

    def state_dict(self) -> StateDict:
        """The identity of the tokenizer and the data."""
        if self._opened is None or self.tokenizer is None:
            return {}
        return {"tokenizer": self.tokenizer.hash, "data": self._opened.fingerprint}

    def load_state_dict(self, state: StateDict) -> None:
        """Check that tokenizer and data are those of the checkpoint, once they are open."""
        self._resumed = state
        self._check_resumed()

    def _check_resumed(self) -> None:
        if self._opened is None or self._resumed is None or self.tokenizer is None:
            return
        if self._resumed["tokenizer"] != self.tokenizer.hash:
            raise CheckpointError(
                f"the checkpoint was trained with a different tokenizer or chat template than "
                f"{self.tokenizer}; set {self.name}.tokenizer to {TOKENIZER}/ in the run folder"
            )
        if self._resumed["data"] != self._opened.fingerprint:
            warnings.warn(
                "the training data differs from the checkpoint's (source, content, order "
                "or packing): this run does not exactly continue it",
                RuntimeWarning,
                stacklevel=2,
            )


class _Opener:
    """Opens the sources of a run."""

    def __init__(
        self, plugin: RowsPlugin[Any], encoder: Encoder, tokenizer: HubTokenizer, engine: Engine
    ) -> None:
        self._plugin, self._name = plugin, plugin.name
        self._config: RowsConfig = plugin.config
        self._encoder, self._tokenizer, self._engine = encoder, tokenizer, engine
        self._batching = plugin.batching()
        self._cache = cache_folder(self._config.cache_dir)
        self._pins = engine.device.type == "cuda"
        self._notes: list[str] = []

    def open(self) -> _Opened:
        """Training and evaluation data.

        Raises:
            DataError: a source cannot be read or used.
        """
        sources = listed(self._config.train)
        names = [source.called for source in sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"two sources are called '{twice}'; give them different names")
        train, held_out = (
            of_setting(f"{self._name}.train", self._streams, sources)
            if self._config.streaming
            else of_setting(f"{self._name}.train", self._rows, sources)
        )
        valid = (
            {}
            if self._config.valid is None
            else of_setting(f"{self._name}.valid", self._apart, listed(self._config.valid))
        )
        loaders = self._evaluations(valid or held_out)
        found = RunData(train, loaders, self._tokenizer)
        return _Opened(found, str(cast(Any, train).fingerprint), self._notes)

    def _rows(self, sources: Sequence[SourceConfig]) -> tuple[ResumableLoader, dict[str, Examples]]:
        share = self._config.valid_share if self._config.valid is None else 0.0
        pairs = {source.called: self._encoded(source, share) for source in sources}
        layouts = [self._layout(train, complete=False) for train, _ in pairs.values()]
        for name, layout in zip(pairs, layouts, strict=True):
            if not len(layout):
                raise DataError(
                    f"the training data of '{name}' has too few tokens for a row of "
                    f"{self._config.seq_len}; lower {self._name}.seq_len, or add data"
                )
        rows = Rows(layouts, self._batching, self._tokenizer.pad)
        if rows.lost:
            self._notes.append(f"{rows.lost:,} tokens of the training data {self._lost()}")
        ramps, seed = self._ramps(sources), self._engine.seed
        loader = ResumableLoader(
            _Described(rows, described(ramps)),
            self._config.batch_size,
            seed,
            order=MixtureOrder(Mixture(ramps, seed), rows.sizes) if ramps else None,
            collate=_as_it_is,
            num_workers=self._config.num_workers,
            prefetch=self._config.prefetch,
            pin_memory=self._pins,
            ranks=self._engine.ranks,
        )
        return loader, {name: held for name, (_, held) in pairs.items() if len(held)}

    def _streams(self, sources: Sequence[SourceConfig]) -> tuple[StreamLoader, dict[str, Examples]]:
        config = self._config
        if config.num_workers:
            raise ConfigError(
                f"{self._name}.num_workers has no effect with {self._name}.streaming; remove "
                "one of them"
            )
        share = config.valid_share if config.valid is None else 0.0
        streams = [
            Streamed(
                source.called,
                partial(open_stream, source.wish()),
                self._encoder,
                self._batching,
                config.seq_len,
                self._plugin.skips(),
                share,
                config.shuffle,
                self._engine.seed + number,
            )
            for number, source in enumerate(sources)
        ]
        keys, ramps = [stream.open().content for stream in streams], self._ramps(sources)
        known = fingerprint(
            *(keys, self._encoder.key, self._batching, config.seq_len, config.shuffle),
            *(share, described(ramps), self._engine.seed),
        )
        loader = StreamLoader(
            streams,
            Mixture(ramps, self._engine.seed) if ramps else None,
            config.batch_size,
            self._tokenizer.pad,
            self._engine.ranks,
            known[:16],
        )
        held = {stream.name: self._first_held_out(stream) for stream in streams if share}
        return loader, {name: some for name, some in held.items() if len(some)}

    def _first_held_out(self, stream: Streamed) -> Examples:
        return first_held_out(
            stream.open(),
            self._encoder,
            self._cache,
            skips=stream.skips,
            share=stream.share,
            rows=self._config.valid_limit or _OF_STREAM,
            length=None if self._batching == "pad" else stream.length,
        )

    def _apart(self, sources: Sequence[SourceConfig]) -> dict[str, Examples]:
        return {source.called: self._encoded(source, 0.0)[0] for source in sources}

    def _encoded(self, source: SourceConfig, share: float) -> tuple[Examples, Examples]:
        skips = self._plugin.skips()
        found = encoded(
            open_records(source.wish()), self._encoder, self._cache, skips=skips, share=share
        )
        for kind, (count, first) in found[0].skipped.items():
            self._notes.append(
                f"{count:,} records of '{source.called}' skipped: {kind} (first: {first})"
            )
        return found

    def _evaluations(self, sources: dict[str, Examples]) -> dict[str, ResumableLoader]:
        """All sources together as "val" and, if there are several, each as "val_<name>"."""
        groups = {"val": [*sources.values()]} if sources else {}
        if len(sources) > 1:
            groups |= {f"val_{name}": [examples] for name, examples in sources.items()}
        size = self._config.eval_batch_size or self._config.batch_size
        return {
            name: ResumableLoader(
                Rows(
                    [self._layout(one, complete=True) for one in group],
                    self._batching,
                    self._tokenizer.pad,
                    self._config.valid_limit,
                    self._tokenizer.token_bytes if self._plugin.counts_bytes else None,
                ),
                max(size, self._engine.ranks.size),
                shuffle=False,
                collate=_as_it_is,
                pin_memory=self._pins,
                ranks=self._engine.ranks,
            )
            for name, group in groups.items()
        }

    def _layout(self, examples: Examples, complete: bool) -> Layout:
        length = self._config.seq_len
        if self._batching == "cut":
            return Cut(examples, length, complete)
        return (Together if self._batching == "pack" else One)(examples, length)

    def _ramps(self, sources: Sequence[SourceConfig]) -> list[Ramp]:
        """The weights of a mixture; empty for a single source."""
        tokens = None if self._batching == "pad" else self._config.seq_len
        return [ramp(one, tokens, self._name) for one in sources] if len(sources) > 1 else []

    def _lost(self) -> str:
        if self._batching == "cut":
            return "are not trained on: they are left over after the last full row"
        return f"are truncated ({self._name}.seq_len)"


class _Described:
    """Rows whose fingerprint includes their mixture."""

    def __init__(self, rows: Rows, mixed: list[Any]) -> None:
        self.rows = rows
        self.fingerprint = fingerprint(rows.fingerprint, mixed)[:16]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        return self.rows.__getitems__(numbers)


def _check_model(model: object, tokenizer: HubTokenizer, name: str) -> None:
    """Check that the model's vocabulary, if it reports one, covers the tokenizer's."""
    inner = getattr(model, "module", model)
    embeddings = getattr(inner, "get_input_embeddings", None)
    known = getattr(embeddings(), "num_embeddings", None) if callable(embeddings) else None
    if isinstance(known, int) and known < tokenizer.size:
        raise ConfigError(
            f"the model has {known:,} ids, but the {tokenizer} has more; set {name}.tokenizer to "
            "the model's own, or enlarge its embedding (resize_token_embeddings)"
        )


def _as_it_is(batch: Any) -> Any:
    return batch
