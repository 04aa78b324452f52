"""Records digests of a run's full state, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from nexus_core import ConfigError, Every, IntervalField, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.cli.digests import Digester, hexadecimal
from nexus_core.paths import PathText
from nexus_plugins._shared.files import write_whole
from nexus_plugins.tape import cells, lines, parts

if TYPE_CHECKING:
    from nexus_core import Step
    from nexus_core.engine import Engine

__all__ = ["TapeConfig", "TapePlugin"]

HASH_BITS = 48
_IGNORED: dict[str, Any] = {"resume": "ignored"}


class TapeConfig(PluginConfig):
    """How much of a run is recorded, and how often."""

    every: int = Field(
        default=1,
        ge=1,
        description="steps between digests of gradient, weights, optimizer and plugins; batches, "
        "generators and losses are recorded every step",
    )
    modules: int = Field(
        default=2, ge=0, description="depth of the module path: 2 separates blocks.0 from blocks.1"
    )
    witness: IntervalField | None = Field(
        default=None,
        description="interval for logging a hash of all weights, `weights/hash`; in a run in "
        "cells it is the same on any number of processes; null: never",
        json_schema_extra=_IGNORED,
    )
    at_once: bool = Field(
        default=False,
        description="write each line within its step, which syncs with the device; otherwise "
        "lines are read with logs and saves, except on a CPU",
        json_schema_extra=_IGNORED,
    )
    file: PathText = Field(
        default=lines.FILE,
        min_length=1,
        description="file name in the run folder",
        json_schema_extra=_IGNORED,
    )


@dataclass
class _Taken:
    """A step whose digests are still on the device.

    Args:
        line: the parts known on the host.
        names: names of the digests of each part.
        losses: the mean of each term `(terms)`.
        digests: the other digests, in the order of the names, int64.
        cells: digests of all cells of the step, `(cells, 1 + generators)`, int64; None if the run
            is not in cells.
        generators: the names of the cells' generators.
    """

    line: dict[str, Any]
    names: dict[str, list[str]] = field(default_factory=dict)
    losses: Tensor | None = None
    digests: list[Tensor] = field(default_factory=list)
    cells: Tensor | None = None
    generators: tuple[str, ...] = ()


class TapePlugin(Plugin[TapeConfig]):
    """Writes a tape: for each step a line of digests, chained to the previous line.

    A line covers the batches, the random generators before the forward pass, each loss term, the
    applied gradient by module, the optimizer's settings, then weights and optimizer states by
    module after the update, and the state of each plugin if that needs no device sync. Training is
    not affected. Two runs with the same chain digest at a step are identical up to it:
    `nexus-run diff` finds the first step at which they are not, and says why.

    A resumed run continues the tape of its checkpoint, which ends up identical to that of an
    uninterrupted run. With several ranks, batches and generators are those of rank 0; in cells they
    are those of all ranks, in the order of the cells, and the tape equals that of one process.
    """

    config_class = TapeConfig
    api_version: ClassVar[str] = "1.2"
    only_watches: ClassVar[bool] = True  # a branch starts a new tape

    def __post_init__(self) -> None:
        self._chain = ""
        self._batches: list[str] = []
        self._inputs: list[list[Tensor]] = []  # per batch: tensors already on a device
        self._generators: list[dict[str, str]] = []  # per batch: before its forward pass
        self._gradients: dict[str, Tensor] = {}
        self._begun = 0  # the step whose batches are being read
        self._waiting: list[_Taken] = []
        self._digester = Digester()
        self._file: IO[str] | None = None
        self._witness: Every | None = None

    def state_dict(self) -> StateDict:
        """The digest of all lines so far."""
        self._write()
        return {"chain": self._chain}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what `state_dict` returned."""
        self._waiting.clear()
        self._chain = cast(str, state["chain"])

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Truncate the tape to the step that the run resumes from."""
        self._begun = 0
        if every := self.config.witness:
            self._witness = Every(every.of(engine.horizon), engine.state)
        if not engine.ranks.is_main or engine.out is None:
            return
        step = engine.state.step
        path = engine.out / self.config.file
        tape = lines.read_tape(engine.out, self.config.file)
        session = {
            "step": step,
            "every": self.config.every,
            "modules": self.config.modules,
            "environment": parts.environment(engine),
        }
        kept = [{"session": old} for old in tape.sessions if old["step"] < step]
        kept += [line for number, line in tape.lines.items() if number <= step]
        text = "".join(map(lines.encoded, [*kept, {"session": session}]))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(
                f"{self.name}.file: cannot write '{path}': {error.strerror}"
            ) from error

    @hookimpl(stage="inspect", trylast=True)
    def on_batch(self, engine: Engine, batch: Any) -> None:
        if self._begun != engine.state.step + 1:
            self._begun = engine.state.step + 1
            self._batches, self._inputs, self._generators, self._gradients = [], [], [], {}
        digest, elsewhere = parts.of_batch(batch)
        self._batches.append(digest)
        self._inputs.append(elsewhere)
        self._generators.append(parts.generators())

    @hookimpl(stage="measure", trylast=True)
    def after_backward(self, engine: Engine, step: Step) -> None:
        if self._is_due(step.number):
            self._gradients |= self._by_module(
                engine, parts.gradients(engine, self.config.modules), step.turn or ""
            )

    @hookimpl(stage="restore", trylast=True)
    def on_step(self, engine: Engine, step: Step) -> None:
        taken = self._read_data(engine, step)
        taken.names["losses"] = list(step.losses)
        losses = [loss.detach().reshape(()).double() for loss in step.losses.values()]
        taken.losses = engine.ranks.sum(torch.stack(losses)) if losses else None
        taken.line["settings"] = parts.settings(engine)
        found: dict[str, dict[str, Tensor]] = {}
        if any(self._inputs):
            found["inputs"] = self._inputs_of(engine, step)
        if self._is_due(step.number):
            depth = self.config.modules
            found |= {
                "gradient": self._gradients,
                "weights": self._by_module(engine, parts.weights(engine, depth)),
                "optimizer": self._by_module(engine, parts.optimizer_states(engine, depth)),
            }
            if self._waits(taken):
                taken.line["plugins"] = _states(engine)
        for part, digests in found.items():
            taken.names[part] = list(digests)
            taken.digests += digests.values()
        self._waiting.append(taken)
        if self._waits(taken):
            self._write()

    @hookimpl
    def collect_metrics(self, engine: Engine) -> dict[str, float]:
        """A hash of all weights, truncated to what a float represents exactly, if due."""
        if self._witness is None or not self._witness.due(engine.state):
            return {}
        weights = [value for values in parts.weights(engine, 0).values() for value in values]
        digest = int(self._digester([weights], engine.device, engine.ranks)[0])
        return {"weights/hash": float(digest % 2**HASH_BITS)}

    @hookimpl(stage="record")
    def on_log(self) -> None:
        self._write()

    @hookimpl
    def on_close(self) -> None:
        self._write()
        self._inputs, self._gradients = [], {}
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_data(self, engine: Engine, step: Step) -> _Taken:
        """Read the digests of batches and generators."""
        if not step.cells:
            line = {"step": step.number, "batches": self._batches}
            return _Taken(line | {"generators": self._generators[-1]})
        each = [cells.of_run(engine, generators) for generators in self._generators]
        pairs = zip(self._batches, each, strict=True)
        own = [[batch, *generators.values()] for batch, generators in pairs]
        found = cells.gathered(engine, step, own)
        return _Taken({"step": step.number}, cells=found, generators=tuple(each[0]))

    def _inputs_of(self, engine: Engine, step: Step) -> dict[str, Tensor]:
        if step.cells:
            return cells.inputs_of(engine, step, self._inputs, self._digester)
        inputs = {str(place): tensors for place, tensors in enumerate(self._inputs)}
        return self._by_module(engine, inputs)

    def _waits(self, taken: _Taken) -> bool:
        """Whether to read the line within the step; on a CPU that costs nothing."""
        return self.config.at_once or taken.losses is None or taken.losses.is_cpu

    def _is_due(self, number: int) -> bool:
        return number % self.config.every == 0

    def _by_module(
        self, engine: Engine, groups: Mapping[str, list[Tensor]], prefix: str = ""
    ) -> dict[str, Tensor]:
        """The digest of each group, on the device; over all ranks if it is sharded."""
        digests = self._digester(list(groups.values()), engine.device, engine.ranks)
        names = [f"{prefix}:{name}" if prefix else name for name in groups]
        return dict(zip(names, digests.unbind(), strict=True))

    def _write(self) -> None:
        """Read pending digests from the device, chain and write them."""
        waiting, self._waiting = self._waiting, []
        numbers = [number for taken in waiting for number in taken.digests]
        digests = iter(torch.stack(numbers).tolist() if numbers else [])
        for taken in waiting:
            line = taken.line
            if taken.cells is not None:
                line["batches"], line["generators"] = cells.read(taken.cells, taken.generators)
            for part, names in taken.names.items():
                if part == "losses":
                    values = taken.losses.tolist() if taken.losses is not None else []
                    line[part] = dict(zip(names, map(parts.number, values), strict=True))
                else:
                    line[part] = {name: hexadecimal(next(digests)) for name in names}
            self._chain = line["chain"] = lines.chained(self._chain, line)
            if self._file is not None:
                self._file.write(lines.encoded(line))


def _states(engine: Engine) -> dict[str, str]:
    """A digest of the state of each plugin that has one and is not an observer."""
    states = {
        name: plugin.state_dict()
        for name, plugin in engine.plugins.items()
        if not getattr(plugin, "only_watches", False)
    }
    return {name: parts.of_tree(state) for name, state in states.items() if state}
