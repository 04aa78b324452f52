"""What all tests share."""

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
os.environ.update(  # read when these packages are imported, in processes that tests start too
    OMP_NUM_THREADS="1",  # as many processes as there are cores would wait for one another
    WANDB_MODE="offline",  # with what follows: nothing leaves the machine
    WANDB_ERROR_REPORTING="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",
    TRACKIO_DIR=tempfile.mkdtemp(prefix="trackio-"),
)
READ = metadata.entry_points


@cache
def read(places: tuple[tuple[str, int], ...], **chosen: str) -> metadata.EntryPoints:
    """The entry points that lie in these places, read once."""
    return READ(**chosen)


def entry_points(**chosen: str) -> metadata.EntryPoints:
    """As in `importlib.metadata`, but read again only once there is another place, or a new file.

    A scan of all that is installed takes longer than most tests.
    """
    folders = [Path(place or ".").absolute() for place in sys.path]
    places = tuple((str(f), f.stat().st_mtime_ns) for f in folders if f.exists())
    return read(places, **chosen)


metadata.entry_points = entry_points  # before the packages under test are imported


def pytest_collection_finish() -> None:
    """Leave what the imports made, more than a million objects, out of each later collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> Iterator[None]:
    """Small tensors are fastest on one thread, and no test depends on what ran before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # the generator that tests draw from; torch.manual_seed takes a hundred times as long
    torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(threads)
