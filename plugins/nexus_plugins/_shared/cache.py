"""Derived files that are built once: indexes and tokenized copies, keyed by their sources."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nexus_core.errors import DataError, hint_out
from nexus_plugins._shared.paths import expanded, reason

__all__ = [
    "CACHE_TAG",
    "cache_folder",
    "cached",
    "fingerprint",
    "sample",
    "signature",
    "tag_cache",
    "writing",
]

CACHE_TAG = "CACHEDIR.TAG"
_WHOLE = 1 << 20  # bytes; smaller files are read completely
_BLOCKS, _BLOCK = 16, 1 << 14  # sampled from larger files


def cache_folder(wish: Path | None) -> Path:
    """The folder for derived files: the given one, or one in the user's cache folder."""
    if wish is not None:
        return expanded(wish)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "nexus-trainer"
    try:
        return Path.home() / ".cache" / "nexus-trainer"
    except RuntimeError:  # there is no home folder
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
        return Path(tempfile.gettempdir()) / f"nexus-trainer-{user}"


def signature(paths: Sequence[Path], changes: bool = False) -> list[list[str | int]]:
    """A signature that changes whenever the contents of the files change.

    Size and times are not enough, since copying can preserve them, so bytes are read too: all of a
    small file, samples of a large one.

    Args:
        paths: the files.
        changes: include the change time, which only the system sets. Device and inode are not
            included, as both change when a file system is remounted.
    """
    return [_signature(path, changes) for path in paths]


def _signature(path: Path, changes: bool) -> list[str | int]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            looks = _sample(file, status.st_size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error
    own = [status.st_ctime_ns] if changes else []
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns, looks, *own]


def _sample(file: IO[bytes], size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for begin, end in _spans(size):
        file.seek(begin)
        digest.update(file.read(end - begin))
    return digest.hexdigest()


def sample(raw: memoryview) -> str:
    """A hash of the data's length and bytes; of large data only samples."""
    digest = hashlib.blake2b(str(len(raw)).encode(), digest_size=16)
    for begin, end in _spans(len(raw)):
        digest.update(raw[begin:end])
    return digest.hexdigest()


def _spans(size: int) -> list[tuple[int, int]]:
    """The whole of a small file; evenly spaced blocks of a large one, including first and last."""
    if size <= _WHOLE:
        return [(0, size)]
    begins = [(size - _BLOCK) * block // (_BLOCKS - 1) for block in range(_BLOCKS)]
    return [(begin, begin + _BLOCK) for begin in begins]


def fingerprint(*parts: object) -> str:
    """A short hash of everything that something was made from."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def tag_cache(folder: Path) -> None:
    """Mark a folder of derived files, so that it is neither read as data nor backed up.

    Source: the Cache Directory Tagging Specification, https://bford.info/cachedir/
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CACHE_TAG).exists():
            (folder / CACHE_TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n")


def cached(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `folder/name`, built by `build(temporary folder)` if it is not there yet.

    It appears complete or not at all; two processes may build it at the same time.

    Raises:
        DataError: the folder cannot be written.
    """
    target = folder / name
    if target.is_dir():
        return target
    tag_cache(folder)
    temporary = folder / f".{name}.{os.getpid()}"
    with writing(folder):
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            build(temporary)
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # unless another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror or error}; free some space, or choose "
            "another folder: for the run ",
            hint_out(),
            ", for the cache with the setting cache_dir of the data plugin",
        ) from error
