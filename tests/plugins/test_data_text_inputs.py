"""Difficult input: ids without metadata, folders, leaks, changes, long lines."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus_core import ConfigError, DataError
from nexus_plugins.data_text import DataTextConfig, DataTextPlugin, cli
from nexus_plugins.data_text.dataset import TextData, open_data, open_streams
from nexus_plugins.data_text.doubts import doubts
from nexus_plugins.data_text.formats import Reading, read_slice, slices_of
from nexus_plugins.data_text.index import held_out
from nexus_plugins.data_text.prepare import Job, prepare
from nexus_plugins.data_text.tokenizer import ByteTokenizer

IDS = np.random.default_rng(0).integers(0, 50_000, 3000)
ZIPF = np.minimum(np.random.default_rng(1).zipf(1.3, 6000) - 1, 50_256)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def data_of(cache: Path, train: Any, **wish: Any) -> TextData:
    settings = {"seq_len": 4, "valid_share": 0, "cache_dir": cache, **wish}
    wanted = str(train) if isinstance(train, Path) else train
    return open_data(DataTextConfig(train=wanted, **settings))


def ids_of(data: TextData) -> list[int]:
    """All ids of the training streams."""
    found = []
    for stream in data.train.streams:
        ids = np.empty(len(stream), np.int64)
        stream.read(0, len(stream), ids)
        found += ids.tolist()
    return found


def text_of(data: TextData) -> list[str]:
    """The documents to train on, of bytes."""
    raw = bytes(min(token, 255) if token != 256 else 10 for token in ids_of(data))
    return raw.decode().splitlines()


def valid_text_of(data: TextData) -> list[str]:
    (stream,) = data.valid["val"].streams
    ids = np.empty(len(stream), np.int64)
    stream.read(0, len(stream), ids)
    return bytes(token if token != 256 else 10 for token in ids.tolist()).decode().splitlines()


# -- ids


def llm_c(ids: np.ndarray[Any, Any], magic: int, version: int, dtype: str) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.astype(dtype).tobytes()


def of_numpy(ids: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...] = (-1,)) -> bytes:
    sink = io.BytesIO()
    np.save(sink, ids.astype(dtype).reshape(shape))
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "raw", "how"),
    [
        ("a.bin", IDS.astype("<u2").tobytes(), "bare uint16"),
        ("a.bin", llm_c(IDS, 20240520, 1, "<u2"), "uint16 ids with an llm.c header"),
        ("a.bin", llm_c(IDS, 20240801, 7, "<u4"), "uint32 ids with an llm.c header"),
        ("a.bin", of_numpy(IDS, "<u2"), "uint16 ids with a NumPy header"),
        ("a.npy", of_numpy(IDS, ">u4"), "uint32 ids with a NumPy header"),
        ("a.npy", of_numpy(IDS, "<i8"), "int64 ids with a NumPy header"),
    ],
)
def test_ids_are_read_by_what_the_file_says(
    tmp_path: Path, cache: Path, name: str, raw: bytes, how: str
) -> None:
    """A header read as ids, or ids of another width, would silently be trained on."""
    (tmp_path / name).write_bytes(raw)
    assert ids_of(data_of(cache, tmp_path / name)) == IDS.tolist()
    config = DataTextConfig(train=str(tmp_path / name), cache_dir=cache, valid_share=0)
    assert any(how in reading for reading in open_streams(config).readings)


@pytest.mark.parametrize("name", ["uint32", "int32", "int64", "uint16be", "uint32be"])
@pytest.mark.parametrize("ids", [IDS, IDS * 3, ZIPF], ids=["uniform", "above 65,536", "text"])
def test_bare_ids_of_other_kinds_need_their_name(
    tmp_path: Path, cache: Path, name: str, ids: np.ndarray[Any, Any]
) -> None:
    """Read as uint16, half of the ids of a uint32 file are zeros, which is the only sign."""
    ids = ids % 50_257 if name == "uint16be" else ids
    dtype = np.dtype(name.removesuffix("be")).newbyteorder(">" if name.endswith("be") else "<")
    (tmp_path / "a.bin").write_bytes(ids.astype(dtype).tobytes())
    with pytest.raises(DataError, match=r"a\.bin does not look like uint16 ids: .*data_text\.ids_"):
        data_of(cache, tmp_path / "a.bin")
    assert ids_of(data_of(cache, tmp_path / "a.bin", ids_dtype=name)) == ids.tolist()


def torch_file() -> bytes:
    sink = io.BytesIO()
    torch.save({"weights": torch.randn(999)}, sink)
    return sink.getvalue() + b"\0" * (len(sink.getvalue()) % 2)


NORMAL = np.random.default_rng(2).normal(size=2000)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (NORMAL.astype("<f4").tobytes(), "floating-point"),
        (NORMAL.astype("<f8").tobytes(), "floating-point"),
        (NORMAL.astype("<f2").tobytes(), "floating-point"),
        (torch.tensor(NORMAL).bfloat16().view(torch.int16).numpy().tobytes(), "floating-point"),
        (IDS.astype("<f4").tobytes(), "floating-point"),
        (torch_file(), "a zip archive"),
        (gzip.compress(IDS.astype("<u2").tobytes() * 2, mtime=0), "gzip"),
        (b"GGUF" + bytes(range(200)), "GGUF"),
        (b"These are words, and no ids of any kind.\n" * 40, "text"),
        (bytes(4000), "nothing but zeros"),
    ],
)
def test_what_is_not_ids_is_refused(tmp_path: Path, cache: Path, raw: bytes, what: str) -> None:
    """Weights, archives and text can be read as numbers below 65,536 too."""
    (tmp_path / "a.bin").write_bytes(raw[: len(raw) // 2 * 2])
    with pytest.raises(DataError, match=f"does not look like uint16 ids: it .*{what}"):
        data_of(cache, tmp_path / "a.bin")


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 5000),
    kind=st.sampled_from(["zipf", "uniform", "letters", "alternating", "codes"]),
    vocabulary=st.sampled_from([2, 5, 65, 259, 1024, 32_000, 50_257, 65_535]),
)
@settings(deadline=None, max_examples=200)
def test_ids_of_any_text_pass_the_check(
    tmp_path_factory: Any, seed: int, count: int, kind: str, vocabulary: int
) -> None:
    """A check must not reject valid files."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, count)
    if kind == "zipf":
        ids = np.minimum(rng.zipf(1.2, count) - 1, vocabulary - 1)  # many have the highest id
    elif kind == "letters":
        ids = np.tile(rng.integers(0, min(vocabulary, 90), 44), count // 44 + 1)
    elif kind == "alternating":  # digits and operators in columns
        ids = np.where(
            np.arange(count) % 2, rng.integers(0, 10, count), rng.integers(10, 40, count)
        )
    elif kind == "codes":  # several codebooks, interleaved
        ids = rng.integers(0, 1024, count) + 1024 * (np.arange(count) % 4)
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(np.append(ids, 1).astype("<u2").tobytes())
    assert doubts(path) is None


def megatron(folder: Path, dtype: int, width: str, documents: list[list[int]]) -> Path:
    """Files of `preprocess_data.py --append-eod`; the first document has two sequences."""
    first, rest = documents[0], documents[1:]
    sequences = [first[:1], first[1:], *rest]
    lengths = np.array(list(map(len, sequences)), "<i4")
    size = np.dtype(width).itemsize
    offsets = np.concatenate([[0], lengths[:-1].cumsum()]).astype("<i8") * size
    edges = np.array([0, *range(2, len(sequences) + 1)], "<i8")
    index = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([dtype])
    index += len(lengths).to_bytes(8, "little") + len(edges).to_bytes(8, "little")
    (folder / "m.idx").write_bytes(index + lengths.tobytes() + offsets.tobytes() + edges.tobytes())
    flat = [token for document in documents for token in document]
    np.array(flat, width).tofile(folder / "m.bin")
    return folder / "m.bin"


@pytest.mark.parametrize(("kind", "width"), [(8, "<u2"), (4, "<i4")])
def test_files_of_megatron_are_read(tmp_path: Path, cache: Path, kind: int, width: str) -> None:
    """Its index gives the width of ids, and where documents begin."""
    documents = [[5, 6, 7, 0], [8, 9, 0], [70, 71, 72, 73, 0]]
    path = megatron(tmp_path, kind, width, documents)
    data = data_of(cache, path)
    (stream,) = data.train.streams
    assert ids_of(data) == sum(documents, [])
    assert [stream.span(number) for number in range(3)] == [(0, 4), (4, 7), (7, 12)]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"m\.bin has .* bytes, but its \.idx says"):
        data_of(cache, path)


