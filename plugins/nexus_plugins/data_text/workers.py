"""Worker processes that encode work units, each fed one line of JSON at a time.

They are child processes that run this module, not forks: they share no locks or threads with a
training process, never re-run its main module, and exit when it does, however it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from nexus_core.errors import DataError
from nexus_plugins.data_text.formats import Slice

if TYPE_CHECKING:
    from nexus_plugins.data_text.prepare import Job

__all__ = ["Workers"]

Task = tuple[int, Sequence[Slice]]


class Workers:
    """A pool of worker processes; with one worker, the work is done in this process.

    Args:
        count: processes.
        job: what to do with each unit.
        parts: the folder for results.
    """

    def __init__(self, count: int, job: Job, parts: Path) -> None:
        self._job = job
        self._parts = parts
        self._idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        self._processes = [self._start() for _ in range(count if count > 1 else 0)]
        self._threads = ThreadPoolExecutor(max(1, count))

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C only reaches the parent, which ends its children
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        self._send(process, {"job": asdict(self._job), "parts": str(self._parts)})
        self._idle.put(process)
        return process

    @staticmethod
    def _send(process: subprocess.Popen[str], message: object) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()

    def run(self, tasks: Sequence[Task]) -> Iterator[Path]:
        """The results in the order of the tasks.

        Raises:
            DataError: a unit cannot be encoded, or a worker has died.
        """
        if self._processes:
            yield from self._threads.map(self._ask, tasks)
            return
        from nexus_plugins.data_text.prepare import encode_unit

        for number, unit in tasks:
            yield encode_unit(number, unit, self._job, self._parts)

    def _ask(self, task: Task) -> Path:
        process = self._idle.get()
        number, unit = task
        try:
            self._send(process, {"number": number, "unit": [asdict(part) for part in unit]})
            assert process.stdout is not None
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        self._idle.put(process)
        if not line:
            raise DataError(
                f"a worker died at {unit[0].path} (exit code {process.wait()}; out of memory?); "
                "run the same command again to continue, perhaps with fewer --workers"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise DataError(answer["error"])
        return Path(answer["path"])

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()


def main() -> None:
    """Answer tasks until the parent closes the pipe or is gone."""
    from nexus_plugins._shared.cache import writing
    from nexus_plugins.data_text.prepare import Job, encode_unit

    first = json.loads(sys.stdin.readline())
    job, parts = Job(**first["job"]), Path(first["parts"])
    for line in sys.stdin:
        task = json.loads(line)
        unit = [Slice(**part) for part in task["unit"]]
        try:
            with writing(parts.parent):
                path = encode_unit(task["number"], unit, job, parts)
            answer = {"path": str(path)}
        except DataError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
