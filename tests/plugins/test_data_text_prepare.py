"""Files: every format, invalid input, and tokenizing in advance."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_core import DataError
from nexus_plugins.data_text import DataTextConfig, cli, formats
from nexus_plugins.data_text import prepare as preparing
from nexus_plugins.data_text.binary import TokenFile
from nexus_plugins.data_text.dataset import open_data, open_streams
from nexus_plugins.data_text.formats import Reading, read_slice, slices_of
from nexus_plugins.data_text.prepare import Job, prepare
from nexus_plugins.data_text.stream import Stream

LINES = [f"document {number} " + "ä" * (number % 13) for number in range(300)]
FUZZ = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_format(path: Path, texts: Sequence[str]) -> Path:
    """The documents in the format of the suffix."""
    lines = "".join(
        json.dumps({"text": text, "metadata": {"n": n}}) + "\n" for n, text in enumerate(texts)
    )
    if path.name.endswith(".txt"):
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif path.name.endswith(".parquet"):
        pq.write_table(pa.table({"text": list(texts)}), path, row_group_size=70)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".zst"):
        half = len(lines) // 2
        pack = zstandard.ZstdCompressor().compress  # two frames, as from `cat a.zst b.zst`
        path.write_bytes(pack(lines[:half].encode()) + pack(lines[half:].encode()))
    else:
        path.write_text(lines)
    return path


def documents(stream: Stream) -> list[str]:
    """All documents of a stream of bytes."""
    ids = np.empty(len(stream), np.int64)
    stream.read(0, len(stream), ids)
    spans = [stream.span(number) for number in range(stream.documents)]
    assert all(ids[last - 1] == 256 for _, last in spans)
    return [ids[first : last - 1].astype(np.uint8).tobytes().decode() for first, last in spans]


def stream_of(path: Path | str, cache: Path, **wish: Any) -> Stream:
    config = DataTextConfig(train=str(path), cache_dir=cache, valid_share=0, **wish)
    (stream,) = open_streams(config).train.values()
    return stream


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


FORMATS = ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    """No format may lose or change documents."""
    path = write_format(tmp_path / name, LINES)
    stream = stream_of(path, tmp_path / "cache")
    assert documents(stream) == LINES
    place = stream.place(stream.span(123)[0] + 5)
    assert (place.file, place.document, place.offset) == (str(path), 123, 5)


def test_folders_globs_and_lists_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    """An order that depends on the file system would make runs differ between machines."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, lines in (("b.txt", LINES[:9]), ("a.jsonl", LINES[9:20]), ("sub/c.txt", LINES[20:])):
        write_format(folder / name, lines)
    (folder / ".git/x.txt").write_text("not this")
    (folder / "README.md").write_text("nor this")
    expected = LINES[9:20] + LINES[:9] + LINES[20:]
    assert documents(stream_of(folder, tmp_path / "cache")) == expected
    assert documents(stream_of(f"{folder}/*.txt", tmp_path / "cache")) == LINES[:9]
    config = DataTextConfig(
        train=[str(folder / "b.txt"), str(folder / "sub")],
        cache_dir=tmp_path / "cache",
        valid_share=0,
    )
    (stream,) = open_streams(config).train.values()
    assert documents(stream) == LINES[:9] + LINES[20:]


