"""What notes down the state of a run step by step, so that two runs can be compared to the bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from operator import itemgetter
from pathlib import Path
from typing import TextIO, cast

import torch
from torch import Tensor

from nexus_core.device import random_state
from nexus_core.engine import Engine
from nexus_core.plugin import Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.processes import gather, whole
from nexus_core.step import Step

__all__ = ["NOTES", "STARTS", "WitnessPlugin", "companions", "fingerprint", "whole_lines"]

NOTES = "witness.jsonl"
STARTS = "starts.txt"


class WitnessPlugin(Plugin[PluginConfig]):
    """Writes a line of fingerprints for each step; a resumed run continues after its own step.

    A step whose evaluation was put off by a stop is noted when that has been made, by the life that
    makes it; the batches are those that the life before had read.
    """

    only_watches = True

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[str] = []  # of the last step, over all processes
        self._noted = 0  # the last step
        self._file: TextIO | None = None

    def state_dict(self) -> StateDict:
        return {"batches": list(self._batches)}

    def load_state_dict(self, state: StateDict) -> None:
        self._batches = list(cast(list[str], state["batches"]))

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        if not engine.ranks.is_main:
            return
        assert engine.out is not None
        path = engine.out / NOTES
        step = engine.state.step
        kept = [line for line in whole_lines(path) if json.loads(line)["step"] <= step]
        self._noted = json.loads(kept[-1])["step"] if kept else 0
        engine.out.mkdir(parents=True, exist_ok=True)
        with (engine.out / STARTS).open("a", encoding="utf-8") as starts:
            starts.write(f"{engine.state.step}\n")
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        draft.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    @hookimpl
    def on_step(self, engine: Engine, step: Step) -> None:
        own = [(m.cell or 0, fingerprint(m.batch)) for m in step.micro if not m.borrowed]
        cells = [one for part in gather(engine.ranks, own) for one in part]
        self._batches = [print_ for _, print_ in sorted(cells, key=itemgetter(0))]

    @hookimpl
    def on_step_end(self, engine: Engine) -> None:
        states = {
            name: plugin.state_dict()
            for name, plugin in engine.plugins.items()
            if not getattr(plugin, "only_watches", False)  # a run's id in a service, say
        }
        notes = {
            "step": engine.state.step,
            "batches": fingerprint(self._batches),
            "weights": fingerprint(engine.model.state_dict()),
            "optimizer": fingerprint(engine.optimizer.state_dict()),
            "generators": fingerprint(random_state()),
            **{f"plugin {name}": fingerprint(state) for name, state in states.items() if state},
        }
        if self._file is not None and engine.state.step > self._noted:
            self._file.write(json.dumps(notes) + "\n")

    @hookimpl
    def on_close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def companions() -> list[str]:
    """Names of the plugins that installed packages add to a run which is compared to the bit."""
    return sorted(entry.name for entry in entry_points(group="nexus.verify"))


def fingerprint(value: object) -> str:
    """A hash of a tree of values, to the bits of its tensors."""
    digest = hashlib.sha256()
    for path, leaf in _leaves(value):
        digest.update(path.encode())
        if isinstance(leaf, Tensor):
            flat = whole(leaf.detach()).cpu().contiguous().view(-1)
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:32]


def whole_lines(path: Path) -> list[str]:
    """The whole lines of a file, which may be cut off by a kill; none where there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")
    else:
        yield path, value
