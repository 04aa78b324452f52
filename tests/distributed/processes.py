"""Processes forked from one that has imported everything, which start in no time.

Several that train together and return their results, or one that runs a program.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nexus_core.cli.nursery import free_port

PATIENCE_S = 60.0
_NURSERY = multiprocessing.get_context("forkserver")
_NURSERY.set_forkserver_preload(["tests.distributed.works", "torch._dynamo"])


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `work(*arguments)` in each of `size` processes, by rank.

    Raises:
        AssertionError: a process raised; the message contains its traceback.
    """
    port = free_port()
    started = []
    for rank in range(size):
        ours, theirs = _NURSERY.Pipe(duplex=False)
        process = _NURSERY.Process(
            target=_live, args=(theirs, rank, size, port, work, arguments), daemon=True
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    answers, faults = [], []
    for rank, (process, pipe) in enumerate(started):
        fault, answer = pipe.recv() if pipe.poll(PATIENCE_S) else ("no answer in time", None)
        answers.append(answer)
        faults += [f"rank {rank}: {fault}"] if fault else []
        process.join(PATIENCE_S)
        pipe.close()
        process.close()
    assert not faults, "\n".join(faults)
    return answers


def _live(
    pipe: Connection, rank: int, size: int, port: int, work: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        pipe.send((None, work(*arguments)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def ran(
    program: Path, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """How a Python program ended, and its output, in a folder and a process of its own."""
    with TemporaryDirectory() as place:
        logs = [Path(place, name) for name in ("out", "errors")]
        given = (program, arguments, folder, environment or {}, logs)
        process = _NURSERY.Process(target=_run, args=given)
        process.start()
        process.join(4 * PATIENCE_S)
        process.kill()  # in case it does not end
        process.join()
        out, errors = (log.read_text() for log in logs)
        code = process.exitcode
        assert code is not None
        return CompletedProcess([str(program), *arguments], code, out, errors)


def said_by(program: Path, *arguments: str, folder: Path) -> str:
    """The output of a program that runs in a folder, in a process of its own.

    Raises:
        AssertionError: it fails; the message contains its output.
    """
    done = ran(program, *arguments, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _run(
    program: Path,
    arguments: tuple[str, ...],
    folder: Path,
    environment: Mapping[str, str],
    logs: list[Path],
) -> None:
    for stream, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), stream)
    os.environ |= environment
    os.chdir(folder)
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