def test_one_file_can_be_one_document(tmp_path: Path) -> None:
    texts = ["first\nfile\n", "second\r\n\r\nfile"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for tokens in ("auto", "bytes"):
        stream = stream_of(
            tmp_path / "*.txt", tmp_path / "c", one_file_one_document=True, tokenizer=tokens
        )
        assert documents(stream) == texts
    config = Job(one_file_one_document=True)
    prepare([tmp_path / "0.txt", tmp_path / "1.txt"], tmp_path / "out", config)
    assert documents(stream_of(tmp_path / "out", tmp_path / "c")) == texts


@pytest.mark.parametrize(
    ("train", "trained", "valid", "evaluated"),
    [
        ("p", ["p"], None, ["p"]),
        (["p", "deep/q"], ["p", "deep/q"], None, ["p", "deep/q"]),
        (["p", "deep/q"], ["p", "deep/q"], "p", ["p"]),
        (["p", "deep/q"], ["p", "deep/q"], ["deep/q", "p"], ["deep/q", "p"]),
        ("", ["deep/q", "p"], None, ["deep/q", "p"]),
        ("", ["deep/q", "p"], "deep", ["deep/q"]),
        ("**/*.bin", ["deep/q", "p"], None, ["deep/q", "p"]),
        ("p/train.bin", ["p"], "deep/q", ["deep/q"]),
    ],
)
def test_what_prepare_held_out_is_never_trained_on(
    tmp_path: Path, train: Any, trained: list[str], valid: Any, evaluated: list[str]
) -> None:
    """A model trained on its evaluation data looks better than it is."""
    corpora = tmp_path / "corpora"
    for name in ("p", "deep/q"):
        source = write_format(tmp_path / f"{name[-1]}.jsonl", [f"{name} {line}" for line in LINES])
        prepare([source], corpora / name, Job(share=0.1))
        (corpora / name / "input.txt").write_text("text that the ids were made of\n")
    assert (corpora / "p/train.meta.jsonl").exists()

    def absolute(wish: Any) -> Any:
        return [absolute(one) for one in wish] if isinstance(wish, list) else f"{corpora}/{wish}"

    def parts(names: list[str], part: str) -> list[str]:
        files = [corpora / name / part for name in names]
        return [text for file in files for text in documents(stream_of(file, tmp_path / "c"))]

    config = DataTextConfig(
        train=absolute(train), valid=valid and absolute(valid), cache_dir=tmp_path / "c"
    )
    streams = open_streams(config)
    assert documents(*streams.train.values()) == parts(trained, "train.bin")
    assert documents(*streams.valid.values()) == parts(evaluated, "val.bin")


def test_prepared_data_and_text_share_a_list(tmp_path: Path) -> None:
    """Text next to prepared data must still be split, and the prepared split must be kept."""
    source = write_format(tmp_path / "a.jsonl", [f"a {line}" for line in LINES])
    prepare([source], tmp_path / "a", Job(share=0.1))
    text = write_format(tmp_path / "b.txt", LINES)
    config = DataTextConfig(
        train=[str(text), str(tmp_path / "a")], valid_share=0.2, cache_dir=tmp_path / "c"
    )
    streams = open_streams(config)
    seen, held = documents(*streams.train.values()), documents(*streams.valid.values())
    assert sorted(seen + held) == sorted([*LINES, *(f"a {line}" for line in LINES)])
    prepared = documents(stream_of(tmp_path / "a/val.bin", tmp_path / "c"))
    assert [line for line in held if line.startswith("a ")] == prepared
    assert len(held) > len(prepared)


def test_metadata_beside_ids_is_not_text(tmp_path: Path) -> None:
    """Metadata must not be trained on, or stop the run."""
    source = write_format(tmp_path / "a.jsonl", LINES)
    prepare([source], tmp_path / "made", Job())
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in (tmp_path / "made").glob("train.*"):
        file.rename(folder / file.name.replace("train", "books"))
    write_format(folder / "own.meta.jsonl", ["no ids beside it"])
    assert (folder / "books.meta.jsonl").exists()
    expected = [*LINES, "no ids beside it"]
    assert documents(stream_of(folder, tmp_path / "c")) == expected
    assert documents(stream_of(f"{folder}/*.jsonl", tmp_path / "c")) == expected[-1:]


def test_a_byte_order_mark_alone_is_an_empty_file(tmp_path: Path) -> None:
    """The mark must not become a document."""
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match=r"bom\.txt is empty except for a byte-order mark"):
        stream_of(tmp_path / "bom.txt", tmp_path / "c", one_file_one_document=True)


PIECES = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b"\r", b" ", b"\t", b"a", b"bc", "é".encode(), b"\x0b", b"\x1c"]
    ),
    max_size=40,
)


