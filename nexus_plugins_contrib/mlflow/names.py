"""Convert names and settings to what MLflow accepts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["name_for_mlflow", "name_of_image", "named", "parameters", "steps_of_images"]

LONGEST_NAME, LONGEST_PARAMETER = 250, 6000  # characters: MLflow's own limits
_NOT_IN_NAMES = re.compile(r"[^\w.\-:/ ]")
_NOT_IN_IMAGES = re.compile(r"[^a-zA-Z0-9_\-./ ]")
_IMAGE = re.compile(r"images/(.*)[+%]step[+%](\d+)[+%]")


def name_for_mlflow(name: str) -> str:
    """A name that MLflow accepts: `acc@1` is stored as `acc_1`."""
    parts = _NOT_IN_NAMES.sub("_", name).split("/")
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)[:LONGEST_NAME]


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each metric under a unique name that MLflow accepts."""
    named = {name: value for name, value in metrics.items() if name_for_mlflow(name) == name}
    for name in sorted(metrics.keys() - named.keys()):
        stored = name_for_mlflow(name)
        while stored in named:
            stored += "_"
        named[stored] = metrics[name]
    return named


def name_of_image(title: str) -> str:
    """The title of an image in characters that MLflow accepts."""
    return _NOT_IN_IMAGES.sub("_", title)[:LONGEST_NAME]


def steps_of_images(paths: Iterable[str]) -> dict[str, int]:
    """The last step of each image by its name, according to its file names."""
    steps: dict[str, int] = {}
    for path in paths:
        if found := _IMAGE.match(path):
            name = found[1].replace("~", "/")
            steps[name] = max(int(found[2]), steps.get(name, -1))
    return steps


def parameters(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a config as text, under dotted keys."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from parameters(value, f"{prefix}{key}.")
        else:
            yield name_for_mlflow(f"{prefix}{key}"), str(value)[:LONGEST_PARAMETER]
