"""The thread that writes while the loop continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

__all__ = ["Writer"]


class Writer:
    """Runs one job at a time beside the loop; its error waits until somebody asks for it."""

    def __init__(self) -> None:
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        device = torch.cuda.current_device() if initialized else -1  # of this thread; -1: none
        self._pool = ThreadPoolExecutor(
            1, "checkpoint-writer", initializer=torch.cuda.set_device, initargs=(device,)
        )
        self._job: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is being done."""
        return self._job is not None and not self._job.done()

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job; call `finish` before, so that no error is lost."""
        if self._job is not None:
            raise RuntimeError("the result of the previous job was not collected")
        self._job = self._pool.submit(job)

    @property
    def pending(self) -> bool:
        """Whether there is a job whose outcome has not been taken."""
        return self._job is not None

    def finish(self) -> Exception | None:
        """Wait for the job, if there is one; returns the error it ended with."""
        job, self._job = self._job, None
        error = job.exception() if job is not None else None
        if error is not None and not isinstance(error, Exception):
            raise error
        return error

    def close(self) -> None:
        """End the thread; call `finish` before."""
        self._pool.shutdown()