@given(pieces=PIECES, step=st.integers(1, 9), block=st.integers(4, 9))
@FUZZ
def test_lines_are_the_same_however_a_file_is_cut(
    tmp_path: Path, pieces: list[bytes], step: int, block: int
) -> None:
    """Documents must not be lost or duplicated at slice boundaries."""
    raw = b"x\n" + b"".join(pieces)
    path = tmp_path / f"{os.urandom(6).hex()}.txt"
    path.write_bytes(raw)
    lines = [line.removesuffix(b"\r") for line in raw.split(b"\n")]
    expected = [line for line in lines if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_SLICE", step)
        patch.setattr(formats, "_BLOCK", block)
        read = [
            text
            for part in slices_of(path)
            for p in read_slice(part, Reading())
            for text in p.texts
        ]
        assert read == expected
        mapped = documents(stream_of(path, tmp_path / "cache"))
        assert mapped == [line.decode() for line in expected]


def big_corpus(path: Path, megabytes: int) -> Path:
    rng = np.random.default_rng(0)
    words = np.array(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"])
    block = "\n".join(" ".join(words[rng.integers(0, 6, 18)]) for _ in range(9000)) + "\n"
    with path.open("w") as file:
        for number in range(megabytes):
            file.write(f"part {number}\n{block[: 1 << 20]}\n")
    return path


def test_prepared_bytes_do_not_depend_on_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared data must not depend on the machine."""
    monkeypatch.setattr(formats, "_SLICE", 1000)
    monkeypatch.setattr(preparing, "_UNIT", 3000)
    paths = [write_format(tmp_path / name, LINES) for name in FORMATS]
    job = Job(share=0.2, deduplicate=True)
    one = prepare(paths, tmp_path / "one", job, workers=1)
    two = prepare(paths, tmp_path / "two", job, workers=2)
    assert one == two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.train_documents + one.valid_documents == len(LINES)
    assert one.duplicates == 4 * len(LINES)
    assert 20 < one.valid_documents < 100
    again = prepare(paths, tmp_path / "two", job, workers=2)
    assert again == two


@pytest.mark.slow
def test_a_killed_prepare_is_finished_by_the_next_one(tmp_path: Path) -> None:
    """Work must not be lost, nor a partial file mistaken for a complete one."""
    path = big_corpus(tmp_path / "big.txt", 32)
    command = [
        sys.executable,
        "-m",
        "nexus_plugins.data_text.cli",
        "prepare",
        str(path),
        "--val",
        "0.1",
    ]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [*command, "--out", str(broken), "--workers", "2"], env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(broken.glob(".parts-*/*.part")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "train.bin").exists()
    reached = {part.name: part.stat().st_mtime_ns for part in broken.glob(".parts-*/*.part")}
    assert reached
    prepare([path], broken, Job(share=0.1), workers=1)
    prepare([path], whole, Job(share=0.1), workers=2)
    assert contents(broken) == contents(whole)


def test_metadata_stays_with_its_document(tmp_path: Path) -> None:
    path = write_format(tmp_path / "a.jsonl", LINES)
    prepare([path], tmp_path / "out", Job(share=0.2))
    for name in ("train", "val"):
        kept = [
            json.loads(line)
            for line in (tmp_path / f"out/{name}.meta.jsonl").read_text().splitlines()
        ]
        origins = TokenFile(tmp_path / f"out/{name}.bin").origins
        assert origins is not None
        assert [entry["n"] for entry in kept] == origins.array.tolist()


def test_a_full_disk_is_told_and_leaves_nothing_half(tmp_path: Path) -> None:
    """A full disk must not leave data that looks complete."""
    path = big_corpus(tmp_path / "big.txt", 2)
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "from nexus_plugins.data_text.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "prepare", str(path), "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write to" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/train.bin").exists()


def corrupt(path: Path, change: Callable[[bytearray], object]) -> None:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


BAD = {
    "utf8.txt": (b"good\nb\xffd\n", r"utf8\.txt, line 2, byte 2 \(0xff\) is not UTF-8"),
    "wide.txt": ("hello\n".encode("utf-16"), r"line 1, byte 1 .* looks like UTF-16"),
    "packed.txt": (gzip.compress(b"hello"), r"line 1, byte 2 .* looks like gzip"),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', r"utf8\.jsonl, line 2, byte 11"),
    "lone.jsonl": (b'{"text": "\\ud800"}\n', r"lone\.jsonl, line 1, byte 1 .* not UTF-8"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": ', r"cut\.jsonl, line 2 is not JSON"),
    "key.jsonl": (b'{"body": "a"}\n', r"key\.jsonl, line 1 has no key 'text', only 'body'"),
    "kind.jsonl": (b'{"text": 3}\n', r"kind\.jsonl, line 1: 'text' is of type int"),
    "null.jsonl": (b'\n{"text": null}\n', r"null\.jsonl, line 2: 'text' is null"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl, line 1 is of type list"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl, line 1 is not JSON"),
    "empty.txt": (b"", r"empty\.txt is empty"),
    "blank.txt": (b"\n \n", r"blank\.txt has no"),
    "blank.jsonl": (b'{"text": ""}\n', r"blank\.jsonl has no usable document"),
    "cut.jsonl.gz": (
        gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
        r"cut\.jsonl\.gz is damaged or trunc",
    ),
    "bad.jsonl.gz": (b"no gzip", r"bad\.jsonl\.gz is damaged or trunc"),
    "cut.jsonl.zst": (
        zstandard.compress(os.urandom(999))[:-9],
        r"cut\.jsonl\.zst is damaged or trunc|not UTF-8",
    ),
    "bad.jsonl.zst": (b"no zstd", r"bad\.jsonl\.zst is damaged or trunc"),
    "bad.parquet": (b"PAR1", r"bad\.parquet is not a readable \.parquet"),
    "odd.bin": (b"abc", r"odd\.bin is truncated"),
    "none.bin": (b"", r"none\.bin is empty"),
    "what.pdf": (b"%P\0", r"what.pdf is not text, .* '\.pdf' is unknown; known: \.txt, \.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_the_place_of_the_fault(tmp_path: Path, name: str) -> None:
    """The message alone must locate the fault."""
    raw, message = BAD[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        stream_of(tmp_path / name, tmp_path / "cache")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "no column 'text', only 'body'"),
        ({"text": [1]}, "column 'text' has type int64"),
        ({"text": ["a", None]}, "row 2: 'text' is null"),
    ],
)
def test_bad_parquet_columns(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        stream_of(tmp_path / "a.parquet", tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_policies_for_what_is_not_utf8(tmp_path: Path, name: str) -> None:
    """`skip` must skip only the damaged document, `replace` must keep the rest of it."""
    lines = [b"good", b"b\xffd", b"fine"]
    if name == "a.jsonl":
        lines = [b'{"text": "' + line + b'"}' for line in lines]
    (tmp_path / name).write_bytes(b"\n".join(lines))
    skipped = stream_of(tmp_path / name, tmp_path / "c", invalid_utf8="skip")
    assert documents(skipped) == ["good", "fine"]
    assert skipped.place(skipped.span(1)[0]).document == 2
    replaced = stream_of(tmp_path / name, tmp_path / "c", invalid_utf8="replace")
    assert documents(replaced) == ["good", "b\N{REPLACEMENT CHARACTER}d", "fine"]
    config = DataTextConfig(
        train=str(tmp_path / name),
        cache_dir=tmp_path / "c",
        valid_share=0,
        invalid_utf8="skip",
        seq_len=4,
    )
    assert any("1 documents are not UTF-8" in note for note in open_data(config).notes())


@given(
    raw=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
        st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(
            lambda value: json.dumps({"text": "a", "metadata": value}).encode()
        ),
    ),
    name=st.sampled_from([*FORMATS, "a.bin"]),
    policy=st.sampled_from(["error", "replace", "skip"]),
)
@FUZZ
def test_any_bytes_are_documents_or_a_data_error(
    tmp_path: Path, raw: bytes, name: str, policy: str
) -> None:
    """No file may end a run with a traceback, or hang it."""
    folder = tmp_path / os.urandom(6).hex()
    folder.mkdir()
    (folder / name).write_bytes(raw)
    try:
        stream = stream_of(folder / name, folder / "cache", invalid_utf8=policy)
    except DataError:
        return
    out = np.empty(len(stream), np.int64)
    stream.read(0, len(stream), out)


@given(
    name=st.sampled_from(["train.bin", "train.idx"]),
    place=st.integers(0, 10**6),
    value=st.integers(0, 255),
    action=st.sampled_from(["cut", "flip", "add"]),
)
@FUZZ
def test_damaged_token_files_are_noticed_or_harmless(
    tmp_path: Path, name: str, place: int, value: int, action: str
) -> None:
    """A damaged index must not read beyond the file, nor a damaged id reach the model."""
    folder = tmp_path / os.urandom(6).hex()
    prepare([write_format(tmp_path / "a.txt", LINES[:20])], folder, Job())

    def change(raw: bytearray) -> None:
        at = place % len(raw)
        if action == "cut":
            del raw[at:]
        elif action == "add":
            raw.append(value)
        else:
            raw[at] = value

    corrupt(folder / name, change)
    config = DataTextConfig(train=str(folder), cache_dir=folder / "c", valid_share=0, seq_len=8)
    try:
        data = open_data(config)
        data.train.__getitems__(range(len(data.train)))
    except DataError:
        return
    assert action == "flip"


def test_a_tokenizer_that_does_not_fit_the_data_is_named(tmp_path: Path) -> None:
    """Ids of another vocabulary decode to different text."""
    from nexus_plugins.data_text.training import train_tokenizer

    path = write_format(tmp_path / "a.txt", LINES)
    tokenizer = train_tokenizer([path], tmp_path / "tok.json", 300, Reading())
    prepare([path], tmp_path / "out", Job(tokenizer=str(tmp_path / "tok.json")))
    assert stream_of(tmp_path / "out", tmp_path / "c").documents == len(LINES)
    with pytest.raises(DataError, match=rf"hash {tokenizer.hash[:12]}, but the run uses a bytes"):
        stream_of(tmp_path / "out", tmp_path / "c", tokenizer="bytes")
    with pytest.raises(DataError, match="already has data prepared from other"):
        prepare([path], tmp_path / "out", Job())


def run_cli(*arguments: str) -> int:
    """Run `nexus-data` in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["nexus-data", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def test_the_command_prepares_and_inspects(tmp_path: Path, capsys: Any) -> None:
    """The commands of the documentation must work as written."""
    path = str(write_format(tmp_path / "a.jsonl", LINES))
    out, tokenizer = str(tmp_path / "out"), str(tmp_path / "t.json")
    assert run_cli("train-tokenizer", path, "--out", tokenizer, "--vocab-size", "300") == 0
    wish = ("--tokenizer", tokenizer, "--val", "0.1", "--workers", "1")
    assert run_cli("prepare", path, "--out", out, *wish) == 0
    capsys.readouterr()
    assert run_cli("inspect", out, "--json") == 0
    train, valid = json.loads(capsys.readouterr().out)
    assert train["documents"] + valid["documents"] == len(LINES)
    assert sum(count for _, _, count in train["histogram"]) == train["documents"]
    assert train["samples"][0][1].startswith("document ")
    corrupt(tmp_path / "out/train.bin", lambda raw: raw.__setitem__(slice(40, 42), b"\xff\xff"))
    assert run_cli("inspect", out) == 1
    assert "WRONG: id 65535 is not in the vocabulary" in capsys.readouterr().out
    assert run_cli("prepare", str(tmp_path / "missing.txt"), "--out", out) == 2
    assert "no file or folder" in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    """Help must be immediate."""
    program = (
        "import sys; sys.argv = ['nexus-data', '--help']\n"
        "from nexus_plugins.data_text.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True
    )
