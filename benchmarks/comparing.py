"""How good `nexus-run compare` is: its false alarms, and the runs that pairing saves.

    python -m benchmarks.comparing [--pairs 200] [--jobs 2] [--json PATH]

A small network with dropout learns handwritten digits for 60 steps with the engine; its result is
the cross-entropy on 597 held-out digits. The seed determines weights, order of rows and dropout.

A/A: 200 comparisons without a change, of 8 pairs each, checked after every pair: how often does the
interval exclude zero at some point? Once with runs of different seeds, and once with pairs in which
only the variant draws one extra random number before training, which changes its dropout. Twenty
pairs of equal settings must be bitwise equal.

Ten changes: their effect is estimated from all pairs (200). The pairs are then taken in 200 random
orders, one at a time until the interval excludes zero: paired by seed, and with shuffled seeds,
which is how runs are usually compared. Each row has the median number of pairs for both.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nexus_core import Engine
from nexus_core.cli.compare.confidence import estimate, radius
from nexus_core.plan import load

LOOKS = 8  # pairs of an A/A comparison
COMPARISONS = 200
EQUAL = 20


@dataclass(frozen=True)
class Setting:
    """One net and how it is trained."""

    lr: float = 3e-3
    width: int = 48
    dropout: float = 0.2
    decay: float = 0.01
    beta2: float = 0.99
    batch: int = 32
    smoothing: float = 0.0
    clip: float = math.inf
    gelu: bool = False
    warmup: int = 0
    extra_draws: int = 0


BASE = Setting()
ECHO = Setting(extra_draws=1)
CHANGES = {
    "learning rate x 1.05": Setting(lr=3.15e-3),
    "learning rate x 0.95": Setting(lr=2.85e-3),
    "dropout 0.2 to 0.25": Setting(dropout=0.25),
    "no dropout": Setting(dropout=0.0),
    "weight decay 0.01 to 0.5": Setting(decay=0.5),
    "beta2 0.99 to 0.97": Setting(beta2=0.97),
    "label smoothing 0.02": Setting(smoothing=0.02),
    "gradients clipped to norm 0.3": Setting(clip=0.3),
    "GELU for ReLU": Setting(gelu=True),
    "warm-up of 5 steps": Setting(warmup=5),
}


def digits() -> tuple[Tensor, Tensor]:
    """Pixels (1797, 64) between 0 and 1, and their digits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)


def result(order: tuple[Setting, int, int]) -> float:
    """Train one net, given its setting, seed and steps; returns its held-out cross-entropy."""
    setting, seed, steps = order
    torch.set_num_threads(1)
    pixels, labels = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, setting.width),
        nn.GELU() if setting.gelu else nn.ReLU(),
        nn.Dropout(setting.dropout),
        nn.Linear(setting.width, 10),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), setting.lr, (0.9, setting.beta2), weight_decay=setting.decay
    )
    rows = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(1200, generator=rows)[: setting.batch] for _ in range(steps)]
    batches = [(pixels[rows], labels[rows]) for rows in chosen]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(
            model(batch[0]), batch[1], label_smoothing=setting.smoothing
        )

    clip = [load("clip")(max_norm=setting.clip)] if setting.clip < math.inf else []
    engine = Engine(
        model, optimizer, loss=loss, plugins=clip, seed=seed, log_every="1000 steps", device="cpu"
    )
    torch.rand(setting.extra_draws)
    for state in engine.steps(batches, until=f"{steps} steps"):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * min(1.0, (state.step + 1) / (setting.warmup + 1))
    model.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(pixels[1200:]), labels[1200:]))


def first_told(differences: Sequence[float]) -> int | None:
    """The number of differences after which the interval first excludes zero; None: never."""
    values = np.asarray(differences)
    counts = np.arange(1, len(values) + 1)
    means = values.cumsum() / counts
    squares = np.maximum((values**2).cumsum() - counts * means**2, 0.0)
    spreads = np.sqrt(squares / np.maximum(counts - 1, 1))
    widths = np.array([half_width(int(n)) for n in counts])
    finite = np.isfinite(widths)
    told = finite & (np.abs(means) > np.where(finite, widths, 0.0) * spreads)
    return int(told.argmax()) + 1 if told.any() else None


