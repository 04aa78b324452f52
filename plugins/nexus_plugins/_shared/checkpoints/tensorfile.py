"""safetensors files, hashed in the same pass that writes or reads them.

The format is eight bytes of header length, a JSON header, then the tensors without gaps
(https://github.com/huggingface/safetensors#format). The safetensors library is not used: it does
not return a hash, so each file would have to be read again, and it holds the GIL while writing,
which would block training. Reading is also a single pass, so the bytes hashed are the bytes loaded,
and a header must match the file size before any memory is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus_core.errors import CheckpointError
from nexus_core.processes import is_sharded

__all__ = [
    "DTYPES",
    "HashingReader",
    "HashingWriter",
    "check_header",
    "check_size",
    "fault_of",
    "read_tensors",
    "write_tensors",
]

_HEADER_LIMIT = 100_000_000  # limit of the format
_CHUNK = 8 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes that a checkpoint can hold, by their names in the format."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HashingWriter:
    """Writes to a file, and records the size and SHA-256 of what was written."""

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of the data, in pieces that let other threads run."""
        view = memoryview(data)
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            self._hash.update(piece)
            self.size += len(piece)
            while piece:
                piece = piece[self._file.write(piece) or 0 :]

    def sha256(self) -> str:
        """The hash of everything written so far."""
        return self._hash.hexdigest()


class HashingReader:
    """Reads a file from front to back, while another thread hashes what has been read.

    Args:
        file: the file, at its start.
        pool: has one thread, so that pieces are hashed in order.
    """

    def __init__(self, file: RawIOBase, pool: ThreadPoolExecutor) -> None:
        self._file = file
        self._pool = pool
        self._hash = hashlib.sha256()
        self._hashing: Future[None] | None = None
        """The hashing of the last piece; with one thread, all earlier pieces are done before it."""

    def read(self, size: int) -> bytearray:
        """Read exactly this many bytes."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return data

    def read_into(self, view: memoryview) -> None:
        """Fill a buffer.

        Raises:
            CheckpointError: the file is too short.
        """
        while view:
            count = self._file.readinto(view[:_CHUNK])
            if not count:
                raise CheckpointError("the file ends too early")
            self._hashing = self._pool.submit(self._hash.update, view[:count])
            view = view[count:]

    def sha256(self) -> str:
        """The hash of everything read so far."""
        if self._hashing is not None:
            self._hashing.result()
        return self._hash.hexdigest()


@dataclass(frozen=True)
class _Entry:
    """A header's entry for one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensors(
    file: HashingWriter, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors in host memory.

    Args:
        file: the file to write to.
        tensors: by name; any strided tensors, also 0-d or empty.
        metadata: text for other readers, kept in the header.

    Raises:
        CheckpointError: a tensor has a layout or a dtype that safetensors cannot hold.
    """
    for name, tensor in tensors.items():
        if fault := fault_of(tensor):
            raise CheckpointError(f"the tensor '{name}' cannot be stored: {fault}")
    text = _header(tensors, metadata)
    _check_length(text, "a file's")
    file.write(struct.pack("<Q", len(text)) + text)
    for name in _order(tensors):
        if tensors[name].numel():
            file.write(_bytes_of(tensors[name]))


def fault_of(tensor: Tensor) -> str:
    """Why a tensor cannot be stored, and what to keep instead; empty if it can."""
    if tensor.is_quantized:
        return "it is quantized; keep int_repr(), and scale and zero point as numbers"
    if tensor.is_nested:
        return "it is nested; keep its values() and offsets()"
    if tensor.is_sparse:
        return "it is sparse; keep to_dense(), or indices() and values()"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}; keep to_dense()"
    if tensor.is_meta:
        return "it is on the meta device and has no values; initialize it first"
    if is_traceable_wrapper_subclass(tensor) and not is_sharded(tensor):
        return f"it is a {type(tensor).__qualname__}, a wrapper around other tensors; keep those"
    return _fault_of_dtype(tensor.dtype)


def _fault_of_dtype(dtype: torch.dtype) -> str:
    if dtype in DTYPES.values():
        return ""
    if dtype.is_complex:
        return f"safetensors has no {dtype}; keep torch.view_as_real(x), its parts as real numbers"
    return f"safetensors has no {dtype}; keep view(torch.uint8), its bytes, or another dtype"


def check_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], whose: str) -> None:
    """Check that tensors with these names fit into one file.

    Raises:
        CheckpointError: the header would be longer than the format allows.
    """
    _check_length(_header(tensors, metadata), whose)


def _check_length(header: bytes, whose: str) -> None:
    if len(header) > _HEADER_LIMIT:
        raise CheckpointError(
            f"{whose} tensors are too many for a safetensors file: the header "
            f"would have {len(header)} bytes, the limit is {_HEADER_LIMIT}; keep fewer, "
            "larger tensors with shorter names"
        )


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in _order(tensors):
        end = begin + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)  # the data is aligned to 8 bytes


def read_tensors(file: HashingReader, size: int) -> dict[str, Tensor]:
    """Read all tensors of a file, each into its own memory.

    Args:
        file: the file, at its start.
        size: its size in bytes; nothing larger is ever allocated.

    Raises:
        CheckpointError: the header is invalid, or does not match the size.
    """
    entries = check_size(file, size)
    tensors = {}
    for entry in entries:
        try:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
        except RuntimeError as error:
            raise CheckpointError(f"tensor '{entry.name}' of shape {entry.shape}") from error
        if tensor.numel():
            file.read_into(_bytes_of(tensor))
        tensors[entry.name] = tensor
    return tensors


def check_size(file: HashingReader, size: int) -> list[_Entry]:
    """Read a header, and check that it matches the file size exactly.

    Raises:
        CheckpointError: it does not.
    """
    if size < 8:
        raise CheckpointError(f"{size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, _HEADER_LIMIT):
        raise CheckpointError(f"the header claims {length} bytes, but the file has {size}")
    return _entries(bytes(file.read(length)), size - 8 - length)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _entries(header: bytes, data_size: int) -> list[_Entry]:
    """The entries of a header in file order; they must fill the file without gaps or overlaps."""
    try:
        parsed = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError("the header is not a JSON object")
    found = (_entry(name, facts) for name, facts in parsed.items() if name != "__metadata__")
    entries = sorted(found, key=lambda entry: (entry.begin, entry.end))
    place = 0
    for entry in entries:
        if entry.begin != place:
            raise CheckpointError(f"tensor '{entry.name}' starts at {entry.begin}, not at {place}")
        place = entry.end
    if place != data_size:
        raise CheckpointError(f"the header describes {place} bytes of tensors, not {data_size}")
    return entries


def _entry(name: str, facts: object) -> _Entry:
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor '{name[:80]}' lacks dtype, shape or offsets")
    shape, offsets, dtype = facts["shape"], facts["data_offsets"], DTYPES.get(str(facts["dtype"]))
    if dtype is None or not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"tensor '{name[:80]}' has an invalid entry {str(facts)[:200]}")
    begin, end = offsets
    if len(shape) > 64 or math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(
            f"tensor '{name[:80]}' of shape {str(shape)[:80]}, {dtype}, cannot lie at {begin}:{end}"
        )
    return _Entry(name, dtype, tuple(shape), begin, end)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 1 << 63 for number in value
    )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made
