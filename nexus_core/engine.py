"""The loop. It calls the hooks of `nexus_core.events` and keeps count; plugins do the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nexus_core import relay as calling
from nexus_core import snapshot as snapshots
from nexus_core.batches import Batch
from nexus_core.cells import per_batch
from nexus_core.data import DataState, RunData
from nexus_core.defaults import Defaults, FunctionLossPlugin
from nexus_core.device import check_values, pick_device, seed_everything
from nexus_core.earlier import EarlierNames
from nexus_core.errors import ConfigError
from nexus_core.evaluation import (
    GivenUpError,
    collect,
    evaluating,
    measure,
    named_sets,
    predict,
    say_mode,
    train_mode,
)
from nexus_core.events import Hooks
from nexus_core.intervals import Interval, Length, TrainState
from nexus_core.meter import Finish, Measured, Meter, Number
from nexus_core.optimizers import Untrained, check_optimizer, trained
from nexus_core.plan import arrange, claim
from nexus_core.plugin import Plugin
from nexus_core.processes import Agreement, Ranks
from nexus_core.progress import Course, Progress
from nexus_core.step import Step
from nexus_core.update import compute_gradient, count_units, prepare
from nexus_core.views import Metrics, Result, ShownEngine, ShownPlan, stopping_on_interrupt

__all__ = ["Engine", "Result"]

Data = Iterable[Batch]
GivenOptimizer = Optimizer | list[Optimizer] | Mapping[str, Optimizer]


class Engine(ShownEngine, EarlierNames):
    """Trains a model: a loop of events whose every part a plugin can listen to or replace.

    Args:
        model: any module; None asks the plugins (`make_model`).
        optimizer: over the model's parameters; of a list all are stepped, of a dict by name they
            take turns (the hook `take_turns`). None asks the plugins.
        loss: `loss(model, batch)` returns a mean, or `loss(input, target)` as in `torch.nn`; None
            if plugins provide the loss terms.
        plugins: called in this order unless they declare otherwise.
        seed: seeds python, numpy and torch at once; None leaves the generators alone.
        device: "cpu", "cuda:0", "auto" (an accelerator if available); None leaves the model where
            it is.
        accumulate: micro-batches per optimizer step.
        cells: number of cells per step, over all micro-batches and ranks: results are then bitwise
            the same however the cells are distributed; None: each micro-batch is whole.
        step_at_epoch_end: the last step of an epoch takes only the micro-batches that are left of
            it; otherwise it also takes the first of the next epoch.
        log_every: interval between calls of `on_log`.
        out: the run folder, for plugins that write files.
        config: the resolved settings of the run, for plugins that store or show them.

    Raises:
        ConfigError, PluginError, DataError: the parts do not fit together.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: GivenOptimizer | None = None,
        *,
        loss: Callable[..., Tensor] | None = None,
        plugins: Iterable[Plugin[Any]] = (),
        seed: int | None = None,
        device: str | torch.device | None = None,
        accumulate: int = 1,
        cells: int | None = None,
        step_at_epoch_end: bool = False,
        log_every: Length = "10 steps",
        out: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.cells, self.batch_cells = cells or 0, per_batch(cells, accumulate)
        if seed is not None:
            seed_everything(seed)
        self.seed = seed or 0
        self.accumulate, self.step_at_epoch_end = accumulate, step_at_epoch_end
        self.log_every = Interval.parse(log_every)
        self.out = Path(out) if out is not None else None
        self.config = dict(config or {})
        self.ranks = Ranks.current()
        self.state = TrainState()
        self.horizon: Interval | None = None
        self.training, self.split = True, "train"
        self.metrics = Metrics(self.state)
        self.meter = Meter(counts=not self.cells or self.ranks.is_main)
        self._agreement = Agreement(self.ranks)
        self._progress = Progress()
        self._running = False
        self._untrained = Untrained()

        self.plan = ShownPlan.of(arrange([*plugins, *([FunctionLossPlugin(loss)] if loss else [])]))
        self.plugins = {plugin.name: plugin for plugin in self.plan.plugins}
        self.hook: Hooks = calling.relay(self.plan, Defaults())
        if not self._answers("loss_terms"):
            raise ConfigError("no loss: pass loss=..., or add a plugin with a loss term")
        self.device = pick_device(device, model)
        self.data: RunData | None = None
        given = model is not None
        if model is None:
            self.data = self.hook.make_data(engine=self)
            model = self.hook.make_model(engine=self)
        check_values(model)
        self.model: nn.Module = model if given and device is None else model.to(self.device)
        made = self.hook.make_optimizer(engine=self) if optimizer is None else optimizer
        self.optimizer: Optimizer = check_optimizer(made, self.model)
        claim(self.plan, self)
        self.hook.on_build(engine=self)

    def fit(
        self,
        data: Data | None = None,
        until: Length | None = None,
        *,
        eval_data: Data | Mapping[str, Data] | None = None,
        eval_every: Length | None = None,
    ) -> Result:
        """Train until the horizon, or until `stop`; see `steps` for the arguments.

        Ctrl-C, or the stop button of a notebook, ends the run after the current step, saving as at
        the end; a running evaluation is abandoned, and made by the next call. A second one
        interrupts at once, and that step has not happened.
        """
        with stopping_on_interrupt(self.stop, lambda: self.state.step):
            for _ in self.steps(data, until=until, eval_data=eval_data, eval_every=eval_every):
                pass
        return self.result()

    def steps(
        self,
        data: Data | None = None,
        *,
        until: Length | None = None,
        eval_data: Data | Mapping[str, Data] | None = None,
        eval_every: Length | None = None,
    ) -> Iterator[TrainState]:
        """The loop as a generator, one optimizer step per iteration; close it and continue later.

        A step that is interrupted or fails has not happened: the next call takes it again. If its
        update was already applied, the next call only does what was still due after it.

        Args:
            data: batches; any iterable, ideally a `ResumableLoader`. None: uses `make_data`.
            until: the horizon, counted from the very first step across restarts: "3 epochs".
            eval_data: batches to evaluate on, or several sets by name.
            eval_every: interval between evaluations, or a share of the horizon ("10%"); there is
                always one at the horizon.

        Yields:
            The counters, after each step with its log and evaluation.
        """
        if self._running:
            raise ConfigError(
                "this engine already has an open loop: exhaust or close() what steps() returned "
                "before starting another"
            )
        if data is None:
            self.data = self.data or self.hook.make_data(engine=self)
            data = self.data.train
            eval_data = self.data.valid if eval_data is None else eval_data
        self.horizon = Interval.horizon(until)
        period = Interval.parse(eval_every).of(self.horizon) if eval_every else None
        self._running = True
        try:
            yield from self._loop(data, self.horizon, eval_data, period)
        finally:
            self._running = False

    def rehearse(
        self, data: Data, *, until: Length, eval_data: Mapping[str, Data]
    ) -> tuple[Step, dict[str, float]]:
        """Compute the gradient of one step, and evaluate, without an update.

        Raises whatever `on_start`, a batch or a loss would raise in training. Observers, such as
        loggers, are not called.

        Returns:
            The step, and the metrics of the evaluation.
        """
        self.horizon = Interval.horizon(until)
        acting = calling.relay(
            self.plan, Defaults(), lambda plugin: not getattr(plugin, "only_watches", False)
        )
        try:
            stream = self._progress.open(self, data, self.horizon, None)
            acting.on_start(engine=self)
            step = self._progress.step = prepare(self, stream.take(self.accumulate, self.horizon))
            for turn in self.hook.take_turns(engine=self, step=step):
                step.turn = turn
                count_units(self, step)
                compute_gradient(self, step)
            return step, self._measured(eval_data)
        finally:
            acting.on_close(engine=self)

    def evaluate(self, data: Data | Mapping[str, Data]) -> dict[str, float]:
        """Evaluate every loss term over all the data, weighted by units; calls `on_eval`.

        Inside an evaluation (from the hook `measure`) it calls no events.

        Returns:
            `val/loss`, `val/total_loss`, `val/<term>_loss` and metrics of plugins, by
            split.
        """
        metrics = self._measured(named_sets(data))
        return self._announced(metrics) if self.training else metrics

    def predict(self, data: Data) -> list[Any]:
        """The model's output for each batch, in order, on the CPU.

        Runs like an evaluation: in evaluation mode, without gradients, with averaged weights if a
        plugin evaluates with them; the engine's `loss=` is not called. Every rank gets all outputs.
        If each rank reads a share of every batch (a `ResumableLoader` with `ranks`), the outputs of
        a batch are concatenated in row order, and padding rows are dropped.
        """
        answering = calling.relay(self.plan, Defaults(), lambda plugin: plugin.name != "loss")
        with self._aside([data]):
            return predict(self, answering.forward, data)

    def _announced(self, metrics: dict[str, float]) -> dict[str, float]:
        self.metrics |= metrics
        self.hook.on_eval(engine=self, metrics=metrics)
        self.metrics.keep({name: float(value) for name, value in metrics.items()})
        return metrics

    @property
    def stop_reason(self) -> str | None:
        """Why the loop ends before its horizon; None if it does not."""
        return self._agreement.reason

    @property
    def stopping(self) -> bool:
        """Whether the loop ends after the current step."""
        return self._agreement.reason is not None

    @property
    def data_state(self) -> DataState | None:
        """Which data the loop reads, and its position; None before the first loop."""
        return self._progress.where()

    def stop(self, reason: str = "stopped by the program", *, at_once: bool = False) -> None:
        """End the loop after the current step, or before its first; all ranks end together.

        Args:
            reason: shown in the `Result`.
            at_once: do not start or finish an evaluation; it is abandoned between two batches (on
                all ranks at the same one), and made up for when the run is resumed.
        """
        self._agreement.stop(reason, at_once)

    def log(
        self, name: str, value: Number | Measured, units: Number = 1.0, finish: Finish = None
    ) -> None:
        """Record a 0-d sum over units; its mean is read at the next log, without a device sync.

        Args:
            name: without a slash it gets the split as prefix: "train/grad_norm", "val/...".
            value: a number, or a metric with `update`, `compute` and `reset` that you update: it is
                computed when due, then reset. Those of torchmetrics reduce over ranks themselves;
                for others the mean over ranks is taken.
            finish: applied to the mean when it is read: `math.exp` makes a perplexity.

        Raises:
            ConfigError: the value is more than one number.
        """
        self.meter.add(name if "/" in name else f"{self.split}/{name}", value, units, finish)

    def parameters(self, turn: str | None = None) -> list[nn.Parameter]:
        """The parameters the optimizer updates now, or in one turn; may change, so do not cache."""
        return trained(self.optimizer, turn)

    def untrained(self) -> list[nn.Parameter]:
        """The model's other parameters; looked up again when the optimizer's groups change."""
        return self._untrained.of(self.optimizer, self.model)

    def result(self) -> Result:
        """The progress of the run, the last value of every metric, and their history."""
        return Result.of(
            self.state, self.horizon, self.stop_reason, self.metrics, self._progress.owed
        )

    def state_dict(self) -> snapshots.Snapshot:
        """Everything needed to continue the run, tensors by reference; calls `on_save`."""
        self._progress.check_whole()
        snapshot = snapshots.gather(self, self._progress.where(), self._progress.owed)
        calling.call_each(
            self._answers("on_save"),
            lambda plugin: snapshots.check_parts(snapshot, plugin),
            engine=self,
            snapshot=snapshot,
        )
        return snapshot

    def load_state_dict(self, snapshot: snapshots.Snapshot) -> None:
        """Continue from a snapshot, bitwise; calls `on_load` first.

        Raises:
            CheckpointError: it does not fit; the engine is left unchanged.
        """
        if self._running:
            raise ConfigError(
                "cannot load a snapshot while the loop is open; "
                "close the loop first, or use rewind, which leaves counters and data alone"
            )
        self._restore(deepcopy(snapshot))

    def resume(self, source: str = "auto") -> None:
        """Find a snapshot through the plugins ("auto": the newest valid one) and load it."""
        self._restore(self.hook.load_snapshot(engine=self, source=source))

    def rewind(self, snapshot: snapshots.Snapshot) -> None:
        """Restore only weights, optimizer and plugins from an earlier snapshot of this run.

        Counters, metrics, random generators and the data position are kept.
        """
        progress = self._progress
        now = snapshots.gather(self, progress.where())
        kept = {key: now[key] for key in ("train", "pending", "metrics", "random", "data")}
        self._restore(cast(snapshots.Snapshot, {**deepcopy(snapshot), **kept}))
        self._progress = progress

    def _measured(
        self,
        sets: Mapping[str, Data],
        gives_up: Callable[[int | None], bool] = lambda number: False,
    ) -> dict[str, float]:
        metrics = dict[str, float]()
        with self._aside(sets.values()):
            for name, batches in sets.items():
                self.split, self.meter = name, Meter(self.meter.counts)
                metrics |= measure(self, name, batches, gives_up)
        return metrics

    @contextmanager
    def _aside(self, sets: Iterable[Data]) -> Iterator[None]:
        before = (self.training, self.split, self.meter)
        self._progress.leave_to(sets)
        with evaluating(self, nested=not self.training):
            try:
                self.training, self.split, self.meter = False, "predict", Meter(before[2].counts)
                yield
            finally:
                self.training, self.split, self.meter = before

    def _restore(self, snapshot: snapshots.Snapshot) -> None:
        self.hook.on_load(engine=self, snapshot=snapshot)
        snapshots.apply(self, snapshot, snapshots.check(self, snapshot))
        self._progress = Progress(snapshot.get("data"), "evaluate" in snapshot.get("due", []))
        self.metrics.recall(self.out)

    def _loop(
        self,
        data: Data,
        horizon: Interval,
        eval_data: Data | Mapping[str, Data] | None,
        period: Interval | None,
    ) -> Iterator[TrainState]:
        failure: BaseException | None = None
        try:
            self._agreement.settle()
            stream = self._progress.open(self, data, horizon, period)
            self.hook.on_start(engine=self)
            train_mode(self.optimizer)
            say_mode(self.model)
            self._agreement.settle()
            course = Course(
                self,
                self._progress,
                stream,
                self._agreement,
                horizon,
                self.log_every.of(horizon),
                period,
            )
            while self._progress.due or not (self.stopping or horizon.reached(self.state)):
                if not self._progress.due and not course.take_step():
                    break
                if not self._end_step(eval_data):
                    break
                yield self.state
            if not self.stopping or horizon.reached(self.state):
                self._log()
                self._evaluate(eval_data)
            if failed := self._call_all("on_finish", None):
                raise failed
        except (Exception, KeyboardInterrupt) as error:
            failure = error
            calling.blame(error, self.plan, self.state.step)
            self._call_all("on_error", failure, error=error)
            raise
        finally:
            self._agreement.close()
            closing = self._call_all("on_close", failure)
            if closing is not None and closing is not failure:
                raise closing

    def _end_step(self, eval_data: Data | Mapping[str, Data] | None) -> bool:
        """Do what is due after a step; what has not been started when an error occurs stays due.

        Returns:
            False if the run stops before everything is done.
        """
        due = self._progress.due
        if "follow" in due and self._progress.step is not None:
            self.hook.on_step(engine=self, step=self._progress.step)
            due.remove("follow")
        if "log" in due:
            self._log()
        if "evaluate" in due and not self._evaluate(eval_data):
            return False
        due.clear()
        self.hook.on_step_end(engine=self)
        return True

    def _evaluate(self, data: Data | Mapping[str, Data] | None) -> bool:
        """Evaluate unless already done at this step; False if a stop cannot wait."""
        if data is None or (isinstance(data, Mapping) and not data) or self.state.is_evaluated:
            return True
        try:
            if self._agreement.heed(1):  # the last step's exchange already answers this
                raise GivenUpError
            metrics = self._measured(named_sets(data), self._agreement.heed)
        except GivenUpError:
            self._progress.owed = True
            return False
        self._progress.owed = False
        self.state.evaluated_at = self.state.step
        self._announced(metrics)
        self._agreement.settle()
        return True

    def _log(self) -> None:
        if metrics := collect(self):
            self.metrics.keep(metrics)
            self.hook.on_log(engine=self, metrics=metrics)

    def _answers(self, hook: str) -> list[calling.Impl]:
        return calling.implementations(self.plan, hook, Defaults())

    def _call_all(
        self, hook: str, failure: BaseException | None, **given: object
    ) -> BaseException | None:
        return calling.call_all(self._answers(hook), hook, failure, engine=self, **given)
