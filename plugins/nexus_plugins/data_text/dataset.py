"""From the settings to rows: the sources, their tokenizer, and what is held out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nexus_core.errors import DataError
from nexus_plugins.data_text.binary import TokenFile
from nexus_plugins.data_text.cache import cache_folder, fingerprint, signature
from nexus_plugins.data_text.config import DataTextConfig, SourceConfig, SourceList
from nexus_plugins.data_text.embedded import standard_library
from nexus_plugins.data_text.formats import HELD_OUT, TRAIN, Reading, find_files, is_text
from nexus_plugins.data_text.index import open_text, scan_ids, split_documents
from nexus_plugins.data_text.load import load_tokenizer, tokenizer_beside
from nexus_plugins.data_text.prepare import Job, prepare
from nexus_plugins.data_text.rows import PackedRows, PaddedRows, Rows
from nexus_plugins.data_text.stream import MappedFile, Named, Origin, Stream, TokenStream, chained
from nexus_plugins.data_text.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer

__all__ = ["PreparedOrigin", "Streams", "TextData", "open_data", "open_streams"]

_EMBEDDED = "stdlib"
_MOST_MAPPED = 64  # text files to keep open; more are put into one file of ids


@dataclass(frozen=True)
class TextData:
    """Everything that a run reads.

    Args:
        train: the rows of an epoch.
        valid: the rows of each evaluation, by the prefix of its metrics.
        tokenizer: of all of them.
        remarks: what was left out while text became ids.
    """

    train: Rows
    valid: dict[str, Rows]
    tokenizer: Tokenizer
    remarks: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What a user should know: which tokens are left out, and what is evaluated."""
        found = list(self.remarks)
        if self.train.lost:
            found.append(f"{self.train.lost:,} tokens of the training text {self.train.LOST}")
        for name, rows in self.valid.items():
            if len(rows) < sum(rows.counts):
                found.append(
                    f"{name} is measured on {len(rows):,} of {sum(rows.counts):,} rows, the same "
                    "ones each time (data_text.valid_limit)"
                )
        return found


