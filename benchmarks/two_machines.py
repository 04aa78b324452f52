"""Two simulated machines: do they train together, stop when the network is cut, and resume?

    sudo python -m benchmarks.two_machines [--steps 20] [--timeout 10] [--keep]

Two network namespaces, each with its own address, are connected by a virtual cable; torchrun runs
in each, and they find each other by its rendezvous. Three phases:

    1  the quickstart trains to its end on both, one process each
    2  a longer run; once it has saved, the cable is cut: each side must end with an error that
       names rank and event, within the timeout of `ddp` plus the seconds of an engine step
    3  the cable is restored, both are started again with --resume auto, and the run reaches its end

It needs root and the command `ip`; without them it says so and exits with 0 (skipped). It removes
everything it creates, namespaces and a folder in /tmp, at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SPACES = {"nexus-a": "10.77.0.1", "nexus-b": "10.77.0.2"}
CABLE = "nexus0"  # name of each side's end
PORT = 29511
PATIENCE_S = 240.0
LEAVE_S = 10.0
QUICKSTART = (
    "data_text.seq_len=64", "data_text.batch_size=4", "data_text.valid_limit=4096",
    "model_nexus.d_model=32", "model_nexus.ssm_n_layers=1", "model_nexus.ssm_head_dim=16",
    "log_every=1", "checkpoint.every=5 steps", "lr_cosine.warmup=2 steps",
)  # fmt: skip
Machines = dict[str, subprocess.Popen[str]]


def ip(*words: str) -> None:
    """Run the command `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def cabled() -> Iterator[None]:
    """Two namespaces connected by a cable, in a `with` block."""
    first, second = SPACES
    remove()
    try:
        for space in SPACES:
            ip("netns", "add", space)
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", CABLE, "netns", second)
        for space, address in SPACES.items():
            ip("-n", space, "addr", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", space, "link", "set", device, "up")
        yield
    finally:
        remove()


def remove() -> None:
    """Remove the namespaces, and the cable with them."""
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def start(out: Path, steps: int, timeout: float) -> Machines:
    """Start the launcher on both machines; each writes a log next to the run folder."""
    machines = {}
    for number, (space, address) in enumerate(SPACES.items()):
        log = out.with_name(f"{out.name}-{space}.log").open("a", encoding="utf-8")
        command = [
            "ip", "netns", "exec", space, sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "2", "--nproc-per-node", "1",
            "--local-addr", address, "--rdzv-backend", "c10d", "--rdzv-id", out.name,
            "--rdzv-conf", f"is_host={int(number == 0)}",
            "--rdzv-endpoint", f"{SPACES['nexus-a']}:{PORT}", "--monitor-interval", "0.5",
            "-m", "nexus_core.cli.run", "quickstart", "--plugins", "ddp,no:tensorboard",
            "--out", str(out), "--resume", "auto",
            *(word for key in QUICKSTART for word in ("--set", key)),
            "--set", f"until={steps} steps", "--set", f"ddp.timeout={timeout}",
        ]  # fmt: skip
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
        machines[space] = subprocess.Popen(
            command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        log.close()
    return machines


def end(machines: Machines) -> list[int]:
    """Wait for both launchers; returns their exit codes."""
    deadline = time.monotonic() + PATIENCE_S
    return [m.wait(max(1.0, deadline - time.monotonic())) for m in machines.values()]


def stop(machines: Machines) -> None:
    """End launchers whose processes have ended; alone, one waits minutes for the other's store."""
    for machine in machines.values():
        machine.terminate()
        try:
            machine.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            machine.kill()
            machine.wait()


def wait_for(happened: Callable[[], bool], what: str) -> float:
    """Wait until a condition holds; returns the seconds that took."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > PATIENCE_S:
            sys.exit(f"failed: waited {PATIENCE_S:.0f} s for {what}")
        time.sleep(0.1)
    return time.monotonic() - began


def summary(out: Path) -> dict[str, object]:
    """The run's summary; empty while it is running."""
    path = out / "summary.json"
    read: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return read


def said(out: Path, words: str) -> bool:
    """Whether the logs of both machines contain these words."""
    logs = [out.with_name(f"{out.name}-{space}.log") for space in SPACES]
    return all(words in log.read_text(encoding="utf-8", errors="replace") for log in logs)


def play(folder: Path, steps: int, timeout: float) -> None:
    """Run the three phases; exits with a message and code 1 if one fails."""
    first, second = folder / "whole", folder / "cut"
    codes = end(start(first, steps, timeout))
    expect(codes == [0, 0] and summary(first)["steps"] == steps, f"phase 1 ended with {codes}")
    print(f"1  two machines trained {steps} steps together")

    machines = start(second, 100 * steps, timeout)
    wait_for(lambda: any((second / "checkpoints").glob("step-*")), "the first checkpoint")
    ip("-n", "nexus-b", "link", "set", CABLE, "down")
    try:
        seconds = wait_for(lambda: said(second, "of 2, in "), "an end")
    finally:
        stop(machines)
    expect(seconds < timeout + 10, f"phase 2 took {seconds:.0f} s")
    print(f"2  without the cable both ended after {seconds:.1f} s (ddp.timeout={timeout:g})")

    ip("-n", "nexus-b", "link", "set", CABLE, "up")
    reached = max(int(p.name[5:]) for p in (second / "checkpoints").glob("step-*"))
    codes = end(start(second, reached + steps, timeout))
    state = summary(second)
    good = codes == [0, 0] and (state["status"], state["steps"]) == ("finished", reached + steps)
    expect(good, f"phase 3 ended with {codes}: {state}")
    print(f"3  with the cable back, the run continued from step {reached} to its end")


def expect(holds: bool, otherwise: str) -> None:
    """Exit with a message if a condition does not hold."""
    if not holds:
        sys.exit(f"failed: {otherwise}")


def main() -> None:
    """Run the phases, or say why not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_machines")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=10.0, help="timeout of ddp in seconds")
    parser.add_argument("--keep", action="store_true", help="keep the folder with runs and logs")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        print("skipped: network namespaces need root and the command ip (iproute2)")
        return
    folder = Path(tempfile.mkdtemp(prefix="nexus-two-machines-"))
    try:
        with cabled():
            play(folder, options.steps, options.timeout)
    finally:
        if options.keep:
            print(f"runs and logs: {folder}")
        else:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