@cache
def half_width(n: int) -> float:
    """Half the width of the 95% interval of `compare`, in standard deviations."""
    return radius(n, 0.95)


def false_alarms(one: Sequence[float], other: Sequence[float]) -> int:
    """The number of A/A comparisons, of `LOOKS` pairs each, with a false alarm at some look."""
    differences = [b - a for a, b in zip(one, other, strict=True)]
    parts = [differences[at : at + LOOKS] for at in range(0, len(differences), LOOKS)]
    return sum(first_told(part) is not None for part in parts)


def needed(base: Sequence[float], variant: Sequence[float], *, by_seed: bool) -> list[int]:
    """The pairs that each of 200 random orders needs; one more than available: not enough."""
    chance, found = random.Random(0), []
    for _ in range(COMPARISONS):
        ours = chance.sample(range(len(base)), len(base))
        theirs = ours if by_seed else chance.sample(ours, len(ours))
        differences = [variant[b] - base[a] for a, b in zip(ours, theirs, strict=True)]
        found.append(first_told(differences) or len(base) + 1)
    return found


def table(base: Sequence[float], variants: dict[str, list[float]]) -> Iterator[str]:
    """The ten changes, as Markdown."""
    yield (
        "| change | effect on the cross-entropy | spread, paired | unpaired | pairs needed "
        "| unpaired | ratio |"
    )
    yield "|---|---|---|---|---|---|---|"
    times, most = [], len(base)
    spread = math.sqrt(2) * statistics.stdev(base)
    for name, variant in variants.items():
        found = estimate([b - a for a, b in zip(base, variant, strict=True)])
        paired = statistics.median(needed(base, variant, by_seed=True))
        alone = statistics.median(needed(base, variant, by_seed=False))
        times.append(alone / paired)
        ours, theirs = (f"over {most}" if n > most else f"{n:.0f}" for n in (paired, alone))
        more = "over " if alone > most else ""
        yield (
            f"| {name} | {found.mean:+.4f} ± {found.mean - found.low:.4f} | {found.spread:.4f} "
            f"| {spread:.4f} | {ours} | {theirs} | {more}{times[-1]:.1f} |"
        )
    yield f"\nMedian ratio over the changes: {statistics.median(times):.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Train all runs, and print the results."""
    parser = argparse.ArgumentParser(prog="benchmarks.comparing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=200, help="pairs per change")
    parser.add_argument("--steps", type=int, default=60, help="steps per run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs in parallel")
    parser.add_argument("--json", type=Path, help="save the results here, and resume from them")
    options = parser.parse_args(arguments)
    many = max(LOOKS * COMPARISONS, options.pairs)
    done = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:

        def trained(name: str, setting: Setting, count: int) -> list[float]:
            found: list[float] = done.setdefault(name, [])
            orders = [(setting, seed, options.steps) for seed in range(len(found), count)]
            found += pool.map(result, orders, chunksize=10)
            if options.json:  # each time, so that an interrupted benchmark keeps its results
                options.json.write_text(json.dumps(done) + "\n", encoding="utf-8")
            return found[:count]

        changed = {name: trained(name, each, options.pairs) for name, each in CHANGES.items()}
        print("\n".join(table(trained("base", BASE, options.pairs), changed)), flush=True)
        base, echo = trained("base", BASE, many), trained("one more draw", ECHO, many)
        equal = trained("base again", BASE, EQUAL)
        shuffled = random.Random(0).sample(echo, len(echo))
        unequal = sum(a != b for a, b in zip(base, equal, strict=False))
        print(f"equal settings: {unequal} of {EQUAL} pairs differ")
        for name, other in (("another dropout", echo), ("other seeds", shuffled)):
            count = false_alarms(base[: LOOKS * COMPARISONS], other[: LOOKS * COMPARISONS])
            print(f"A/A, {name}: {count} of {COMPARISONS} reported a difference", flush=True)


if __name__ == "__main__":
    main()
