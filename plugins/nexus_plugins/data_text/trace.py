"""Which documents a step trained on: the order of the data is a function, so it can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nexus_core.bases.loader import ResumableLoader
from nexus_core.errors import ConfigError
from nexus_plugins.data_text.dataset import open_data
from nexus_plugins.data_text.plugin import DataTextPlugin
from nexus_plugins.data_text.rows import Rows, as_it_is
from nexus_plugins.data_text.stream import Place

__all__ = ["Excerpt", "Row", "trained_on"]


@dataclass(frozen=True)
class Excerpt:
    """A stretch of one document in a row: where it begins, how many tokens it has, its text."""

    place: Place
    tokens: int
    text: str


@dataclass(frozen=True)
class Row:
    """One row of a step.

    Args:
        epoch, batch: the micro-batch, counted from 0.
        sample: its number in `sample_ids`.
        excerpts: what it shows, in order.
    """

    epoch: int
    batch: int
    sample: int
    excerpts: tuple[Excerpt, ...]


def trained_on(run: Path, step: int) -> list[Row]:
    """The rows of a step of a run.

    Args:
        run: the run's folder, with config.yaml.
        step: counted from 1, as the logs count it.

    Raises:
        ConfigError: the folder holds no config of a run on text.
        DataError: the data is not there any more.
    """
    if step < 1:
        raise ConfigError(f"steps count from 1, got {step}")
    settings = _config(run / "config.yaml")
    plugin = DataTextPlugin(**(settings["plugins"]["data_text"] or {}))
    data = open_data(plugin.config)
    loader = ResumableLoader(
        data.train, plugin.config.batch_size, settings.get("seed") or 0, collate=as_it_is
    )
    accumulate = int(settings.get("accumulate") or 1)
    rows = []
    for micro in range((step - 1) * accumulate, step * accumulate):
        epoch, batch = divmod(micro, len(loader))
        samples = loader.sample_ids(epoch, batch).tolist()
        shown = zip(samples, _excerpts(data.train, samples, data.tokenizer), strict=True)
        rows += [Row(epoch, batch, sample, excerpts) for sample, excerpts in shown]
    return rows


def _config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}; expected the folder of a run") from error
    plugins = found.get("plugins") if isinstance(found, dict) else None
    if not isinstance(plugins, dict) or "data_text" not in plugins:
        raise ConfigError(f"{path} is not the config of a run with the plugin data_text")
    return dict(found)


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
