"""The reasoner by itself on multi-hop questions, compared with a plain MLP of its size.

    python -m benchmarks.reasoner [--seeds 3]

A question is a table of six places (where each leads to), a start and a number of hops, as one
vector; the answer is where they end. Each row has its own table, so answers cannot be memorized.
Both are trained on 1 to 3 hops, for the same CPU time, and tested on held-out questions of 1 to 3
hops, and of 4, for which the reasoner takes a fourth step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_plugins.model_nexus.reasoning import Reasoner
from nexus_plugins.modules.answerer import Answerer
from nexus_plugins.modules.puzzles import hops

PLACES, MOST, STEPS, ROWS, LR = 6, 3, 1000, 256, 3e-3
Questions = tuple[Tensor, Tensor]


def questions(generator: torch.Generator, rows: int, exactly: int | None = None) -> Questions:
    """Questions of up to `MOST` hops, or of the given number, and their answers."""
    made = hops(generator, rows, 1, PLACES, exactly or MOST, exactly or 1)
    return made["question"][:, 0], made["labels"][:, 0]


def train(model: nn.Module, seed: int, seconds: float | None) -> float:
    """Train for `STEPS` steps, or for a given CPU time; returns the time used."""
    generator, begin = torch.Generator().manual_seed(seed + 1), time.process_time()
    optimizer, done = torch.optim.AdamW(model.parameters(), lr=LR), 0.0
    step = 0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 50, 2 - 2 * done)
        asked, places = questions(generator, ROWS)
        optimizer.zero_grad()
        F.cross_entropy(model(asked), places).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        done = step / STEPS if seconds is None else (time.process_time() - begin) / seconds
    return time.process_time() - begin


@torch.no_grad()
def nats(model: nn.Module, asked: Questions) -> float:
    """The cross-entropy of the answers."""
    return F.cross_entropy(model(asked[0]), asked[1]).item()


def compare(seed: int) -> dict[str, float]:
    """The nats of both on questions of known depth and one hop further."""
    held_out = torch.Generator().manual_seed(10**6 + seed)
    known, further = questions(held_out, 4000), questions(held_out, 4000, MOST + 1)
    torch.manual_seed(seed)
    size = PLACES * PLACES + PLACES + 1
    reasoner, mlp = Answerer("reason", size, PLACES), Answerer("mlp", size, PLACES)
    train(mlp, seed, train(reasoner, seed, None))
    found = {"known, reasoner": nats(reasoner, known), "known, MLP": nats(mlp, known)}
    found |= {"further, MLP": nats(mlp, further), "further, 3 steps": nats(reasoner, further)}
    assert isinstance(reasoner.thinker, Reasoner)
    reasoner.thinker.steps += 1
    return {**found, "further, 4 steps": nats(reasoner, further)}


def main() -> None:
    """Print the mean and the spread over seeds."""
    parser = argparse.ArgumentParser(prog="benchmarks.reasoner", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=3)
    runs = [compare(seed) for seed in range(parser.parse_args().seeds)]
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name}: {statistics.mean(values):.3f} ± {spread:.3f} nats")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
