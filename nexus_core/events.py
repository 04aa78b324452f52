"""The hooks: every event that plugins can observe, and every question they can answer.

The loop, with the hooks in capitals where they fire:

    MAKE_DATA, MAKE_MODEL, MAKE_OPTIMIZER            whatever was not passed in
    ON_BUILD
    [LOAD_SNAPSHOT, ON_LOAD]                         when resuming
    ON_START
    for each step until the horizon:
        micro = the step's batches, each through ON_BATCH and CUT_BATCH
        for turn in TAKE_TURNS:                      one, unless several optimizers take turns
            units = sum of LOSS_UNITS over micro and over all processes, per term
            weights = WEIGH_LOSSES                   the default asks LOSS_WEIGHT
            ACCUMULATE_GRADIENT                      which by default is:
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
    ON_NOTE, ON_IMAGE                                whenever a plugin notes or shows something
    ON_FINISH, or ON_ERROR if something raised
    ON_CLOSE                                         always, in reverse order
    SUMMARIZE                                        `nexus-run` prints the answers

There are two kinds. An *event* is broadcast and returns nothing. A *seam* asks a question: "first
answer" takes the first plugin that answers, "collected" takes all answers, "chained" passes each
answer on to the next plugin; the core's default comes last (`nexus_core.defaults`).
`@hookimpl(wrapper=True)` wraps a seam.

Plugins are called in the order of the plan (`nexus-run --explain`). Hooks with an inherent order
have *stages*: `@hookimpl(stage="limit")` puts an implementation into that stage, wherever its
plugin is in the plan; the stage marked * is the default. The first wrapper is the outermost. An
implementation only names the arguments it uses.
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
from nexus_core.images import Image
from nexus_core.intervals import Interval, TrainState
from nexus_core.meter import Finish, Measured, Meter, Number
from nexus_core.plugin import Plugin
from nexus_core.processes import Ranks
from nexus_core.snapshot import Snapshot
from nexus_core.step import Step

__all__ = ["API_VERSIONS", "RENAMED", "STAGES", "Hooks", "Run"]

API_VERSIONS: tuple[str, ...] = ("1.0", "1.1", "1.2")  # supported versions, newest last
RENAMED: Mapping[str, str] = {}  # old name of a hook: its new name; warns for one release

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
"""The stages of hooks that have any, in order; * marks the default."""

Answer = TypeVar("Answer")
Answers: TypeAlias = list[Answer]
"""The result of a collected seam: one answer from each implementation."""

hookspec = pluggy.HookspecMarker("nexus")


class Run(Protocol):
    """What plugins get as `engine`: the part of `Engine` that they may rely on."""

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
    meter: Meter
    model: nn.Module
    optimizer: Optimizer
    data: RunData | None
    plugins: dict[str, Plugin[Any]]
    hook: Hooks

    @property
    def metrics(self) -> dict[str, float]: ...
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
    def note(
        self, title: str, text: str = ..., *, image: object = ..., figure: object = ...
    ) -> None: ...
    def parameters(self, turn: str | None = None) -> list[nn.Parameter]: ...
    def untrained(self) -> list[nn.Parameter]: ...


class Hooks:
    """The specification of every hook, and the type of `engine.hook`, which calls them.

    Read it as documentation. Calls pass every argument; an implementation takes what it needs.
    Return types are those of a call; with `Answers`, each implementation returns one.
    """

    @hookspec(firstresult=True)
    def make_data(self, *, engine: Run) -> RunData:
        """Seam, first answer: build training and evaluation data if none was passed."""

    @hookspec(firstresult=True)
    def make_model(self, *, engine: Run) -> nn.Module:
        """Seam, first answer: build the model if none was passed; `engine.data` is available."""

    @hookspec(firstresult=True)
    def make_optimizer(self, *, engine: Run) -> Optimizer:
        """Seam, first answer: build the optimizer over `engine.model`, already on its device.

        Several optimizers are returned as a dict by the names of their turns.
        """

    @hookspec
    def on_build(self, *, engine: Run) -> None:
        """Event: model and optimizer exist; create what `load_state_dict` will need."""

    @hookspec(firstresult=True)
    def load_snapshot(self, *, engine: Run, source: str) -> Snapshot:
        """Seam, first answer: read the snapshot to resume from ("auto": the newest valid one)."""

    @hookspec
    def on_load(self, *, engine: Run, snapshot: Snapshot) -> None:
        """Event: a snapshot was read and is about to be checked and restored.

        Stages: check* > copy.
        """

    @hookspec
    def on_start(self, *, engine: Run) -> None:
        """Event: the loop is about to start; state is restored, nothing is trained yet.

        Stages: claim > join > prepare* > wrap > compile > clock.
        """

    @hookspec
    def on_batch(self, *, engine: Run, batch: Batch) -> Batch:
        """Seam, chained: change a training batch, still on the CPU, before it is counted.

        Change its entries in place, or return a new batch for the next plugin. Stages:
        transform* > inspect.
        """

    @hookspec(firstresult=True)
    def cut_batch(self, *, engine: Run, batch: Batch) -> Sequence[Batch]:
        """Seam, first answer: split a training batch into parts that are computed one by one.

        By default it is not split. The update is still that of the whole batch.
        """

    @hookspec(firstresult=True)
    def take_turns(self, *, engine: Run, step: Step) -> Sequence[str | None]:
        """Seam, first answer: the turns of this step, each with a gradient and an update.

        A turn is the name of one optimizer of several (`Engine(model, {"critic": ...})`); None is
        all of them. Return the terms of `step.turn` from `loss_units` and `loss_terms`.
        """

    @hookspec
    def loss_units(
        self, *, engine: Run, batch: Batch, step: Step | None
    ) -> Answers[Mapping[str, Tensor | float]]:
        """Seam, collected: number of units of each loss term in this micro-batch, on the CPU."""

    @hookspec(firstresult=True)
    def weigh_losses(
        self, *, engine: Run, terms: tuple[str, ...], step: Step
    ) -> Mapping[str, Tensor | float]:
        """Seam, first answer, once per turn: each term's weight; `step.losses` is for `on_step`."""

    @hookspec
    def loss_weight(self, *, engine: Run) -> Answers[Mapping[str, float]]:
        """Seam, collected: the static weight of each loss term."""

    @hookspec(firstresult=True)
    def accumulate_gradient(self, *, engine: Run, step: Step) -> bool:
        """Seam, first answer, once per gradient: sum it over micro-batches; return True if done.

        The default takes one micro-batch after the other through `forward`, `loss_terms` and
        `backward`, and records `step.losses` and their metrics.
        """

    @hookspec(firstresult=True)
    def forward(self, *, engine: Run, batch: Batch, step: Step | None) -> Any:
        """Seam, first answer: run the model; returns the losses' `output` (`loss=fn`: the loss).

        In an evaluation `step` is None. Stages: context > inspect*.
        """

    @hookspec
    def loss_terms(
        self, *, engine: Run, batch: Batch, output: Any, step: Step | None
    ) -> Answers[Mapping[str, Tensor]]:
        """Seam, collected: the sum of each loss term over the units of this micro-batch.

        Stages: context > inspect*.
        """

    @hookspec(firstresult=True)
    def backward(
        self, *, engine: Run, loss: Tensor, terms: Mapping[str, Tensor], step: Step
    ) -> bool:
        """Seam, first answer: add the gradient of `loss`, the sum of `terms`; return True if done.

        Stages: reduce > scale > inspect*.
        """

    @hookspec(firstresult=True)
    def sum_cells(self, *, engine: Run, step: Step, part: CellSum) -> list[Tensor | None]:
        """Seam, first answer: the sum over all cells of the step; `part` holds this rank's.

        Called only in runs in cells, once per gradient, and by plugins that sum over cells
        themselves; all ranks must call it alike. The result must not depend on their number.
        """

    @hookspec
    def after_backward(self, *, engine: Run, step: Step) -> None:
        """Event, once per gradient: it is complete; change or measure it.

        Stages: reduce > unscale > inspect > transform* > judge > limit > measure.
        """

    @hookspec
    def lr_scale(self, *, engine: Run) -> Answers[float]:
        """Seam, collected and multiplied: current factor of every group's base learning rate.

        A pure function of `engine.state` (`step` is 0 in the first step) and `engine.horizon`.
        """

    @hookspec(firstresult=True)
    def optimizer_step(self, *, engine: Run, step: Step, again: Callable[[], Tensor]) -> bool:
        """Seam, first answer: update the weights of the turn; return True if done.

        `again()` recomputes the step's gradient at the current weights, through every hook from
        `forward` to `after_backward`, and returns the loss.
        """

    @hookspec
    def on_step(self, *, engine: Run, step: Step) -> None:
        """Event: the update is done and counted; update target networks and averages here.

        Stages: follow* > restore.
        """

    @hookspec
    def collect_metrics(self, *, engine: Run) -> Answers[Mapping[str, float]]:
        """Seam, collected: metrics that are only read when a log is due, by full name."""

    @hookspec
    def on_log(self, *, engine: Run, metrics: dict[str, float]) -> None:
        """Event: the metrics since the last log, as floats, reduced over steps and ranks.

        Stages: measure* > record.
        """

    @hookspec
    def evaluating(self, *, engine: Run) -> Answers[AbstractContextManager[object]]:
        """Seam, collected: contexts around an evaluation, always exited.

        Use it to swap in other weights: contexts are entered in the order of the plan
        before the first batch, and exited after `measure`. Nested evaluations enter none.
        """

    @hookspec
    def measure(
        self, *, engine: Run, split: str, data: Iterable[Batch]
    ) -> Answers[Mapping[str, float]]:
        """Seam, collected: metrics of a whole evaluation set, by full name; also samples.

        Called after its last batch, with the evaluated weights in the model, in evaluation mode and
        without gradients; `engine.evaluate({...: data})` measures it again. The answers reach
        `Result.metrics`, loggers, early stopping and the choice of the best checkpoint.
        """

    @hookspec
    def on_eval(self, *, engine: Run, metrics: dict[str, float]) -> None:
        """Event: an evaluation is done; its metrics, weighted by units.

        Stages: measure* > decide > record.
        """

    @hookspec
    def on_step_end(self, *, engine: Run) -> None:
        """Event: the step, its log and its evaluation are complete; checkpoints are saved here.

        Stages: measure* > save > clock.
        """

    @hookspec
    def on_save(self, *, engine: Run, snapshot: Snapshot) -> None:
        """Event: a snapshot is complete; add what to store to `snapshot["extras"][self.name]`.

        Stages: gather* > copy.
        """

    @hookspec
    def on_note(self, *, engine: Run, title: str, text: str) -> None:
        """Event: a plugin writes a note about the run; loggers that support text record it."""

    @hookspec
    def on_image(self, *, engine: Run, title: str, image: Image) -> None:
        """Event: an image about the run, as PNG; loggers that support images record it."""

    @hookspec
    def on_finish(self, *, engine: Run) -> None:
        """Event: the horizon is reached or `engine.stop` was called; the last step is complete.

        Every plugin is called; errors are raised afterwards. Stages: settle > save > report*.
        """

    @hookspec
    def on_error(self, *, engine: Run, error: BaseException) -> None:
        """Event: an exception was raised; it reaches the caller after `on_close`."""

    @hookspec
    def on_close(self, *, engine: Run) -> None:
        """Event: release files, threads, handlers. Always called, in reverse order."""

    @hookspec
    def summarize(self, *, engine: Run) -> Answers[Mapping[str, str]]:
        """Seam, collected: lines for the end of a run, by label: a path, a sample, a hint."""
