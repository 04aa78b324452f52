"""Start runs under torchrun, and find their processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

PATIENCE_S = 150.0
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d",
    "--rdzv-endpoint", "localhost:0", "--monitor-interval", "0.2",
)  # fmt: skip
NEXUS_RUN = ("-m", "nexus_core.cli.run")


def write_run(folder: Path, **changes: object) -> None:
    """Write a small corpus and `tiny.yaml`, a config for it, to a folder."""
    rows = "".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600))
    (folder / "corpus.txt").write_text(rows)
    plugins: dict[str, object] = {
        "data_text": {"train": "corpus.txt", "seq_len": 32, "batch_size": 8},
        "model_nexus": {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16, "dropout": 0.1},
        "loss_lm": {}, "optim_adamw": {"lr": 1e-3}, "guard": {}, "clip": {}, "ddp": {"timeout": 60},
        "checkpoint": {"every": "5 steps"}, "jsonl": {}, "console": {},
    }  # fmt: skip
    config = {"until": "20 steps", "seed": 1, "log_every": "1 steps", "plugins": plugins, **changes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def start(
    folder: Path, processes: int, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the launcher in a folder; its options precede the program."""
    return subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", str(processes), *arguments],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def process_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The id of the process with this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (
                parent == launcher.pid
                and f"\0RANK={rank}\0".encode() in b"\0" + (path / "environ").read_bytes()
            ):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"the launcher has no process of rank {rank}")


def wait_for(happened: Callable[[], bool], launcher: subprocess.Popen[str]) -> None:
    """Wait until a condition holds while the run is alive."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
