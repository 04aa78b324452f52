"""The loop. It fires the hooks of `nexus_core.events` and keeps the books; plugins do the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nexus_core import plan as planning
from nexus_core.data import Batch, RunData, stream_batches, to_device
from nexus_core.defaults import Defaults, FunctionLossPlugin
from nexus_core.errors import ConfigError
from nexus_core.intervals import Every, Interval
from nexus_core.meter import Finish, Meter, Number
from nexus_core.plugin import Plugin
from nexus_core.processes import Ranks, pick_device
from nexus_core.state import Snapshot, TrainState, restore, seed_everything, snap
from nexus_core.step import measure, take_step

__all__ = ["Engine", "Result"]

Data = Iterable[Batch]


@dataclass(frozen=True)
class Result:
    """How a run ended: "finished", or "stopped" early for a reason; the last of every metric."""

    status: str
    reason: str
    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]


class Engine:
    """Trains a model: a loop of events whose every part a plugin can listen to or replace.

    Args:
        model: any module; None asks the plugins (`make_model`).
        optimizer: over the model's parameters; None asks the plugins (`make_optimizer`).
        loss: `loss(model, batch)` returns a mean; None where plugins bring the loss terms.
        plugins: in the order in which to call them, where they do not say themselves.
        seed: of python, numpy and torch, set at once; None leaves the generators alone.
        device: "cpu", "cuda:0", "auto" (an accelerator if there is one); None: the model's own.
        accumulate: micro-batches in a step.
        log_every: period of `on_log`.
        out: the run's folder, for plugins that write files.
        config: the resolved settings of the run, for plugins that store or show them.

    Raises:
        ConfigError, PluginError, DataError: the parts do not make a run.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        plugins: Iterable[Plugin[Any]] = (),
        seed: int | None = None,
        device: str | torch.device | None = None,
        accumulate: int = 1,
        log_every: Interval | str | int = "10 steps",
        out: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if accumulate < 1:
            raise ConfigError(f"accumulate must be at least 1, got {accumulate}")
        if seed is not None:
            seed_everything(seed)
        self.seed = seed or 0
        self.accumulate = accumulate
        self.log_every = Interval.parse(log_every)
        self.out = Path(out) if out is not None else None
        self.config = dict(config or {})
        self.ranks = Ranks.current()
        self.state = TrainState()
        self.horizon: Interval | None = None
        self.stop_reason: str | None = None
        self.clock = time.perf_counter  # in seconds; a plugin may bring one for all processes
        self.alone = True  # False: a plugin sets `stopping`, when all processes know of the stop
        self.training, self.split = True, "train"
        self.last_micro_batch = True
        self.losses: dict[str, Tensor] = {}
        self.refused: Tensor | None = None
        self.metrics: dict[str, float] = {}
        self.meter = Meter()

        self.plan = planning.arrange([*plugins, *([FunctionLossPlugin(loss)] if loss else [])])
        self.plugins = {plugin.name: plugin for plugin in self.plan.plugins}
        hooks = planning.plugin_manager(self.plan, Defaults()).hook
        self.hook = planning.shortcuts(hooks)
        self._hooks = hooks
        if not hooks.loss_terms.get_hookimpls():
            raise ConfigError("there is no loss: pass loss=..., or add a plugin with a loss term")
        self.device = pick_device(device, model)
        self.data: RunData | None = None
        if model is None:
            self.data = self.hook.make_data(engine=self)
            model = self.hook.make_model(engine=self)
        self.model: nn.Module = model.to(self.device)
        self.optimizer: Optimizer = optimizer or self.hook.make_optimizer(engine=self)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def fit(
        self,
        data: Data | None = None,
        *,
        until: Interval | str | int,
        eval_data: Data | Mapping[str, Data] | None = None,
        eval_every: Interval | str | int | None = None,
    ) -> Result:
        """Train until the horizon, or until `stop`; see `steps` for the arguments."""
        for _ in self.steps(data, until=until, eval_data=eval_data, eval_every=eval_every):
            pass
        return self.result()

    def steps(
        self,
        data: Data | None = None,
        *,
        until: Interval | str | int,
        eval_data: Data | Mapping[str, Data] | None = None,
        eval_every: Interval | str | int | None = None,
    ) -> Iterator[TrainState]:
        """The loop as a generator, one optimizer step a turn; close it and go on later.

        Args:
            data: batches; an iterable, best a `ResumableLoader`. None: what `make_data` answers.
            until: the horizon, counted from the very first step, restarts included.
            eval_data: batches to evaluate on, or several sets of them by name.
            eval_every: the period of evaluations; there is one at the horizon in any case.

        Yields:
            The counters, after each step with its log and evaluation.
        """
        if data is None:
            self.data = self.data or self.hook.make_data(engine=self)
            data = self.data.train
            eval_data = self.data.valid if eval_data is None else eval_data
        eval_data = eval_data or None if isinstance(eval_data, Mapping) else eval_data
        self.horizon = horizon = Interval.parse(until)
        self.stop_reason, self.stopping, failure = None, False, None
        self.state.epoch_length = 0 if isinstance(data, Iterator) else length_hint(data)
        log_due = Every(self.log_every, self.state)
        eval_due = Every(Interval.parse(eval_every) if eval_every else None, self.state)
        try:
            self.hook.on_start(engine=self)
            started = self.clock() - self.state.seconds
            stream = stream_batches(data, self.state, horizon)
            while not (self.stopping or horizon.reached(self.state)):
                if not (micro := list(islice(stream, self.accumulate))):
                    break
                take_step(self, [to_device(batch, self.device) for batch in micro])
                self.state.seconds = self.clock() - started
                if log_due.due(self.state):
                    self._log()
                if eval_due.due(self.state) and eval_data is not None:
                    self.evaluate(eval_data)
                self.hook.on_step_end(engine=self)
                yield self.state
            if not self.stopping or horizon.reached(self.state):
                self._log()
                if eval_data is not None and self.state.evaluated_at != self.state.step:
                    self.evaluate(eval_data)
            self.hook.on_finish(engine=self)
        except Exception as error:
            failure = error
            planning.blame(error, self.plan, self.state.step)
            planning.call_all(self._hooks.on_error, failure, engine=self, error=error)
            raise
        finally:
            planning.call_all(self._hooks.on_close, failure, engine=self)

    def evaluate(self, data: Data | Mapping[str, Data]) -> dict[str, float]:
        """Measure every loss term, weighted by its units, over all the data; fires `on_eval`.

        Returns `val/loss`, `val/total_loss`, `val/<term>_loss` and what plugins log, by split.
        """
        metrics: dict[str, float] = {}
        for name, batches in (data if isinstance(data, Mapping) else {"val": data}).items():
            metrics |= measure(self, name, batches)
        self.metrics |= metrics
        self.state.evaluated_at = self.state.step
        self.hook.on_eval(engine=self, metrics=metrics)
        return metrics

    def stop(self, reason: str = "stopped by the program") -> None:
        """End the loop after the present step; several processes end together, a step later."""
        self.stop_reason, self.stopping = reason, self.alone

    def log(self, name: str, value: Number, units: Number = 1.0, finish: Finish = None) -> None:
        """Record a sum over units, 0-d; its mean is read when due, and no device is waited for.

        Args:
            name: without a slash it gets the split's prefix: "train/grad_norm", "val/...".
            finish: applied to the mean when it is read: `math.exp` makes a perplexity.
        """
        value = value.detach() if isinstance(value, Tensor) else value
        self.meter.add(name if "/" in name else f"{self.split}/{name}", value, units, finish)

    def result(self) -> Result:
        """How far the run is, and the last value of every metric."""
        at, reason = self.state, self.stop_reason or ""
        status = "finished" if self.horizon and self.horizon.reached(at) else "stopped"
        return Result(status, reason, at.step, at.tokens, at.seconds, dict(self.metrics))

    def state_dict(self) -> Snapshot:
        """Everything that decides how the run goes on, read in place; fires `on_save`."""
        snapshot = snap(self)
        self.hook.on_save(engine=self, snapshot=snapshot)
        return snapshot

    def load_state_dict(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, to the same bits; fires `on_load` first.

        Raises:
            CheckpointError: it does not fit the model, the optimizer or the plugins.
        """
        self.hook.on_load(engine=self, snapshot=snapshot)
        restore(self, deepcopy(snapshot))

    def resume(self, source: str = "auto") -> None:
        """Find a snapshot through the plugins ("auto": the newest good one) and load it."""
        snapshot = self.hook.load_snapshot(engine=self, source=source)
        self.hook.on_load(engine=self, snapshot=snapshot)
        restore(self, snapshot)

    def _log(self) -> None:
        if not (metrics := self.meter.read(self.ranks)):
            return
        metrics["train/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        for answer in self.hook.collect_metrics(engine=self):
            metrics |= answer
        self.metrics |= metrics
        self.hook.on_log(engine=self, metrics=metrics)
