"""Systems without POSIX: every file can be imported, runs train and resume, locks work."""

from __future__ import annotations

import ctypes
import errno
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nexus_core.cli import memory
from nexus_core.device import Undo, random_state, set_random_state
from nexus_plugins._shared import locks

ROOT = Path(__file__).parents[1]
HIDDEN = """
import importlib, multiprocessing, multiprocessing.context as context, os, pkgutil, shutil, signal
import sys, warnings
import torch, numpy, pydantic, pluggy, safetensors.torch, yaml, tqdm, click, plotille  # vendors
import torch.utils.tensorboard, torch.utils.data, tokenizers, pyarrow.parquet
import torch.distributed.elastic.multiprocessing, torch.distributed.fsdp
from contextlib import suppress
vendors = "wandb mlflow trackio schedulefree bitsandbytes torchmetrics"
for name in (*vendors.split(), "datasets", "transformers", "peft", "optuna"):
    with suppress(ImportError):
        importlib.import_module(name)

class Hidden:
    names = {"fcntl", "resource", "termios", "pwd", "grp", "posix", "pty", "tty", "syslog"}
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Hidden())
for name in Hidden.names:
    sys.modules.pop(name, None)
POSIX = "fork forkpty register_at_fork getuid geteuid getpgid setpgid setsid killpg sysconf " \\
    "sysconf_names O_NOFOLLOW O_CLOEXEC O_NONBLOCK O_DIRECTORY mkfifo wait3 wait4 uname"
for name in POSIX.split():
    delattr(os, name)
shutil._use_fd_functions, shutil._rmtree_impl = False, shutil._rmtree_unsafe  # before, from 3.14
for name in "SIGKILL SIGSTOP SIGCONT SIGHUP SIGALRM".split():
    delattr(signal, name)
for name in "Fork ForkServer".split():
    delattr(context, f"{name}Context"), delattr(context, f"{name}Process")
multiprocessing.get_all_start_methods = lambda: ["spawn"]
from types import SimpleNamespace
sys.modules["msvcrt"] = SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)
"""
IMPORTED = """
import benchmarks, nexus_core, nexus_plugins, nexus_plugins_contrib
seen = 0
for package in (nexus_core, nexus_plugins, nexus_plugins_contrib, benchmarks):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.endswith("__main__"):
            continue
        print("importing", found.name)
        try:
            importlib.import_module(found.name)
        except nexus_core.ConfigError as error:  # its vendor's package is not installed
            if str(error).split()[5].rstrip(":") in sys.modules:
                raise
        except ModuleNotFoundError as error:  # a part of a plugin whose vendor is not installed
            if (error.name or "").partition(".")[0] in {*Hidden.names, *sys.modules}:
                raise
        seen += 1
print("imported", seen)
"""
TRAINED = """
from nexus_core.cli.run import main
def run(*arguments):
    try:
        main(list(arguments), standalone_mode=False)
    except SystemExit as error:
        return error.code
    return 0
settings = ["model_nexus.d_model=16", "model_nexus.ssm_head_dim=16", "model_nexus.ssm_n_layers=1",
            f"data_text.train={sys.argv[1]}", "data_text.seq_len=32", "data_text.batch_size=2",
            "optim_adamw.lr=1e-3", "log_every=2 steps", "checkpoint.every=2 steps"]
sets = [part for setting in settings for part in ("--set", setting)]
plugins = "data_text,model_nexus,loss_lm,optim_adamw,checkpoint,throughput,diagnose,jsonl"
assert run("--plugins", plugins, *sets, "--set", "until=4 steps", "--out", "run") == 0
assert run("run/config.yaml", "--resume", "run", "--set", "until=6 steps") == 0
assert run("--plugins", plugins, *sets, "--set", "until=4 steps", "--dry-run") == 0
print("verified", run("verify-resume", "run/config.yaml"))
"""


@pytest.mark.slow
def test_every_file_imports_and_a_run_is_resumed_without_posix(tmp_path: Path) -> None:
    """Fails if importing a module, or a run, needs fcntl, resource or fork."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(99)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDDEN + IMPORTED + TRAINED, "text.txt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'plugins'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "importing benchmarks.mutations" in done.stdout
    assert int(done.stdout.partition("imported ")[2].split()[0]) > 150
    assert "verified 2" in done.stdout, done.stdout[-500:]
    assert "forking, which this system lacks" in done.stderr
    assert (tmp_path / "run/summary.json").exists() or (tmp_path / "run/checkpoints").exists()


class Msvcrt:
    """The Windows lock: of one byte of a file, exclusive between handles."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}
        self.refusals = 0

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if self.held.setdefault(place, descriptor) != descriptor:
            self.refusals += 1
            if self.refusals == 3:  # its holder has exited by then
                self.held.clear()
            raise PermissionError(errno.EACCES, "Permission denied")


def test_a_lock_of_windows_keeps_others_out_and_the_file_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    msvcrt = Msvcrt()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr(locks, "_RETRY_S", 0)
    path = tmp_path / "run.lock"
    path.write_text("whose it is")
    with path.open("r+") as one, path.open("r+") as other:
        locks.lock(one, wait=False)
        ((_, byte),) = msvcrt.held
        assert byte > 2**20, "what the file says can be read"
        assert one.read() == "whose it is", "the place in the file is as it was"
        with pytest.raises(BlockingIOError):
            locks.lock(other, wait=False)
        locks.lock(other, wait=True)
        assert msvcrt.refusals == 3


def test_memory_is_told_by_posix_and_by_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows the numbers come from the kernel, whose two functions are faked here."""
    assert 2**24 < memory.peak_resident() < memory.machine_memory()

    def process(handle: Any, answer: Any, size: int) -> int:
        assert (handle.value, size) == (7, ctypes.sizeof(answer._obj))
        answer._obj.peak = 123
        return 1

    def machine(answer: Any) -> int:
        assert answer._obj.size == ctypes.sizeof(answer._obj) == 64
        answer._obj.total = 456
        return 1

    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sysconf_names")
    assert (memory.peak_resident(), memory.machine_memory()) == (0, 0), "not told is 0"

    class Handle:
        restype: Any = None

        def __call__(self) -> int:
            return 7

    kernel = SimpleNamespace(
        GetCurrentProcess=Handle(), K32GetProcessMemoryInfo=process, GlobalMemoryStatusEx=machine
    )
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert (memory.peak_resident(), memory.machine_memory()) == (123, 456)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_generators_of_any_accelerator_are_saved_and_put_back(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a kind of device is ignored, or its module is called with missing functions."""
    module = torch.get_device_module(kind)
    inspect.signature(module.get_rng_state).bind(1)
    inspect.signature(module.set_rng_state).bind(torch.zeros(1), 1)
    states = [torch.tensor([number], dtype=torch.uint8) for number in range(2)]

    def put(state: torch.Tensor, device: int) -> None:
        states[device] = state

    monkeypatch.setattr(module, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(module, "set_rng_state", put)
    accelerator = torch.accelerator
    monkeypatch.setattr(accelerator, "current_accelerator", lambda **_: torch.device(kind))
    monkeypatch.setattr(accelerator, "device_count", lambda: 2)
    saved, undo = random_state(), Undo(torch.nn.Linear(1, 1))
    for put_back in (lambda: set_random_state(saved), undo.put_back):
        states[:] = [torch.tensor([9], dtype=torch.uint8)] * 2
        put_back()
        assert [state.item() for state in states] == [0, 1]
    assert saved["accelerator"] == kind
    assert torch.amp.is_autocast_available(kind)
