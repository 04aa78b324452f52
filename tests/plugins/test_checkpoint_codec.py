"""The codec and the tensor files: exact round trips, and strict validation."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_core import CheckpointError
from nexus_plugins._shared.checkpoints.tensorfile import (
    DTYPES,
    HashingReader,
    HashingWriter,
    read_tensors,
    write_tensors,
)
from nexus_plugins.checkpoint.codec import TensorBag, decode, encode


def tensor_of(dtype: torch.dtype, shape: list[int]) -> Tensor:
    raw = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.int64) * 37 % 251
    if dtype is torch.bool:
        return (raw % 2).bool().reshape(shape)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


tensors = st.builds(
    tensor_of, st.sampled_from([*DTYPES.values()]), st.lists(st.integers(0, 3), max_size=3)
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=4)
    | st.sampled_from(["$tensor", "$", "nan"])
)
keys = st.text(max_size=4) | st.sampled_from(["$dict", "__metadata__", "a.b", "0"]) | st.integers()
trees = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    """Equality that distinguishes types, the sign of zero, nan, and the bits of tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and bytes(a.contiguous().view(-1).view(torch.uint8).tolist()) == bytes(
            b.contiguous().view(-1).view(torch.uint8).tolist()
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(
            same(x, y) for x, y in zip(a.values(), b.values(), strict=True)
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


@given(tree=trees)
def test_any_state_comes_back_as_it_was(tree: object) -> None:
    """Fails if a value, type, key, order or bit changes in a round trip through JSON."""
    bag = TensorBag()
    text = json.dumps(encode(tree, bag, "state"), allow_nan=False)
    assert same(decode(json.loads(text), bag.tensors), tree)


@given(named=st.dictionaries(st.text(min_size=1, max_size=6), tensors, max_size=5))
def test_files_are_what_the_safetensors_library_reads(
    named: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Fails if another reader cannot open a checkpoint, or reads other bits."""
    named.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("st") / "t.safetensors"
    size, digest = write(path, named)
    assert (size, digest) == (path.stat().st_size, sha256(path))
    theirs = load_file(path)
    assert theirs.keys() == named.keys()
    assert all(same(theirs[name], named[name]) for name in named)
    ours, read_digest = read(path)
    assert read_digest == digest
    assert all(same(ours[name], named[name]) for name in named)


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    """Fails if files of others, such as published weights, cannot be read."""
    named = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(3)}
    save_file(named, tmp_path / "t.safetensors")
    ours, _ = read(tmp_path / "t.safetensors")
    assert all(torch.equal(ours[name], named[name]) for name in named)


def test_tensors_that_are_no_plain_memory_are_stored_by_value(tmp_path: Path) -> None:
    """Fails if a transposed, expanded, conjugated or overlapping tensor loads differently."""
    base = torch.randn(4, 6)
    named = {
        "transposed": base.t(),
        "expanded": base[:1].expand(3, 6),
        "strided": base[:, ::2],
        "part": base[1:3],
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
    }
    write(tmp_path / "t.safetensors", named)
    loaded = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], named[name]) for name in named)


def test_tied_weights_are_stored_once_and_come_back_tied() -> None:
    """Fails if a tied head doubles the file, or views of one memory count as tied weights."""
    table = torch.randn(4, 4)
    state = {"head": table, "embedding": table, "transposed": table.t(), "row": table[:1]}
    bag = TensorBag()
    back = decode(encode(state, bag), bag.tensors)
    assert isinstance(back, dict)
    assert set(bag.tensors) == {"head", "transposed", "row"}
    assert bag.aliases == {"embedding": "head"}
    assert back["embedding"] is back["head"]


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), bytearray(b"bytes"), torch.device("cpu"), {(1, 2): 3}, [lambda: 0]]
)
def test_what_cannot_be_stored_is_refused_by_name(value: object) -> None:
    """Fails if a state that JSON cannot represent is pickled, dropped or stored as its repr."""
    with pytest.raises(CheckpointError, match=r"plugins\.mine"):
        encode({"mine": value}, TensorBag(), "plugins")


@pytest.mark.parametrize(
    "value",
    [
        {"$tensor": "missing"}, {"$tensor": 3}, {"$float": "1e999"}, {"$int": "ten"},
        {"$int": 7}, {"$tuple": 1}, {"$dict": [[1]]}, {"$dict": [[[1], 2]]}, {"$eval": "1"},
        {"$dict": {"a": 1}},
    ],
)  # fmt: skip
def test_marks_that_mean_nothing_are_refused(value: Any) -> None:
    """Fails if a forged mark is executed, or ends as another error than a CheckpointError."""
    with pytest.raises(CheckpointError):
        decode([value], {})


HEADERS: dict[str, Callable[[], bytes]] = {
    "a header of exabytes": lambda: struct.pack("<Q", 1 << 62) + b"{}",
    "a header longer than the file": lambda: struct.pack("<Q", 1000) + b"{}",
    "no header": lambda: b"1234567",
    "no JSON": lambda: framed(b"{'a': 1}"),
    "a list": lambda: framed(b"[]"),
    "nested without end": lambda: framed(b"[" * 100_000),
    "a tensor of terabytes": lambda: described([1 << 40], [0, 1 << 42]),
    "a shape that overflows": lambda: described([1 << 33, 1 << 33], [0, 4]),
    "a shape with a zero and giants": lambda: described([0, 1 << 62, 1 << 62], [0, 0], b""),
    "a negative size": lambda: described([-1], [0, 4]),
    "a size that is no number": lambda: described(["1"], [0, 4]),
    "a size that is true": lambda: described([True], [0, 4]),
    "offsets that go back": lambda: described([1], [4, 0]),
    "offsets past the end": lambda: described([1], [4, 8]),
    "bytes that belong to nobody": lambda: described([1], [0, 4], bytes(8)),
    "a dtype of its own": lambda: described([1], [0, 4], dtype="OBJECT"),
    "an overlap": lambda: framed(
        json.dumps(
            {n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "ab"}
        ).encode(),
        bytes(2),
    ),
    "a name twice": lambda: framed(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
    ),
    "a pickle": lambda: b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers_are_refused_in_little_memory(kind: str, tmp_path: Path) -> None:
    """Fails if a header is trusted before it is checked, which could exhaust or misread memory."""
    path = tmp_path / "t.safetensors"
    path.write_bytes(HEADERS[kind]())
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


def test_a_reader_stops_at_the_end_of_the_file(tmp_path: Path) -> None:
    """Fails if a file that shrinks while being read hangs the reader or leaves memory unset."""
    path = tmp_path / "t.safetensors"
    size, _ = write(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with FileIO(path) as file, ThreadPoolExecutor(1) as pool, pytest.raises(CheckpointError):
        read_tensors(HashingReader(file, pool), size)


def test_other_readers_see_the_names_of_tied_weights(tmp_path: Path) -> None:
    """Fails if `safetensors.torch.load_model` cannot fill a model with tied weights."""
    path = tmp_path / "t.safetensors"
    with FileIO(path, "w") as file:
        write_tensors(HashingWriter(file), {"a": torch.ones(2)}, {"b": "a", "format": "pt"})
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"b": "a", "format": "pt"}


def write(path: Path, named: dict[str, Tensor]) -> tuple[int, str]:
    with FileIO(path, "w") as file:
        writer = HashingWriter(file)
        write_tensors(writer, named, {})
        return writer.size, writer.sha256()


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    with FileIO(path) as file, ThreadPoolExecutor(1) as pool:
        reader = HashingReader(file, pool)
        return read_tensors(reader, path.stat().st_size), reader.sha256()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def described(shape: Any, offsets: Any, data: bytes = bytes(4), dtype: str = "F32") -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return framed(json.dumps({"a": entry}).encode(), data)
