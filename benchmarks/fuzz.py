"""Check that damaged input always ends in an error meant for the user.

Each target reads inputs that were valid, of which one file has been modified, truncated, spliced or
replaced, each with its own seed. A target may return or raise a `NexusError`. Any other exception
is a failure, and so are a signal, a read of more than 20 seconds, and peak memory above twice the
bytes of the input plus 64 MiB (where the system lets a process reset its peak). Failing inputs are
kept.

    python -m benchmarks.fuzz --inputs 10000
    python -m benchmarks.fuzz --only parquet --inputs 500
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from benchmarks.fuzz_data import TARGETS as DATA
from benchmarks.fuzzing import Input, Target, damaged, write
from nexus_core.errors import NexusError

__all__ = ["TARGETS", "Outcome", "above_limit", "main", "read_once", "reset_peak"]

TARGETS: dict[str, Target] = {**DATA}

SECONDS = 20
CONSTANT = 64 << 20
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Outcome:
    """The outcome of a target's inputs."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    slowest_ms: float = 0.0
    most_mib: float = 0.0
    measured: bool = True
    faults: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Add the counts of another process."""
        self.inputs += other.inputs
        self.read += other.read
        self.refused += other.refused
        self.slowest_ms = max(self.slowest_ms, other.slowest_ms)
        self.most_mib = max(self.most_mib, other.most_mib)
        self.measured &= other.measured
        self.faults += other.faults


def main() -> None:
    """Run all targets, and print a table; exits with 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, help="inputs per target")
    parser.add_argument("--only", action="append", help="only this target; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-faults"), help="faulty inputs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, first, last = options.child
        _child(name, int(first), int(last), options.seed, options.keep)
        return
    unknown = set(options.only or ()) - TARGETS.keys()
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    outcomes = {}
    print(
        f"{'target':<34}{'inputs':>8}{'read':>8}{'refused':>9}{'faults':>8}{'slowest':>11}  memory"
    )
    for name in options.only or TARGETS:
        outcomes[name] = one = _feed(name, options.inputs, options.seed, options.keep)
        memory = f"{one.most_mib:+.0f} MiB" if one.measured else "not measured"
        print(
            f"{name:<34}{one.inputs:>8}{one.read:>8}{one.refused:>9}{len(one.faults):>8}"
            f"{one.slowest_ms:>8.0f} ms  {memory}",
            flush=True,
        )
        for fault, count in Counter(one.faults).most_common(5):
            print(f"    {count} x {fault}")
    if options.json:
        options.json.write_text(json.dumps({name: asdict(one) for name, one in outcomes.items()}))
    sys.exit(1 if any(one.faults for one in outcomes.values()) else 0)


def _feed(name: str, inputs: int, seed: int, keep: Path) -> Outcome:
    """Read all inputs in child processes; after one dies by a signal, another continues."""
    total, first = Outcome(), 0
    while first < inputs:
        arguments = ["--seed", str(seed), "--keep", str(keep), "--child", name]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz", *arguments, str(first), str(inputs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # panics of Rust code are printed there
            text=True,
            check=False,
        )
        lines = done.stdout.splitlines()
        reports = [json.loads(line) for line in lines]
        finished = next((one for one in reports if "inputs" in one), None)
        if finished is not None:
            total.add(Outcome(**finished))
            break
        at = reports[-1]["at"] if reports else first
        total.add(Outcome(at - first + 1, faults=[f"exit code {done.returncode} at input {at}"]))
        first = at + 1
    return total


def _child(name: str, first: int, last: int, seed: int, keep: Path) -> None:
    target, outcome = TARGETS[name], Outcome()
    seeds = target.seeds()
    for number in range(first, last):
        if number % 50 == 0 or number == first:
            print(json.dumps({"at": number}), flush=True)
        files = damaged(target, seeds, Random(f"{seed}/{name}/{number}"))
        fault = read_once(target, files, outcome)
        if fault is not None:
            outcome.faults.append(fault)
            write(files, keep / name.replace(" ", "-") / str(number))
    print(json.dumps(asdict(outcome)), flush=True)


def read_once(target: Target, files: Input, outcome: Outcome) -> str | None:
    """Read one input, and count it; returns the fault, or None."""
    place = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as folder:
        size = write(files, Path(folder))
        before, began = reset_peak(), time.perf_counter()
        fault = _read(target, Path(folder), outcome)
        outcome.slowest_ms = max(outcome.slowest_ms, 1000 * (time.perf_counter() - began))
        return fault or above_limit(before, size, outcome)


def _read(target: Target, folder: Path, outcome: Outcome) -> str | None:
    outcome.inputs += 1
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder)
        outcome.read += 1
    except NexusError:
        outcome.refused += 1
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"{type(error).__name__}: {str(error)[:90]} ({place})"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None


def above_limit(before: int | None, size: int, outcome: Outcome) -> str | None:
    """The fault if an input took more memory than allowed for its size; None: it did not.

    Args:
        before: what `reset_peak` returned.
        size: size of the input in bytes.
        outcome: records the peak.
    """
    peak = _status("VmHWM")
    if before is None or peak is None:
        outcome.measured = False
        return None
    grown = peak - before
    outcome.most_mib = max(outcome.most_mib, grown / 2**20)
    if grown > 2 * size + CONSTANT:
        return f"{grown / 2**20:.0f} MiB of memory for {size:,} bytes"
    return None


def reset_peak() -> int | None:
    """Reset the peak memory; None if the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"still reading after {SECONDS} seconds")


if __name__ == "__main__":
    main()
