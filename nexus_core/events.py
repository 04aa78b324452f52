"""The hooks: every moment of a run at which plugins are called, and every question they answer.

The loop, with the hooks in capitals where they fire:

    MAKE_DATA, MAKE_MODEL, MAKE_OPTIMIZER            what was not passed in as an object
    [LOAD_SNAPSHOT, ON_LOAD]                         when resuming
    ON_START
    for each step until the horizon:
        micro = the step's micro-batches, each on the device and through ON_BATCH
        units = sum of LOSS_UNITS over micro and over all processes, per term
        weights = WEIGH_LOSSES                       the default asks LOSS_WEIGHT
        for batch in micro:
            output = FORWARD
            terms  = LOSS_TERMS                      one sum over units per term
            BACKWARD(sum of weight * term / units)
        AFTER_BACKWARD                               unscale, guard, clip
        learning rate = base * product of LR_SCALE
        OPTIMIZER_STEP
        ON_STEP
        COLLECT_METRICS, ON_LOG                      every `log_every`
        ON_EVAL                                      every `eval_every`, and at the end
        ON_STEP_END                                  a checkpoint is taken here: ON_SAVE
    ON_NOTE                                          whenever a plugin has something to say
    ON_FINISH, or ON_ERROR when something raised
    ON_CLOSE                                         whatever happened, in reverse order
    SUMMARIZE                                        `nexus-run` prints what is answered

Two kinds. An *event* is broadcast and returns nothing. A *seam* asks a question: "first answer"
takes the first plugin that answers, "collected" takes all of them; what the core does by itself is
the last answer (`nexus_core.defaults`). Around a seam, `@hookimpl(wrapper=True)` wraps it.
Plugins are called in the order of the plan (`nexus-run --explain`); a wrapper that comes first is
outermost. An implementation names only the arguments it uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from nexus_core.data import Batch, RunData
    from nexus_core.engine import Engine
    from nexus_core.state import Snapshot

__all__ = ["API_VERSIONS", "RENAMED", "Hooks"]

API_VERSIONS: tuple[str, ...] = ("1.0", "1.1")  # those whose plugins can be run, newest last
RENAMED: Mapping[str, str] = {}  # a hook's earlier name to its own: warns for a release

hookspec = pluggy.HookspecMarker("nexus")


class Hooks:
    """The specification of every hook. Read it as documentation; nothing instantiates it."""

    @hookspec(firstresult=True)
    def make_data(self, engine: Engine) -> RunData | None:
        """Seam, first answer: build training and evaluation data where none was passed."""

    @hookspec(firstresult=True)
    def make_model(self, engine: Engine) -> nn.Module | None:
        """Seam, first answer: build the model where none was passed; `engine.data` is there."""

    @hookspec(firstresult=True)
    def make_optimizer(self, engine: Engine) -> Optimizer | None:
        """Seam, first answer: build the optimizer over `engine.model`, on its device already."""

    @hookspec(firstresult=True)
    def load_snapshot(self, engine: Engine, source: str) -> Snapshot | None:
        """Seam, first answer: read the snapshot to resume from ("auto": the newest good one)."""

    @hookspec
    def on_start(self, engine: Engine) -> None:
        """Event: the loop is about to begin; state is restored, nothing has been trained yet."""

    @hookspec
    def on_finish(self, engine: Engine) -> None:
        """Event: the horizon is reached or `engine.stop` was called; the last step is complete."""

    @hookspec
    def on_error(self, engine: Engine, error: BaseException) -> None:
        """Event: something raised; the error goes on to the caller after `on_close`."""

    @hookspec
    def on_close(self, engine: Engine) -> None:
        """Event: give back files, threads, handlers. Runs whatever happened, in reverse order."""

    @hookspec
    def on_batch(self, engine: Engine, batch: Batch) -> None:
        """Event: a training micro-batch is on the device; its entries may be replaced."""

    @hookspec(firstresult=True)
    def forward(self, engine: Engine, batch: Batch) -> Any:
        """Seam, first answer: run the model; gives the losses' `output` (`loss=fn`: the loss)."""

    @hookspec
    def loss_units(self, engine: Engine, batch: Batch) -> Mapping[str, Tensor | float]:
        """Seam, collected: how many units each loss term has in this micro-batch."""

    @hookspec
    def loss_terms(self, engine: Engine, batch: Batch, output: Any) -> Mapping[str, Tensor]:
        """Seam, collected: the sum of each loss term over the units of this micro-batch."""

    @hookspec
    def loss_weight(self, engine: Engine) -> Mapping[str, float]:
        """Seam, collected: the static weight of each loss term."""

    @hookspec(firstresult=True)
    def weigh_losses(
        self, engine: Engine, terms: tuple[str, ...]
    ) -> Mapping[str, Tensor | float] | None:
        """Seam, first answer, once a step: each term's weight; `engine.losses` is for `on_step`."""

    @hookspec(firstresult=True)
    def backward(self, engine: Engine, loss: Tensor, terms: Mapping[str, Tensor]) -> bool | None:
        """Seam, first answer: add the gradient of `loss`, the sum of `terms`; True says done."""

    @hookspec
    def after_backward(self, engine: Engine) -> None:
        """Event, once a step: gradients are complete: unscale, guard, clip, in declared order."""

    @hookspec
    def lr_scale(self, engine: Engine) -> float:
        """Seam, collected and multiplied: factor of every group's base learning rate now.

        A pure function of `engine.state` (its `step` is 0 in the first) and `engine.horizon`.
        """

    @hookspec(firstresult=True)
    def optimizer_step(self, engine: Engine) -> bool | None:
        """Seam, first answer: update the weights; True says done."""

    @hookspec
    def on_step(self, engine: Engine) -> None:
        """Event: the update is done and counted; target networks and weights follow here."""

    @hookspec
    def collect_metrics(self, engine: Engine) -> Mapping[str, float]:
        """Seam, collected: metrics worth reading only when a log is due, by full name."""

    @hookspec
    def on_log(self, engine: Engine, metrics: dict[str, float]) -> None:
        """Event: the metrics since the last log, as floats, reduced over steps and processes."""

    @hookspec
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        """Event: an evaluation is done; its metrics, weighted by units."""

    @hookspec
    def on_note(self, engine: Engine, title: str, text: str) -> None:
        """Event: a plugin says a few words about the run; loggers that hold text keep them."""

    @hookspec
    def on_step_end(self, engine: Engine) -> None:
        """Event: the step, its log and its evaluation are complete; the moment to save."""

    @hookspec
    def summarize(self, engine: Engine) -> Mapping[str, str]:
        """Seam, collected: lines for the end of a run, by their label: a path, a sample, a hint."""

    @hookspec
    def on_save(self, engine: Engine, snapshot: Snapshot) -> None:
        """Event: a snapshot is complete; what a plugin adds to it is stored with it."""

    @hookspec
    def on_load(self, engine: Engine, snapshot: Snapshot) -> None:
        """Event: a snapshot has been read and is about to be restored."""
