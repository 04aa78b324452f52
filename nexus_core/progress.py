"""The position of a run: in its data, between steps, and within a step that failed halfway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nexus_core.batches import Batch
from nexus_core.cells import seed_for
from nexus_core.data import DataState, Stream
from nexus_core.device import RandomState, Undo, random_state, set_random_state
from nexus_core.errors import ConfigError
from nexus_core.events import Run
from nexus_core.holders import Place
from nexus_core.intervals import Every, Interval
from nexus_core.loaders import is_same
from nexus_core.processes import Agreement
from nexus_core.step import Step
from nexus_core.update import prepare, take_step

__all__ = ["Course", "Progress"]


class Progress:
    """Which data the cursor is in, the current step, and what is due after it.

    Attributes:
        step: the last step started; None before the first.
        due: what follows the last step and has not started: "follow" (the hook `on_step`),
            "log", "evaluate" and "end" (`on_step_end`). An error before it leaves it due.

        owed: the evaluation of the last step was abandoned because the run had to stop.

    Args:
        saved: the data state of the restored snapshot.
        owed: see the attribute, in that snapshot.
    """

    def __init__(self, saved: DataState | None = None, owed: bool = False) -> None:
        self.step: Step | None = None
        self.due = {"evaluate", "end"} if owed else set[str]()
        self.owed = owed
        self._saved = saved
        self._read: Iterable[Batch] | None = None  # the data that the cursor is in
        self._stream: Stream | None = None
        self._place: Place | None = None  # in the stream, after the last step
        self._partial: tuple[Step, RandomState] | None = None  # a step between two of its turns

    def open(
        self, engine: Run, data: Iterable[Batch], horizon: Interval, period: Interval | None
    ) -> Stream:
        """The stream of this data from the cursor on; an iterator continues.

        Args:
            engine: its counters give the cursor.
            data: batches.
            horizon: the end of the run; `period` the interval of evaluations; if one is a fraction
                of an epoch, the data must have a length.
        """
        if self._stream is not None and data is self._stream.data and isinstance(data, Iterator):
            return self._stream
        if engine.cells:
            seed_for(engine.seed, engine.state.step)
        same = is_same(data, self._read)
        stream = Stream(
            data,
            engine.state,
            self.where(),
            same,
            engine.ranks,
            engine.step_at_epoch_end,
            engine.batch_cells,
        )
        for length in filter(None, (horizon, period)):
            stream.check(length)
        if self._read is not None and data is not self._read:
            self.check_whole()
        if self._stream is not None:
            self._stream.close()
        self._read, self._stream, self._place = data, stream, stream.place
        engine.state.epoch, engine.state.batch = stream.place.epoch, stream.place.batch
        engine.state.epoch_length = stream.length
        return stream

    def where(self) -> DataState | None:
        """Which data the cursor is in, and its position, for a snapshot."""
        if self._stream is None or self._place is None:
            return self._saved
        return self._stream.state(self._place)

    def leave_to(self, others: Iterable[object]) -> None:
        """Let others read data, possibly the run's own."""
        if self._stream is not None:
            self._stream.leave_to(others)

    def check_whole(self) -> None:
        """Reject operations that need whole steps if one stopped between two turns.

        Raises:
            ConfigError: one did.
        """
        if self._partial is not None:
            raise ConfigError(
                "the last step failed between two of its turns; complete it first by calling "
                "fit with the same data"
            )

    def reached(self, place: Place) -> None:
        """Mark the steps up to this position in the data as done."""
        self._place = place

    def interrupted(self) -> None:
        """Keep a step that failed after some of its turns, to continue with the next turn."""
        if self.step is not None and self.step.turns_done:
            self._partial = self.step, random_state()

    def continued(self) -> Step | None:
        """The step that failed after some of its turns, if there is one."""
        if self._partial is None:
            return None
        (step, generators), self._partial = self._partial, None
        set_random_state(generators)
        return step


class Course:
    """One open loop: takes the steps of a stream, each atomically.

    Args:
        engine: the engine to train.
        progress: its position.
        stream: the stream of its data.
        agreement: what its ranks agree on.
        horizon: the end of the run.
        log_every: interval between logs.
        period: interval between evaluations; None: only the last.
    """

    def __init__(
        self,
        engine: Run,
        progress: Progress,
        stream: Stream,
        agreement: Agreement,
        horizon: Interval,
        log_every: Interval,
        period: Interval | None,
    ) -> None:
        self._engine, self._progress = engine, progress
        self._stream, self._agreement, self._horizon = stream, agreement, horizon
        self._log_due, self._eval_due = Every(log_every, engine.state), Every(period, engine.state)
        self._undo = Undo(engine.model)
        self._started = agreement.clock() - engine.state.seconds

    def take_step(self) -> bool:
        """Take one step, or none at the end of the data; a failed step is undone."""
        engine, progress, stream = self._engine, self._progress, self._stream
        self._mark()
        place = stream.place
        progress.step, micro = None, stream.take(engine.accumulate, self._horizon)
        if not micro:
            self._commit(None)
            return False
        if isinstance(stream.data, Iterator):
            self._undo.take()  # returned batches are not read again
        try:
            step = progress.step = progress.continued() or prepare(engine, micro)
            take_step(engine, step, lambda: self._agreement.begin(*step.size()), self._mark)
        except BaseException:
            if progress.step is not None and progress.step.is_done:
                self._commit(progress.step)
            else:
                stream.give_back(place)
                engine.meter.rollback(self._metrics)
                self._undo.put_back()
                progress.interrupted()
            raise
        self._commit(step)
        return True

    def _mark(self) -> None:
        """Record what a failure restores: before the step, and between two of its turns."""
        self._metrics = self._engine.meter.mark()
        self._undo.take()

    def _commit(self, step: Step | None) -> None:
        """Move all counters and the cursor together: here, and nowhere else."""
        state, progress = self._engine.state, self._progress
        progress.reached(self._stream.place)
        state.epoch, state.batch, *_ = self._stream.place
        state.epoch_length = self._stream.length
        if step is None:
            return
        rows, tokens = self._agreement.end()
        state.step += 1
        state.samples += rows
        state.tokens += tokens
        state.seconds = self._agreement.clock() - self._started
        progress.due, progress.owed = {"follow", "end"}, False
        progress.due |= {"log"} if self._log_due.due(state) else set()
        progress.due |= {"evaluate"} if self._eval_due.due(state) else set()
        if self._engine.cells:
            seed_for(self._engine.seed, state.step)
