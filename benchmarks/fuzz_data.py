"""The readers of `data_text`, as targets of `benchmarks.fuzz`."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import zstandard

from benchmarks.fuzzing import Input, Target
from nexus_plugins.data_text import DataTextConfig
from nexus_plugins.data_text.dataset import open_data
from nexus_plugins.data_text.formats import Reading
from nexus_plugins.data_text.inspection import inspect
from nexus_plugins.data_text.prepare import Job, prepare
from nexus_plugins.data_text.trace import trained_on
from nexus_plugins.data_text.training import train_tokenizer

__all__ = ["TARGETS"]

_TEXTS = [f"document {number}, " + "äöü€𝄞 word"[: number % 10] * 3 for number in range(12)]
_LINES = "".join(f"{text}\n" for text in _TEXTS).encode()
_JSON = "".join(
    json.dumps({"text": text, "metadata": {"n": [number, None, 1.5]}}, ensure_ascii=number % 2 > 0)
    + "\n"
    for number, text in enumerate(_TEXTS)
).encode()


def _pack(name: str, raw: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(raw, 1)
    return zstandard.ZstdCompressor().compress(raw) if name.endswith(".zst") else raw


def _rows(train: str, **wish: Any) -> Callable[[Path], object]:
    """Opens a file of the folder, and reads rows, fingerprint and notes."""

    def read(folder: Path) -> object:
        settings = {"seq_len": 8, "valid_share": 0.0, "cache_dir": folder / "cache", **wish}
        if isinstance(settings.get("tokenizer"), Path):
            settings["tokenizer"] = str(folder / settings["tokenizer"])
        config = DataTextConfig(train=str(folder / train), **settings)
        data = open_data(config)
        data.train.__getitems__(range(min(len(data.train), 50)))
        data.notes()
        inspect(config, 2)
        return data.fingerprint

    return read


def _text(name: str, raw: bytes, **wish: Any) -> Target:
    return Target(lambda: [{name: raw}, {name: raw + raw}], _rows(name, **wish), _pack)


def _parquets() -> list[Input]:
    times = pa.array([1, None, 3] * 6, pa.timestamp("ns"))
    tables = [
        pa.table({"text": _TEXTS, "metadata": [{"n": [n]} for n in range(len(_TEXTS))]}),
        pa.table({"text": pa.array(["a", "b", "a"] * 6).dictionary_encode(), "metadata": times}),
        pa.table({"text": pa.array([b"a", b"bc"] * 9, pa.binary()), "n": range(18)}),
        pa.table({"text": pa.array(["a", "b"] * 9, pa.large_string())}),
    ]
    inputs = []
    for number, table in enumerate(tables):
        sink = io.BytesIO()
        packing = ["snappy", "zstd", "gzip", "none"][number]
        pq.write_table(table, sink, row_group_size=5, compression=packing)
        inputs.append({"a.parquet": sink.getvalue()})
    return inputs


def _ids() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 400, 600)


def _bare() -> list[Input]:
    ids = _ids()
    return [{"a.bin": ids.astype(dtype).tobytes()} for dtype in ("<u2", "<u4", ">u2", "<f4", "<i8")]


def _llm_c() -> list[Input]:
    found = []
    for magic, version, dtype in ((20240520, 1, "<u2"), (20240801, 7, "<u4")):
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, 600
        found.append({"a.bin": header.tobytes() + _ids().astype(dtype).tobytes()})
    return found


def _numpy() -> list[Input]:
    found = []
    for dtype in ("<u2", ">u4", "<i8", "<f4"):
        sink = io.BytesIO()
        np.save(sink, _ids().astype(dtype))
        found.append({"a.npy": sink.getvalue()})
    return found


def _megatron() -> list[Input]:
    lengths = np.array([100, 200, 0, 300], "<i4")
    offsets = np.concatenate([[0], lengths[:-1].cumsum()]).astype("<i8") * 2
    edges = np.array([0, 1, 2, 4], "<i8")
    index = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08"
    index += len(lengths).to_bytes(8, "little") + len(edges).to_bytes(8, "little")
    index += lengths.tobytes() + offsets.tobytes() + edges.tobytes()
    return [{"a.idx": index, "a.bin": _ids().astype("<u2").tobytes()}]


def _made(work: Callable[[Path], None]) -> Input:
    """All files that a function writes to a folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        work(folder)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}
    finally:
        shutil.rmtree(folder)