@dataclass(frozen=True)
class _Source:
    """A source whose files have been found; the embedded text has none.

    Args:
        name: its own.
        weight: its share of the rows.
        files: to train on.
        held_out: of those that are prepared data, what was held out for evaluation.
    """

    name: str
    weight: float
    files: tuple[Path, ...]
    held_out: Mapping[Path, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Streams:
    """The sources by name: what to train on, what to evaluate on, and the tokenizer of all."""

    train: dict[str, Stream]
    valid: dict[str, Stream]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    remarks: tuple[str, ...]


def open_data(config: DataTextConfig) -> TextData:
    """Find, check and open everything that the settings name, cut into rows.

    Raises:
        DataError: something is missing, damaged or does not fit together.
    """
    streams = open_streams(config)
    train, valid = _training(config, streams), _evaluations(config, streams)
    return TextData(train, valid, streams.tokenizer, streams.remarks)


def open_streams(config: DataTextConfig) -> Streams:
    """Find, check and open everything that the settings name.

    Raises:
        DataError: something is missing, damaged or does not fit together.
    """
    sources = _find(config.train)
    apart = [] if config.valid is None else [_instead(one) for one in _find(config.valid)]
    files = [path for one in (*sources, *apart) for path in one.files]
    opener = _Opener(config, *_tokenizer(config, files))
    share = config.valid_share if config.valid is None else 0.0
    opened = {source.name: opener.open(source, share) for source in sources}
    valid = {name: held_out for name, (_, held_out) in opened.items()} if share else {}
    return Streams(
        {name: train for name, (train, _) in opened.items()},
        valid | {one.name: opener.open(one, 0.0)[0] for one in apart},
        tuple(source.weight for source in sources),
        opener.tokenizer,
        tuple(opener.remarks),
    )


def _training(config: DataTextConfig, streams: Streams) -> Rows:
    kind, length = _shape(config)
    rows = kind(
        list(streams.train.values()),
        streams.tokenizer,
        length,
        complete=False,
        weights=streams.weights,
    )
    for (name, stream), count in zip(streams.train.items(), rows.counts, strict=True):
        if not count:
            raise DataError(
                f"the training text of '{name}' has {len(stream):,} tokens, too few for a row of "
                f"{length}; lower data_text.seq_len, or add text"
            )
    return rows


def _evaluations(config: DataTextConfig, streams: Streams) -> dict[str, Rows]:
    """All sources together as "val", and where there are several, each as "val_<name>"."""
    kind, length = _shape(config)
    for name, stream in streams.valid.items():
        if not len(stream):
            raise DataError(
                f"no document of '{name}' is left for the evaluation; set data_text.valid to a "
                "file of its own, raise data_text.valid_share, or set it to 0 for none"
            )
    limit = config.valid_limit and max(1, config.valid_limit // length)
    groups = {"val": list(streams.valid.values())} if streams.valid else {}
    if len(streams.valid) > 1:
        groups |= {f"val_{name}": [stream] for name, stream in streams.valid.items()}
    return {
        name: kind(group, streams.tokenizer, length, limit=limit) for name, group in groups.items()
    }


def _shape(config: DataTextConfig) -> tuple[type[Rows], int]:
    if config.batching == "pack":
        return PackedRows, config.seq_len
    return PaddedRows, config.max_length or config.seq_len


def _find(wish: SourceList) -> list[_Source]:
    """The sources of a setting; a path or a list of paths is one source."""
    if isinstance(wish, str):
        return [_source(SourceConfig(path=wish))]
    paths = [one for one in wish if isinstance(one, str)]
    if paths:
        return [_Source("text", 1.0, *_files(paths))]
    sources = [_source(one) for one in wish if isinstance(one, SourceConfig)]
    if not sources:
        raise DataError("the list of sources is empty; name at least one file, folder or glob")
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two sources are called '{twice}'; give them names of their own (name:)")
    return sources


def _source(wish: SourceConfig) -> _Source:
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(wish.path).name.partition(".")[0])
    name = wish.name or stem or "text"
    if wish.path == _EMBEDDED:
        return _Source(name, wish.weight, ())
    return _Source(name, wish.weight, *_files([wish.path]))


def _files(paths: Sequence[str]) -> tuple[tuple[Path, ...], dict[Path, Path]]:
    """The files to train on, and which of them have a part that was held out.

    Such a part is what a folder or a glob brings along; a file that is named by itself is meant.
    """
    files: list[Path] = []
    held_out: dict[Path, Path] = {}
    for one in paths:
        found = find_files(one)
        pairs = {path: path.with_name(HELD_OUT) for path in found if path.name == TRAIN}
        pairs = {path: part for path, part in pairs.items() if part in found}
        held_out |= pairs
        files += [path for path in found if path not in pairs.values()]
    return tuple(files), held_out


def _instead(source: _Source) -> _Source:
    """Of prepared data that is named for evaluation, what was held out."""
    files = tuple(source.held_out.get(path, path) for path in source.files)
    return _Source(source.name, source.weight, files)


def _tokenizer(config: DataTextConfig, files: list[Path]) -> tuple[Tokenizer, str]:
    """The tokenizer of the run, and the name or path under which it is loaded."""
    if config.tokenizer != "auto":
        special = (config.eos_token, config.pad_token)
        return load_tokenizer(config.tokenizer, *special), config.tokenizer
    ids = [path for path in files if not is_text(path)]
    beside = next(filter(None, map(tokenizer_beside, ids)), None)
    if beside is not None:
        return load_tokenizer(str(beside), config.eos_token, config.pad_token), str(beside)
    headers = [TokenFile(path).header for path in ids if path.with_suffix(".idx").exists()]
    plain = ByteTokenizer()
    if not ids or any(header.tokenizer == plain.hash for header in headers):
        return plain, "bytes"
    known = config.vocab_size or max((header.vocabulary for header in headers), default=0)
    return IdTokenizer(known or _highest(ids, config) + 1), "auto"


def _highest(ids: list[Path], config: DataTextConfig) -> int:
    cache = cache_folder(config.cache_dir)
    folders = {path.parent for path in ids}
    beside = [folder / "val.bin" for folder in folders if (folder / "val.bin").is_file()]
    return max(scan_ids(path, None, cache).highest for path in {*ids, *beside})


class _Opener:
    """Opens sources, one like the other."""

    def __init__(self, config: DataTextConfig, tokenizer: Tokenizer, name: str) -> None:
        self.tokenizer = tokenizer
        self.remarks: list[str] = []
        self._name = name
        self._config = config
        self._cache = cache_folder(config.cache_dir)
        self._reading = Reading(config.text_key, config.one_file_one_document, config.invalid_utf8)

    def open(self, source: _Source, share: float) -> tuple[Stream, Stream]:
        """The documents to train on and those to evaluate on (none of them if share is 0)."""
        if not source.files:
            return self._embedded(share)
        texts = [path for path in source.files if is_text(path)]
        ids = [path for path in source.files if not is_text(path)]
        pairs = [self._pair(path, source.held_out.get(path), share) for path in ids]
        if texts and self._can_map(texts):
            assert self.tokenizer.eos is not None
            settings = (self._reading, share, self.tokenizer.eos, self._cache)
            pairs += [[*open_text(path, *settings)] for path in texts]
        elif texts:
            pairs.append(self._converted(texts, share))
        train = chained([pair[0] for pair in pairs])
        return train, chained([stream for pair in pairs for stream in pair[1:]])

    def _can_map(self, texts: list[Path]) -> bool:
        """Whether the bytes of the files can be used as ids where they lie."""
        lines = all(path.name.lower().endswith(".txt") for path in texts)
        strict = self._reading.invalid_utf8 == "error"
        plain = isinstance(self.tokenizer, ByteTokenizer)
        return plain and lines and strict and len(texts) <= _MOST_MAPPED

    def _embedded(self, share: float) -> tuple[Stream, Stream]:
        train, valid = standard_library(share)
        return self._in_memory(train), self._in_memory(valid)

    def _in_memory(self, documents: Sequence[tuple[str, bytes]]) -> Stream:
        encoded = self.tokenizer.encode_documents([text for _, text in documents])
        starts = np.concatenate([[0], encoded.lengths.cumsum()])
        origin = Named(tuple((name, number) for number, (name, _) in enumerate(documents)))
        return TokenStream(encoded.ids, starts, lengths=encoded.token_bytes, origin=origin)

    def _converted(self, texts: list[Path], share: float) -> list[Stream]:
        """Text as ids in the cache, made on first use."""
        config = self._config
        job = Job(
            tokenizer=self._name,
            eos_token=config.eos_token,
            pad_token=config.pad_token,
            share=share,
            **asdict(self._reading),
        )
        key = fingerprint("tokens", asdict(job), self.tokenizer.hash, signature(texts))
        folder = self._cache / f"tokens-{key}"
        size = sum(path.stat().st_size for path in texts)
        with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
            summary = prepare(
                texts, folder, job, os.cpu_count() or 1, lambda done: bar.update(done)
            )
        if summary.skipped or summary.replaced or summary.empty:
            self.remarks.append(
                f"{summary.skipped:,} documents are not UTF-8 and are left out, "
                f"{summary.replaced:,} have bytes replaced, {summary.empty:,} are empty"
            )
        names = ("train.bin", "val.bin") if share else ("train.bin",)
        return [stream for name in names for stream in self._ids(folder / name, 0.0)]

    def _pair(self, path: Path, held_out: Path | None, share: float) -> list[Stream]:
        """Like `_ids`, but what was held out already is all that is evaluated."""
        if held_out is None or not share:
            return self._ids(path, share)
        return [*self._ids(path, 0.0), *self._ids(held_out, 0.0)]

    def _ids(self, path: Path, share: float) -> list[Stream]:
        """The streams of a .bin file: to train on, and if share is not 0, to evaluate on."""
        if path.with_suffix(".idx").exists():
            file = TokenFile(path)
            self._check_tokenizer(path, file)
            ids, starts, lengths = file.ids, file.starts, file.lengths
            origin: Origin = PreparedOrigin.of(file)
        else:
            scan = scan_ids(path, self.tokenizer.eos, self._cache)
            self._check_highest(path, scan.highest)
            ids, starts, lengths = MappedFile(path, "u2"), scan.starts, None
            origin = PreparedOrigin(((str(path), 1 << 62),), starts, None)
        if share:
            settings = {"lengths": lengths, "origin": origin}
            return [*split_documents(path, ids, starts, share, self._cache, **settings)]
        return [TokenStream(ids, starts, lengths=lengths, origin=origin)]

    def _check_tokenizer(self, path: Path, file: TokenFile) -> None:
        header, tokenizer = file.header, self.tokenizer
        if isinstance(tokenizer, IdTokenizer):
            self._check_highest(path, header.highest)
        elif header.tokenizer != tokenizer.hash or header.vocabulary != tokenizer.size:
            raise DataError(
                f"{path} was made with a tokenizer of {header.vocabulary:,} ids, hash "
                f"{header.tokenizer[:12]}, but the run uses a {tokenizer}; set "
                f"data_text.tokenizer to {path.parent / 'tokenizer.json'}, or prepare the data "
                "again"
            )

    def _check_highest(self, path: Path, highest: int) -> None:
        if highest >= self.tokenizer.size:
            raise DataError(
                f"{path} holds id {highest}, but the vocabulary has {self.tokenizer.size:,} ids "
                f"({self.tokenizer}); set data_text.tokenizer or data_text.vocab_size to what the "
                "file was made with"
            )


@dataclass(frozen=True)
class PreparedOrigin:
    """Documents of a .bin file, by the files that it was made from.

    Args:
        files: path and number of documents of each.
        starts: where the documents begin in the .bin.
        origins: the number of each document among all that went in; None: its own.
    """

    files: tuple[tuple[str, int], ...]
    starts: MappedFile
    origins: MappedFile | None

    @classmethod
    def of(cls, file: TokenFile) -> PreparedOrigin:
        """Read what `prepare` recorded beside the file."""
        record = file.path.with_name("prepare.json")
        recorded = [(file.path, 1 << 62)]
        if file.origins is not None and record.exists():
            recorded = json.loads(record.read_text())["files"]
        files = tuple((str(name), int(count)) for name, count in recorded)
        return cls(files, file.starts, file.origins)

    def name(self, document: int, source: int) -> tuple[str, int]:
        number = int(self.starts.array.searchsorted(source, "right")) - 1
        if self.origins is not None:
            number = int(self.origins.array[number])
        for name, count in self.files:
            if number < count:
                return name, number
            number -= count
        return "unknown", number
