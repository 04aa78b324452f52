"""The whole NEXUS model with its five losses, compared with its backbone and transformers' Mamba-2.

    python -m benchmarks.model [--rounds 9] [--threads 1] [--json PATH]

Forward and backward without optimizer: vocabulary 32,000, width 256, 6 layers, batch 2 x 512, in
bfloat16 autocast. "backbone" has only the language-model loss; "+world" adds that module and its
loss, and so on; "whole" has all of them; "mamba2" is the Mamba-2 of transformers in its PyTorch
implementation, with the same inner width, heads and state, and its one loss. Nothing is compiled.

Each has its own process and they take turns, so that slow phases of the machine affect all of them.
A ratio is the median over the rounds of the ratio within a round. Peak memory is the highest
resident set minus the size of the process when the model was built. The machine's rate is that of a
bfloat16 matmul of 2048 x 2048 x 2048, measured in the same rounds; a step's share of it counts only
the FLOPs of matmuls. With --threads 1 times are CPU times, which other load hardly affects;
otherwise they are wall times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nexus_core.cli.memory import peak_resident

VOCABULARY = 32_000
WIDTH = 256
LAYERS = 6
ROWS, LENGTH = 2, 512
PRODUCT = 2048
MODULES = ("world", "reason", "energy", "causal")
CASES: dict[str, tuple[str, ...]] = {
    "backbone": (),
    **{f"+{name}": (name,) for name in MODULES},
    "whole": MODULES,
}
PEER = "mamba2"
MACHINE = "product"


def nexus_step(modules: tuple[str, ...]) -> Callable[[], None]:
    """The model with some modules, each with its loss at its default weight."""
    import torch

    from nexus_plugins.loss_causal import LossCausalPlugin
    from nexus_plugins.loss_energy import LossEnergyPlugin
    from nexus_plugins.loss_lm import LossLmPlugin
    from nexus_plugins.loss_reason import LossReasonPlugin
    from nexus_plugins.loss_world import LossWorldPlugin
    from nexus_plugins.model_nexus import NEXUSCore

    kinds: dict[str, type[Any]] = {
        "world": LossWorldPlugin,
        "reason": LossReasonPlugin,
        "energy": LossEnergyPlugin,
        "causal": LossCausalPlugin,
    }
    switches = {name: name in modules for name in MODULES}
    model = NEXUSCore(vocab_size=VOCABULARY, d_model=WIDTH, ssm_n_layers=LAYERS, **switches)
    losses: list[Any] = [LossLmPlugin(), *(kinds[name]() for name in modules)]
    input_ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    batch = {"input_ids": input_ids, "labels": torch.randint(VOCABULARY, (ROWS, LENGTH))}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.hidden(input_ids)
            means = [loss.loss(batch, output) / loss.units(batch) for loss in losses]
            total = sum(loss.weight * mean for loss, mean in zip(losses, means, strict=True))
        total.backward()

    return step


def peer_step() -> Callable[[], None]:
    """transformers' Mamba-2 of the same width and depth."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        expand=2,
        head_dim=64,
        num_heads=2 * WIDTH // 64,
        state_size=64,
        n_groups=1,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = Mamba2ForCausalLM(config)
    input_ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()

    return step


def product_step() -> Callable[[], None]:
    """One large matmul."""
    import torch

    left, right = torch.randn(2, PRODUCT, PRODUCT, dtype=torch.bfloat16)
    result = torch.empty(PRODUCT, PRODUCT, dtype=torch.bfloat16)

    def step() -> None:
        torch.matmul(left, right, out=result)

    return step


def serve(connection: Connection, name: str, threads: int | None) -> None:
    """In a separate process: build, count, warm up, then time a step for each request."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    torch.set_num_threads(threads or torch.get_num_threads())
    now = time.process_time if threads == 1 else time.perf_counter
    if name in CASES:
        step = nexus_step(CASES[name])
    else:
        step = peer_step() if name == PEER else product_step()
    built = peak_resident() / 2**20
    step()
    peak = peak_resident() / 2**20 - built
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    step()
    connection.send((counter.get_total_flops(), peak))
    while connection.recv():
        begin = now()
        step()
        connection.send(now() - begin)


def measure(rounds: int, threads: int | None) -> dict[str, dict[str, Any]]:
    """Run all cases in turn for some rounds."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    workers = {}
    for name in (*CASES, PEER, MACHINE):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, threads), daemon=True)
        process.start()
        theirs.close()  # so that a failing process also ends this one
        operations, peak = ours.recv()
        results[name] = {"operations": operations, "peak_memory_mb": peak, "seconds": []}
        workers[name] = (ours, process)
    for _ in range(rounds):
        for name, (connection, _) in workers.items():
            connection.send(True)
            results[name]["seconds"].append(connection.recv())
    for connection, process in workers.values():
        connection.send(False)
        process.join()
    return results


def ratio(results: dict[str, dict[str, Any]], name: str, other: str) -> float:
    """The time of `name` divided by that of `other`: the median over the rounds."""
    pairs = zip(results[name]["seconds"], results[other]["seconds"], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print the table and the resulting ratios."""
    machine = results[MACHINE]
    rate = machine["operations"] / statistics.median(machine["seconds"])
    print(f"bfloat16 matmuls on this machine: {rate / 1e9:,.0f} GFLOP/s\n")
    print(f"{'':10} {'tokens/s':>9} {'ms':>7} {'peak MB':>8} {'over backbone':>14} {'of rate':>8}")
    for name in (*CASES, PEER):
        result = results[name]
        seconds = statistics.median(result["seconds"])
        reached = result["operations"] / seconds / rate
        print(
            f"{name:10} {ROWS * LENGTH / seconds:9,.0f} {1e3 * seconds:7.1f} "
            f"{result['peak_memory_mb']:8,.0f} {ratio(results, name, 'backbone') - 1:+14.1%} "
            f"{reached:8.1%}"
        )
    print(f"\nwhole model against {PEER}: {ratio(results, PEER, 'whole'):.2f} times as fast")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON on request."""
    parser = argparse.ArgumentParser(prog="benchmarks.model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=9, help="rounds per model")
    parser.add_argument("--threads", type=int, help="threads per process; default: one per core")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    results = measure(options.rounds, options.threads)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
