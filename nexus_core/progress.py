"""Where a run is: in its data, between its steps, and within one that failed halfway."""

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
    """Which data the cursor is in, the present step, and what is due after it.

    Attributes:
        step: the last one that was begun; None before the first.
        due: what comes after the last step and has not been begun: "follow" (the hook `on_step`),
            "log", "evaluate" and "end" (`on_step_end`). An error before it leaves it due.

        owed: an evaluation of the last step was given up, as the run had to stop.

    Args:
        saved: the data's state of the snapshot that was restored.
        owed: as the attribute, in that snapshot.
    """

    def __init__(self, saved: DataState | None = None, owed: bool = False) -> None:
        self.step: Step | None = None
        self.due = {"evaluate", "end"} if owed else set[str]()
        self.owed = owed
        self._saved = saved
        self._read: Iterable[Batch] | None = None  # the data that the cursor is in
        self._stream: Stream | None = None
        self._place: Place | None = None  # in the stream, as of the last step
        self._partial: tuple[Step, RandomState] | None = None  # a step between two of its turns

    def open(
        self, engine: Run, data: Iterable[Batch], horizon: Interval, period: Interval | None
    ) -> Stream:
        """The stream of this data from the cursor on; that of an iterator is continued.

        Args:
            engine: whose counters say where the cursor is.
            data: batches.
            horizon: the end of the run, and `period` that of its evaluations; where they are part
                of an epoch, the data must say how long one is.
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
        """Which data the cursor is in, and where, for a snapshot."""
        if self._stream is None or self._place is None:
            return self._saved
        return self._stream.state(self._place)

    def leave_to(self, others: Iterable[object]) -> None:
        """Let others read data, which may be what the run reads."""
        if self._stream is not None:
            self._stream.leave_to(others)

    def check_whole(self) -> None:
        """Refuse what needs whole steps where one stopped between two of its turns.

        Raises:
            ConfigError: one did.
        """
        if self._partial is not None:
            raise ConfigError(
                "the last step failed between two of its turns; take it to its end first, by "
                "fit with the same data"
            )

    def reached(self, place: Place) -> None:
        """The steps up to this place in the data are done."""
        self._place = place

    def interrupted(self) -> None:
        """Keep a step that failed after some of its turns, to continue it at the next one."""
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
    """One open loop: takes the steps of a stream, each all or nothing.

    Args:
        engine: that is trained.
        progress: where it is.
        stream: of its data.
        agreement: what its processes agree on.
        horizon: the end of the run.
        log_every: the period of logs.
        period: of evaluations; None: none but the last.
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
        """Take one step, or none at the data's end; one that fails leaves no trace."""
        engine, progress, stream = self._engine, self._progress, self._stream
        self._mark()
        place = stream.place
        progress.step, micro = None, stream.take(engine.accumulate, self._horizon)
        if not micro:
            self._commit(None)
            return False
        if isinstance(stream.data, Iterator):
            self._undo.take()  # what is given back is not read again
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
        """Remember what a failure returns to: before the step, and between two of its turns."""
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
