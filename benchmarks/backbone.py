"""Forward and backward of the backbone with its loss, next to transformers' Mamba-2 and GPT-2.

    python -m benchmarks.backbone [--rounds 5] [--quick] [--lengths 512 ...]
                                  [--precisions bfloat16 ...] [--json PATH]

All models have vocabulary 32,000, width 256, 6 layers and tied embeddings; the two state-space
models also have the same inner width 512, heads of 64 and state of 64. All process the same 8,192
random tokens per step, in rows of the given length. The others run as installed, without extra
kernels: Mamba-2 with its PyTorch implementation, GPT-2 with PyTorch's fused attention and enough
positions, both with their own loss. Nothing is compiled.

The cost of GPT-2 depends on dropout, which PyTorch's fused attention does not support on a CPU. So
up to length 2,048 there are two pairs: `nexus` and `gpt2` without dropout, and `nexus_dropout` and
`gpt2_dropout` with 0.1, the default of GPT2Config.

Each model has its own process, which does one warm-up step. Then the models take turns, so that
slow phases of the machine affect all of them; the median over the rounds is reported. Peak memory
is the process's highest resident set minus its size when the model was built: activations,
gradients and what the allocator keeps.

The second table is the loss only, on the same number of tokens, from hidden states and head to
gradients: with full logits, with PyTorch's `F.linear_cross_entropy` and with ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nexus_core.cli.memory import peak_resident

VOCABULARY = 32_000
WIDTH = 256
LAYERS = 6
HEAD_WIDTH = 64
STATE = 64
TOKENS = 8_192
LENGTHS = (512, 2_048, 8_192)
PRECISIONS = ("bfloat16", "float32")
MODELS = ("nexus", "mamba2", "gpt2", "nexus_dropout", "gpt2_dropout")
DROPOUT = 0.1
LONGEST_WITH_DROPOUT = 2_048  # unfused attention stores every score
LOSSES = ("ours", "full logits", "torch fused")
QUICK_TOKENS = 2_048


@dataclass(frozen=True)
class Case:
    """One model, or one way to the loss, under one load."""

    name: str
    precision: str
    length: int
    tokens: int


@dataclass(frozen=True)
class Measurement:
    """The result of a case."""

    name: str
    precision: str
    length: int
    tokens_per_second: float
    slowest: float
    fastest: float
    peak_memory_mb: float


def model_step(case: Case) -> Callable[[], None]:
    """Build a model; return its step without the optimizer."""
    import torch

    model, loss_of = globals()[f"_{case.name}"](case.length)
    input_ids = torch.randint(VOCABULARY, (case.tokens // case.length, case.length))
    labels = torch.randint(VOCABULARY, input_ids.shape)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bfloat16"):
            loss = loss_of(model, input_ids, labels)
        loss.backward()

    return step


def _nexus(_length: int, dropout: float = 0.0) -> tuple[Any, Callable[..., Any]]:
    from nexus_plugins.loss_lm import LossLmPlugin
    from nexus_plugins.model_nexus import NEXUSCore

    plugin = LossLmPlugin(label_smoothing=0.0)

    def loss_of(model: Any, input_ids: Any, labels: Any) -> Any:
        return plugin.loss({"labels": labels}, model.hidden(input_ids)) / labels.numel()

    model = NEXUSCore(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        ssm_n_layers=LAYERS,
        ssm_head_dim=HEAD_WIDTH,
        ssm_d_state=STATE,
        dropout=dropout,
        **dict.fromkeys(("world", "reason", "energy", "causal"), False),  # only the backbone
    )
    return model, loss_of


def _mamba2(_length: int) -> tuple[Any, Callable[..., Any]]:
    from transformers import Mamba2Config, Mamba2ForCausalLM, logging

    logging.set_verbosity_error()  # it reports its missing kernels at every start

    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        expand=2,
        head_dim=HEAD_WIDTH,
        num_heads=2 * WIDTH // HEAD_WIDTH,
        state_size=STATE,
        n_groups=1,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Mamba2ForCausalLM(config), _transformers_loss


def _gpt2(length: int, dropout: float = 0.0) -> tuple[Any, Callable[..., Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=WIDTH // HEAD_WIDTH,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return GPT2LMHeadModel(config), _transformers_loss


def _nexus_dropout(length: int) -> tuple[Any, Callable[..., Any]]:
    return _nexus(length, DROPOUT)


def _gpt2_dropout(length: int) -> tuple[Any, Callable[..., Any]]:
    return _gpt2(length, DROPOUT)


def _transformers_loss(model: Any, input_ids: Any, labels: Any) -> Any:
    return model(input_ids=input_ids, labels=labels).loss


def loss_step(case: Case) -> Callable[[], None]:
    """Create hidden states and a head; return the step that computes their gradients."""
    import torch
    import torch.nn.functional as F

    from nexus_plugins._shared.linear_cross_entropy import linear_cross_entropy

    hidden = torch.randn(case.tokens, WIDTH, requires_grad=True)
    weight = (0.02 * torch.randn(VOCABULARY, WIDTH)).requires_grad_()
    labels = torch.randint(VOCABULARY, (case.tokens,))

    def full_logits() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def torch_fused() -> torch.Tensor:
        kind = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(
            hidden.to(kind), weight.to(kind), labels, reduction="sum", options=options
        )

    def ours() -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels)

    loss_of = {"ours": ours, "full logits": full_logits, "torch fused": torch_fused}[case.name]

    def step() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bfloat16"):
            loss = loss_of() / case.tokens
        torch.autograd.backward(loss)

    return step


def serve(connection: Connection, case: Case) -> None:
    """In a separate process: build, warm up, then time a step for each request."""
    import torch

    torch.manual_seed(0)
    step = (loss_step if case.name in LOSSES else model_step)(case)
    built = peak_resident() / 2**20
    step()
    connection.send(0.0)
    while connection.recv():
        gc.collect()
        begin = time.perf_counter()
        step()
        connection.send(time.perf_counter() - begin)
    connection.send(peak_resident() / 2**20 - built)


def measure(cases: list[Case], rounds: int) -> list[Measurement]:
    """Run the cases in turn for some rounds."""
    context = multiprocessing.get_context("spawn")
    workers = []
    for case in cases:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, case), daemon=True)
        process.start()
        ours.recv()
        workers.append((case, ours, process))
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case, connection, _ in workers:
            connection.send(True)
            seconds[case.name].append(connection.recv())
    results = []
    for case, connection, process in workers:
        connection.send(False)
        results.append(_summary(case, seconds[case.name], connection.recv()))
        process.join()
    return results


def _summary(case: Case, seconds: list[float], peak_memory_mb: float) -> Measurement:
    return Measurement(
        name=case.name,
        precision=case.precision,
        length=case.length,
        tokens_per_second=case.tokens / statistics.median(seconds),
        slowest=case.tokens / max(seconds),
        fastest=case.tokens / min(seconds),
        peak_memory_mb=peak_memory_mb,
    )


def show(results: Iterable[Measurement], reference: str) -> None:
    """Print one line per case, each compared with the reference under the same load."""
    results = list(results)
    ours = {(r.name, r.precision, r.length): r for r in results}
    print(f"{'':13} {'precision':9} {'length':>6} {'tokens/s':>9} {'min':>7} {'max':>7}", end="")
    print(f" {'peak MB':>8}  {reference} has")
    for result in results:
        ending = "_dropout" if result.name.endswith("_dropout") else ""
        base = ours[reference + ending, result.precision, result.length]
        speed = base.tokens_per_second / result.tokens_per_second
        memory = base.peak_memory_mb / max(result.peak_memory_mb, 1e-9)
        print(
            f"{result.name:13} {result.precision:9} {result.length:6,} "
            f"{result.tokens_per_second:9,.0f} {result.slowest:7,.0f} {result.fastest:7,.0f} "
            f"{result.peak_memory_mb:8,.0f}  {speed:.2f} x speed, {memory:.2f} x memory"
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print two tables, and write them as JSON on request."""
    parser = argparse.ArgumentParser(prog="benchmarks.backbone", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=5, help="rounds per model")
    parser.add_argument("--quick", action="store_true", help="only 2,048 tokens per step, bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    tokens = QUICK_TOKENS if options.quick else TOKENS
    precisions = PRECISIONS[:1] if options.quick else options.precisions

    models: list[Measurement] = []
    for precision in precisions:
        for length in options.lengths:
            if length <= tokens:
                names = MODELS if length <= LONGEST_WITH_DROPOUT else MODELS[:3]
                group = [Case(name, precision, length, tokens) for name in names]
                models += measure(group, options.rounds)
    show(models, "nexus")
    print()
    losses: list[Measurement] = []
    for precision in precisions:
        group = [Case(name, precision, 1, tokens) for name in LOSSES]
        losses += measure(group, options.rounds)
    show(losses, "ours")
    if options.json:
        results = {"models": [asdict(r) for r in models], "losses": [asdict(r) for r in losses]}
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