def _prepared() -> list[Input]:
    def work(folder: Path) -> None:
        (folder / "a.jsonl").write_bytes(_JSON)
        prepare([folder / "a.jsonl"], folder / "data", Job(share=0.2))

    return [{name: raw for name, raw in _made(work).items() if name.startswith("data/")}]


def _tokenizers() -> list[Input]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    def byte_level(folder: Path) -> None:
        (folder / "a.txt").write_bytes(_LINES)
        train_tokenizer([folder / "a.txt"], folder / "t.json", 280, Reading())

    def word_piece(folder: Path) -> None:
        words = {"[UNK]": 0, "[SEP]": 1, "[PAD]": 2, "document": 3, "word": 4, ",": 5, "##s": 6}
        tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.save(str(folder / "t.json"))

    def unigram(folder: Path) -> None:
        pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -1.0), ("doc", -2.0), ("a", -3.0)]
        tokenizer = Tokenizer(models.Unigram(pieces, 0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.save(str(folder / "t.json"))

    own = [{"nexus_tokenizer": "bytes", "size": 259}, {"nexus_tokenizer": "ids", "size": 400}]
    found = [_made(work) for work in (byte_level, word_piece, unigram)]
    found += [{"t.json": json.dumps(layout).encode()} for layout in own]
    return [{"t.json": one["t.json"], "a.txt": _LINES} for one in found]


def _nanogpt() -> list[Input]:
    letters = dict(enumerate("abcdefghij \n"))
    meta = {"vocab_size": len(letters), "itos": letters}
    ids = (_ids() % len(letters)).astype("<u2").tobytes()
    return [{"a.bin": ids, "meta.pkl": pickle.dumps(meta, protocol)} for protocol in (0, 2, 4)]


def _runs() -> list[Input]:
    config = (
        "seed: 1\naccumulate: 2\nplugins:\n  data_text: {train: %s, seq_len: 8, batch_size: 2}\n"
    )
    return [
        {
            "config.yaml": (config % "stdin.txt").encode(),
            "data.json": json.dumps({"train": "0", "valid": {}}).encode(),
        }
    ]


def _trace(folder: Path) -> object:
    """Traces what a step trained on; the run's data is next to its config."""
    path = folder / "config.yaml"
    path.write_bytes(path.read_bytes().replace(b"stdin.txt", str(folder / "a.txt").encode()))
    (folder / "a.txt").write_bytes(_LINES)
    return trained_on(folder, 1)


def _folder() -> list[Input]:
    return [{"f/a.txt": _LINES, "f/sub/b.jsonl": _JSON, "f/val.txt": _LINES, "f/code.py": b"x\n"}]


TARGETS: dict[str, Target] = {
    "txt": _text("a.txt", _LINES),
    "txt as one document": _text("a.txt", _LINES, one_file_one_document=True),
    "txt with replacement": _text("a.txt", _LINES, invalid_utf8="replace", batching="pad"),
    "txt.gz": _text("a.txt.gz", _LINES),
    "txt.zst": _text("a.txt.zst", _LINES),
    "jsonl": _text("a.jsonl", _JSON),
    "jsonl, invalid UTF-8 skipped": _text("a.jsonl", _JSON, invalid_utf8="skip"),
    "jsonl.gz": _text("a.jsonl.gz", _JSON),
    "jsonl.zst": _text("a.jsonl.zst", _JSON),
    "parquet": Target(_parquets, _rows("a.parquet")),
    "ids, bare": Target(_bare, _rows("a.bin")),
    "ids, bare, as int32": Target(_bare, _rows("a.bin", ids_dtype="int32", batching="pad")),
    "ids of llm.c": Target(_llm_c, _rows("a.bin")),
    "ids of NumPy": Target(_numpy, _rows("a.npy")),
    "ids of Megatron": Target(_megatron, _rows("a.bin")),
    "prepared data": Target(_prepared, _rows("data")),
    "tokenizers": Target(_tokenizers, _rows("a.txt", tokenizer=Path("t.json"))),
    "nanoGPT's meta.pkl": Target(_nanogpt, _rows("a.bin")),
    "a folder": Target(_folder, _rows("f", valid_share=0.2)),
    "a run's folder": Target(_runs, _trace),
}
