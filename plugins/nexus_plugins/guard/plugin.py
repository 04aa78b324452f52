"""Skips updates that would corrupt the weights."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from nexus_core import Plugin, PluginConfig, RunError, StateDict, hookimpl
from nexus_core.device import RandomState, random_state
from nexus_core.optimizers import members, needs_closure
from nexus_core.processes import gather, is_sharded, local_part
from nexus_core.snapshot import Snapshot
from nexus_plugins.guard.held import flagged, unmoved
from nexus_plugins.guard.record import Attempt, write_record
from nexus_plugins.guard.replay import replay
from nexus_plugins.guard.spikes import Spikes

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["GuardConfig", "GuardPlugin"]

WAITED_FOR = ("cpu",)
"""Devices whose verdict can be read without a sync."""

_KEPT_ATTEMPTS = 16  # on devices whose verdicts are read later
Tree = TypeVar("Tree")


class GuardConfig(PluginConfig):
    """What to do about a step with a non-finite loss or gradient."""

    policy: Literal["skip", "rollback", "stop"] = Field(
        default="skip",
        description="after skipping the update: 'skip' continues with the next batch; 'rollback' "
        "first restores the last save, if there is one (checkpoint.every); 'stop' "
        "saves and ends the run",
    )
    max_consecutive: int = Field(
        default=20,
        ge=1,
        description="end the run after this many consecutive skipped steps, or rollbacks to the "
        "same save",
    )
    spike_threshold: float | None = Field(
        default=None,
        gt=0,
        description="skip steps whose loss is this many robust standard deviations above the "
        "median of recent ones; null: off",
    )
    spike_window: int = Field(
        default=128, ge=8, description="number of recent losses for the median, in steps"
    )
    records: int = Field(
        default=3, ge=0, description="maximum skipped steps per run to dump with weights and batch"
    )


class GuardPlugin(Plugin[GuardConfig]):
    """Skips updates with non-finite losses or gradients, and optionally loss spikes.

    A skipped step counts as a step and leaves weights, optimizer state and everything that follows
    the weights unchanged: `step.refused` is 1.0, on the device. If the optimizer supports
    `found_inf` (torch's fused ones), there is no device sync: the update itself checks the flag,
    and the counts are read when logging. Otherwise the flag is read at each step, and the gradients
    of a skipped step are dropped.

    A rollback needs a save of this run, or the one it was resumed from; before the first,
    a step is only skipped, since restoring the start would undo all progress.

    `guard/skipped_steps` and `guard/rollbacks` are logged, with a note per skipped step. The first
    skipped steps are dumped to `OUT/guard/step-00000123`, for `nexus-run replay`. With a gradient
    scaler, whose first steps overflow by design, the policy should be 'skip'.
    """

    config_class = GuardConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._spikes = Spikes(self.config.spike_threshold, self.config.spike_window)
        self._skipped: Tensor | float = 0.0
        self._streak: Tensor | float = 0.0
        self._longest: Tensor | float = 0.0
        self._rollbacks = 0
        self._returns = 0
        self._snapshot: Snapshot | None = None
        self._going_back = False
        self._error: RunError | None = None
        self._waits = True
        self._attempts: deque[Attempt] = deque(maxlen=1)
        self._noted = 0.0
        self._judged = 0  # the last step checked
        self._before = self._counts()
        self._generators: tuple[int, RandomState] | None = None  # before a step's forward pass

    def state_dict(self) -> StateDict:
        """Counts, and the recent losses used to detect spikes."""
        return {
            "skipped": float(self._skipped),
            "streak": float(self._streak),
            "rollbacks": self._rollbacks,
            "spikes": self._spikes.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what `state_dict` returned."""
        if self._going_back:
            return  # keep counting
        self._skipped = self._noted = cast(float, state["skipped"])
        self._streak = cast(float, state["streak"])
        self._rollbacks = cast(int, state["rollbacks"])
        self._returns = 0
        self._spikes.load_state_dict(cast(StateDict, state["spikes"]))

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        optimizers = members(engine.optimizer).values()
        takes_flag = all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)
        devices = {engine.device.type, *(p.device.type for p in engine.parameters())}
        self._waits = bool(devices & {*WAITED_FOR}) or not takes_flag
        self._attempts = deque(maxlen=1 if self._waits else _KEPT_ATTEMPTS)
        self._error = None
        self._spikes.to(engine.device)

    @hookimpl(stage="inspect")
    def on_batch(self, engine: Engine) -> None:
        step = engine.state.step + 1
        if self._generators is None or self._generators[0] != step:
            self._generators = step, random_state()
            self._before = self._counts()
        elif self._judged == step:  # it failed after the check, and is repeated
            self._skipped, self._streak, self._longest, spikes = self._before
            self._spikes.load_state_dict(spikes)
            self._judged = 0

    @hookimpl(stage="judge")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Check the gradient, also if a plugin recomputes it, since the last one is applied."""
        optimizers = members(engine.optimizer, step.turn).values()
        if not step.again:
            self._judge_first(engine, step)
        elif not any(map(needs_closure, optimizers)):  # those tolerate non-finite values
            self._judge_again(engine, step)

    def _counts(self) -> tuple[Tensor | float, Tensor | float, Tensor | float, StateDict]:
        return self._skipped, self._streak, self._longest, deepcopy(self._spikes.state_dict())

    def _judge_first(self, engine: Engine, step: Step) -> None:
        counted = self._attempts[-1].refused if self._judged == step.number else 0.0
        self._judged = step.number
        refused = self._judge(engine, step)
        if self._spikes.enabled:
            losses = [step.losses[name].reshape(()).float() for name in step.units]
            spike = self._spikes.judge(engine.ranks.sum(torch.stack(losses).sum()))
            refused = torch.maximum(refused, spike.float())
        if step.refused is not None:  # by another plugin, or in an earlier turn
            refused = torch.maximum(refused, step.refused)
        step.refused = refused
        generators = self._generators[1] if self._generators else random_state()
        batches = [micro.batch for micro in step.micro]
        attempt = Attempt(step.number, generators, batches, dict(step.losses), refused, step.turn)
        self._attempts.append(attempt)
        if not self._waits:
            self._skipped = self._skipped + refused - counted
            self._streak = (self._before[1] + refused) * refused
            self._longest = torch.maximum(torch.as_tensor(self._longest), self._streak)
        elif refused.item() and float(counted):
            return  # in an earlier turn of this step
        elif refused.item():
            self._skipped, self._streak = self._skipped + 1, self._streak + 1
            self._react(engine, attempt, self._streak)
        else:
            self._streak = 0.0

    def _judge_again(self, engine: Engine, step: Step) -> None:
        first = cast(Tensor, step.refused)
        step.refused = torch.maximum(self._judge(engine, step), first)
        attempt = self._attempts[-1]
        attempt.refused, attempt.losses = step.refused, dict(step.losses)
        if not self._waits:
            self._skipped = self._skipped + step.refused - first
            self._streak = (self._before[1] + step.refused) * step.refused
            self._longest = torch.maximum(torch.as_tensor(self._longest), self._streak)
        elif step.refused.item() > first.item():
            self._skipped, self._streak = self._skipped + 1, self._before[1] + 1
            self._react(engine, attempt, self._streak)
            for parameter in engine.parameters(step.turn):
                parameter.grad = None

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine, step: Step) -> Generator[None, bool, bool]:
        """Pass the flag to an optimizer that supports it; others get no gradient and are reset."""
        with ExitStack() as guarded:
            for optimizer in members(engine.optimizer, step.turn).values():
                if not self._waits:
                    guarded.enter_context(flagged(optimizer, step))
                elif self._streak:
                    guarded.enter_context(unmoved(optimizer))
            if self._waits and self._streak:
                for parameter in engine.parameters(step.turn):
                    parameter.grad = None  # optimizers skip parameters without a gradient
            return (yield)

    @hookimpl(stage="restore")
    def on_step(self, engine: Engine) -> None:
        if self._going_back:
            self._go_back(engine)

    @hookimpl
    def collect_metrics(self, engine: Engine) -> dict[str, float]:
        """Read the device's counts; logging has already synced."""
        skipped = float(self._skipped)
        if not self._waits and skipped > self._noted:
            refused = [attempt for attempt in self._attempts if float(attempt.refused)]
            if refused:
                self._react(engine, refused[0], float(self._longest))
            if self._going_back:
                self._go_back(engine)
        self._noted, self._longest = skipped, self._streak
        metrics = {"guard/skipped_steps": skipped}
        if self.config.policy == "rollback":
            metrics["guard/rollbacks"] = float(self._rollbacks)
        return metrics

    @hookimpl(stage="copy")
    def on_save(self, snapshot: Snapshot) -> None:
        self._keep(snapshot)
        self._returns = 0

    @hookimpl(stage="copy")
    def on_load(self, snapshot: Snapshot) -> None:
        if not self._going_back:
            self._keep(snapshot)

    @hookimpl
    def on_close(self) -> None:
        """Raise the error that stopped the run, now that the run is saved."""
        self._attempts.clear()
        if self._error is not None:
            raise self._error

    def replay(self, engine: Engine, record: Path) -> str:
        """Repeat a recorded step, and say what first went wrong in it (see `replay`)."""
        return replay(engine, record)

    @torch.no_grad()
    def _judge(self, engine: Engine, step: Step) -> Tensor:
        """1.0 if anything is non-finite, else 0.0, on the device, without a sync."""
        parameters = engine.parameters(step.turn)
        gradients = [_values(p.grad) for p in parameters if p.grad is not None]
        gradients = [values for values in gradients if values.numel()]
        losses = [step.losses[name].reshape(()).float() for name in step.units]
        largest = torch._foreach_norm(gradients, math.inf) if gradients else []
        size = torch.stack([*losses, *(norm.to(losses[0].device).float() for norm in largest)])
        flag = (~size.isfinite().all()).float()
        return engine.ranks.sum(flag).clamp(max=1.0) if engine.ranks.size > 1 else flag

    def _react(self, engine: Engine, attempt: Attempt, streak: Tensor | float) -> None:
        """Record the step and apply the policy; all ranks decide alike, rank 0 warns."""
        attempt.losses = {name: engine.ranks.sum(loss) for name, loss in attempt.losses.items()}
        what = f"skipped the update of step {attempt.step}: {attempt.verdict()}"
        what += gather(engine.ranks, self._write_down(engine, attempt))[0]
        limit = self.config.max_consecutive
        if self.config.policy == "stop":
            self._stop(engine, what)
        elif streak >= limit:
            self._stop(engine, f"{what}; {streak:.0f} in a row")
        elif self._returns >= limit:
            self._stop(engine, f"{what}; {self._returns} rollbacks did not help")
        elif self.config.policy == "rollback":
            what += self._prepare_return()
        if engine.ranks.is_main:
            warnings.warn(what, RuntimeWarning, stacklevel=2)
            engine.hook.on_note(engine=engine, title="guard/refused", text=what)

    def _prepare_return(self) -> str:
        """Roll back if there is a save; returns which one, in words."""
        if self._snapshot is None:
            return (
                "; there is no save to roll back to yet, so the run continues with the weights "
                "before that step (see checkpoint.every)"
            )
        self._returns += 1
        self._going_back = True
        return f"; rolling back to the save of step {self._snapshot['train']['step']}"

    def _keep(self, snapshot: Snapshot) -> None:
        """Copy the state that a rollback restores, except before the first step."""
        if self.config.policy == "rollback":
            self._snapshot = _host_copy(snapshot) if snapshot["train"]["step"] else None

    def _write_down(self, engine: Engine, attempt: Attempt) -> str:
        """Write the record; returns its path, in words."""
        if engine.out is None or not engine.ranks.is_main:
            return ""
        if any(map(is_sharded, engine.parameters())):
            return "; it is not dumped, since no rank has all the weights"
        try:
            folder = write_record(engine, attempt, engine.out / "guard", self.config.records)
        except (OSError, SafetensorError) as error:  # a full disk must not end the run
            return f"; it could not be dumped: {error}"
        return f"; see nexus-run replay {folder}" if folder else ""

    def _stop(self, engine: Engine, why: str) -> None:
        advice = "lower the learning rate, check the data, or raise guard.max_consecutive"
        self._error = RunError(f"{why}; the weights before it are saved; {advice}")
        engine.stop(f"guard: {why}")

    def _go_back(self, engine: Engine) -> None:
        """Restore everything from the last save except counters, metrics and data position."""
        engine.rewind(cast(Snapshot, self._snapshot))
        self._rollbacks += 1
        self._going_back = False


def _values(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient."""
    return gradient.coalesce().values() if gradient.is_sparse else local_part(gradient)


def _host_copy(tree: Tree) -> Tree:
    """Copy dicts and lists, with tensors copied to host memory."""
    copied: Any = tree
    if isinstance(tree, Tensor):
        copied = tree.detach().to("cpu", copy=True)
    elif isinstance(tree, dict):
        copied = {key: _host_copy(value) for key, value in tree.items()}
    elif isinstance(tree, list | tuple):
        copied = type(tree)(_host_copy(value) for value in tree)
    return cast(Tree, copied)
