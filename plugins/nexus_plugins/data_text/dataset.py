"""From settings to rows: the sources, their tokenizer, and the held-out split."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nexus_core.errors import DataError
from nexus_plugins._shared.cache import cache_folder, fingerprint, signature, tag_cache
from nexus_plugins._shared.paths import of_setting, reason
from nexus_plugins.data_text.config import DataTextConfig
from nexus_plugins.data_text.embedded import standard_library
from nexus_plugins.data_text.folders import HELD_OUT, TRAIN
from nexus_plugins.data_text.formats import Format, Reading, format_of, is_text
from nexus_plugins.data_text.ids import IdFile, open_ids
from nexus_plugins.data_text.index import NoDocumentError, open_text, split_documents
from nexus_plugins.data_text.load import load_tokenizer, tokenizer_beside
from nexus_plugins.data_text.prepare import Job, prepare
from nexus_plugins.data_text.rows import PackedRows, PaddedRows, Rows
from nexus_plugins.data_text.sources import Source, find_sources
from nexus_plugins.data_text.stream import Named, Stream, TokenStream, chained
from nexus_plugins.data_text.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer, loss_of

__all__ = ["Streams", "TextData", "loss_in_words", "open_data", "open_streams"]

_MOST_MAPPED = 64  # text files to keep open; more are converted to one file of ids


@dataclass(frozen=True)
class TextData:
    """Everything that a run reads.

    Args:
        train: the rows of an epoch.
        valid: the rows of each evaluation, by the prefix of its metrics.
        tokenizer: of all of them.
        remarks: what was left out, what is in both splits, what the tokenizer loses.
        units: how the training files become documents.
    """

    train: Rows
    valid: dict[str, Rows]
    tokenizer: Tokenizer
    remarks: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of all training data: see `Rows.fingerprint`."""
        return self.train.fingerprint

    def notes(self) -> list[str]:
        """What the user should know: what a document is, what is left out, what is evaluated."""
        found = [*self.units, *self.remarks]
        if self.train.lost:
            found.append(f"{self.train.lost:,} tokens of the training text {self.train.LOST}")
        for name, rows in self.valid.items():
            if len(rows) < sum(rows.counts):
                found.append(
                    f"{name} is evaluated on {len(rows):,} of {sum(rows.counts):,} rows, the same "
                    "ones each time (data_text.valid_limit)"
                )
        return found


@dataclass(frozen=True)
class Streams:
    """The training and evaluation sources by name, and the tokenizer they share.

    `remarks` is what the user should know, `readings` how the files were read, `units` how those
    to train on become documents.
    """

    train: dict[str, Stream]
    valid: dict[str, Stream]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    remarks: tuple[str, ...]
    readings: tuple[str, ...]
    units: tuple[str, ...]


def open_data(config: DataTextConfig) -> TextData:
    """Find, check and open everything in the settings, cut into rows.

    Raises:
        DataError: something is missing, damaged or does not fit together.
    """
    streams = open_streams(config)
    train, valid = _training(config, streams), _evaluations(config, streams)
    return TextData(train, valid, streams.tokenizer, streams.remarks, streams.units)


def open_streams(config: DataTextConfig) -> Streams:
    """Find, check and open everything in the settings.

    Raises:
        DataError: something is missing, damaged or does not fit together.
    """
    try:
        return _opened(config)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {reason(error)}") from error


