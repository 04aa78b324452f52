"""Trace which documents a step trained on; possible because data order is a function."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nexus_core.bases.loader import ResumableLoader
from nexus_core.cli.config_file import read_config_file
from nexus_core.errors import ConfigError
from nexus_plugins.data_text.dataset import TextData, open_data
from nexus_plugins.data_text.plugin import DATA, DataTextPlugin
from nexus_plugins.data_text.rows import Rows, as_it_is
from nexus_plugins.data_text.stream import Place

__all__ = ["Excerpt", "Row", "trained_on"]


_MOST_ROWS = 50_000


@dataclass(frozen=True)
class Excerpt:
    """A piece of one document in a row: its start, its number of tokens, its text."""

    place: Place
    tokens: int
    text: str


@dataclass(frozen=True)
class Row:
    """One row of a step.

    Args:
        epoch, batch: the micro-batch, counted from 0.
        sample: its id in `sample_ids`.
        excerpts: its content, in order.
    """

    epoch: int
    batch: int
    sample: int
    excerpts: tuple[Excerpt, ...]


def trained_on(run: Path, step: int) -> list[Row]:
    """The rows of a step of a run.

    Args:
        run: the run's folder, with config.yaml.
        step: number of the step as in the logs, from 1.

    Raises:
        ConfigError: the folder has no config of a text run.
        DataError: the data no longer exists.
    """
    if step < 1:
        raise ConfigError(f"steps count from 1, got {step}")
    settings = _config(run / "config.yaml")
    block = settings["plugins"]["data_text"] or {}
    seed, accumulate = settings.get("seed") or 0, settings.get("accumulate") or 1
    named = isinstance(block, dict) and all(isinstance(key, str) for key in block)
    if not named or not isinstance(seed, int) or not isinstance(accumulate, int):
        raise ConfigError(
            f"{run / 'config.yaml'} is not a run's resolved config: expected settings for "
            f"data_text, and numbers for seed and accumulate (got {seed!r} and {accumulate!r})"
        )
    plugin = DataTextPlugin(**block)
    count = accumulate * plugin.config.batch_size
    if not 0 < count <= _MOST_ROWS:
        raise ConfigError(f"cannot list a step of {count:,} rows; the limit is {_MOST_ROWS:,}")
    data = open_data(plugin.config)
    _check_same(run, data)
    loader = ResumableLoader(data.train, plugin.config.batch_size, seed, collate=as_it_is)
    rows = []
    ends = settings.get("step_at_epoch_end") is True
    for epoch, batch in _batches(step, accumulate, len(loader), ends):
        samples = loader.sample_ids(epoch, batch).tolist()
        shown = zip(samples, _excerpts(data.train, samples, data.tokenizer), strict=True)
        rows += [Row(epoch, batch, sample, excerpts) for sample, excerpts in shown]
    return rows


def _batches(step: int, accumulate: int, length: int, ends: bool) -> list[tuple[int, int]]:
    """The epoch and number of each batch of a step, all of one epoch if steps `end` with epochs."""
    if not ends:
        return [divmod(n, length) for n in range((step - 1) * accumulate, step * accumulate)]
    epoch, place = divmod(step - 1, math.ceil(length / accumulate))
    return [(epoch, n) for n in range(length)[place * accumulate : (place + 1) * accumulate]]


def _check_same(run: Path, data: TextData) -> None:
    """Warn if the data has changed since the run started."""
    path = run / DATA
    try:
        saved = json.loads(path.read_bytes())["train"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}; expected the folder of a run") from error
    if saved != data.fingerprint:
        warnings.warn(
            f"the data has changed since {run} started (fingerprint {data.fingerprint}, not "
            f"{saved}): these are the rows of the current data",
            RuntimeWarning,
            stacklevel=3,
        )


def _config(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_config_file(path).value
    except ConfigError as error:
        raise ConfigError(*error.args, "; expected the folder of a run") from error
    plugins = found.get("plugins")
    if not isinstance(plugins, dict) or "data_text" not in plugins:
        raise ConfigError(f"{path} is not the config of a run with the plugin data_text")
    return found


def _excerpts(rows: Rows, samples: list[int], tokenizer: Any) -> list[tuple[Excerpt, ...]]:
    found = []
    for (stream, first, last), ids in zip(rows.locate(samples), rows.tokens(samples), strict=True):
        starts, _ = stream.starts(np.array([first + 1]), np.array([last]))
        edges = [first, *starts.tolist(), last]
        found.append(
            tuple(
                Excerpt(
                    stream.place(begin),
                    end - begin,
                    tokenizer.decode(ids[begin - first : end - first].tolist()),
                )
                for begin, end in pairwise(edges)
            )
        )
    return found
