"""Profile a run's time and tensor memory around every hook, from outside the engine."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_core.batches import Batch
from nexus_core.data import RunData
from nexus_core.engine import Engine
from nexus_core.errors import ConfigError
from nexus_core.loaders import Seekable, can_seek
from nexus_core.plan import HOOK_NAMES, Plan

__all__ = ["Profiler", "Row", "Sync", "check_trace"]

CORE = "the core"
LOOP = "the loop"
OTHER = "other events"
PHASES = {
    **dict.fromkeys(["make_data", "make_model", "make_optimizer"], "building"),
    **dict.fromkeys(["loss_units", "loss_terms", "weigh_losses"], "losses"),
    "forward": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
}
UNOBSERVED = frozenset(
    {"forward", "backward", "optimizer_step"}
)  # may run compiled code, which a torch mode would change
SYNCS = frozenset(
    {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select"}
    | {"__bool__", "__float__", "__int__", "__index__"}
)
END: Final = object()
MEBIBYTE = 2**20
TRACED_STEPS = 5
SHOWN_SHARE = 0.001  # of the time; smaller rows without memory or syncs are summed


@dataclass
class Row:
    """What one plugin did in one hook.

    Args:
        calls: calls of its method; a wrapper counts twice, before and after the rest.
        seconds: time in it, excluding calls that have their own row.
        allocated: bytes of tensors it allocated.
        kept: bytes of those still alive when it returned.
    """

    calls: int = 0
    seconds: float = 0.0
    allocated: int = 0
    kept: int = 0


@dataclass
class Sync:
    """How often a method synced with the device (or would on a GPU), and where first."""

    count: int = 0
    function: str = ""
    place: str = ""


@dataclass
class _Span:
    """An open time span."""

    row: tuple[str, str]
    phase: str
    entered: float
    started: float = 0.0
    elsewhere: float = 0.0  # seconds inside it that belong to other spans or to profiling


class Profiler:
    """Profiles a run: call `watch` before the engine is built, `attach` after.

    Every moment between `watch` and `stop` belongs to exactly one row, to the loop or to profiling
    itself, so the rows add up to the total. Times are host times: on a GPU, running work shows up
    where the host waits for it.

    Args:
        trace: file for a Chrome trace of the first 5 steps by torch.profiler; None: no trace.
    """

    def __init__(self, trace: Path | None = None) -> None:
        self.rows: defaultdict[tuple[str, str], Row] = defaultdict(Row)
        self.syncs: defaultdict[tuple[str, str], Sync] = defaultdict(Sync)
        self.phases: defaultdict[str, float] = defaultdict(float)
        self.cost = 0.0
        self.whole = 0.0
        self.steps = 0
        self._trace = trace
        self._tracing: profile | None = None
        self._stack: list[_Span] = []
        self._engine: Engine | None = None
        self._stop = ExitStack()

    def watch(self, plan: Plan) -> None:
        """Time every hook of the plugins, and start the clock."""
        for plugin in plan.plugins:
            for name in HOOK_NAMES:
                method = getattr(plugin, name, None)
                if method is not None:
                    setattr(plugin, name, self._around(method, plugin.name, name))
        if self._trace is not None:
            self._tracing = profile(activities=_activities(), acc_events=True)
            self._tracing.start()
        self._stop.enter_context(self._span((LOOP, ""), LOOP))

    def attach(self, engine: Engine) -> None:
        """Time every event of the engine, and its data loading."""
        self._engine = engine
        for name in HOOK_NAMES:
            hook = getattr(engine.hook, name)
            setattr(engine.hook, name, self._event(name, hook, _phase(name)))
        scopes = engine.hook.evaluating

        def evaluating(**given: Any) -> list[AbstractContextManager[object]]:
            return [self._span((CORE, "evaluate"), "evaluation"), *scopes(**given)]

        vars(engine.hook)["evaluating"] = evaluating

    def _timed_data(self, data: RunData) -> RunData:
        """The same data, timing how long training waits for it."""
        if isinstance(data.train, Iterator):
            return data
        kind = _TimedSeekable if can_seek(data.train) else _TimedData
        return replace(data, train=kind(data.train, self._waiting))

    def stop(self) -> None:
        """Stop the clock, and write the trace if requested."""
        self.whole = time.perf_counter() - self._stack[0].entered
        self._stop.close()
        self._end_trace()

    @property
    def has_news(self) -> bool:
        """Whether this process took a step and is rank 0."""
        return self.steps > 0 and self._engine is not None and self._engine.ranks.is_main

    def report(self) -> str:
        """The tables: phases, plugins by event, syncs, and the profiling overhead."""
        return "\n".join(_report(self))

    def _event(self, name: str, hook: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*arguments: object, **given: object) -> Any:
            with self._span((CORE, name), phase):
                answer = hook(*arguments, **given)
            if name == "on_step_end":
                self._step_done()
            return answer

        return timed

    def _around(self, method: Callable[..., Any], plugin: str, name: str) -> Callable[..., Any]:
        row, phase = (plugin, name), _phase(name)

        @wraps(method)
        def call(*arguments: object) -> Any:
            with self._span(row, phase, observed=name not in UNOBSERVED):
                answer = method(*arguments)
            return self._timed_data(answer) if isinstance(answer, RunData) else answer

        @wraps(method)
        def wrapper(*arguments: object) -> Generator[None, object, object]:
            inner = method(*arguments)
            with self._span(row, phase):
                next(inner)
            try:
                answer = yield
            except BaseException as error:
                go_on: Callable[[], object] = partial(inner.throw, error)
            else:
                go_on = partial(inner.send, answer)
            with self._span(row, phase):
                try:
                    go_on()
                except StopIteration as end:
                    return cast(object, end.value)
            raise RuntimeError(f"{plugin}.{name} yields twice; a wrapper yields once")

        return wrapper if getattr(method, "nexus_impl", {}).get("wrapper") else call

    @contextmanager
    def _span(self, key: tuple[str, str], phase: str, *, observed: bool = False) -> Iterator[None]:
        """Charge the time inside to a row and a phase."""
        entered = time.perf_counter()
        parent = self._stack[-1] if self._stack else None
        if parent is not None and parent.phase not in (LOOP, OTHER):
            phase = parent.phase
        if self._engine is not None and not self._engine.training:
            phase = "evaluation"
        span = _Span(key, phase, entered)
        self._stack.append(span)
        memory = _Memory(self) if observed else None
        try:
            with ExitStack() as modes:
                if self._tracing is not None:
                    modes.enter_context(record_function(f"{key[1]}/{key[0]}"))
                if memory is not None:
                    modes.enter_context(_Syncs(self, key))
                    modes.enter_context(memory)
                span.started = time.perf_counter()
                try:
                    yield
                finally:
                    ended = time.perf_counter()
        finally:
            row = self.rows[key]
            row.calls += 1
            if memory is not None:
                row.allocated += memory.allocated
                row.kept += memory.kept()
            own = ended - span.started - span.elsewhere
            row.seconds += own
            self.phases[span.phase] += own
            self._stack.pop()
            left = time.perf_counter()
            self.cost += span.started - entered + left - ended
            if parent is not None:
                parent.elsewhere += left - entered

    def charge(self, seconds: float) -> None:
        """Exclude profiling overhead from what is measured."""
        self.cost += seconds
        self._stack[-1].elsewhere += seconds

    def saw_sync(self, key: tuple[str, str], function: str, tensor: Tensor) -> None:
        """Record a call that syncs, if the tensor is on the run's device."""
        if self._engine is None or tensor.device.type != self._engine.device.type:
            return
        sync = self.syncs[key]
        sync.count += 1
        if sync.count == 1:
            sync.function, sync.place = function.strip("_"), _place()

    def _waiting(self) -> AbstractContextManager[None]:
        return self._span((CORE, "data wait"), "data wait")

    def _step_done(self) -> None:
        self.steps += 1
        if self.steps == TRACED_STEPS:
            self._end_trace()

    def _end_trace(self) -> None:
        tracing, self._tracing = self._tracing, None
        if tracing is not None:
            tracing.stop()
            if self.has_news:
                tracing.export_chrome_trace(str(self._trace))


