"""What every plugin shares that lets several processes train one model: start, clock, stops."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from nexus_core.data import Batch, batch_size
from nexus_core.errors import ConfigError, RunError
from nexus_core.meter import Meter
from nexus_core.plugin import Plugin, PluginConfig, hookimpl
from nexus_core.processes import Ranks
from nexus_core.state import seed_everything

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = [
    "Distributed",
    "DistributedConfig",
    "gather",
    "is_sharded",
    "launched",
    "local_part",
    "own_seed",
    "share_buffers",
    "whole",
]

Value = TypeVar("Value")
Units: TypeAlias = list[Mapping[str, Tensor | float]]
Terms: TypeAlias = list[Mapping[str, Tensor]]
_IGNORED: dict[str, Any] = {"resume": "ignored"}
_EVENTS = "nexus_core", "nexus_plugins"


class DistributedConfig(PluginConfig):
    """Settings that every such plugin has."""

    timeout: float = Field(
        600.0,
        gt=0,
        description="seconds that a process waits for its peers before the run ends with an error",
        json_schema_extra=_IGNORED,
    )


ConfigT = TypeVar("ConfigT", bound=DistributedConfig)


class Distributed(Plugin[ConfigT]):
    """Makes several processes one run: counters, clock and stops are those of all of them.

    Subclasses answer how gradients and weights are shared. In a process without a launcher they
    must change nothing.
    """

    slot: ClassVar[str | None] = "processes"
    before: ClassVar[tuple[str, ...]] = ("recompute", "compile", "amp", "guard", "clip")
    conflicts: ClassVar[tuple[str, ...]] = ("pcgrad",)

    def __init__(self, config: ConfigT | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self._samples = self._tokens = 0
        self._own = 0, 0  # rows and tokens of this process that the others do not know of
        self._now = 0.0
        self._sums: Tensor
        self._exchange: dist.Work

    def join(self) -> Ranks:
        """Join the peers that the launcher started, once; without a launcher do nothing.

        `nexus-run` does it. A program of your own calls it before it builds the Engine.

        Returns:
            The place of this process among them.

        Raises:
            ConfigError: the launcher's environment is not whole, or asks for a missing device.
            RunError: the peers do not come within `timeout`.
        """
        if launched() and not dist.is_initialized():
            _pick_own_device()
            try:
                _start_group(timedelta(seconds=self.config.timeout))
            except ValueError as error:
                raise ConfigError(f"the launcher's environment is not whole: {error}") from error
            except RuntimeError as error:
                raise RunError(f"{_self()} cannot join its peers: {_first_line(error)}") from error
        return Ranks.current()

    def check_joined(self) -> None:
        """See that `join` was called where there are peers.

        Raises:
            ConfigError: it was not.
        """
        if launched() and not dist.is_initialized():
            raise ConfigError(
                f"{self.name}: a launcher started {os.environ['WORLD_SIZE']} processes that do "
                f"not know one another; call join() of the plugin before Engine(...)"
            )

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Take over the clock and the stops.

        Raises:
            ConfigError: a launcher started several processes, and they have not been joined.
        """
        self.check_joined()
        if engine.ranks.size == 1:
            return
        engine.alone = False
        engine.clock = lambda: self._now
        self._samples, self._tokens = engine.state.samples, engine.state.tokens
        self._own = 0, 0
        if engine.state.step == 0 and not engine.ranks.is_main:
            seed_everything(own_seed(engine.seed, engine.ranks))  # for a dropout of its own
        self._begin_exchange(engine)
        self._end_exchange(engine)

    @hookimpl(wrapper=True)
    def on_batch(self, batch: Batch) -> Generator[None, None, None]:
        """Count the rows of this process that count, as they are once plugins have changed them."""
        yield
        if not _is_borrowed(batch):
            rows, tokens = batch_size(batch)
            self._own = self._own[0] + rows, self._own[1] + tokens

    @hookimpl(wrapper=True)
    def loss_units(self, batch: Batch) -> Generator[None, Units, Units]:
        """A borrowed row has no units."""
        answers = yield
        if _is_borrowed(batch):
            return [{name: units * 0.0 for name, units in answer.items()} for answer in answers]
        return answers

    @hookimpl(wrapper=True)
    def loss_terms(self, engine: Engine, batch: Batch) -> Generator[None, Terms, Terms]:
        """A borrowed row adds nothing to the losses and to what is logged with them."""
        if not _is_borrowed(batch):
            return (yield)
        meter, engine.meter = engine.meter, Meter()
        try:
            answers = yield
        finally:
            aside, engine.meter = engine.meter, meter
        for name in aside.state_dict():
            meter.add(name, 0.0, 0.0)
        return [{name: term * 0.0 for name, term in answer.items()} for answer in answers]

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool, bool]:
        """Begin the exchange of this step, which needs no time of its own while weights move."""
        if engine.ranks.size > 1:
            self._begin_exchange(engine)
        return (yield)

    @hookimpl(tryfirst=True)
    def on_step(self, engine: Engine) -> None:
        """Count what all processes did, and stop all where one is to stop."""
        if engine.ranks.size > 1:
            self._end_exchange(engine)

    @hookimpl(wrapper=True)
    def on_eval(self, engine: Engine) -> Generator[None, None, None]:
        """Stop all where the evaluation of a run made one stop."""
        yield
        if not engine.alone:
            self._begin_exchange(engine)
            self._end_exchange(engine)

    @hookimpl
    def on_error(self, engine: Engine, error: BaseException) -> None:
        """Say where this process waited for peers that did not come."""
        if engine.ranks.size > 1:
            error.add_note(f"{_self()}, in {_event(error)}, step {engine.state.step}")

    @hookimpl
    def on_close(self, engine: Engine) -> None:
        """Give back clock and stops."""
        engine.clock, engine.alone = time.perf_counter, True

    def _begin_exchange(self, engine: Engine) -> None:
        """Send counters, the clock of the main process, and whether this one is to stop."""
        asked = engine.stop_reason is not None
        now = time.perf_counter() if engine.ranks.is_main else 0.0
        self._sums = torch.tensor([*self._own, now, asked], dtype=torch.double)
        self._own = 0, 0
        self._exchange = dist.all_reduce(self._sums, async_op=True)

    def _end_exchange(self, engine: Engine) -> None:
        """Take over what all processes sent."""
        self._exchange.wait()
        del self._exchange  # it keeps the group's connections
        samples, tokens, self._now, stops = self._sums.tolist()
        self._samples += int(samples)
        self._tokens += int(tokens)
        engine.state.samples, engine.state.tokens = self._samples, self._tokens
        if stops and not engine.stopping:
            engine.stop_reason = next(filter(None, gather(engine.ranks, engine.stop_reason)))
            engine.stopping = True


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_borrowed(batch: Batch) -> bool:
    """Whether the batch is a row that was borrowed by a process whose share had none."""
    return isinstance(batch, dict) and "sample_ids" in batch and len(batch["sample_ids"]) == 0