def _opened(config: DataTextConfig) -> Streams:
    found = find_sources(config)
    sources, apart = found.train, found.valid
    opener = _Opener(config, *_tokenizer(config, [*sources, *apart]))
    share = config.valid_share if config.valid is None else 0.0
    opened = {source.name: opener.open(source, share) for source in sources}
    units = tuple(dict.fromkeys(opener.units))
    valid = {name: held_out for name, (_, held_out) in opened.items()} if share else {}
    return Streams(
        {name: train for name, (train, _) in opened.items()},
        valid | {one.name: opener.open(one, 0.0)[0] for one in apart},
        tuple(source.weight for source in sources),
        opener.tokenizer,
        (*found.remarks, *dict.fromkeys(opener.remarks)),
        tuple(dict.fromkeys(opener.readings)),
        units,
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
                f"no document of '{name}' is left for evaluation; set data_text.valid to a "
                "separate file, raise data_text.valid_share, or set it to 0 for no evaluation"
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


def _tokenizer(config: DataTextConfig, sources: Sequence[Source]) -> tuple[Tokenizer, str]:
    """The tokenizer of the run, and the name or path under which it is loaded."""
    special = (config.eos_token, config.pad_token)
    if config.tokenizer != "auto":
        return (
            of_setting("data_text.tokenizer", load_tokenizer, config.tokenizer, *special),
            config.tokenizer,
        )
    ids = [path for one in sources for path in (*one.ids, *_ids_apart(one))]
    beside = next(filter(None, map(tokenizer_beside, ids)), None)
    if beside is not None:
        return load_tokenizer(str(beside), *special), str(beside)
    cache = cache_folder(config.cache_dir)
    files = [open_ids(path, config.ids_dtype, None, cache) for path in ids]
    known = [file.tokenizer for file in files if file.tokenizer is not None]
    plain = ByteTokenizer()
    if not ids or any(tokenizer == plain.hash for tokenizer, _ in known):
        return plain, "bytes"
    text = next((path for one in sources for path in one.texts), None)
    if text is not None:
        raise DataError(
            f"{ids[0]} has ids of an unknown tokenizer, which is needed for the text in {text}; "
            "set data_text.tokenizer to it"
        )
    size = config.vocab_size or max((size for _, size in known), default=0)
    return IdTokenizer(size or _highest(files, ids, config) + 1), "auto"


def _ids_apart(source: Source) -> list[Path]:
    return [path for path in source.apart if not is_text(path, source.as_text)]


def _highest(files: Sequence[IdFile], paths: Sequence[Path], config: DataTextConfig) -> int:
    """The highest id overall, including held-out data, so that the vocabulary covers both."""
    folders = {path.parent for path in paths}
    beside = {folder / HELD_OUT for folder in folders if (folder / HELD_OUT).is_file()} - {*paths}
    cache = cache_folder(config.cache_dir)
    others = [open_ids(path, config.ids_dtype, None, cache) for path in sorted(beside)]
    return max(file.highest for file in (*files, *others))


class _Opener:
    """Opens all sources in the same way."""

    def __init__(self, config: DataTextConfig, tokenizer: Tokenizer, name: str) -> None:
        self.tokenizer = tokenizer
        self.remarks: list[str] = []
        self.readings: list[str] = []
        self.units: list[str] = []
        self._name = name
        self._config = config
        self._cache = cache_folder(config.cache_dir)
        self._reading = Reading(config.text_key, config.one_file_one_document, config.invalid_utf8)

    def open(self, source: Source, share: float) -> tuple[Stream, Stream]:
        """The training documents and the evaluation documents (none if the share is 0)."""
        if not source.files:
            return self._embedded(share)
        apart = replace(source, files=source.apart, apart=(), held_out={})
        held_out = [self.open(apart, 0.0)[0]] if source.apart and share else []
        pairs = self._ids_of(source, share)
        pairs += self._texts_of(source, 0.0 if source.apart else share)
        train = chained([pair[0] for pair in pairs])
        return train, chained([*(stream for pair in pairs for stream in pair[1:]), *held_out])

    def _ids_of(self, source: Source, share: float) -> list[list[Stream]]:
        pairs: list[list[Stream]] = []
        for path in source.ids:
            held_out = source.held_out.get(path)
            if held_out is not None and share:  # evaluate only what was held out
                pairs.append([self._ids(path, 0.0)[0], self._ids(held_out, 0.0)[0]])
            else:
                pairs.append(self._ids(path, 0.0 if source.apart else share))
        return pairs

    def _texts_of(self, source: Source, share: float) -> list[list[Stream]]:
        texts = source.texts
        reading = replace(self._reading, as_text=source.as_text)
        if not texts:
            return []
        self.units.append(_units(texts, reading))
        if not self._can_map(texts, reading):
            return [self._converted(texts, share, reading)]
        assert self.tokenizer.eos is not None
        pairs: list[list[Stream]] = []
        barren: list[str] = []
        for path in texts:
            try:
                pairs.append([*open_text(path, reading, share, self.tokenizer.eos, self._cache)])
            except NoDocumentError:
                if len(texts) == 1:
                    raise
                barren.append(str(path))
        if not pairs:
            raise DataError(f"neither {barren[0]} nor the other files have a usable document")
        self._say_barren(barren)
        self.readings.append(f"{_files_of_text(len(pairs))}, used in place")
        return pairs

    def _say_barren(self, paths: Sequence[str]) -> None:
        if paths:
            self.remarks.append(f"{len(paths):,} of the files have no document, such as {paths[0]}")

    def _can_map(self, texts: list[Path], reading: Reading) -> bool:
        """Whether the bytes of the files can be used as ids in place."""
        lines = all(format_of(path, reading.as_text) == Format("lines") for path in texts)
        plain = self.tokenizer.kind == ByteTokenizer.kind
        return plain and lines and reading.invalid_utf8 == "error" and len(texts) <= _MOST_MAPPED

    def _embedded(self, share: float) -> tuple[Stream, Stream]:
        self.units.append("one document per file of the standard library")
        train, valid = standard_library(share)
        return self._in_memory(train), self._in_memory(valid)

    def _in_memory(self, documents: Sequence[tuple[str, bytes]]) -> Stream:
        texts = [text for _, text in documents]
        encoded = self.tokenizer.encode_documents(texts)
        self._say_loss(**loss_of(self.tokenizer, texts, encoded))
        starts = np.concatenate([[0], encoded.lengths.cumsum()])
        origin = Named(tuple((name, number) for number, (name, _) in enumerate(documents)))
        checksum = f"{zlib.crc32(encoded.ids.view(np.uint8).data):08x}"
        return TokenStream(
            encoded.ids, starts, lengths=encoded.token_bytes, origin=origin, checksum=checksum
        )

    def _converted(self, texts: list[Path], share: float, reading: Reading) -> list[Stream]:
        """Text converted to ids in the cache, on first use."""
        config = self._config
        job = Job(
            tokenizer=self._name,
            eos_token=config.eos_token,
            pad_token=config.pad_token,
            share=share,
            **asdict(reading),
        )
        signed = signature(texts, changes=True)
        key = fingerprint("tokens", 2, asdict(job), self.tokenizer.hash, signed)
        folder = self._cache / f"tokens-{key}"
        tag_cache(self._cache)
        size = sum(path.stat().st_size for path in texts)
        with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
            summary = prepare(
                texts, folder, job, os.cpu_count() or 1, lambda done: bar.update(done)
            )
        if summary.skipped or summary.replaced or summary.empty:
            self.remarks.append(
                f"{summary.skipped:,} documents are not UTF-8 and were skipped, "
                f"{summary.replaced:,} have bytes replaced, {summary.empty:,} are empty"
            )
        self._say_barren(summary.barren)
        self._say_loss(summary.compared, summary.altered, summary.lost_bytes)
        self.readings.append(f"{_files_of_text(len(texts))}, as ids in {folder}")
        names = (TRAIN, HELD_OUT) if share else (TRAIN,)
        files = [open_ids(folder / name, None, self.tokenizer.eos, self._cache) for name in names]
        return [self._checked(file).stream() for file in files]

    def _say_loss(self, compared: int = 0, altered: int = 0, lost_bytes: int = 0) -> None:
        remark = loss_in_words(compared, altered, lost_bytes)
        if remark:
            self.remarks.append(remark)

    def _ids(self, path: Path, share: float) -> list[Stream]:
        """The streams of an id file: for training and, if share is not 0, for evaluation."""
        file = self._checked(
            open_ids(path, self._config.ids_dtype, self.tokenizer.eos, self._cache)
        )
        self.readings.append(f"{path}: {file.how}")
        self._say_loss(**file.loss)
        if share:
            settings = {"lengths": file.lengths, "origin": file.origin, "checksum": file.checksum}
            ids, starts = file.ids, file.starts
            return [*split_documents(path, ids, starts, share, self._cache, **settings)]
        return [file.stream()]

    def _checked(self, file: IdFile) -> IdFile:
        """The file, after checking that its ids belong to the tokenizer."""
        path, tokenizer = file.ids.path, self.tokenizer
        if file.tokenizer is not None and not isinstance(tokenizer, IdTokenizer):
            made_with, size = file.tokenizer
            if made_with != tokenizer.hash or size != tokenizer.size:
                raise DataError(
                    f"{path} was made with a tokenizer of {size:,} ids, hash {made_with[:12]}, but "
                    f"the run uses a {tokenizer}; set data_text.tokenizer to "
                    f"{path.parent / 'tokenizer.json'}, or prepare the data again"
                )
        elif file.highest >= tokenizer.size:
            raise DataError(
                f"{path} holds id {file.highest}, but the vocabulary has {tokenizer.size:,} ids "
                f"({tokenizer}); set data_text.tokenizer, data_text.vocab_size or "
                "data_text.ids_dtype to what the file was made with"
            )
        elif file.guessed and tokenizer.size > 1 << 16:
            raise DataError(
                f"{path} does not declare its dtype, and the {tokenizer.size:,} ids of its "
                "tokenizer do not fit into 16 bits; set data_text.ids_dtype to its dtype "
                "(most likely uint32)"
            )
        return file


def loss_in_words(compared: int, altered: int, lost_bytes: int) -> str:
    """What the tokenizer loses of the text, in words; "" if it is lossless."""
    said = []
    if lost_bytes:
        said.append(f"{lost_bytes:,} bytes of text have no id and are not counted")
    if altered:
        said.append(f"{altered:,} of {compared:,} documents change when decoded from their ids")
    if not said:
        return ""
    return (
        f"the tokenizer is lossy: {'; '.join(said)}; bits per byte only cover what it keeps, and "
        "cannot be compared with other tokenizers"
    )


def _units(texts: Sequence[Path], reading: Reading) -> str:
    """What a document is in text files, and the setting that changes it."""
    words = {
        "lines": "file" if reading.one_file_one_document else "line",
        "json": "line of JSON",
        "parquet": "row of Parquet",
    }
    kinds = dict.fromkeys(words[format_of(path, reading.as_text).kind] for path in texts)
    per_file = " (data_text.one_file_one_document=true: one per file)" if "line" in kinds else ""
    return f"{_files_of_text(len(texts))}, one document per {' or '.join(kinds)}{per_file}"


def _files_of_text(count: int) -> str:
    """The number of files, in words."""
    return "1 text file" if count == 1 else f"{count:,} text files"
