"""The background thread that writes checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

__all__ = ["Writer"]


class Writer:
    """Runs one job at a time in the background; its error is kept until asked for."""

    def __init__(self) -> None:
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        device = torch.cuda.current_device() if initialized else -1  # of this thread; -1: none
        self._pool = ThreadPoolExecutor(
            1, "checkpoint-writer", initializer=torch.cuda.set_device, initargs=(device,)
        )
        self._job: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._job is not None and not self._job.done()

    def start(self, job: Callable[[], None]) -> None:
        """Start a job; call `finish` first, so that no error is lost."""
        if self._job is not None:
            raise RuntimeError("the result of the previous job was not collected")
        self._job = self._pool.submit(job)

    @property
    def pending(self) -> bool:
        """Whether the outcome of a job has not been collected yet."""
        return self._job is not None

    def finish(self) -> Exception | None:
        """Wait for the job, if any, and return its error."""
        job, self._job = self._job, None
        error = job.exception() if job is not None else None
        if error is not None and not isinstance(error, Exception):
            raise error
        return error

    def close(self) -> None:
        """Stop the thread; call `finish` first."""
        self._pool.shutdown()
