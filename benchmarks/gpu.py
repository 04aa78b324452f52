"""Models and trainers on an accelerator: speed, utilization, memory, overhead, synchronization.

    python -m benchmarks.gpu [--rounds 3] [--json PATH]      # on CUDA, 124 M parameters
    python -m benchmarks.gpu --size tiny --device cpu        # a smoke test, not a measurement

Models, each trained by the same plain PyTorch loop (bfloat16 autocast, fused AdamW, gradients
clipped), in rows of 2,048 tokens:

    nexus          the whole model with its five losses      backbone   with its first loss only
    nexus+kernels  whole, its layers by the kernels of mamba-ssm, flash-linear-attention and
                   causal-conv1d, where these are installed
    gpt2           of transformers, with PyTorch's flash attention
    mamba2         of transformers, with its Triton kernels where they are installed

Trainers, each training that gpt2: a plain loop ("bare"), our engine with clip, jsonl and amp, the
same with the gradient of each step replayed from a CUDA graph ("engine+graph"), Lightning, and the
Trainer of Hugging Face. The engine also trains nexus, with and without the graph. No case loads
data: all take ready batches from one iterable, in pinned memory on CUDA, which synchronizes and
records the time at every tenth batch.

Each case has its own process, and they take turns from round to round. A figure is the median over
the rounds, with minimum and maximum. MFU is the FLOPs of a step's matmuls and attention, as counted
by PyTorch, over the rate of the fastest matmul found on this device. "Waits" is the number of
synchronizations per step, by `torch.cuda.set_sync_debug_mode`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from nexus_core import Engine
from nexus_core.cli.memory import peak_resident

Batch = dict[str, Tensor]
LossOf = Callable[[nn.Module, Batch], Tensor]
STRETCH, WARMUP, MAX_NORM, LEARNING_RATE = 10, 2, 1.0, 3e-4


@dataclass(frozen=True)
class Size:
    """The sizes of the models and of a step."""

    vocabulary: int
    width: int
    length: int
    rows: int
    layers: Mapping[str, int]
    stretches: int
    head: int = 64
    state: int = 64


SIZES = {
    "124M": Size(50_257, 768, 2048, 8, {"nexus": 23, "gpt2": 12, "mamba2": 23}, 8),
    "tiny": Size(256, 64, 32, 2, {"nexus": 1, "gpt2": 1, "mamba2": 1}, 4),
}


# -- models


def nexus(size: Size, modules: bool = True) -> tuple[nn.Module, LossOf]:
    """The model with or without its modules, each with its loss at its default weight."""
    from nexus_core.plan import load
    from nexus_plugins.model_nexus import NEXUSCore

    names = ("world", "reason", "energy", "causal")
    model = NEXUSCore(
        vocab_size=size.vocabulary, d_model=size.width, ssm_n_layers=size.layers["nexus"],
        ssm_head_dim=size.head, ssm_d_state=size.state, **dict.fromkeys(names, modules),
    )  # fmt: skip
    losses = [load(f"loss_{name}")() for name in ("lm", *(names if modules else ()))]

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        output = model.hidden(batch["input_ids"])  # type: ignore[operator]
        count = batch["labels"].numel()
        return sum(loss.weight * loss.loss(batch, output) / count for loss in losses)

    return model, loss_of


def backbone(size: Size) -> tuple[nn.Module, LossOf]:
    """The model without its modules."""
    return nexus(size, modules=False)


def nexus_with_kernels(size: Size) -> tuple[nn.Module, LossOf]:
    """The whole model, with its layers run by the first installed kernels, unchecked."""
    from nexus_plugins_contrib.kernels.swaps import KERNELS

    model, loss_of = nexus(size)
    for name in ("scan", "convolve"):
        kernel = next((k for k in KERNELS[name] if k.installed), None)
        for layer in model.modules():
            if kernel is not None and hasattr(layer, name):
                setattr(layer, name, torch.compiler.disable(kernel.of(layer)))
    return model, loss_of


def of_transformers(model: nn.Module, batch: Batch) -> Tensor:
    """The loss computed by a transformers model."""
    loss: Tensor = model(**batch).loss
    return loss


def gpt2(size: Size) -> tuple[nn.Module, LossOf]:
    """GPT-2 with PyTorch's attention, without dropout."""
    library = importlib.import_module("transformers")
    config = library.GPT2Config(
        vocab_size=size.vocabulary, n_positions=size.length, n_embd=size.width,
        n_layer=size.layers["gpt2"], n_head=size.width // size.head, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return library.GPT2LMHeadModel(config), of_transformers


def mamba2(size: Size) -> tuple[nn.Module, LossOf]:
    """Mamba-2 of the same width and depth as the backbone."""
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    config = library.Mamba2Config(
        vocab_size=size.vocabulary, hidden_size=size.width,
        num_hidden_layers=size.layers["mamba2"], expand=2, head_dim=size.head,
        num_heads=2 * size.width // size.head, state_size=size.state, n_groups=1,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return library.Mamba2ForCausalLM(config), of_transformers


MODELS: dict[str, Callable[[Size], tuple[nn.Module, LossOf]]] = {
    "nexus": nexus,
    "nexus+kernels": nexus_with_kernels,
    "backbone": backbone,
    "gpt2": gpt2,
    "mamba2": mamba2,
}


# -- training and timing


@dataclass
class Feed:
    """An iterable of ready batches that syncs with the device and records the time."""

    ready: list[Batch]
    length: int
    device: torch.device
    stamps: list[float] = field(default_factory=list)
    watched: int = 0
    """Steps in which synchronizations were counted: those of the last stretch."""

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        on_cuda = self.device.type == "cuda"
        for place in range(self.length):
            if place % STRETCH == 0:
                if on_cuda:
                    torch.cuda.synchronize(self.device)
                self.stamps.append(time.perf_counter())
            if place == self.length - STRETCH and on_cuda:
                torch.cuda.set_sync_debug_mode("warn")
            self.watched += place >= self.length - STRETCH and on_cuda
            yield dict(self.ready[place % len(self.ready)])
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")


@dataclass
class Run:
    """The input of a trainer: the model on its device, its loss, the batches, and a folder."""

    model: nn.Module
    loss_of: LossOf
    feed: Feed
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.feed.device

    def optimizer(self) -> AdamW:
        return AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)


def bare(run: Run) -> None:
    """A handwritten loop."""
    optimizer = run.optimizer()
    for ready in run.feed:
        batch = {k: v.to(run.device, non_blocking=True) for k, v in ready.items()}
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = run.loss_of(run.model, batch)
        loss.backward()
        clip_grad_norm_(run.model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def engine(run: Run, step_graph: bool = False) -> None:
    """Our engine, embedded."""
    from nexus_core.plan import load

    plugins = [load("amp")(), load("clip")(max_norm=MAX_NORM), load("jsonl")()]
    if step_graph:
        plugins.append(load("compile")(step_graph=True, backend="eager"))  # without code generation
    made = Engine(
        run.model, run.optimizer(), loss=run.loss_of, plugins=plugins, log_every=10**6,
        out=run.folder, device=run.device,
    )  # fmt: skip
    made.fit(run.feed, until=run.feed.length)


def engine_with_graph(run: Run) -> None:
    """Our engine, the gradient and the update of each step replayed from CUDA graphs."""
    with torch.compiler.set_stance("force_eager"):
        engine(run, step_graph=True)


def lightning(run: Run) -> None:
    """A LightningModule with automatic optimization."""
    pl = importlib.import_module("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return run.loss_of(self.model, batch)

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            """Clip manually, as Lightning rejects fused optimizers in mixed precision."""
            clip_grad_norm_(self.model.parameters(), MAX_NORM, foreach=True)

        def configure_optimizers(self) -> AdamW:
            return run.optimizer()

    trainer = pl.Trainer(
        max_steps=run.feed.length, accelerator="gpu" if run.device.type == "cuda" else "cpu",
        devices=1, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, use_distributed_sampler=False, default_root_dir=run.folder,
    )  # fmt: skip
    trainer.fit(Module(), run.feed)


def transformers(run: Run) -> None:
    """The Hugging Face Trainer."""
    library = importlib.import_module("transformers")
    importlib.import_module("accelerate")
    library.logging.set_verbosity_error()

    class Trainer(library.Trainer):  # type: ignore[name-defined, misc]
        def get_train_dataloader(self) -> Feed:
            feed: Feed = self.train_dataset
            return feed

        def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
            return run.loss_of(model, inputs)

    arguments = library.TrainingArguments(
        output_dir=str(run.folder), max_steps=run.feed.length, max_grad_norm=MAX_NORM, bf16=True,
        logging_strategy="no", report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=run.device.type == "cpu", dataloader_pin_memory=False, remove_unused_columns=False,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        model=run.model, args=arguments, train_dataset=run.feed, optimizers=(run.optimizer(), None)
    )
    trainer.train()


TRAINERS: dict[str, Callable[[Run], None]] = {
    "bare": bare,
    "engine": engine,
    "engine+graph": engine_with_graph,
    "lightning": lightning,
    "transformers": transformers,
}
NEEDS = {"gpt2": ("transformers",), "mamba2": ("transformers",), "lightning": ("lightning",),
         "transformers": ("transformers", "accelerate")}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, and what trains it."""

    model: str
    trainer: str

    @property
    def missing(self) -> str:
        """What must be installed to run it; empty if nothing is missing."""
        needed = {*NEEDS.get(self.model, ()), *NEEDS.get(self.trainer, ())}
        absent = [name for name in sorted(needed) if find_spec(name) is None]
        if self.model == "nexus+kernels" and not absent:
            from nexus_plugins_contrib.kernels import available

            absent = [] if available() else ["mamba-ssm, causal-conv1d or flash-linear-attention"]
        return f"pip install {' '.join(absent)}" if absent else ""


CASES = [
    *(Case(model, "bare") for model in MODELS),
    *(Case("nexus", name) for name in ("engine", "engine+graph")),
    *(Case("gpt2", name) for name in TRAINERS),
]


def missing(case: Case, device: str) -> str:
    """Why a case does not run on a device; empty if it does."""
    has_graphs = hasattr(torch.get_device_module(device), "CUDAGraph")
    no_graphs = "" if has_graphs else f"{device} has no graphs"
    return case.missing or (no_graphs if case.trainer == "engine+graph" else "")


@dataclass(frozen=True)
class Figures:
    """The figures of a case in one round."""

    parameters: int
    tokens_per_second: float
    milliseconds: float
    mfu: float
    peak_gib: float
    waits_per_step: float | None


def figures(case: Case, size: Size, device: torch.device, folder: Path) -> Figures:
    """Train a case, in this process."""
    from nexus_plugins.mfu import matmul_rate

    torch.manual_seed(0)
    model, loss_of = MODELS[case.model](size)
    model.to(device).train()
    draw = torch.Generator().manual_seed(1)
    shape = (size.rows, size.length)
    ids = [torch.randint(size.vocabulary, shape, generator=draw) for _ in range(4)]
    pinned = [i.pin_memory() if device.type == "cuda" else i for i in ids]
    feed = Feed([{"input_ids": i, "labels": i} for i in pinned], STRETCH * size.stretches, device)
    flops = _arithmetic(model, loss_of, feed.ready[0], device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        TRAINERS[case.trainer](Run(model, loss_of, feed, folder))
    waits = sum("synchroniz" in str(w.message) for w in said)
    seconds = statistics.median(
        (end - begin) / STRETCH for begin, end in pairwise(feed.stamps[WARMUP:])
    )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    return Figures(
        parameters=sum(p.numel() for p in model.parameters()),
        tokens_per_second=size.rows * size.length / seconds,
        milliseconds=1000 * seconds,
        mfu=flops / seconds / matmul_rate(device, torch.bfloat16),
        peak_gib=peak / 2**30,
        waits_per_step=waits / feed.watched if feed.watched else None,
    )


def _arithmetic(model: nn.Module, loss_of: LossOf, batch: Batch, device: torch.device) -> int:
    """FLOPs of a step, forward and backward; those of third-party kernels are not counted."""
    moved = {k: v.to(device) for k, v in batch.items()}
    with FlopCounterMode(display=False) as counter, torch.autocast(device.type, torch.bfloat16):
        loss_of(model, moved).backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def serve(connection: Connection, case: Case, size: str, device: str) -> None:
    """In a separate process: train a case and send its figures, or its error."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = figures(case, SIZES[size], torch.device(device), Path(folder))
        connection.send(asdict(found))
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"})


def measure(size: str, device: str, rounds: int) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The figures of every case by round, and why other cases did not run."""
    context = multiprocessing.get_context("spawn")
    left = {f"{c.model} by {c.trainer}": why for c in CASES if (why := missing(c, device))}
    cases = [c for c in dict.fromkeys(CASES) if not missing(c, device)]
    found: dict[str, list[Any]] = {}
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            name = f"{case.model} by {case.trainer}"
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(theirs, case, size, device))
            process.start()
            theirs.close()
            try:
                answer = ours.recv()
            except EOFError:
                answer = {"error": f"the process ended with exit code {process.exitcode}"}
            process.join()
            if "error" in answer:
                left[name] = answer["error"]
            else:
                found.setdefault(name, []).append(answer)
    return found, left


def machine(device: str) -> dict[str, str]:
    """The machine and versions measured."""
    known = {"torch": torch.__version__, "device": device}
    if device == "cuda":
        known["device"] = torch.cuda.get_device_name()
        known["cuda"] = str(torch.version.cuda)
    for package in ("transformers", "lightning", "mamba-ssm", "causal-conv1d", "liger-kernel",
                    "flash-linear-attention"):  # fmt: skip
        with suppress(PackageNotFoundError):
            known[package] = version(package)
    return known


def show(results: Mapping[str, Any]) -> None:
    """Print the table."""
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    print("| case | parameters | tokens/s | ms per step | over bare, us | MFU | peak GiB | waits |")
    print("|---|---|---|---|---|---|---|---|")
    for name, rounds in results["cases"].items():
        middle = {key: _median([r[key] for r in rounds]) for key in rounds[0]}
        times = [r["milliseconds"] for r in rounds]
        base = results["cases"].get(f"{name.partition(' by ')[0]} by bare", [])
        pairs = zip(rounds, base, strict=False)
        over = [1000 * (mine["milliseconds"] - its["milliseconds"]) for mine, its in pairs]
        waits = middle["waits_per_step"]
        print(
            f"| {name} | {middle['parameters']:,.0f} | {middle['tokens_per_second']:,.0f} "
            f"| {middle['milliseconds']:.2f} ({min(times):.2f} to {max(times):.2f}) "
            f"| {_median(over) or 0:,.0f} | {middle['mfu']:.0%} | {middle['peak_gib']:.2f} "
            f"| {'' if waits is None else f'{waits:.1f}'} |"
        )
    for name, reason in results["left_out"].items():
        print(f"skipped: {name}: {reason}")


def _median(values: list[Any]) -> Any:
    return None if not values or None in values else statistics.median(values)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write a file if one is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --size tiny --device cpu shows that it works")
    found, left = measure(options.size, options.device, options.rounds)
    results = {"machine": machine(options.device), "cases": found, "left_out": left}
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
