"""The counters of a run, its random generators, and the snapshot that a checkpoint stores."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Union

import numpy as np
import torch
from torch import Tensor

from nexus_core.errors import CheckpointError

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["PluginState", "RandomState", "Snapshot", "StateDict", "StateValue", "TrainState"]

StateValue: TypeAlias = Union[
    bool, int, float, str, Tensor, "list[StateValue]", "dict[str, StateValue]", None
]
"""What a state may be made of: what JSON holds, and tensors."""

StateDict: TypeAlias = dict[str, StateValue]


@dataclass
class TrainState:
    """How far a run is. The engine alone writes it; everything else reads it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # passes over the data completed
    batch: int = 0  # micro-batches done within the present epoch: the data cursor
    epoch_length: int = 0  # micro-batches in an epoch, 0 where the data does not say
    samples: int = 0  # rows trained on
    tokens: int = 0  # tokens trained on (rows, where a batch holds no `input_ids`)
    seconds: float = 0.0  # time spent in the training loop, over all restarts
    evaluated_at: int = -1  # the step of the last evaluation

    @property
    def epochs(self) -> float:
        """Epochs done, with the begun one as a fraction where its length is known, to 9 digits."""
        return round(self.epoch + (self.batch / self.epoch_length if self.epoch_length else 0), 9)

    def counted(self, unit: str) -> float:
        """The amount done of a unit: steps, epochs, samples, tokens or seconds."""
        return self.step if unit == "steps" else float(getattr(self, unit))


class RandomState(TypedDict):
    """The state of every global random generator of this process."""

    python: list[StateValue]
    numpy: list[StateValue]
    torch: Tensor
    devices: list[Tensor]


class PluginState(TypedDict):
    """What a plugin saved, and the `state_version` that it had."""

    version: int
    state: StateDict


class Snapshot(TypedDict):
    """Everything that decides how a run goes on: what a checkpoint stores."""

    model: dict[str, Tensor]
    optimizer: StateDict
    train: dict[str, int | float]  # the counters, with the data cursor
    pending: dict[str, list[float]]  # the sum and units of each metric since the last log
    metrics: dict[str, float]  # the last value of each
    random: RandomState
    plugins: dict[str, PluginState]  # by name


def seed_everything(seed: int) -> None:
    """Seed the generators of python, numpy, torch and its devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> RandomState:
    """Read the generators of python, numpy, torch and each CUDA device."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "devices": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to where `random_state` read it."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].clone())  # of a view with an offset torch reads garbage
    if state["devices"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["devices"])


def snap(engine: Engine) -> Snapshot:
    """Gather the state of an engine, tensors in place."""
    states = {name: plugin.state_dict() for name, plugin in engine.plugins.items()}
    return {
        "model": engine.model.state_dict(),
        "optimizer": engine.optimizer.state_dict(),
        "train": asdict(engine.state),
        "pending": engine.meter.state_dict(),
        "metrics": dict(engine.metrics),
        "random": random_state(),
        "plugins": {
            name: {"version": engine.plugins[name].state_version, "state": state}
            for name, state in states.items()
            if state
        },
    }


def restore(engine: Engine, snapshot: Snapshot) -> None:
    """Put a snapshot back into an engine of the same make; the optimizer takes over its tensors.

    Raises:
        CheckpointError: it does not fit the model, the optimizer or the plugins.
    """
    if strangers := snapshot["plugins"].keys() - engine.plugins.keys():
        name = min(strangers)
        raise CheckpointError(
            f"the checkpoint holds the state of plugin '{name}', which is not in this run; "
            f"add it with --plugins {name}"
        )
    try:
        engine.model.load_state_dict(snapshot["model"])
        engine.optimizer.load_state_dict(snapshot["optimizer"])
        for name, saved in snapshot["plugins"].items():
            plugin, state = engine.plugins[name], saved["state"]
            if saved["version"] != plugin.state_version:
                state = plugin.migrate(state, saved["version"])
            plugin.load_state_dict(state)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit this run: {' '.join(str(error).split())[:400]}; resume "
            "with the config that wrote it (config.yaml in its folder)"
        ) from error
    for counter, value in snapshot["train"].items():
        setattr(engine.state, counter, value)
    engine.meter.load_state_dict(snapshot["pending"])
    engine.metrics.update(snapshot["metrics"])
    set_random_state(snapshot["random"])
