"""Detect what a run leaves behind: in the process, in torch, on the model and the optimizer."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import torch
import torch.nn.modules.module as module_globals
import torch.optim.optimizer as optimizer_globals
from torch import nn
from torch.optim import Optimizer

from nexus_core.engine import Engine

__all__ = ["Traces", "changed", "of_engine", "of_process", "of_torch"]

Traces: TypeAlias = dict[str, Any]
"""Observed state, by a readable name."""

_FDS = Path("/proc/self/fd")
_HOOKS = tuple(key for key in vars(nn.Module()) if key.endswith(("_hooks", "_hooks_with_kwargs")))
_PATIENCE = 1.0  # seconds for a thread to end
_PATCHABLE = (torch, torch.nn.functional, torch.autograd, torch.utils.data)
_CLASSES = (torch.Tensor, nn.Module, Optimizer, torch.utils.data.DataLoader)


def changed(before: Traces, after: Traces) -> list[str]:
    """What is new or has changed."""
    new = [f"{what} is new: {_shown(after[what])}" for what in after.keys() - before.keys()]
    other = [
        f"{what} was {_shown(before[what])} and is {_shown(after[what])}"
        for what in after.keys() & before.keys()
        if before[what] is not after[what] and before[what] != after[what]
    ]
    return sorted(new + other)


def of_process(before: Traces | None = None) -> Traces:
    """Threads, child processes, open files, signal handlers and other state of the process.

    Args:
        before: earlier traces; threads that are not in them get a moment to end.
    """
    for name, thread in _threads().items():
        if before is not None and name not in before:
            thread.join(_PATIENCE)
    children = {
        f"child process {child.pid}": child.name for child in multiprocessing.active_children()
    }
    environment = {f"environment variable {key}": value for key, value in os.environ.items()}
    return {
        **{name: thread.name for name, thread in _threads().items()},
        **children,
        **_open_files(),
        **{
            f"handler of {s.name}": signal.getsignal(s) for s in signal.valid_signals() if _named(s)
        },
        **environment,
        "working folder": os.getcwd(),  # noqa: PTH109
        "sys.excepthook": sys.excepthook,
        "threading.excepthook": threading.excepthook,
        "sys.stdout": sys.stdout,
        "sys.stderr": sys.stderr,
        "warnings.showwarning": warnings.showwarning,
        "logging handlers": tuple(logging.root.handlers),
    }


def of_torch() -> Traces:
    """The process-wide settings of torch, its global hooks and its functions."""
    switches: dict[str, Callable[[], Any]] = {
        "default dtype": torch.get_default_dtype,
        "default device": torch.get_default_device,
        "number of threads": torch.get_num_threads,
        "grad mode": torch.is_grad_enabled,
        "anomaly mode": torch.is_anomaly_enabled,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
        "float32 matmul precision": torch.get_float32_matmul_precision,
        "autocast on the CPU": lambda: torch.is_autocast_enabled("cpu"),
        "autocast on CUDA": lambda: torch.is_autocast_enabled("cuda"),
        "TF32 in CUDA matrix products": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
        "cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
    }
    return {
        **{f"torch's {name}": read() for name, read in switches.items()},
        **{f"torch's {n}": len(hooks) for n, hooks in _global_hooks().items()},
        **_functions(),
    }


def of_engine(engine: Engine) -> Traces:
    """Hooks and replaced methods on the modules, parameters and optimizer of an engine."""
    found: Traces = {}
    for name, module in engine.model.named_modules():
        where = f"module '{name}'" if name else "the model"
        found[f"class of {where}"] = type(module)
        found |= {
            f"{key} of {where}": len(vars(module)[key]) for key in _HOOKS if key in vars(module)
        }
        found |= _methods(module, where)
    for name, parameter in engine.model.named_parameters():
        found[f"parameter '{name}'"] = (parameter.dtype, parameter.requires_grad)
        found[f"hooks of parameter '{name}'"] = len(parameter._backward_hooks or ())
        after = getattr(parameter, "_post_accumulate_grad_hooks", None)
        found[f"hooks after the gradient of '{name}'"] = len(after or ())
    found["class of the optimizer"] = type(engine.optimizer)
    for key in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        found[f"{key} of the optimizer"] = len(vars(engine.optimizer)[key])
    return found | _methods(engine.optimizer, "the optimizer")


def _methods(owner: object, where: str) -> Traces:
    """Methods set on an object that shadow those of its class."""
    own = {
        k: v for k, v in vars(owner).items() if callable(v) and callable(getattr(type(owner), k, 0))
    }
    compiled = vars(owner).get("_compiled_call_impl")
    return {f"{key} on {where}": value for key, value in own.items()} | (
        {f"compiled code of {where}": compiled} if compiled is not None else {}
    )


def _threads() -> dict[str, threading.Thread]:
    return {f"thread '{thread.name}' ({thread.ident})": thread for thread in threading.enumerate()}


def _open_files() -> Traces:
    """The target of each open file descriptor, where the system provides it."""
    found: Traces = {}
    for entry in _FDS.iterdir() if _FDS.is_dir() else ():
        try:
            found[f"open file {entry.name}"] = str(entry.readlink())
        except FileNotFoundError:  # the descriptor used to list this folder
            continue
    return found


def _named(number: int) -> bool:
    return isinstance(number, signal.Signals)


def _global_hooks() -> Mapping[str, Any]:
    owners = (module_globals, optimizer_globals)
    return {
        name.lstrip("_"): value
        for owner in owners
        for name, value in vars(owner).items()
        if name.startswith("_global_") and name.endswith("_hooks")
    }


def _functions() -> Traces:
    """The functions of torch that plugins might replace."""
    kinds = (FunctionType, BuiltinFunctionType)
    modules = {
        f"{owner.__name__}.{name}": value
        for owner in _PATCHABLE
        for name, value in vars(owner).items()
        if type(value) in kinds
    }
    methods = {
        f"{owner.__name__}.{name}": value
        for owner in _CLASSES
        for name, value in vars(owner).items()
        if callable(value)
    }
    return {**modules, **methods}


def _shown(value: object) -> str:
    return f"{value!r:.100}"
