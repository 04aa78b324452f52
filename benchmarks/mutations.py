"""Change checkpoints in thousands of ways, sign them again, and resume from each of them.

    python -m benchmarks.mutations [--mutations 10000] [--seed 0] [--first 0]

A modified file with matching hashes is what an attacker would write. Each mutation is resumed from
and trained for a step: a `CheckpointError` or a successful step is right; another error, a signal,
or memory beyond a bound is a failure. Runs have fused AdamW, AdamW with three moments, fused SGD
with momentum, or NAdam, and plugins with all kinds of state. Mutations run in processes of a few
hundred each, so that a crash is detected and the others still run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer

from nexus_core import CheckpointError, Engine
from nexus_core.cli.memory import peak_resident
from nexus_plugins.checkpoint import CheckpointPlugin, lock
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.early_stop import EarlyStopPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.guard import GuardPlugin

__all__ = ["Outcome", "mutate", "try_mutations"]

BATCH = 250
"""Mutations per process."""
MEMORY_KB = 1 << 20
"""Memory limit of a process beyond its initial memory."""
Verdict = Literal["refused", "worked", "failed"]

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=1e-3, fused=True),
    "amsgrad": lambda p: AdamW(p, lr=1e-3, amsgrad=True),
    "sgd": lambda p: SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "nadam": lambda p: NAdam(p, lr=1e-3),
}
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 10**18, 1e308, -1e308, 1e-320, 0.5, "", "abc", "nan", "5", [],
    {}, [1, 2], [[[]]], {"a": 1}, {"$float": "nan"}, {"$float": "inf"}, {"$float": "-inf"},
    {"$int": "0x1" + "0" * 40}, {"$int": "-0x1" + "0" * 300}, {"$int": "zz"}, {"$tuple": []},
    {"$tuple": [1, "a"]}, {"$tuple": [{"$float": "nan"}, 2]}, {"$dict": [[1, 2]]}, {"$dict": [1]},
    {"$dict": [[{"$tuple": [1]}, 2]]}, {"$ordered": [["a", 1]]}, {"$tensor": "nothing"},
    {"$eval": "exit()"}, "x" * 100_000, list(range(5000)),
)  # fmt: skip
SHAPES = ((), (0,), (1,), (2,), (3, 5), (1 << 20,), (7, 1), (4, 4, 4), (1, 1, 1, 1))
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


@dataclass
class Outcome:
    """The outcome of some mutations.

    Args:
        refused: number that ended with a `CheckpointError`.
        worked: number that trained for a step.
        failures: all others: the number of the mutation, and what happened.
        memory_kb: peak memory of a process beyond its initial memory.
    """

    refused: int = 0
    worked: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    memory_kb: int = 0


def try_mutations(count: int, folder: Path, seed: int = 0, first: int = 0) -> Outcome:
    """Try some mutations, starting with number `first`, in separate processes.

    Args:
        count: number of mutations.
        folder: folder in which the checkpoints are created.
        seed: seed of the mutations; each is determined by the seed and its number.
        first: number of the first one.
    """
    for name in OPTIMIZERS:
        if not (folder / name).exists():
            engine = _engine(name, folder / name)
            engine.fit(_batches(), until="3 steps", eval_data=_batches())
    outcome, number = Outcome(), first
    while number < first + count:
        number = _in_child(number, min(number + BATCH, first + count), folder, seed, outcome)
    return outcome


def _in_child(begin: int, end: int, folder: Path, seed: int, outcome: Outcome) -> int:
    """Try some mutations in a fork; returns the next number."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # it must never return into the parent's code
        code = 1
        try:
            os.close(read)
            with os.fdopen(write, "w", buffering=1) as pipe:
                _work(begin, end, folder, seed, pipe.write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    place = begin
    with os.fdopen(read) as pipe:
        for line in pipe:
            said = json.loads(line)
            place, verdict = said["number"], said["verdict"]
            if verdict == "failed":
                outcome.failures[place] = said["what"]
            elif verdict != "begun":
                setattr(outcome, verdict, getattr(outcome, verdict) + 1)
            outcome.memory_kb = max(outcome.memory_kb, said["memory_kb"])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        outcome.failures[place] = f"the process ended with {code}"
    return place + 1


def _work(begin: int, end: int, folder: Path, seed: int, say: Callable[[str], object]) -> None:
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # nobody pulls the plug
    lock.installed = cache(lock.installed)  # type: ignore[assignment]  # it does not change,
    told = cast(property, Distribution.metadata).fget  # nor does its metadata
    Distribution.metadata = property(cache(told))  # type: ignore[method-assign,assignment,arg-type]
    torch.set_num_threads(1)
    before = peak_resident()
    with tempfile.TemporaryDirectory(dir=folder) as room:
        for number in range(begin, end):
            report = {"number": number, "verdict": "begun", "what": "", "memory_kb": 0}
            say(json.dumps(report) + "\n")
            verdict, what = _one(number, folder, Path(room), seed)
            report |= {
                "verdict": verdict,
                "what": what,
                "memory_kb": (peak_resident() - before) // 1024,
            }
            say(json.dumps(report) + "\n")


def _one(number: int, folder: Path, room: Path, seed: int) -> tuple[Verdict, str]:
    """Mutate, resume, and train for a step."""
    source = random.Random(f"{seed} {number}")
    name = source.choice(list(OPTIMIZERS))
    original = (folder / name / "checkpoints" / "final").resolve()
    changed = room / original.name
    shutil.rmtree(changed, ignore_errors=True)
    shutil.copytree(original, changed)
    what = f"{name}: {mutate(changed, source)}"
    shutil.rmtree(room / "run", ignore_errors=True)
    engine = _engine(
        name, room / "run", resume_policy="force" if source.random() < 0.5 else "exact"
    )
    running = engine.steps(_batches(), until=f"{10**19} steps", eval_data=_batches())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.resume(str(changed))
            next(running)
    except CheckpointError:
        return "refused", what
    except Exception:
        return "failed", f"{what}\n{traceback.format_exc()[-1500:]}"
    finally:
        with suppress(Exception):
            running.close()
    return "worked", what


def _engine(name: str, out: Path, **settings: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 1))
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    plugins = [
        GuardPlugin(spike_threshold=50.0, spike_window=8),
        ClipPlugin(),
        EmaPlugin(),
        EarlyStopPlugin(patience=1000),
        CheckpointPlugin(every="1000 steps", **settings),
    ]
    return Engine(model, optimizer, loss=_loss, plugins=plugins, out=out, seed=1, log_every=1)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 2, 6, generator=generator) for _ in range(4)]


