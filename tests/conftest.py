"""Fixtures and settings for all tests."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("house")
os.environ.update(  # read at import, also in processes started by tests
    OMP_NUM_THREADS="1",  # one process per core would otherwise compete
    WANDB_MODE="offline",  # with the following: no network access
    WANDB_ERROR_REPORTING="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",
    TRACKIO_DIR=tempfile.mkdtemp(prefix="trackio-"),
)
READ = metadata.entry_points


@cache
def read(places: tuple[tuple[str, int], ...], **chosen: str) -> metadata.EntryPoints:
    """The entry points in these locations, cached."""
    return READ(**chosen)


def entry_points(**chosen: str) -> metadata.EntryPoints:
    """As in `importlib.metadata`, but only reread if a location or file is new.

    Scanning all installed packages takes longer than most tests.
    """
    folders = [Path(place or ".").absolute() for place in sys.path]
    places = tuple((str(f), f.stat().st_mtime_ns) for f in folders if f.exists())
    return read(places, **chosen)


metadata.entry_points = entry_points  # before the packages under test are imported


def pytest_collection_finish() -> None:
    """Exclude the million objects created by imports from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> Iterator[None]:
    """Small tensors are fastest on one thread, and tests must not depend on earlier ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # the generator that tests use; torch.manual_seed is a hundred times slower
    torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(threads)
