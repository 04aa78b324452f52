"""The hooks: every moment of a run at which plugins are called, and every question they answer.

The loop, with the hooks in capitals where they fire:

    MAKE_DATA, MAKE_MODEL, MAKE_OPTIMIZER            what was not passed in as an object
    ON_BUILD
    [LOAD_SNAPSHOT, ON_LOAD]                         when resuming
    ON_START
    for each step until the horizon:
        micro = the step's batches, each through ON_BATCH and CUT_BATCH
        for turn in TAKE_TURNS:                      one, unless several optimizers take turns
            units = sum of LOSS_UNITS over micro and over all processes, per term
            weights = WEIGH_LOSSES                   the default asks LOSS_WEIGHT
            ACCUMULATE_GRADIENT                      which is, where no plugin does it:
                for batch in micro:                  moved to the device one at a time
                    output = FORWARD
                    terms  = LOSS_TERMS              one sum over units per term
                    BACKWARD(sum of weight * term / units)
            SUM_CELLS                                in a run in cells, over all processes
            AFTER_BACKWARD                           by stage: reduce > unscale > inspect >
                                                     transform > judge > limit > measure
            learning rate = base * product of LR_SCALE
            OPTIMIZER_STEP(again)                    again() computes the gradient anew
        step, samples, tokens and cursor are committed together
        ON_STEP
        COLLECT_METRICS, ON_LOG                      every `log_every`
        EVALUATING                                   every `eval_every`, and at the end:
            FORWARD, LOSS_UNITS, LOSS_TERMS          for each batch of each set
            MEASURE                                  for each set
        ON_EVAL
        ON_STEP_END                                  a checkpoint is taken here: ON_SAVE
    ON_NOTE                                          whenever a plugin has something to say
    ON_FINISH, or ON_ERROR when something raised
    ON_CLOSE                                         whatever happened, in reverse order
    SUMMARIZE                                        `nexus-run` prints what is answered

Two kinds. An *event* is broadcast and returns nothing. A *seam* asks a question: "first answer"
takes the first plugin that answers, "collected" takes all of them, "chained" hands the answer of
one to the next; what the core does by itself is the last answer (`nexus_core.defaults`). Around a
seam, `@hookimpl(wrapper=True)` wraps it.

Plugins are called in the order of the plan (`nexus-run --explain`). Where a hook has an inherent
order it has *stages*: `@hookimpl(stage="limit")` puts an implementation there, wherever its plugin
stands in the plan; the one marked * holds those that name none. A wrapper that comes first is
outermost. An implementation names only the arguments it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import pluggy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nexus_core.batches import Batch
from nexus_core.cells import CellSum
from nexus_core.data import DataState, RunData
from nexus_core.intervals import Interval, TrainState
from nexus_core.meter import Finish, Measured, Meter, Number
from nexus_core.plugin import Plugin
from nexus_core.processes import Ranks
from nexus_core.snapshot import Snapshot
from nexus_core.step import Step

__all__ = ["API_VERSIONS", "RENAMED", "STAGES", "Hooks", "Run"]

API_VERSIONS: tuple[str, ...] = ("1.0", "1.1", "1.2")  # those whose plugins run, newest last
RENAMED: Mapping[str, str] = {}  # a hook's earlier name to its own: warns for a release

STAGES: Mapping[str, tuple[str, ...]] = {
    "on_start": ("claim", "join", "prepare*", "wrap", "compile", "clock"),
    "on_batch": ("transform*", "inspect"),
    "forward": ("context", "inspect*"),
    "loss_terms": ("context", "inspect*"),
    "backward": ("reduce", "scale", "inspect*"),
    "after_backward": ("reduce", "unscale", "inspect", "transform*", "judge", "limit", "measure"),
    "on_step": ("follow*", "restore"),
    "on_log": ("measure*", "record"),
    "on_eval": ("measure*", "decide", "record"),
    "on_step_end": ("measure*", "save", "clock"),
    "on_save": ("gather*", "copy"),
    "on_load": ("check*", "copy"),
    "on_finish": ("settle", "save", "report*"),
}
"""The stages of the hooks that have some, in order; * marks the ordinary one."""

Answer = TypeVar("Answer")
Answers: TypeAlias = list[Answer]
"""What a collected seam gives: the answers of all implementations, each of which gives one."""

hookspec = pluggy.HookspecMarker("nexus")


class Run(Protocol):
    """What the core hands to plugins as `engine`: the part of `Engine` that they may rely on."""

    seed: int
    accumulate: int
    cells: int
    batch_cells: int
    step_at_epoch_end: bool
    out: Path | None
    config: dict[str, Any]
    ranks: Ranks
    device: torch.device
    state: TrainState
    horizon: Interval | None
    training: bool
    split: str
    metrics: dict[str, float]
    meter: Meter
    model: nn.Module
    optimizer: Optimizer
    data: RunData | None
    plugins: dict[str, Plugin[Any]]
    hook: Hooks

    @property
    def stop_reason(self) -> str | None: ...
    @property
    def stopping(self) -> bool: ...
    @property
    def data_state(self) -> DataState | None: ...
    def stop(self, reason: str = ..., *, at_once: bool = ...) -> None: ...
    def log(
        self, name: str, value: Number | Measured, units: Number = ..., finish: Finish = ...
    ) -> None: ...
    def parameters(self, turn: str | None = None) -> list[nn.Parameter]: ...
    def untrained(self) -> list[nn.Parameter]: ...


class Hooks:
    """The specification of every hook, and the type of `engine.hook`, which calls them.

    Read it as documentation. Calls name every argument; an implementation takes what it needs.
    What is annotated is what a call gives: of `Answers`, each implementation gives one.
    """

    @hookspec(firstresult=True)
    def make_data(self, *, engine: Run) -> RunData:
        """Seam, first answer: build training and evaluation data where none was passed."""

    @hookspec(firstresult=True)
    def make_model(self, *, engine: Run) -> nn.Module:
        """Seam, first answer: build the model where none was passed; `engine.data` is there."""

    @hookspec(firstresult=True)
    def make_optimizer(self, *, engine: Run) -> Optimizer:
        """Seam, first answer: build the optimizer over `engine.model`, on its device already.

        A dict of several goes by the names of their turns.
        """

    @hookspec
    def on_build(self, *, engine: Run) -> None:
        """Event: model and optimizer are there; make what `load_state_dict` will need."""

    @hookspec(firstresult=True)
    def load_snapshot(self, *, engine: Run, source: str) -> Snapshot:
        """Seam, first answer: read the snapshot to resume from ("auto": the newest good one)."""

    @hookspec
    def on_start(self, *, engine: Run) -> None:
        """Event: the loop is about to begin; state is restored, nothing has been trained yet.

        Stages: claim > join > prepare* > wrap > compile > clock.
        """

    @hookspec
    def on_finish(self, *, engine: Run) -> None:
        """Event: the horizon is reached or `engine.stop` was called; the last step is complete.

        It reaches every plugin; errors are raised afterwards. Stages: settle > save > report*.
        """

    @hookspec
    def on_error(self, *, engine: Run, error: BaseException) -> None:
        """Event: something raised; the error reaches the caller after `on_close`."""

    @hookspec
    def on_close(self, *, engine: Run) -> None:
        """Event: give back files, threads, handlers. Runs whatever happened, in reverse order."""

    @hookspec
    def on_batch(self, *, engine: Run, batch: Batch) -> Batch:
        """Seam, chained: change a training batch, on the host still, before it is counted.

        Change its entries in place, or return another batch, which the next plugin gets. Stages:
        transform* > inspect.
        """

    @hookspec(firstresult=True)
    def cut_batch(self, *, engine: Run, batch: Batch) -> Sequence[Batch]:
        """Seam, first answer: cut a training batch into parts that are computed one by one.

        The default leaves it whole. The update stays that of the whole batch.
        """

    @hookspec(firstresult=True)
    def take_turns(self, *, engine: Run, step: Step) -> Sequence[str | None]:
        """Seam, first answer: the turns of this step, each with a gradient and an update.

        A turn is the name of one of several optimizers (`Engine(model, {"critic": ...})`); None is
        all of them. Answer `loss_units` and `loss_terms` with the terms of `step.turn`.
        """

    @hookspec(firstresult=True)
    def forward(self, *, engine: Run, batch: Batch, step: Step | None) -> Any:
        """Seam, first answer: run the model; gives the losses' `output` (`loss=fn`: the loss).

        In an evaluation `step` is None. Stages: context > inspect*.
        """

    @hookspec
    def loss_units(
        self, *, engine: Run, batch: Batch, step: Step | None
    ) -> Answers[Mapping[str, Tensor | float]]:
        """Seam, collected: how many units each loss term has in this micro-batch, on the host."""

    @hookspec
    def loss_terms(
        self, *, engine: Run, batch: Batch, output: Any, step: Step | None
    ) -> Answers[Mapping[str, Tensor]]:
        """Seam, collected: the sum of each loss term over the units of this micro-batch.

        Stages: context > inspect*.
        """

    @hookspec
    def loss_weight(self, *, engine: Run) -> Answers[Mapping[str, float]]:
        """Seam, collected: the static weight of each loss term."""

    @hookspec(firstresult=True)
    def weigh_losses(
        self, *, engine: Run, terms: tuple[str, ...], step: Step
    ) -> Mapping[str, Tensor | float]:
        """Seam, first answer, once a turn: each term's weight; `step.losses` is for `on_step`."""

    @hookspec(firstresult=True)
    def accumulate_gradient(self, *, engine: Run, step: Step) -> bool:
        """Seam, first answer, once a gradient: add up that of all micro-batches; True says done.

        The default takes one micro-batch after the other through `forward`, `loss_terms` and
        `backward`, and records `step.losses` and their metrics.
        """

    @hookspec(firstresult=True)
    def backward(
        self, *, engine: Run, loss: Tensor, terms: Mapping[str, Tensor], step: Step
    ) -> bool:
        """Seam, first answer: add the gradient of `loss`, the sum of `terms`; True says done.

        Stages: reduce > scale > inspect*.
        """

    @hookspec(firstresult=True)
    def sum_cells(self, *, engine: Run, step: Step, part: CellSum) -> list[Tensor | None]:
        """Seam, first answer: the sum over all cells of the step, of which `part` are ours.

        Called in runs in cells alone, once a gradient, and by plugins that sum over cells
        themselves; all processes ask alike. It must not depend on how many there are.
        """

    @hookspec
    def after_backward(self, *, engine: Run, step: Step) -> None:
        """Event, once a gradient: it is complete; change or measure it.

        Stages: reduce > unscale > inspect > transform* > judge > limit > measure.
        """

    @hookspec
    def lr_scale(self, *, engine: Run) -> Answers[float]:
        """Seam, collected and multiplied: factor of every group's base learning rate now.

        A pure function of `engine.state` (its `step` is 0 in the first) and `engine.horizon`.
        """

    @hookspec(firstresult=True)
    def optimizer_step(self, *, engine: Run, step: Step, again: Callable[[], Tensor]) -> bool:
        """Seam, first answer: update the weights of the turn; True says done.

        `again()` computes the step's gradient anew where the weights are now, through every hook
        from `forward` to `after_backward`, and gives the loss.
        """

    @hookspec
    def on_step(self, *, engine: Run, step: Step) -> None:
        """Event: the update is done and counted; target networks and averages follow here.

        Stages: follow* > restore.
        """

    @hookspec
    def collect_metrics(self, *, engine: Run) -> Answers[Mapping[str, float]]:
        """Seam, collected: metrics worth reading only when a log is due, by full name."""

    @hookspec
    def on_log(self, *, engine: Run, metrics: dict[str, float]) -> None:
        """Event: the metrics since the last log, as floats, reduced over steps and processes.

        Stages: measure* > record.
        """

    @hookspec
    def evaluating(self, *, engine: Run) -> Answers[AbstractContextManager[object]]:
        """Seam, collected: what an evaluation runs inside of; it is left whatever happens.

        The place to put other weights into the model: they are entered in the order of the plan
        before the first batch, and left after `measure`. An evaluation within one enters nothing.
        """

    @hookspec
    def measure(
        self, *, engine: Run, split: str, data: Iterable[Batch]
    ) -> Answers[Mapping[str, float]]:
        """Seam, collected: metrics of a whole evaluation set, by full name; samples too.

        Called after its last batch, with the weights that were evaluated in the model, in
        evaluation mode and without gradients; `engine.evaluate({...: data})` measures it
        again. What is answered reaches `Result.metrics`, loggers, early stopping and the choice of
        the best checkpoint.
        """

    @hookspec
    def on_eval(self, *, engine: Run, metrics: dict[str, float]) -> None:
        """Event: an evaluation is done; its metrics, weighted by units.

        Stages: measure* > decide > record.
        """

    @hookspec
    def on_note(self, *, engine: Run, title: str, text: str) -> None:
        """Event: a plugin says a few words about the run; loggers that hold text keep them."""

    @hookspec
    def on_step_end(self, *, engine: Run) -> None:
        """Event: the step, its log and its evaluation are complete; the moment to save.

        Stages: measure* > save > clock.
        """

    @hookspec
    def summarize(self, *, engine: Run) -> Answers[Mapping[str, str]]:
        """Seam, collected: lines for the end of a run, by their label: a path, a sample, a hint."""

    @hookspec
    def on_save(self, *, engine: Run, snapshot: Snapshot) -> None:
        """Event: a snapshot is complete; add to `snapshot["extras"][self.name]` what to store.

        Stages: gather* > copy.
        """

    @hookspec
    def on_load(self, *, engine: Run, snapshot: Snapshot) -> None:
        """Event: a snapshot has been read and is about to be checked and restored.

        Stages: check* > copy.
        """
