"""The base class of plugins that train one model in several processes: joining and checks."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from nexus_core.device import seed_everything
from nexus_core.errors import ConfigError, RunError
from nexus_core.plugin import Plugin, PluginConfig, hookimpl
from nexus_core.processes import Ranks, gather

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["Parallel", "ParallelConfig", "launched", "own_seed"]

_IGNORED: dict[str, Any] = {"resume": "ignored"}
_EVENTS = "nexus_core", "nexus_plugins"
_ENDED = "nexus: who has ended first, and why"


class ParallelConfig(PluginConfig):
    """Settings shared by all such plugins."""

    timeout: float = Field(
        default=600.0,
        gt=0,
        le=31_536_000,  # a year; larger values overflow the clocks of backends
        description="seconds a process waits for its peers before the run ends with an error",
        json_schema_extra=_IGNORED,
    )


ConfigT = TypeVar("ConfigT", bound=ParallelConfig)


class Parallel(Plugin[ConfigT]):
    """Combines several processes into one run; the engine synchronizes counters, clock and stops.

    Subclasses implement how gradients and weights are shared. Without a launcher they must change
    nothing.
    """

    slot: ClassVar[str | None] = "processes"

    def join(self) -> Ranks:
        """Join the process group that the launcher started, once; does nothing without a launcher.

        `nexus-run` calls it. In your own program, call it before you create the Engine.

        Returns:
            The rank of this process.

        Raises:
            ConfigError: the launcher's environment is incomplete, or asks for a missing device.
            RunError: the peers do not join within `timeout`.
        """
        if launched() and not dist.is_initialized():
            _pick_own_device()
            try:
                _start_group(timedelta(seconds=self.config.timeout))
            except ValueError as error:
                raise ConfigError(f"the launcher's environment is incomplete: {error}") from error
            except RuntimeError as error:
                raise RunError(f"{_self()} cannot join its peers: {_first_line(error)}") from error
        return Ranks.current()

    def check_joined(self) -> None:
        """Check that `join` was called if a launcher started several processes.

        Raises:
            ConfigError: it was not.
        """
        if launched() and not dist.is_initialized():
            raise ConfigError(
                f"{self.name}: a launcher started {os.environ['WORLD_SIZE']} processes that have "
                f"not joined; call join() of the plugin before Engine(...)"
            )

    @hookimpl(stage="join")
    def on_start(self, engine: Engine) -> None:
        """Seed each process differently, so that dropout differs between ranks.

        In a run with cells all processes keep the same seed, and the cells seed themselves.

        Raises:
            ConfigError: a launcher started several processes, and they have not joined; or the
                number of batches per epoch differs between them.
        """
        self.check_joined()
        lengths = gather(engine.ranks, engine.state.epoch_length)
        if len(set(lengths)) > 1:
            raise ConfigError(
                f"{self.name}: an epoch has {', '.join(map(str, lengths))} batches in ranks 0 to "
                f"{engine.ranks.size - 1}; give each the same number, with "
                "ResumableLoader(..., ranks=ranks) or a DistributedSampler"
            )
        _check_cells(engine)
        own = engine.state.step == 0 and not engine.ranks.is_main and not engine.cells
        if engine.ranks.size > 1 and own:
            seed_everything(own_seed(engine.seed, engine.ranks))

    @hookimpl
    def on_error(self, engine: Engine, error: BaseException) -> None:
        """Add to the error where this process was, and which peer failed first, and why."""
        if engine.ranks.size > 1:
            error.add_note(f"{_self()}, in {_event(error)}, step {engine.state.step}")
            what = f"{type(error).__name__}: {_first_line(error).partition('; ')[0]}"
            with suppress(RuntimeError):  # the process with the store may be gone
                ended = f"{_self()} has ended with {what}"
                first = _get_default_store().compare_set(_ENDED, "", ended).decode()
                if not first.endswith(what):
                    error.add_note(first)


def _check_cells(engine: Engine) -> None:
    """Reject what would make the bits of a run with cells depend on the number of processes.

    Raises:
        ConfigError: there are fewer cells than processes, or a norm has running statistics.
    """
    if not engine.cells:
        return
    if engine.batch_cells < engine.ranks.size:
        raise ConfigError(
            f"{engine.batch_cells} cells per batch are too few for {engine.ranks.size} processes, "
            f"each of which needs at least one; set cells={engine.ranks.size} or more"
        )
    for name, module in engine.model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.training:
            raise ConfigError(
                f"the running statistics of '{name}' ({type(module).__name__}) depend on the "
                "batches of each process, so a run with cells would not have the same bits on any "
                "number of them; use a norm over each row (GroupNorm, LayerNorm), freeze it with "
                "eval(), or remove cells"
            )


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_seed(seed: int, ranks: Ranks) -> int:
    """The seed of this process; the main process has the seed of the run."""
    return seed + 1_000_003 * ranks.rank


def _start_group(timeout: timedelta) -> None:
    """Start the process group that the launcher's environment describes."""
    # its functions store the group at import as a default argument, beyond the group's lifetime
    import torch.distributed.nn.functional

    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # a launcher that restarts all processes keeps the store, with the addresses of dead ones
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
            f"there is no device for process {local} of this machine, which has {count}; start "
            f"fewer (torchrun --nproc-per-node {count}), or hide them all: CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local)


def _event(error: BaseException) -> str:
    """The innermost function of this package in the error's traceback."""
    found, step = "the run", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        module = str(step.tb_frame.f_globals.get("__name__", ""))
        if module.startswith(_EVENTS) and code.co_name not in ("sum", "gather", "begin", "end"):
            found = code.co_name
        step = step.tb_next
    return found


def _self() -> str:
    return f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
