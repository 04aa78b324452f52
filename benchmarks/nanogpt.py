"""Speed of NEXUS layers and nanoGPT with a byte vocabulary: forward, loss and backward.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.nanogpt nanoGPT [--compile] [--lengths 64 512 ...] [--rounds 20]
                                 [--layers NAME ...] [--json PATH]

All models have width 128, heads of 64, a vocabulary of 257, and no dropout; nanoGPT has 4 layers
and as many positions as the rows are long. Each step processes 2,048 random tokens in float32 on
one thread, without an optimizer; eagerly, or with `--compile` all of them by `torch.compile`, as
nanoGPT trains by default. The models take turns in one process, and CPU seconds are counted, so
that other processes matter little; the result is the ratio of the medians.

A window layer attends to the last 128 tokens, and nanoGPT to the whole row: in rows of 512 and more
it does less work. Speed only; quality is not compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from nexus_plugins.loss_lm import LossLmPlugin
from nexus_plugins.model_nexus import NEXUSCore

VOCABULARY, WIDTH, HEAD_WIDTH, TOKENS = 257, 128, 64, 2_048
LENGTHS = (64, 512, 2_048)
LAYERS: Mapping[str, tuple[str, int, dict[str, int]]] = {
    "(window, mlp) x 4, shared": ("window mlp", 8, {"window_kv_heads": 1}),
    "(window, mlp) x 4": ("window mlp", 8, {}),
    "(ssm, mlp, window, mlp) x 2": ("ssm mlp window mlp", 8, {}),
    "(ssm, mlp) x 3 + ssm": ("ssm mlp", 7, {}),
    "ssm x 7": ("ssm", 7, {}),
    "ssm x 7, state 64": ("ssm", 7, {"ssm_d_state": 64}),
}
"""The kinds of layers, how many there are, and other settings; shared: one head of keys and values
for both heads of queries."""
LossOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """A model's speed at one length."""

    layers: str
    length: int
    parameters: int
    tokens_per_second: float
    speed: float
    """That of nanoGPT is 1."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(prog="benchmarks.nanogpt", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkout", type=Path, help="folder with nanoGPT's model.py")
    parser.add_argument("--compile", action="store_true", help="compile all models")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="NAME")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each model")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    if not (options.checkout / "model.py").is_file():
        parser.error(f"'{options.checkout}' has no model.py; expected a checkout of nanoGPT")
    module = _module(options.checkout / "model.py")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        row
        for length in options.lengths
        for row in compared(module, options.layers, length, options.rounds, options.compile)
    ]
    for row in rows:
        print(
            f"{row.layers:28} {row.length:6,} {row.parameters / 1e6:5.2f} M parameters "
            f"{row.tokens_per_second:8,.0f} tokens/s  {row.speed:.2f} x nanoGPT"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def compared(
    module: ModuleType, layers: Sequence[str], length: int, rounds: int, compiled: bool = False
) -> list[Row]:
    """Time models on rows of a length, nanoGPT first."""
    models = {"nanoGPT": _nanogpt(module, length)} | {n: _nexus(*LAYERS[n]) for n in layers}
    if compiled:
        models = {
            n: (model, torch.compile(loss_of, dynamic=False))
            for n, (model, loss_of) in models.items()
        }
    input_ids = torch.randint(VOCABULARY, (max(1, TOKENS // length), length))
    labels = torch.randint(VOCABULARY, input_ids.shape)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, (model, loss_of) in models.items():
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            torch.autograd.backward(loss_of(input_ids, labels))
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return [
        Row(
            layers=name,
            length=length,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            tokens_per_second=input_ids.numel() / medians[name],
            speed=medians["nanoGPT"] / medians[name],
        )
        for name, (model, _) in models.items()
    ]


def _nexus(layers: str, count: int, settings: Mapping[str, int]) -> tuple[nn.Module, LossOf]:
    """A backbone without modules, and its loss."""
    model = NEXUSCore(
        vocab_size=VOCABULARY, d_model=WIDTH, layers=layers.split(), ssm_n_layers=count,
        ssm_head_dim=HEAD_WIDTH, window_head_dim=HEAD_WIDTH, **{"ssm_d_state": 16, **settings},
        world=False, reason=False, energy=False, causal=False,
    )  # fmt: skip
    loss = LossLmPlugin(label_smoothing=0.0)

    def loss_of(input_ids: Tensor, labels: Tensor) -> Tensor:
        return loss.loss({"labels": labels}, model.hidden(input_ids)) / labels.numel()

    return model, loss_of


def _nanogpt(module: ModuleType, length: int) -> tuple[nn.Module, LossOf]:
    config = module.GPTConfig(
        block_size=length, vocab_size=VOCABULARY, n_layer=4, n_head=WIDTH // HEAD_WIDTH,
        n_embd=WIDTH, dropout=0.0, bias=False,
    )  # fmt: skip
    with redirect_stdout(StringIO()):  # it prints its number of parameters
        model = module.GPT(config)
    return model, lambda input_ids, labels: model(input_ids, labels)[1]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for the compiler
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
