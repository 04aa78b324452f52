"""Find how many rows fit into memory: by trying on CUDA, by measuring on Linux."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

from nexus_core.errors import RunError, hint_add

__all__ = ["forget_peak", "free_memory", "largest_measured", "largest_tried", "peak_memory"]

Attempt = Callable[[int], None]
"""Runs forward and backward over a number of rows, without side effects."""

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def largest_tried(rows: int, attempt: Attempt, forget: Callable[[], None]) -> int:
    """Halve the rows until an attempt does not run out of memory.

    Args:
        rows: number of rows to start with.
        attempt: raises `torch.OutOfMemoryError` if that many rows do not fit.
        forget: frees memory after a failed attempt.

    Raises:
        RunError: one row does not fit.
    """
    while True:
        try:
            attempt(rows)
        except torch.OutOfMemoryError as error:
            if rows == 1:
                raise RunError(
                    "auto_accumulate: not even one row fits into memory; use shorter rows, a "
                    "smaller model, or ",
                    hint_add("recompute"),
                ) from error
        else:
            return rows
        forget()  # outside the handler, which references the failed attempt's tensors
        rows = -(-rows // 2)


def largest_measured(rows: int, peak: Callable[[int], int], room: int) -> int:
    """Double the rows, starting with one, while the next peak is certain to fit in `room`.

    The peak of n rows is at most linear in n, so twice the rows take at most twice the peak: no
    attempt exceeds the available memory.

    Args:
        rows: maximum number of rows.
        peak: peak bytes of all attempts with up to this many rows.
        room: available bytes.

    Raises:
        RunError: one row does not fit.
    """
    fits, taken = 1, peak(1)
    if taken > room:
        raise RunError(
            f"auto_accumulate: one row takes {taken / 2**20:,.0f} MiB, but only "
            f"{max(room, 0) / 2**20:,.0f} MiB are free; use shorter rows, or ",
            hint_add("recompute"),
        )
    while fits < rows:
        more = min(2 * fits, rows)
        if taken * more / fits > room:
            break
        taken = peak(more)
        if taken > room:
            break
        fits = more
    return fits


def forget_peak() -> bool:
    """Reset the peak memory of this process; False if the system does not support it.

    First returns garbage and memory cached by the C library to the system, as they would hide what
    comes next.
    """
    if not _RESET.exists():
        return False
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Peak resident bytes of this process since `forget_peak`."""
    return int(_found(r"VmHWM:\s+(\d+)", _STATUS)) * 1024


def free_memory() -> int:
    """Bytes still available to this process: on the machine, and in its control group."""
    free = int(_found(r"MemAvailable:\s+(\d+)", _MEMINFO)) * 1024
    limit = _LIMIT.read_text().strip() if _LIMIT.exists() else "max"
    return free if limit == "max" else min(free, int(limit) - int(_USED.read_text()))


def _found(pattern: str, path: Path) -> str:
    match = re.search(pattern, path.read_text())
    assert match is not None, f"{path} has no {pattern}"
    return match[1]
