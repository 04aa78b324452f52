"""The reasoner by itself on questions of several steps, compared with other networks of its size.

    python -m benchmarks.reasoner [--task hops horn modular] [--seeds 3]

Each question is one vector; see `benchmarks.chains` for the kinds. The networks are the reasoner, a
plain MLP, and Deep Thinking networks (Schwarzschild et al. 2021, Bansal et al. 2022) with and
without their progressive loss. All are trained on questions of 1 to 3 steps, for the CPU time that
the reasoner needs for 1,000 steps of training, and tested on new questions of 1 to 3 steps, and of
4, for which the reasoner and Deep Thinking also make a fourth iteration.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.chains import CHAINS, MOST, Chains, Questions
from benchmarks.deep_thinking import DeepThinking
from nexus_plugins.model_nexus.reasoning import Reasoner
from nexus_plugins.modules.answerer import Answerer

STEPS, ROWS, LR, LR_OF_DEEP_THINKING = 1000, 256, 3e-3, 6e-3
PROGRESSIVE, HELD_OUT = 0.5, 4000


@dataclass(frozen=True)
class Contender:
    """A network, and how it is trained."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    """The training loss, given questions and answers."""
    lr: float
    think_longer: Callable[[], None] | None = None
    """Makes the network iterate once more from now on, if it iterates."""


def contenders(chains: Chains) -> dict[str, Contender]:
    """Untrained networks by name, the reasoner first."""
    sizes = (chains.size, chains.answers)
    reasoner = Answerer("reason", *sizes)
    parameters = sum(weight.numel() for weight in reasoner.parameters())

    def one_more_step() -> None:
        assert isinstance(reasoner.thinker, Reasoner)
        reasoner.thinker.steps += 1

    def deep(progressive: float) -> Contender:
        model = DeepThinking(*sizes, parameters, MOST, progressive)
        return Contender(model, model.loss, LR_OF_DEEP_THINKING, model.think_longer)

    return {
        "reasoner": _plain(reasoner, one_more_step),
        "MLP": _plain(Answerer("mlp", *sizes)),
        "Deep Thinking, recall": deep(0.0),
        "Deep Thinking, recall, progressive": deep(PROGRESSIVE),
    }


def _plain(model: Answerer, think_longer: Callable[[], None] | None = None) -> Contender:
    """A network that is trained on the cross-entropy."""
    return Contender(model, lambda q, a: F.cross_entropy(model(q), a), LR, think_longer)


def train(contender: Contender, chains: Chains, seed: int, seconds: float | None) -> float:
    """Train for `STEPS` steps, or for a given CPU time; returns the time used."""
    generator, begin = torch.Generator().manual_seed(seed + 1), time.process_time()
    model, drawing = contender.model, 0.0
    optimizer, done, step = torch.optim.AdamW(model.parameters(), lr=contender.lr), 0.0, 0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = contender.lr * min(1, (step + 1) / 50, 2 - 2 * done)
        before = time.process_time()
        asked, answers = chains.drawn(generator, ROWS, further=False)
        drawing += time.process_time() - before
        optimizer.zero_grad()
        contender.loss(asked, answers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        used = time.process_time() - begin - drawing
        done = step / STEPS if seconds is None else used / seconds
    return used


@torch.no_grad()
def nats(model: nn.Module, asked: Questions) -> float:
    """The cross-entropy of the answers."""
    return F.cross_entropy(model(asked[0]), asked[1]).item()


def compare(kind: type[Chains], seed: int) -> dict[tuple[str, str], float]:
    """The nats by network and kind of questions."""
    chains, held_out = kind(seed), torch.Generator().manual_seed(10**6 + seed)
    known, further = (chains.drawn(held_out, HELD_OUT, further=more) for more in (False, True))
    torch.manual_seed(seed)
    found: dict[tuple[str, str], float] = {}
    seconds = None
    for name, contender in contenders(chains).items():
        used = train(contender, chains, seed, seconds)
        seconds = seconds or used
        found[name, f"1 to {MOST} steps"] = nats(contender.model, known)
        found[name, f"{MOST + 1} steps"] = nats(contender.model, further)
        if contender.think_longer is not None:
            contender.think_longer()
            found[name, f"{MOST + 1} steps, one more iteration"] = nats(contender.model, further)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the mean and the spread over seeds."""
    parser = argparse.ArgumentParser(prog="benchmarks.reasoner", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--task", nargs="+", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    for task in options.task:
        runs = [compare(CHAINS[task], seed) for seed in range(options.seeds)]
        for name, questions in runs[0]:
            values = [run[name, questions] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{task}, {name}, {questions}: {statistics.mean(values):.3f} ± {spread:.3f} nats")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