class _Syncs(TorchFunctionMode):
    """Intercepts functions that read a tensor's values on the host."""

    def __init__(self, profiler: Profiler, key: tuple[str, str]) -> None:
        super().__init__()
        self._profiler = profiler
        self._key = key

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = time.perf_counter()
        name = getattr(func, "__name__", "")
        if name in SYNCS and args and isinstance(args[0], Tensor):
            self._profiler.saw_sync(self._key, name, args[0])
        self._profiler.charge(time.perf_counter() - before)
        return func(*args, **(kwargs or {}))


class _Memory(TorchDispatchMode):
    """Intercepts every new tensor storage."""

    supports_higher_order_operators = True

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._profiler = profiler
        self._made: dict[int, tuple[Any, int]] = {}  # a StorageWeakRef, and its bytes

    @property
    def allocated(self) -> int:
        """Bytes of all storages allocated."""
        return sum(size for _, size in self._made.values())

    def kept(self) -> int:
        """Bytes of those still alive."""
        return sum(size for storage, size in self._made.values() if not storage.expired())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        before = time.perf_counter()
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(answer):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._made:
                alive = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._made[storage._cdata] = alive, storage.nbytes()
        self._profiler.charge(time.perf_counter() - before)
        return answer


class _TimedData:
    """Training data that times the wait for each batch."""

    def __init__(
        self, data: Iterable[Batch], waiting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._data = data
        self._waiting = waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def __len__(self) -> int:
        return len(cast(Sized, self._data))

    def __iter__(self) -> Iterator[Batch]:
        return self._timed(lambda: iter(self._data))

    def _timed(self, start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
        with self._waiting():
            batches = start()
        while True:
            with self._waiting():
                batch = next(batches, END)
            if batch is END:
                return
            yield batch


class _TimedSeekable(_TimedData):
    """The same for seekable data."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self._timed(lambda: cast(Seekable, self._data).batches(epoch, start))

    def batches_from_row(self, epoch: int, row: int) -> Iterator[Batch]:
        return self._timed(lambda: cast(Any, self._data).batches_from_row(epoch, row))


def check_trace(trace: Path) -> None:
    """Reject a trace file that could not be written at the end.

    Raises:
        ConfigError: it does not end in .json, or its folder does not exist.
    """
    if trace.suffix != ".json":
        raise ConfigError(
            f"--profile-trace writes JSON; got '{trace}', expected a file name ending in .json"
        )
    if not trace.absolute().parent.is_dir():
        raise ConfigError(f"--profile-trace: no folder '{trace.parent}'; create it first")


def _report(profiler: Profiler) -> Iterator[str]:
    whole = max(profiler.whole, 1e-9)
    yield f"profile of {profiler.steps:,} steps, {whole:.2f} s including building the run"
    yield ""
    yield f"  {'where the time goes':<44} {'s':>10} {'share':>7}"
    phases = sorted(profiler.phases.items(), key=lambda item: -item[1])
    for name, seconds in [*phases, ("this profile", profiler.cost)]:
        yield f"  {name:<44} {seconds:>10.3f} {seconds / whole:>7.1%}"
    yield ""
    yield (
        f"  {'event':<20} {'plugin':<23} {'s':>10} {'share':>7} {'calls':>7} {'ms/call':>9} "
        f"{'MiB/call':>9} {'kept':>9} {'syncs':>6}"
    )
    rest = Row()
    for key, row in sorted(profiler.rows.items(), key=lambda item: -item[1].seconds):
        sync = profiler.syncs.get(key, Sync())
        if row.seconds < SHOWN_SHARE * whole and row.allocated < MEBIBYTE and not sync.count:
            rest.calls, rest.seconds = rest.calls + row.calls, rest.seconds + row.seconds
        else:
            yield _line(key, row, sync, whole)
    yield _line(("all others", ""), rest, Sync(), whole)
    yield ""
    yield from _sync_lines(profiler.syncs)
    yield ""
    yield (
        f"  Profiling overhead: {profiler.cost:.3f} s ({profiler.cost / whole:.1%}), in no other "
        "row. Only timed, not checked for memory"
    )
    yield f"  or syncs: {', '.join(sorted(UNOBSERVED))}, wrappers, and the core itself."


def _line(key: tuple[str, str], row: Row, sync: Sync, whole: float) -> str:
    plugin, event = key
    calls = max(row.calls, 1)
    return (
        f"  {event:<20} {plugin:<23} {row.seconds:>10.3f} {row.seconds / whole:>7.1%} "
        f"{row.calls:>7,} {row.seconds / calls * 1000:>9.3f} "
        f"{row.allocated / calls / MEBIBYTE:>9.3f} {row.kept / calls / MEBIBYTE:>9.3f} "
        f"{sync.count:>6,}"
    )


def _sync_lines(syncs: Mapping[tuple[str, str], Sync]) -> Iterator[str]:
    if not syncs:
        yield "  No plugin was seen reading a device tensor on the host."
        return
    yield "  Device tensors read on the host (each read is a sync on a GPU):"
    for (plugin, event), sync in sorted(syncs.items(), key=lambda item: -item[1].count):
        yield f"    {plugin}, {event}: {sync.count:,}, first {sync.function} at {sync.place}"


def _phase(event: str) -> str:
    return PHASES.get(event, OTHER)


def _place() -> str:
    """File and line of the innermost caller outside torch and this file."""
    frame = sys._getframe(1)
    torch_folder = str(Path(torch.__file__).parent)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(
        (torch_folder, __file__)
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _tensors(tree: object) -> Iterator[Tensor]:
    """The tensors with storage in an operator's arguments or results."""
    if isinstance(tree, Tensor):
        if tree.layout is torch.strided:
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *cuda]
