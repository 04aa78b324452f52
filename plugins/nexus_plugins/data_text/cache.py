"""Derived files that are built once: indexes and tokenised copies, keyed by what they come from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nexus_core.errors import DataError

__all__ = ["cache_folder", "cached", "fingerprint", "signature", "writing"]


def cache_folder(wish: Path | None) -> Path:
    """The folder for derived files: the one wished for, or one in the user's cache folder."""
    if wish is not None:
        return wish
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nexus-trainer"


def signature(paths: Sequence[Path]) -> list[list[str | int]]:
    """Path, size and time of change of each file: other values mean other contents."""
    try:
        stats = [(path, path.stat()) for path in paths]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def fingerprint(*parts: object) -> str:
    """A short name for everything that something was made from."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def cached(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `folder/name`, built by `build(temporary folder)` if it is not there yet.

    It appears complete or not at all; two processes may build it at the same time.

    Raises:
        DataError: the folder cannot be written.
    """
    target = folder / name
    if target.is_dir():
        return target
    temporary = folder / f".{name}.{os.getpid()}"
    with writing(folder):
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            build(temporary)
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the errors of a full or forbidden disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write into {folder}: {error.strerror or error}; free some space, or choose "
            "another folder (--out, data_text.cache_dir)"
        ) from error