@pytest.mark.parametrize("kind", ["megatron", "ours"])
def test_beginnings_beyond_all_numbers_are_refused(tmp_path: Path, cache: Path, kind: str) -> None:
    """The difference of two 64-bit numbers can overflow, and then looks like an increase."""
    if kind == "megatron":
        path = megatron(tmp_path, 8, "<u2", [[5, 6, 0], [7, 0], [8, 0], [9, 0], [1, 0]])
        index, at = path.with_suffix(".idx"), -8
    else:
        (tmp_path / "a.jsonl").write_text('{"text": "words"}\n' * 5)
        prepare([tmp_path / "a.jsonl"], tmp_path / "p", Job())
        path, index, at = tmp_path / "p", tmp_path / "p/train.idx", -8 * 6
    edges = np.array([6756557849044511745, -6756557849044511745], "<i8").tobytes()
    raw = bytearray(index.read_bytes())
    raw[at - 16 : at] = edges
    index.write_bytes(raw)
    with pytest.raises(DataError, match="document offsets decrease"):
        data_of(cache, path)


def test_prepared_ids_without_their_index_are_read_by_the_record(
    tmp_path: Path, cache: Path
) -> None:
    """A copy without the .idx must not be read with another width."""
    from nexus_plugins.data_text.training import train_tokenizer

    (tmp_path / "a.txt").write_text("".join(f"line {number} of text\n" for number in range(99)))
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.json", 300, Reading())
    layout = json.loads((tmp_path / "t.json").read_text())
    layout["model"]["vocab"] |= {f"zz{number}": number for number in range(300, 65_700)}
    (tmp_path / "big.json").write_text(json.dumps(layout))
    prepare([tmp_path / "a.txt"], tmp_path / "p", Job(tokenizer=str(tmp_path / "big.json")))
    whole = ids_of(data_of(cache, tmp_path / "p"))
    (tmp_path / "p/train.idx").unlink()
    assert ids_of(data_of(cache, tmp_path / "p")) == whole
    (tmp_path / "p/train.bin").write_bytes((tmp_path / "p/train.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"but prepare\.json says"):
        data_of(cache, tmp_path / "p")
    (tmp_path / "p/prepare.json").unlink()
    np.full(999, 7, "<u2").tofile(tmp_path / "p/train.bin")
    with pytest.raises(DataError, match="do not fit into 16 bits; set data_text.ids_dtype"):
        data_of(cache, tmp_path / "p")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.bin", llm_c(IDS, 20240520, 1, "<u2")[:-2], "truncated.*llm.c header"),
        ("a.bin", llm_c(IDS, 20240520, 3, "<u2"), "of version 3; known: 1"),
        ("a.npy", of_numpy(IDS, "<u2")[:-2], "truncated.*NumPy"),
        ("a.npy", of_numpy(IDS, "<f4"), "has dtype float32"),
        ("a.npy", of_numpy(IDS, "<u2", (30, 100)), r"shape \(30, 100\)"),
        ("a.npy", b"\x93NUMPY\1\0\x10\0{'descr': f()}   ", "damaged NumPy header"),
        ("a.npy", b"\1\0" * 90, "is not a NumPy .npy file"),
    ],
)
def test_headers_that_do_not_fit_are_named(
    tmp_path: Path, cache: Path, name: str, raw: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        data_of(cache, tmp_path / name)


def test_a_wish_against_what_the_file_says_is_refused(tmp_path: Path, cache: Path) -> None:
    """A contradictory setting must not be ignored."""
    (tmp_path / "a.bin").write_bytes(llm_c(IDS, 20240520, 1, "<u2"))
    with pytest.raises(DataError, match="but data_text.ids_dtype is uint32"):
        data_of(cache, tmp_path / "a.bin", ids_dtype="uint32")
    np.array([3, -1, 5] * 9, "<i4").tofile(tmp_path / "b.bin")
    with pytest.raises(DataError, match="has the negative id -1"):
        data_of(cache, tmp_path / "b.bin", ids_dtype="int32")
    (tmp_path / "b.idx").write_bytes(b"TNTIDX\0\0 of another time")
    with pytest.raises(DataError, match=r"b\.idx is neither an index of this trainer nor"):
        data_of(cache, tmp_path / "b.bin", ids_dtype="int32")


# -- folders


def corpus(folder: Path) -> Path:
    """A folder with everything that real folders contain."""
    (folder / "store/part").mkdir(parents=True)
    (folder / "c/sub").mkdir(parents=True)
    files: dict[str, bytes] = {
        "store/part/b.txt": b"behind a link\n",
        "c/a.txt": b"kept\n",
        "c/c.json.gz": gzip.compress(b'{"text": "of c4"}\n'),
        "c/d.txt.gz": gzip.compress(b"packed\n"),
        "c/e.ndjson": b'{"text": "ndjson"}\n',
        "c/f.txt.zst": zstandard.compress(b"by zstd\n"),
        "c/g.md": b"# markdown\n",
        "c/h.py": b"code\n",
        "c/settings.json": b"{}",
        "c/empty.txt": b"",
        "c/blank.txt": b"\n  \n",
        "c/sub/i.txt": b"below\n",
        "c/.hidden.txt": b"hidden\n",
    }
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    (folder / "c/part").symlink_to(folder / "store/part")
    (folder / "c/part/back").symlink_to(folder / "c")  # a cycle
    (folder / "c/z.txt").symlink_to(folder / "c/a.txt")
    (folder / "c/broken.txt").symlink_to(folder / "nowhere.txt")
    os.mkfifo(folder / "c/pipe.txt")
    return folder / "c"


READ = ["kept", "of c4", "packed", "ndjson", "by zstd", "behind a link", "below"]


@pytest.mark.parametrize("where", ["c", "c/*", "c/**/*"])
def test_a_folder_is_read_through_links_and_what_is_left_out_is_named(
    tmp_path: Path, cache: Path, where: str
) -> None:
    """Text must not be skipped silently."""
    corpus(tmp_path)
    data = data_of(cache, str(tmp_path / where))
    assert sorted(text_of(data)) == sorted(READ)
    notes = "\n".join(data.notes())
    for part in ("3 files are skipped, of formats", "1 .md", "1 .py", "1 .json", "1 file is "
                 "skipped, empty", "empty.txt", "broken links", "broken.txt", "pipe.txt",
                 "links to files that are read", "1 of the files have no document"):  # fmt: skip
        assert part in notes, (part, notes)
    assert ".hidden" not in notes


def test_any_text_is_read_on_request(tmp_path: Path, cache: Path) -> None:
    """For example to train on source code."""
    folder = tmp_path / "src"
    (folder / "validation").mkdir(parents=True)
    (folder / "a.py").write_text("import b\nb.c()\n")
    (folder / "validation/b.rs").write_text("fn c() {}\n")
    (folder / "a.pyc").write_bytes(b"\0\1\2")
    wish = [{"path": str(folder), "as": "text"}]
    whole = data_of(cache, wish, one_file_one_document=True)
    assert whole.train.streams[0].documents == 2
    assert "not text" in "\n".join(whole.notes())
    assert text_of(data_of(cache, wish)) == ["import b", "b.c()", "fn c() {}"]
    named = data_of(cache, folder / "a.py")
    assert text_of(named) == ["import b", "b.c()"]
    assert named.notes()[0].startswith("1 text file, one document per line (data_text.one_file_on")
    assert whole.notes()[0] == "2 text files, one document per file"
    with pytest.raises(DataError, match=r"a\.pyc is not text, and its format '\.pyc' is unknown"):
        data_of(cache, folder / "a.pyc")
    config = DataTextConfig(train=wish)
    again = DataTextConfig(**config.model_dump(mode="json"))
    assert again == config
    assert "as" in config.model_dump()["train"][0]
    prepare([folder / "a.py"], tmp_path / "out", Job(as_text=True))
    assert text_of(data_of(cache, tmp_path / "out")) == ["import b", "b.c()"]


def test_a_folder_of_nothing_that_can_be_read_says_what_is_there(
    tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/a.csv").write_text("a,b\n")
    (tmp_path / "c/b.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"no readable file: .*a\.csv .*empty: .*b\.txt") as error:
        data_of(cache, tmp_path / "c")
    assert f"--set data_text.train='[{{path: {tmp_path}/c, as: text}}]'" in str(error.value)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt is neither a file nor a folder"):
        data_of(cache, tmp_path / "pipe.txt")


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_cannot_be_read_is_named(
    tmp_path: Path, cache: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreadable files must not silently shrink a corpus."""
    (tmp_path / "c/closed").mkdir(parents=True)
    (tmp_path / "c/a.txt").write_text("words\n" * 9)
    (tmp_path / "c/closed/b.jsonl").write_text('{"text": "words"}\n')

    def refuse(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if "closed" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *rest, **more)

        return call

    if what == "folder":
        monkeypatch.setattr(os, "scandir", refuse(os.scandir))
    else:
        monkeypatch.setattr(Path, "open", refuse(Path.open))
    with pytest.raises(DataError, match=r"cannot read .*closed.*Permission denied"):
        data_of(cache, tmp_path / "c")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("x" * 300 + ".txt", "cannot read .*name too long|no file"),
        ("a\0b.txt", "null byte"),
        ("$NOT_SET_HERE/a.txt", "variable NOT_SET_HERE is not set"),
        ("~no-such-user-here/a.txt", "no home folder for '~no-such-user-here'"),
    ],
)
def test_paths_that_cannot_be(cache: Path, wish: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data_of(cache, wish)


def test_home_and_variables_are_known_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody means a folder called ~ in the current one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPORA", str(tmp_path / "c"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/a.txt").write_text("some words of text\n" * 9)
    (tmp_path / "t.json").write_text(ByteTokenizer().to_json())
    wish = {"tokenizer": "~/t.json", "cache_dir": "$CORPORA/cache", "valid": "${CORPORA}/a.txt"}
    for train in ("~/c/a.txt", "$CORPORA/*.txt"):
        data_of(Path("unused"), train, **wish)
    assert run("prepare", "~/c/a.txt", "--out", "~/out", "--tokenizer", "$HOME/t.json")[0] == 0
    assert run("inspect", "~/out")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out", "t.json"]
    (tmp_path / "$odd.txt").write_text("words\n" * 9)
    assert len(text_of(data_of(tmp_path / "k", "$odd.txt"))) == 9


def test_without_a_home_folder_the_cache_has_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "a.txt").write_text("words\n" * 9)
    open_data(DataTextConfig(train=str(tmp_path / "a.txt"), seq_len=4, valid_share=0))
    assert any(path.name.startswith("nexus-trainer-") for path in tmp_path.iterdir())


# -- what is evaluated on


@pytest.mark.parametrize(
    ("files", "wish", "trained", "evaluated", "said"),
    [
        (["a", "v"], {"train": "c", "valid": "c/v.txt"}, "a", "v", "evaluated on, so excluded"),
        (["a", "b"], {"train": "c/*.txt", "valid": "c/b.txt"}, "a", "b", "1 file .*excluded from"),
        (["a"], {"train": "c/a.txt", "valid": "c/a.txt"}, "a", "a", "both trained on and evaluate"),
        (["x_train_0", "x_val_0"], {"train": "c"}, "x_train_0", "x_val_0", "instead of a share"),
        (["x_0", "x_val_0"], {"train": "c", "valid_share": 0}, "x_0", "", "named as held-out text"),
        (["train", "validation"], {"train": "c", "valid": "c"}, "train", "validation", "named as"),
        (["naïvalé"], {"train": "c", "valid_share": 0}, "naïvalé", "", ""),
        (["w.train", "w.test"], {"train": "c", "valid_share": 0}, "w.train", "", "named as test"),
        (["x_train", "x_val"], {"train": ["c/x_train.txt", "c/x_val.txt"], "valid_share": 0},
         "x_train x_val", "", ""),
        (["validity", "testimony"], {"train": "c", "valid_share": 0}, "testimony validity", "", ""),
    ],
)  # fmt: skip
def test_what_is_evaluated_on_is_not_brought_along_for_training(
    tmp_path: Path,
    cache: Path,
    files: list[str],
    wish: dict[str, Any],
    trained: str,
    evaluated: str,
    said: str,
) -> None:
    """A model trained on its evaluation data looks better than it is."""
    (tmp_path / "c").mkdir()
    for name in files:
        (tmp_path / f"c/{name}.txt").write_text(f"{name}\n" * 30)

    def absolute(one: Any) -> Any:
        return [absolute(path) for path in one] if isinstance(one, list) else f"{tmp_path}/{one}"

    places = {key: absolute(one) if key != "valid_share" else one for key, one in wish.items()}
    data = data_of(cache, places.pop("train"), **{"valid_share": 0.1, **places})
    assert sorted(set(text_of(data))) == trained.split()
    assert (sorted(set(valid_text_of(data))) if data.valid else []) == evaluated.split()
    notes = data.remarks
    assert len(notes) == bool(said)
    if said:
        assert re.search(said, notes[0])
        assert "bytes" in notes[0]


@pytest.mark.parametrize("wish", ["c", "c/**/*.txt", "c/*"])
def test_folders_named_as_held_out_are_not_trained_on(
    tmp_path: Path, cache: Path, wish: str
) -> None:
    """Data sets have train/ and val/; the parent's name does not matter."""
    for name in ("train", "val"):
        (tmp_path / f"valid/c/{name}").mkdir(parents=True)
        (tmp_path / f"valid/c/{name}/a.txt").write_text(f"{name}\n" * 30)
    data = data_of(cache, f"{tmp_path}/valid/{wish}", valid_share=0.1)
    assert {*text_of(data)} == {"train"}
    assert {*valid_text_of(data)} == {"val"}


def test_a_cache_below_the_text_is_not_text(tmp_path: Path) -> None:
    """The second run would train on the ids that the first one cached."""
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 9)
    first, second = (data_of(tmp_path / "cache", tmp_path, valid_share=0) for _ in range(2))
    assert ids_of(first) == ids_of(second)
    assert second.remarks == ()


def test_copies_and_files_named_twice_are_said(tmp_path: Path, cache: Path) -> None:
    """The same text in two lists counts twice; in both sets it leaks."""
    for name in ("a", "copy", "link"):
        (tmp_path / f"{name}.txt").write_text("the same words\n" * 20)
    (tmp_path / "b.txt").write_text("the other word\n" * 20)  # of equal size
    twice = data_of(
        cache, [str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    )
    assert len(twice.remarks) == 1
    assert "1 file" in twice.remarks[0]
    assert "named twice" in twice.remarks[0]
    leak = data_of(cache, tmp_path / "a.txt", valid=str(tmp_path / "copy.txt"))
    assert "both trained on and evaluated on" in leak.remarks[0]
    fine = data_of(cache, tmp_path / "a.txt", valid=str(tmp_path / "b.txt"))
    assert fine.remarks == ()
    both = open_data(DataTextConfig(valid="stdlib", seq_len=4, cache_dir=cache))
    assert "all of 'stdlib' is both trained on and evaluated on" in both.remarks[0]


def test_ids_named_as_held_out_are_evaluated_on(tmp_path: Path, cache: Path) -> None:
    """Shards as written by llm.c and nanoGPT speedruns."""
    for name, first in (("web_train_000001", 0), ("web_val_000000", 500), ("web_train_000002", 10)):
        raw = llm_c(np.arange(first, first + 300), 20240520, 1, "<u2")
        (tmp_path / f"{name}.bin").write_bytes(raw)
    data = data_of(cache, tmp_path, valid_share=0.1, tokenizer="auto")
    assert max(ids_of(data)) == 309
    assert min(valid_ids(data)) == 500
    assert data.tokenizer.size == 800


def valid_ids(data: TextData) -> list[int]:
    (stream,) = data.valid["val"].streams
    ids = np.empty(len(stream), np.int64)
    stream.read(0, len(stream), ids)
    return ids.tolist()  # type: ignore[no-any-return]


# -- the same data, or other data


def aged(path: Path, text: str) -> Path:
    path.write_text(text)
    os.utime(path, (1e9, 1e9))
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.bin"])
def test_a_copy_that_keeps_size_and_time_is_not_taken_for_the_old_file(
    tmp_path: Path, cache: Path, name: str
) -> None:
    """rsync -t, cp -p and tar preserve times; an old index would cut new text at random places."""
    contents = {
        "a.txt": ("aaaa\nbbbbbbbb\ncc\n", "dd\neeee\nffffffff\n"),
        "a.jsonl": ('{"text": "old one"}\n', '{"text": "new one"}\n'),
        "a.bin": ("abcdefghab" * 9 + "\0\0", "abcdefghba" * 9 + "\0\0"),
    }[name]
    old = ids_of(data_of(cache, aged(tmp_path / name, contents[0])))
    new = ids_of(data_of(cache, aged(tmp_path / name, contents[1])))
    assert ids_of(data_of(tmp_path / "fresh", tmp_path / name)) == new != old


@pytest.mark.parametrize("name", ["a.txt", "a.bin", "a.jsonl"])
def test_a_file_that_grows_while_it_is_read_is_noticed(
    tmp_path: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of a partial download would be reused for the whole file."""
    lines = (f'{{"text": "words of {number}"}}\n' for number in range(100))
    (tmp_path / name).write_text("".join(lines))
    real: Callable[..., Any] = np.flatnonzero if name == "a.bin" else held_out
    module = {"a.txt": "nexus_plugins.data_text.index", "a.bin": "numpy"}.get(
        name, "nexus_plugins.data_text.prepare"
    )

    def growing(*arguments: Any) -> Any:
        with (tmp_path / name).open("ab") as file:
            file.write(b"  ")
        return real(*arguments)

    monkeypatch.setattr(f"{module}.{real.__name__}", growing)
    wish = {"ids_dtype": "uint16"} if name == "a.bin" else {}
    with pytest.raises(DataError, match="changed while it was read"):
        data_of(cache, tmp_path / name, valid_share=0.5, tokenizer="bytes", **wish)


def test_the_fingerprint_is_of_the_content_and_its_order(tmp_path: Path, cache: Path) -> None:
    """Otherwise resuming on other text of the same size would go unnoticed."""
    lines = "".join(f"line of text number {number}\n" for number in range(200))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.txt").write_text(lines.upper())
    (tmp_path / "x").mkdir()
    (tmp_path / "x/renamed.txt").write_text(lines)

    def mark(*names: str, **wish: Any) -> str:
        return data_of(cache, [str(tmp_path / name) for name in names], **wish).fingerprint

    one = mark("a.txt")
    assert one == mark("x/renamed.txt")
    assert len({one, mark("b.txt"), mark("a.txt", "b.txt"), mark("b.txt", "a.txt"),
                mark("a.txt", seq_len=5), mark("a.txt", batching="pad")}) == 6  # fmt: skip
    for name in ("a.txt", "b.txt"):
        prepare([tmp_path / name], tmp_path / f"p-{name}", Job())
    first, second = (data_of(cache, tmp_path / f"p-{name}") for name in ("a.txt", "b.txt"))
    assert first.train.fingerprint != second.train.fingerprint
    int(one, 16)
    assert data_of(cache, tmp_path / "a.txt").train.fingerprint == one


@pytest.mark.parametrize("kind", ["txt", "bin", "prepared"])
def test_a_change_anywhere_in_a_large_file_is_noticed(
    tmp_path: Path, cache: Path, kind: str
) -> None:
    """Samples alone would miss a corrected line."""
    raw = bytearray(b"word of text\n" * 200_000)
    name = "a.bin" if kind == "bin" else "a.txt"
    marks = set()
    for place in (None, 1_234_567):
        if place is not None:
            raw[place : place + 2] = b"zz"
        path = tmp_path / name
        path.write_bytes(raw if kind != "bin" else np.frombuffer(raw, "u1").astype("<u2").tobytes())
        os.utime(path, (1e9, 1e9))
        if kind == "prepared":
            path = tmp_path / f"p{place}"
            prepare([tmp_path / name], path, Job())
        marks.add(data_of(cache, path).fingerprint)
    assert len(marks) == 2


def test_resuming_on_other_data_is_said(tmp_path: Path, cache: Path) -> None:
    """An equal number of rows does not mean equal text."""

    def resumed(state: Any) -> DataTextPlugin:
        wish = {"train": str(tmp_path / "a.txt"), "valid": str(tmp_path / "v.txt")}
        plugin = DataTextPlugin(**wish, seq_len=4, cache_dir=cache)
        if state is not None:
            plugin.load_state_dict(state)
        plugin.make_data(_Host())  # type: ignore[arg-type]
        return plugin

    (tmp_path / "a.txt").write_text("words of text\n" * 30)
    (tmp_path / "v.txt").write_text("words of proof\n" * 30)
    state = resumed(None).state_dict()
    resumed(state)
    (tmp_path / "a.txt").write_text("WORDS OF TEXT\n" * 30)
    with pytest.warns(RuntimeWarning, match="training text is not that of the checkpoint"):
        resumed(state)
    (tmp_path / "a.txt").write_text("words of text\n" * 30)
    (tmp_path / "v.txt").write_text("WORDS OF PROOF\n" * 30)
    with pytest.warns(RuntimeWarning, match="evaluation text is not that of the checkpoint"):
        resumed(state)


class _Host:
    """The parts of an engine that `make_data` reads."""

    seed = 0
    device = torch.device("cpu")

    @property
    def ranks(self) -> Any:
        from nexus_core.processes import Ranks

        return Ranks()


# -- formats


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"a", "ü".encode()], pa.binary()), ["a", "ü"]),
        (pa.array([b"a"], pa.binary()).dictionary_encode(), ["a"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array(["a", "b"], pa.string_view()), ["a", "b"]),
    ],
    ids=["dictionary", "binary", "dictionary of binary", "large", "view"],
)
def test_parquet_stores_text_in_many_ways(
    tmp_path: Path, cache: Path, column: Any, expected: list[str]
) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert text_of(data_of(cache, tmp_path / "a.parquet", seq_len=2)) == expected


def test_parquet_with_odd_columns(tmp_path: Path, cache: Path) -> None:
    """Metadata that Python cannot represent must not stop a run; duplicate columns must."""
    times = pa.array([1, None], pa.timestamp("ns"))
    nested = pa.StructArray.from_arrays([times], names=["at"])
    for number, column in enumerate((times, nested, pa.array([[1], []]), pa.array([b"\xff", b""]))):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": ["x", "y"], "metadata": column}), path)
        assert text_of(data_of(cache, path, seq_len=2)) == ["x", "y"]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="has 2 columns called 'text'"):
        data_of(cache, tmp_path / "twice.parquet")


def test_an_array_of_objects_says_how_to_make_lines(tmp_path: Path, cache: Path) -> None:
    for number, raw in enumerate(('[{"text": "a"}]', '[\n {"text": "a"}\n]')):
        (tmp_path / f"{number}.json").write_text(raw)
        with pytest.raises(DataError, match=r"line 1 is .*jq -c '\.\[\]'"):
            data_of(cache, tmp_path / f"{number}.json")


def test_zstd_in_many_frames_is_read(tmp_path: Path, cache: Path) -> None:
    """pzstd writes additional frames that decoders must skip."""
    pack = zstandard.ZstdCompressor().compress
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    raw = skipped + pack(b"one\n") + pack(b"") + skipped + pack(b"two\n") + skipped
    (tmp_path / "a.txt.zst").write_bytes(raw)
    assert text_of(data_of(cache, tmp_path / "a.txt.zst")) == ["one", "two"]


def test_zstd_with_a_long_window_is_read(tmp_path: Path, cache: Path) -> None:
    """`zstd --long=31` needs more memory than decoders allow by default."""
    for log in (28, 31):
        wish = zstandard.ZstdCompressionParameters.from_level(3, window_log=log, enable_ldm=True)
        packer = zstandard.ZstdCompressor(compression_params=wish).compressobj()
        raw = packer.compress(b'{"text": "whole and sound"}\n') + packer.flush()
        (tmp_path / "a.jsonl.zst").write_bytes(raw)
        assert text_of(data_of(cache, tmp_path / "a.jsonl.zst")) == ["whole and sound"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "wide.jsonl", "a.jsonl.gz"])
def test_one_long_line_takes_linear_time_and_two_copies(tmp_path: Path, name: str) -> None:
    """Each slice of a long line used to read all that follows: quadratic time."""
    size = 24 << 20
    text = "word " * (size // 5) + ("\u4e00" if name.startswith("wide") else "")
    entry = json.dumps({"text": text, "metadata": {"ö": "ü"}}, ensure_ascii=False) + "\n"
    raw = (text if name == "a.txt" else entry).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    expected, size = text.encode(), len(raw)
    del text, entry, raw
    before = _read_so_far()
    tracemalloc.start()
    portions = [one for part in slices_of(tmp_path / name) for one in read_slice(part, Reading())]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [one for portion in portions for one in portion.texts] == [expected]
    assert peak < 2.2 * size + (16 << 20)
    assert _read_so_far() - before < 2.5 * size
    if name != "a.txt":
        assert portions[0].metadata == [json.dumps({"ö": "ü"})]


def _read_so_far() -> int:
    """The number of bytes this process has read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def test_errors_of_a_long_line_are_those_of_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long lines are parsed as bytes; keys, types and damage must be reported the same way."""
    monkeypatch.setattr("nexus_plugins.data_text.formats._LONG", 4)
    for raw, wish, message in (
        ('{"text": "ä', {}, "line 1 is not JSON"),
        ('{"tëxt": "ä"}', {}, "has no key 'text', only 'tëxt'"),
        ('{"text": 3}', {}, "is of type int"),
        ('["ä"]', {}, "of type list"),
    ):
        (tmp_path / "a.jsonl").write_text(raw, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            [*read_slice(slices_of(tmp_path / "a.jsonl")[0], Reading(**wish))]
    (tmp_path / "a.jsonl").write_text('{"tëxt": "ä\\n\U0001f600"}', encoding="utf-8")
    (portion,) = read_slice(slices_of(tmp_path / "a.jsonl")[0], Reading(text_key="tëxt"))
    assert portion.texts == ["ä\n\U0001f600".encode()]


def test_a_document_beyond_all_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file may unpack to one line that exhausts memory."""
    monkeypatch.setattr("nexus_plugins.data_text.formats._LONGEST", 9 << 20)
    for name, packing in (("a.txt.gz", gzip.compress), ("a.txt.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(packing(bytes(30 << 20)))
        for wish in (Reading(), Reading(one_file_one_document=True)):
            with pytest.raises(DataError, match="document of more than 9 MiB"):
                [*read_slice(slices_of(tmp_path / name)[0], wish)]


# -- models and terminals


def test_a_model_with_fewer_ids_than_the_data_is_named(tmp_path: Path, cache: Path) -> None:
    """An id outside the vocabulary used to end the run with an index error."""
    from nexus_core import Engine
    from nexus_plugins.loss_lm import LossLmPlugin
    from nexus_plugins.model_nexus import ModelNexusPlugin

    (tmp_path / "a.txt").write_text("some words of text\n" * 50)
    data = {"train": str(tmp_path / "a.txt"), "seq_len": 4, "valid_share": 0, "cache_dir": cache}

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(100, 8)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    foreign = Foreign()
    engine = Engine(
        foreign,
        torch.optim.SGD(foreign.parameters(), lr=0.1),
        loss=lambda model, batch: model.table(batch["input_ids"]).sum(),
        plugins=[DataTextPlugin(**data)],
    )
    with pytest.raises(ConfigError, match="the model has 100 ids, but the data has 259"):
        engine.fit(until="1 step")
    small = ModelNexusPlugin(vocab_size=100, d_model=8, ssm_n_layers=1, ssm_head_dim=8)
    with pytest.raises(ConfigError, match="vocab_size is 100, but the data has 259 ids"):
        Engine(plugins=[DataTextPlugin(**data), small, LossLmPlugin()]).fit(until="1 step")


def run(*arguments: str) -> tuple[int, str]:
    """Run `nexus-data` in this process: its exit code and output."""
    out, kept = io.StringIO(), warnings.showwarning
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["nexus-data", *arguments])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", out)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    warnings.showwarning = kept
    return int(ended.value.code or 0), out.getvalue()


ODD = "bell \x07 escape \x1b]0;title\x07 del \x7f c1 \x9b bidi \u202e ü \u4e00\n"


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded corpus must not send control codes to the terminal."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "k"))
    name = "odd\x1b[31m\u202e.txt"
    (tmp_path / name).write_text(ODD)
    code, out = run("inspect", str(tmp_path / name))
    assert code == 0
    assert all(letter.isprintable() for letter in out.replace("\n", ""))
    assert "\\x9b" in out
    assert "ü" in out
    code, out = run("inspect", str(tmp_path / "no\x1b[2J.txt"))
    assert code == 2
    assert "\x1b" not in out


@pytest.mark.slow
def test_a_terminal_without_utf8_gets_escapes(tmp_path: Path) -> None:
    """Output in an encoding that lacks a character must not raise an error."""
    (tmp_path / "a.txt").write_text(ODD)
    done = subprocess.run(
        [sys.executable, "-m", "nexus_plugins.data_text.cli", "inspect", str(tmp_path / "a.txt")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONIOENCODING": "latin-1",
            "XDG_CACHE_HOME": str(tmp_path / "k"),
        },
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"bidi \\u202e \xfc \\u4e00" in done.stdout


@pytest.mark.parametrize(
    "fault",
    [OSError(5, "Input/output error", "a.txt"), MemoryError(), KeyError("x"), ValueError("a\nb")],
)
def test_any_error_is_one_line(
    fault: Exception, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracebacks are only shown on request."""

    def broken(*_: object) -> None:
        raise fault

    monkeypatch.setattr("nexus_plugins.data_text.trace.trained_on", broken)
    for arguments, lines in (
        (["at", "run", "--step", "1"], 1),
        (["--debug", "at", "r", "--step", "1"], 4),
    ):
        monkeypatch.setattr(sys, "argv", ["nexus-data", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: ")
        assert (len(said) == 1) if lines == 1 else (len(said) > lines)


def test_a_sample_of_the_model_does_not_steer_the_terminal(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained byte model can generate any bytes."""
    from nexus_core import Engine
    from nexus_plugins.loss_lm import LossLmPlugin
    from nexus_plugins.model_nexus import ModelNexusPlugin
    from nexus_plugins.model_nexus.nexus import NEXUSCore
    from nexus_plugins.optim_adamw import OptimAdamwPlugin

    (tmp_path / "a.txt").write_text("some words of text\n" * 50 + "held out words\n" * 9)
    data = DataTextPlugin(
        train=str(tmp_path / "a.txt"), valid_share=0.5, seq_len=4, cache_dir=cache
    )
    model = ModelNexusPlugin(d_model=8, ssm_n_layers=1, ssm_head_dim=8)
    engine = Engine(plugins=[data, model, LossLmPlugin(), OptimAdamwPlugin()])
    engine.fit(until="1 step")

    def generate(self: NEXUSCore, prompt: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        written = torch.tensor([*"\x1b[2J\n\tü".encode()])
        return torch.cat([prompt, written])

    monkeypatch.setattr(NEXUSCore, "generate", generate)
    assert model.summarize(engine)["sample"] == "\\x1b[2J\n\tü"
