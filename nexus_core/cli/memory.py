"""Memory of this process and this machine, as reported by the operating system."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

__all__ = ["machine_memory", "peak_resident"]

_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere


def peak_resident() -> int:
    """Peak resident memory of this process in bytes; 0 if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return int(_ask_windows("K32GetProcessMemoryInfo", _ProcessMemory()).peak)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


def machine_memory() -> int:
    """Memory of this machine in bytes; 0 if unknown."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(_ask_windows("GlobalMemoryStatusEx", _MachineMemory()).total)


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 7),
    ]


class _MachineMemory(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 6),
    ]


def _ask_windows(function: str, answer: Any) -> Any:
    """Call a Windows function that fills in `answer`; it stays zero on other systems."""
    answer.size = ctypes.sizeof(answer)
    kernel = getattr(getattr(ctypes, "windll", None), "kernel32", None)
    if kernel is not None and isinstance(answer, _ProcessMemory):
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        getattr(kernel, function)(process, ctypes.byref(answer), answer.size)
    elif kernel is not None:
        getattr(kernel, function)(ctypes.byref(answer))
    return answer
