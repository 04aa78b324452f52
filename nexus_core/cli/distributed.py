"""`nexus-run` under a launcher such as torchrun: several ranks that behave as one command."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from nexus_core.errors import ConfigError, NexusError
from nexus_core.places import used
from nexus_core.plan import distribution, installed
from nexus_core.processes import Ranks

if TYPE_CHECKING:
    from nexus_core.cli.build import Build

__all__ = ["join", "leave", "of_main", "resume_source", "said_by_main"]

Answer = TypeVar("Answer")
SLOT = "processes"
"""The slot of the plugin that runs distributed training."""
PATIENCE_S = 5.0
"""How long a rank waits for rank 0 to end with the same error, in seconds."""


class Joining(Protocol):
    """What a plugin in this slot provides."""

    def join(self) -> Ranks: ...


def join(build: Build) -> Ranks:
    """Join this rank with the others that the launcher started.

    Raises:
        ConfigError: there are several and no plugin for that, or they were started differently.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return Ranks.current()
    plugin = next((p for p in build.plan.plugins if p.slot == SLOT), None)
    if plugin is None:
        raise ConfigError(
            f"a launcher started {started} processes (WORLD_SIZE={started}), and no plugin of this "
            f"run trains on several; add one that fills the slot '{SLOT}' (nexus-plugins list)"
        )
    if build.run.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise ConfigError(
            "a run that the launcher may restart needs a fixed folder to find its checkpoints "
            "in: --out runs/mine (or torchrun --max-restarts 0)"
        )
    ranks = cast(Joining, plugin).join()
    if differences := _differences(build, ranks):
        _end(ranks, ConfigError(
            f"the ranks of this run were started differently: {differences}; give all of them "
            "the same files, options, NEXUS_* variables and packages"
        ))  # fmt: skip
    return ranks


def of_main(ranks: Ranks, work: Callable[[], Answer]) -> Answer:
    """Do something on rank 0 only; all ranks get its result, or end with its error."""
    if ranks.size == 1:
        return work()
    answer: Answer | None = None
    error: NexusError | None = None
    if ranks.is_main:
        try:
            answer = work()
        except NexusError as raised:
            error = raised
    shared = [(answer, error)]
    dist.broadcast_object_list(shared, src=0)
    answer, error = shared[0]
    if error is not None:
        _end(ranks, error)
    return cast(Answer, answer)


def resume_source(wished: str | None) -> str | None:
    """What to resume from: after a restart by the launcher, this run's own checkpoints.

    A source named by the user is kept, as the run may have ended before its first save; whoever
    reads the checkpoints knows.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return "auto" if restarted and wished is None else wished


def leave() -> None:
    """Wait for all ranks, so that none is killed while it saves, then leave the process group.

    Call it when engine and plugins are gone. Threads of a group that is still alive run until the
    interpreter exits, which aborts if they release a Python object then (pytorch/pytorch#179291),
    and the exit code is lost.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def said_by_main(message: str) -> bool:
    """Whether rank 0 ends with this same error too; its peers ask and wait for it.

    They ask the launcher's store, which is reachable before the ranks have joined.

    Args:
        message: the error that this rank ends with.

    Returns:
        False on rank 0, and if rank 0 is fine, reports another error or cannot be reached.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    place = f"error of attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=PATIENCE_S)
        store = TCPStore(address, port, timeout=patience, wait_for_workers=False)
        if os.environ["RANK"] == "0":
            store.set(place, message)
            return False
        said: bytes = store.get(place)
    except (LookupError, ValueError, RuntimeError):
        return False
    return said == message.encode()


def _end(ranks: Ranks, error: NexusError) -> None:
    """Raise the error on rank 0; the other ranks end silently after it."""
    if not ranks.is_main:
        with suppress(RuntimeError):
            dist.barrier()  # fails when rank 0 leaves
    dist.destroy_process_group()  # its threads must not outlive the interpreter
    gc.collect()
    if ranks.is_main:
        raise error
    sys.exit(error.exit_code)


def _differences(build: Build, ranks: Ranks) -> str:
    """How this run differs between ranks, in words; empty if it does not."""
    own = dict(_settings(build))
    digests = _gather(ranks, hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest())
    if len(set(digests)) == 1:
        return ""
    main, *others = _gather(ranks, own)
    return "; ".join(
        f"{key} is {other.get(key)} in rank {rank}, {main.get(key)} in rank 0"
        for rank, other in enumerate(others, start=1)
        for key in {**main, **other}
        if main.get(key) != other.get(key)
    )


def _settings(build: Build) -> Iterator[tuple[str, str]]:
    """Each setting, the order of the plugins, and the versions of their code."""
    yield from _flat(build.resolved(Path(build.run.out or "")))
    yield "the order of plugins", " ".join(plugin.name for plugin in build.plan.plugins)
    yield "torch", torch.__version__
    yield "nexus-trainer", version("nexus-trainer")
    entries = installed()
    for plugin in build.plan.plugins:
        if plugin.name in entries:
            yield f"the distribution of {plugin.name}", distribution(entries[plugin.name])
        for source in used(plugin):
            yield f"the content of {source.file}", source.sha256


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, "" if key == "plugins" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _gather(ranks: Ranks, value: Answer) -> list[Answer]:
    found = [value] * ranks.size
    dist.all_gather_object(found, value)
    return found
