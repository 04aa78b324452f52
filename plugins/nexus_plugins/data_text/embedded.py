"""A text present on every machine: the source of Python's own standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nexus_core.errors import DataError

__all__ = ["standard_library"]

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def standard_library(valid_share: float) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """The training and the evaluation documents, `(relative path, UTF-8)`, sorted by path.

    Each file is one document. Tests, installed packages and files that are not UTF-8 are skipped.
    A hash of a file's relative path decides which split it belongs to.

    Args:
        valid_share: share of the files held out for evaluation.

    Raises:
        DataError: this Python has no source files of its standard library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = [(path.relative_to(root).as_posix(), text) for path, text in _sources(root)]
    if not documents:
        raise DataError(
            f"no readable .py files in {root}, so there is no built-in text to train "
            "on; set data_text.train to your own file or folder"
        )
    train = [pair for pair in documents if not _held_out(pair[0], valid_share)]
    valid = [pair for pair in documents if _held_out(pair[0], valid_share)]
    return train, valid


def _sources(root: Path) -> Iterator[tuple[Path, bytes]]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                text = _read(path)
                if text:
                    yield path, text


def _read(path: Path) -> bytes | None:
    try:
        raw = path.read_bytes()
        raw.decode()
    except (OSError, UnicodeDecodeError):
        return None
    return raw


def _held_out(name: str, share: float) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
