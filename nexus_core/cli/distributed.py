"""`nexus-run` under a launcher such as torchrun: several processes that behave as one command."""

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
"""The slot of the plugin that lets several processes train one model."""
PATIENCE_S = 5.0
"""How long a process waits for the main one to end with the same error, in seconds."""


class Joining(Protocol):
    """What a plugin that fills the slot can do."""

    def join(self) -> Ranks: ...


def join(build: Build) -> Ranks:
    """Bring this process together with those that the launcher started beside it.

    Raises:
        ConfigError: there are several and no plugin for that, or they were not started alike.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return Ranks.current()
    plugin = next((p for p in build.plan.plugins if p.slot == SLOT), None)
    if plugin is None:
        raise ConfigError(
            f"a launcher started {started} processes (WORLD_SIZE={started}), and no plugin of this "
            f"run lets them train one model; add one of slot '{SLOT}' (nexus-plugins list)"
        )
    if build.run.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise ConfigError(
            "a run that the launcher may start again needs a folder in which it finds what it has "
            "saved: --out runs/mine (or torchrun --max-restarts 0)"
        )
    ranks = cast(Joining, plugin).join()
    if differences := _differences(build, ranks):
        _end(ranks, ConfigError(
            f"the processes of this run were not started alike: {differences}; give all of them "
            "the same files, options, NEXUS_* variables and packages"
        ))  # fmt: skip
    return ranks


def of_main(ranks: Ranks, work: Callable[[], Answer]) -> Answer:
    """Do something in the main process alone; all get what it returned, or end with its error."""
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
    """What to resume from: in a restart by the launcher, what this very run has saved.

    What was named stays what is asked for, as the run may have ended before it had saved; who reads
    checkpoints knows whether it has.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return "auto" if restarted and wished is None else wished


def leave() -> None:
    """Wait until all processes are done, so that none is ended while it saves, and part.

    Call it when engine and plugins are gone. Threads of a group that is still held live on into the
    end of the interpreter, which aborts if they let go of a Python object then
    (pytorch/pytorch#179291), and the exit code is lost.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def said_by_main(message: str) -> bool:
    """Whether the main process ends with this very error too; its peers ask and wait for it.

    They ask the launcher, which they reach whether or not they have joined.

    Args:
        message: the error that this process ends with.

    Returns:
        False in the main process, and where it is well, says something else or cannot be reached.
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
    """Raise the error in the main process; the others end in silence, after it."""
    if not ranks.is_main:
        with suppress(RuntimeError):
            dist.barrier()  # broken off when the main process leaves
    dist.destroy_process_group()  # its threads must not live on into the end of the interpreter
    gc.collect()
    if ranks.is_main:
        raise error
    sys.exit(error.exit_code)


def _differences(build: Build, ranks: Ranks) -> str:
    """How this run is not the same in every process, in words; nothing where it is."""
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
    """Each setting, the order of the plugins, and the versions of what they are made of."""
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