# -- one change


def mutate(folder: Path, source: random.Random) -> str:
    """Change a checkpoint at random and re-sign it; returns a description of the change."""
    kind = source.choice(("json", "json", "json", "optimizer", "group", "tensor", "tensor", "raw"))
    what = {
        "json": _mutate_json,
        "optimizer": _mutate_states,
        "group": _mutate_group,
        "tensor": _mutate_tensors,
        "raw": _mutate_bytes,
    }[kind](folder, source)
    resign(folder)
    return what


def resign(folder: Path) -> None:
    """Update the manifest of a changed checkpoint."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        raw = (folder / name).read_bytes()
        facts.update(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _mutate_json(folder: Path, source: random.Random) -> str:
    """Replace or remove one value of a document."""
    name = source.choice(("state.json", "state.json", "state.json", "lock.json"))
    document = json.loads((folder / name).read_text())
    holders = list(_holders(document, name))
    path, holder, key = source.choice(holders)
    what = _change(holder, key, source, [held[k] for _, held, k in source.choices(holders, k=4)])
    (folder / name).write_text(json.dumps(document))
    return f"{path} {what}"


def _mutate_states(folder: Path, source: random.Random) -> str:
    """Change one state of one parameter in the optimizer."""
    document = json.loads((folder / "state.json").read_text())
    states = document["optimizer"]["state"]["$dict"]
    number, state = source.choice(states)
    others = [value for _, other in states for value in other.values()]
    key = source.choice([*state, "new"])
    what = _change(state, key, source, others)
    (folder / "state.json").write_text(json.dumps(document))
    return f"optimizer.state.{number}.{key} {what}"


def _mutate_group(folder: Path, source: random.Random) -> str:
    """Change a setting of the optimizer's group, and sometimes also its record."""
    document = json.loads((folder / "state.json").read_text())
    group = document["optimizer"]["param_groups"][0]
    key = source.choice([*group, "new"])
    what = _change(group, key, source, list(group.values()))
    (folder / "state.json").write_text(json.dumps(document))
    return f"optimizer.param_groups.0.{key} {what}"