def own_seed(seed: int, ranks: Ranks) -> int:
    """A seed for the generators of this process; the main one has the seed of the run."""
    return seed + 1_000_003 * ranks.rank


def gather(ranks: Ranks, value: Value) -> list[Value]:
    """What each process has, by rank, for all of them; every one of them must ask.

    Args:
        ranks: this process among its peers.
        value: anything that can be pickled; it goes to processes of this very run alone.
    """
    found = [value] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(found, value)
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a `DTensor`, of which this process may hold but a part."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in place: all of it, unless it is a `DTensor`."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is a `DTensor`; then every process must ask."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def share_buffers(model: nn.Module) -> None:
    """Make the model's buffers in all processes those of the main one."""
    sent = [dist.broadcast(buffer, src=0, async_op=True) for buffer in model.buffers()]
    for work in sent:
        work.wait()


def _start_group(timeout: timedelta) -> None:
    """Start the process group that the launcher's environment describes."""
    # its functions keep the group of the time of import as a default, past the end of the group
    import torch.distributed.nn.functional

    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # a launcher that starts everybody again keeps the store, with the addresses of the dead
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )


def _pick_own_device() -> None:
    """Make the device of this process the one that "cuda" and "auto" mean."""
    if not torch.cuda.is_available():
        return
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            f"process {local} of this machine has no device of its own: there are {count}; start "
            f"fewer (torchrun --nproc-per-node {count}), or hide them all: CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local)


def _event(error: BaseException) -> str:
    """The innermost function of ours that the error passed through: where the process was."""
    found, step = "the run", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        module = str(step.tb_frame.f_globals.get("__name__", ""))
        if module.startswith(_EVENTS) and code.co_name not in ("sum", "gather", "_end_exchange"):
            found = code.co_name
        step = step.tb_next
    return found


def _self() -> str:
    return f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
