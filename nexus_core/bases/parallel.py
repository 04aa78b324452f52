"""What plugins share that let several processes train one model: how these find each other."""

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
    """Settings that every such plugin has."""

    timeout: float = Field(
        default=600.0,
        gt=0,
        le=31_536_000,  # a year; what comes after it overflows the clocks of backends
        description="seconds that a process waits for its peers before the run ends with an error",
        json_schema_extra=_IGNORED,
    )


ConfigT = TypeVar("ConfigT", bound=ParallelConfig)


class Parallel(Plugin[ConfigT]):
    """Makes several processes one run; the engine has them agree on counters, clock and stops.

    Subclasses answer how gradients and weights are shared. In a process without a launcher they
    must change nothing.
    """

    slot: ClassVar[str | None] = "processes"

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

    @hookimpl(stage="join")
    def on_start(self, engine: Engine) -> None:
        """Let each process draw random numbers of its own, for a dropout of its own.

        In a run in cells all draw the same, and the cells see to it that they differ.

        Raises:
            ConfigError: a launcher started several processes, and they have not been joined; or
                an epoch does not have as many batches in each of them.
        """
        self.check_joined()
        lengths = gather(engine.ranks, engine.state.epoch_length)
        if len(set(lengths)) > 1:
            raise ConfigError(
                f"{self.name}: an epoch has {', '.join(map(str, lengths))} batches in ranks 0 to "
                f"{engine.ranks.size - 1}; give each as many, by ResumableLoader(..., ranks=ranks) "
                "or a DistributedSampler"
            )
        _check_cells(engine)
        own = engine.state.step == 0 and not engine.ranks.is_main and not engine.cells
        if engine.ranks.size > 1 and own:
            seed_everything(own_seed(engine.seed, engine.ranks))

    @hookimpl
    def on_error(self, engine: Engine, error: BaseException) -> None:
        """Say where this process was, and which peer ended before it, for which reason."""
        if engine.ranks.size > 1:
            error.add_note(f"{_self()}, in {_event(error)}, step {engine.state.step}")
            what = f"{type(error).__name__}: {_first_line(error).partition('; ')[0]}"
            with suppress(RuntimeError):  # the one that keeps the store may be gone
                ended = f"{_self()} has ended with {what}"
                first = _get_default_store().compare_set(_ENDED, "", ended).decode()
                if not first.endswith(what):
                    error.add_note(first)


def _check_cells(engine: Engine) -> None:
    """Refuse what would make the bits of a run in cells depend on who computes them.

    Raises:
        ConfigError: there are fewer cells than processes, or statistics follow the batches.
    """
    if not engine.cells:
        return
    if engine.batch_cells < engine.ranks.size:
        raise ConfigError(
            f"{engine.batch_cells} cells a batch are too few for {engine.ranks.size} processes, "
            f"each of which computes one at least; set cells={engine.ranks.size} or more"
        )
    for name, module in engine.model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.training:
            raise ConfigError(
                f"the running statistics of '{name}' ({type(module).__name__}) follow the batches "
                "that one process sees, so a run in cells cannot have the same bits everywhere; "
                "use a norm over each row (GroupNorm, LayerNorm), freeze it with eval(), or leave "
                "cells out"
            )


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_seed(seed: int, ranks: Ranks) -> int:
    """A seed for the generators of this process; the main one has the seed of the run."""
    return seed + 1_000_003 * ranks.rank


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
        if module.startswith(_EVENTS) and code.co_name not in ("sum", "gather", "begin", "end"):
            found = code.co_name
        step = step.tb_next
    return found


def _self() -> str:
    return f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