def _change(holder: Any, key: Any, source: random.Random, others: list[Any]) -> str:
    kind = source.randrange(5)
    if kind == 0 and (isinstance(holder, list) or key in holder):
        del holder[key]
        return "taken away"
    if kind == 1 and others:
        holder[key] = json.loads(json.dumps(source.choice(others)))
    elif kind == 2:
        value = source.uniform(-2, 2)
        holder[key] = source.choice((value, int(value * 1e6), source.getrandbits(63)))
    else:
        holder[key] = source.choice(ODD)
    return f"= {json.dumps(holder[key])[:80]}"


def _holders(tree: Any, path: str) -> Any:
    """Every value of a document: its path, its container, and its key there."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield f"{path}.{key}", tree, key
        if isinstance(value, dict) or (isinstance(value, list) and len(value) < 50):
            yield from _holders(value, f"{path}.{key}")


def _mutate_tensors(folder: Path, source: random.Random) -> str:
    """Replace a tensor by one of another shape or dtype, or with odd values."""
    name = source.choice(("model", "optimizer", "optimizer", "state")) + ".safetensors"
    raw = (folder / name).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__", {})
    key = source.choice(list(header))
    facts = header[key]
    begin, end = facts["data_offsets"]
    kind = source.randrange(4)
    if kind == 0:  # other bytes, the same shape
        size = end - begin
        pattern = source.choice((b"\xff", b"\x7f", b"\x00", b"\x80", source.randbytes(16)))
        new = (pattern * size)[:size]
    elif kind == 1 and len(facts["shape"]) > 1:  # other strides, as of a transposed tensor
        facts["shape"], new = facts["shape"][::-1], data[begin:end]
    else:
        dtype, shape = source.choice(DTYPES), source.choice((*SHAPES, tuple(facts["shape"])))
        new = bytes(torch.Size(shape).numel() * dtype.itemsize)
        facts.update(dtype=_NAMES[dtype], shape=list(shape))
    place, pieces = 0, []
    for other in sorted(header, key=lambda n: (header[n]["data_offsets"][0], n)):
        piece = new if other == key else data[slice(*header[other]["data_offsets"])]
        header[other]["data_offsets"] = [place, place + len(piece)]
        place += len(piece)
        pieces.append(piece)
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(pieces))
    return f"{name} {key}: {str(facts)[:100]} {new[:8].hex()}"


_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def _mutate_bytes(folder: Path, source: random.Random) -> str:
    """Change bytes, truncate a file, or replace it by another one."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    name = source.choice(names)
    raw = bytearray((folder / name).read_bytes())
    kind = source.randrange(5)
    if kind == 0:
        for _ in range(source.randrange(1, 30)):
            raw[source.randrange(len(raw))] = source.randrange(256)
    elif kind == 1:
        del raw[source.randrange(len(raw)) :]
    elif kind == 2:
        raw = bytearray((folder / source.choice(names)).read_bytes())
    elif kind == 3:
        digits = [i for i, byte in enumerate(raw[:4000]) if byte in b"0123456789"]
        for place in source.sample(digits, min(len(digits), 3)):
            raw[place] = source.choice(b"0123456789-e[")
    else:
        raw[:0] = source.choice((b"[" * 100_000, b'{"a":' * 50_000, b"\x00" * 9))
    (folder / name).write_bytes(raw)
    return f"{name}: bytes, kind {kind}"


def main() -> None:
    """Print the outcome; exit with 1 if a mutation failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nexus-mutations-") as folder:
        outcome = try_mutations(options.mutations, Path(folder), options.seed, options.first)
    for number, what in outcome.failures.items():
        print(f"mutation {number}: {what}")
    bounded = outcome.memory_kb <= MEMORY_KB
    print(
        f"{options.mutations} mutations in {time.perf_counter() - begin:.0f} s: {outcome.refused} "
        f"refused, {outcome.worked} trained on, {len(outcome.failures)} failed; at most "
        f"{outcome.memory_kb / 1024:.0f} MiB of memory beyond the start"
        + ("" if bounded else f", more than {MEMORY_KB / 1024:.0f}")
    )
    raise SystemExit(1 if outcome.failures or not bounded else 0)


if __name__ == "__main__":
    main()
