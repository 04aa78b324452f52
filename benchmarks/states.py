"""State tracking by layer type: parity, and products in the group S3.

    python -m benchmarks.states [--seeds 3] [--quick] [--json PATH]

After each token the model outputs the state: whether the number of ones so far is odd, or which of
the six permutations of three elements is the product so far. Sums with decays between 0 and 1 can
do neither for arbitrary lengths (Grazzi et al. 2025); windows see too little. Each model has one
layer without a convolution, which would offer shortcuts (a window: with an MLP), and is trained on
rows of 32 tokens. Reported is the accuracy at positions 33 to 64 of rows twice as long. `--quick`
uses one seed, with rows of 8 and 16 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_plugins.model_nexus import NEXUSCore

MODELS: Mapping[str, Mapping[str, Any]] = {
    "ssm": {"layers": ["ssm"]},
    "window": {"layers": ["window", "mlp"], "ssm_n_layers": 2, "window": 16, "window_head_dim": 8},
    "delta": {"layers": ["delta"]},
    "delta, 3 corrections": {"layers": ["delta"], "delta_products": 3},
}
PERMUTATIONS = tuple(itertools.permutations(range(3)))


def parity(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits `(rows, length)`, and whether the number of ones so far is odd."""
    bits = torch.randint(2, (rows, length), generator=generator)
    return bits, bits.cumsum(1) % 2


def s3(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Permutations `(rows, length)` by index, and the index of their product so far."""
    table = torch.tensor(
        [[PERMUTATIONS.index(tuple(a[i] for i in b)) for b in PERMUTATIONS] for a in PERMUTATIONS]
    )
    words = torch.randint(len(PERMUTATIONS), (rows, length), generator=generator)
    states = [words[:, 0]]
    for word in words[:, 1:].unbind(1):
        states.append(table[states[-1], word])
    return words, torch.stack(states, 1)


TASKS = {"parity": parity, "s3": s3}


def build(settings: Mapping[str, Any]) -> NEXUSCore:
    """A small backbone of one layer, unless the settings say otherwise."""
    modules = dict.fromkeys(("world", "reason", "energy", "causal"), False)
    sizes = {
        "d_model": 32,
        "ssm_n_layers": 1,
        "ssm_d_state": 16,
        "ssm_head_dim": 16,
        "ssm_conv_width": 1,
    }
    return NEXUSCore(vocab_size=len(PERMUTATIONS), **{**sizes, **modules, **settings})


@dataclass(frozen=True)
class Load:
    """The sizes of training."""

    length: int = 32
    rows: int = 64
    steps: int = 300
    lr: float = 1.5e-2


QUICK = Load(length=8, steps=250)


def learn(task: str, model: NEXUSCore, load: Load, seed: int) -> float:
    """Train a model; returns the accuracy beyond the training length."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(load.steps):
        for group in optimizer.param_groups:
            group["lr"] = load.lr * min(1, (step + 1) / 20) * (1 - step / load.steps)
        words, states = TASKS[task](load.rows, load.length, generator)
        loss = F.cross_entropy(model(words).flatten(0, 1), states.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    words, states = TASKS[task](256, 2 * load.length, generator)
    with torch.no_grad():
        right = (model(words).argmax(-1) == states)[:, load.length :]
    return right.double().mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Train every model on both tasks, and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.states", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--quick", action="store_true", help="shorter rows and one seed")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = QUICK if options.quick else Load()
    seeds = 1 if options.quick else options.seeds
    results: dict[str, dict[str, list[float]]] = {}
    print(f"{'':22} " + " ".join(f"{task:>16}" for task in TASKS))
    for name, settings in MODELS.items():
        cells = []
        for task in TASKS:
            scores = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                scores.append(learn(task, build(settings), load, seed))
            results.setdefault(name, {})[task] = scores
            cells.append(f"{statistics.mean(scores):8.1%} ({min(scores):.1%})")
        print(f"{name:22} " + " ".join(f"{cell:>16}" for cell in cells), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
