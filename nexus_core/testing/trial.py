"""The test runs of a plugin: their parts, and how they are run."""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeAlias
from unittest import SkipTest

import torch
from torch import nn
from torch.optim import Optimizer

from nexus_core import Batch, ConfigError, Engine, Plugin, PluginError
from nexus_core.device import random_state, set_random_state
from nexus_core.plan import answering, load
from nexus_core.snapshot import Snapshot, gather
from nexus_core.testing.accelerator import HostAccelerator, host_accelerator
from nexus_core.testing.probes import FailingPlugin, PlannedError, answered, example_config, make
from nexus_core.testing.states import differences
from nexus_core.testing.syncs import Operations
from nexus_core.testing.tiny import (
    Parts,
    tiny_data,
    tiny_engine,
    tiny_losses,
    tiny_model,
    tiny_optimizer,
)

__all__ = ["RESUMED_AT", "STEPS", "Advice", "Settings", "Trial", "some"]

Settings: TypeAlias = Mapping[str, Any]

STEPS = 6
RESUMED_AT = (1, 4)
SEED, LOGGED = 5, "2 steps"
ENOUGH = "the check has seen enough"


class Advice(UserWarning):
    """What a check recommends; the plugin works without."""


class Trial:
    """The test runs of a plugin; `PluginContract` documents the attributes."""

    plugin: ClassVar[str | type[Plugin[Any]]]
    configs: ClassVar[Sequence[Settings]] = ()
    off: ClassVar[Settings | None] = None
    split_invariant: ClassVar[bool] = True
    resumes_after_stop: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-4
    budget: ClassVar[float] = 1.0
    seconds: ClassVar[float] = 0.02
    horizon: ClassVar[str] = "100000 steps"
    said: tuple[str, ...] = ()

    # -- what the plugin needs; override as required

    def model(self) -> nn.Module:
        """A new model, drawn from torch's generator; not called if a plugin makes the model."""
        return tiny_model()

    def data(self) -> Iterable[Batch]:
        """Batches to train and evaluate on; not called if a plugin makes the data."""
        return tiny_data()

    def optimizer(self, model: nn.Module) -> Optimizer:
        """An optimizer; not called if a plugin makes it."""
        return tiny_optimizer(model)

    def losses(self) -> Iterable[Plugin[Any]]:
        """New plugins with loss terms, in addition to the plugin's own."""
        return tiny_losses()

    def beside(self) -> Iterable[Plugin[Any]]:
        """New instances of the plugins that the plugin needs."""
        return [make(load(name)) for name in self.plugin_class().requires]

    def settings_in(self, folder: Path, settings: Settings) -> Settings:
        """The settings of a run in a folder: write files the plugin reads there, and name them."""
        return settings

    @classmethod
    def plugin_class(cls) -> type[Plugin[Any]]:
        """The class under test.

        Raises:
            PluginError: there is no such plugin, or it cannot be loaded.
        """
        if isinstance(cls.plugin, str):
            cls.plugin = load(cls.plugin)
        return cls.plugin

    @classmethod
    def cases(cls) -> list[Settings]:
        """The settings that every check runs with."""
        return list(cls.configs) or [example_config(cls.plugin_class())]

    def _made(self, settings: Settings) -> Plugin[Any]:
        return self.plugin_class()(**settings)

    def _name(self) -> str:
        return self.plugin_class().name

    def _engine(
        self,
        settings: Settings,
        out: Path,
        accumulate: int = 1,
        *,
        cells: int | None = None,
        seed: int = SEED,
        log_every: str = LOGGED,
        device: torch.device | None = None,
        first: Sequence[Plugin[Any]] = (),
        last: Sequence[Plugin[Any]] = (),
    ) -> Engine:
        """An engine with the plugin, the plugins it needs, and the parts."""
        out.mkdir(parents=True, exist_ok=True)
        return tiny_engine(
            *first,
            self._made(self.settings_in(out, settings)),
            *self.beside(),
            *last,
            parts=self._parts(),
            seed=seed,
            accumulate=accumulate,
            cells=cells,
            log_every=log_every,
            device=device,
            out=out,
        )

    @contextmanager
    def _accelerator(self) -> Iterator[HostAccelerator]:
        """The simulated accelerator; skips the check if there cannot be one."""
        with ExitStack() as stack:
            try:
                found = stack.enter_context(host_accelerator())
            except ConfigError as error:
                raise SkipTest(str(error)) from error
            yield found

    def _plain_engine(
        self, out: Path, *, model: nn.Module | None = None, log_every: str = LOGGED
    ) -> Engine:
        """The same without the plugin."""
        out.mkdir(parents=True, exist_ok=True)
        return tiny_engine(
            *self.beside(),
            parts=self._parts(),
            model=model,
            seed=SEED,
            log_every=log_every,
            out=out,
        )

    def _parts(self) -> Parts:
        return Parts(self.model, self.data, self.optimizer, self.losses)

    def _steps(self, engine: Engine, evaluate: bool = True, end: int = STEPS) -> Generator[int]:
        """Run the engine up to a step, and end it properly."""
        data: dict[str, Iterable[Batch]] | None = None if evaluate else {}
        steps = engine.steps(until=self.horizon, eval_every="3 steps", eval_data=data)
        for state in steps:
            yield state.step
            if state.step >= end:
                engine.stop(ENOUGH)
        self._expect(
            engine.state.step >= end,
            f"the run ended at step {engine.state.step} ({engine.stop_reason}); the checks need "
            f"{STEPS} steps: use settings with which the run lasts that long",
        )

    def _run(
        self,
        engine: Engine,
        taken: dict[int, Snapshot] | None = None,
        at: Iterable[int] = (),
        *,
        end: int = STEPS,
    ) -> Snapshot:
        """The state after the last step; fills `taken` with snapshots of the steps `at`."""
        for step in self._steps(engine, end=end):
            if taken is not None and step in at:
                taken[step] = copy.deepcopy(engine.state_dict())
            if step == end:
                last = copy.deepcopy(gather(engine, None))
        return last

    def _side_by_side(self, settings: Settings, seeds: Sequence[int], out: Path) -> list[Snapshot]:
        """Run one engine per seed, interleaving their steps.

        The process's random generators are swapped, so each engine sees its own.
        """
        ends: list[Snapshot] = []
        running = []
        for seed in seeds:
            engine = self._engine(settings, out / f"together-{seed}", seed=seed)
            running.append((engine, self._steps(engine), random_state()))
        while running:
            engine, steps, generators = running.pop(0)
            set_random_state(generators)
            if next(steps, None) is None:
                continue
            if engine.state.step == STEPS:
                ends.append(copy.deepcopy(gather(engine, None)))
            running.append((engine, steps, random_state()))
        return ends

    def _counted(self, engine: Engine) -> list[Counter[str]]:
        """The tensor operations of the second, fourth and last step."""
        counts = []
        with closing(self._steps(engine, evaluate=False)) as steps:
            for _ in range(STEPS):
                with Operations() as operations:
                    next(steps)
                counts.append(Counter(operations.counts))
        return counts[1::2]

    def _quickest_step(self, engine: Engine) -> float:
        seconds = []
        with closing(self._steps(engine, evaluate=False)) as steps:
            for _ in range(STEPS):
                started = time.perf_counter()
                next(steps)
                seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _ended(self, engine: Engine, failing: FailingPlugin | None) -> None:
        """Run the engine to its end, or to the planned failure."""
        if failing is None:
            self._run(engine)
            return
        try:
            self._run(engine)
        except PlannedError as error:
            _, *later = error.__notes__  # the first says where it was raised
            self._expect(
                not later,
                f"if another plugin fails in {failing.moment}, it fails too: {some(later)}; "
                "on_close must work after any failure",
            )
            return
        self._fail(f"an error of another plugin in {failing.moment} is swallowed")

    def _skip_makers(self, *hooks: str) -> None:
        if found := {*hooks} & answered(self._made(self.cases()[0])):
            raise SkipTest(f"it implements {min(found)}, so there is no step without it to compare")

    def _keeper(self) -> list[Plugin[Any]]:
        """A plugin that writes checkpoints, if none of the run does."""
        own = [self._made(self.cases()[0]), *self.beside()]
        if any("load_snapshot" in answered(plugin) for plugin in own):
            return []
        try:
            found = answering("load_snapshot")
        except PluginError as error:
            raise SkipTest(str(error)) from error
        for plugin in own:
            enemies = {plugin.name, found.name} & {*plugin.conflicts, *found.conflicts}
            if enemies or (found.slot is not None and found.slot == plugin.slot):
                raise SkipTest(f"'{plugin.name}' cannot be used together with '{found.name}'")
        return [make(found)]

    def _say(self, text: str) -> None:
        """Report information that is neither a pass nor a failure."""
        self.said += (text,)
        print(f"{self._name()}: {text}")

    def _same(self, one: Any, other: Any, what: str) -> None:
        lines = differences(one, other)
        self._expect(not lines, f"{what}: {some(lines)}")

    def _expect(self, holds: bool, fault: str) -> None:
        if not holds:
            self._fail(fault)

    def _advise(self, holds: bool, advice: str) -> None:
        """Say what would be better, without a failure."""
        if not holds:
            warnings.warn(f"plugin '{self._name()}': {advice}", Advice, stacklevel=3)

    def _fail(self, fault: str) -> NoReturn:
        raise AssertionError(f"plugin '{self._name()}': {fault}")


def some(lines: Sequence[str], most: int = 3) -> str:
    """The first lines, shortened, and the number of further ones."""
    rest = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(f"{line:.300}" for line in lines[:most]) + rest
