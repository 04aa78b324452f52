"""The engine's cost per step, compared with plain PyTorch loops and other trainers.

    python -m benchmarks.overhead [--rounds 30] [--steps 300] [--quick] [--json PATH]

All cases train the same tiny network (three linear layers of width 64, batch 16, cross-entropy) on
the same batches from memory, with one thread: AdamW, a cosine schedule, the loss logged every 10
steps, and gradients clipped to a norm that all of them exceed. The work per step is so small that
the rest is overhead.

    bare          a plain loop of PyTorch calls: fused AdamW, the schedule as a formula
    tutorial      the loop of PyTorch's tutorials: default AdamW, a scheduler, `loss.item()`
    nexus         our engine with clip, lr_cosine and jsonl
    lightning, ignite, accelerate, transformers
                  with fused AdamW and PyTorch's schedule, without checkpoints, progress bars and
                  evaluation; comments explain each setup

No case loads data: all take ready batches from one iterable, which records the time at every tenth
batch. So starting and ending a run are not counted, and steps are timed alike for all. Times are
CPU times of the process, summed over its threads, so other programs hardly matter; wall times are
shown too, and are the same on an idle machine, since nothing here waits.

The cases take turns in one process, in alternating order. A round is the median of its stretches of
10 steps; differences and ratios are taken within a round; the table has medians over the rounds,
with minimum and maximum. After every run the trained weights are compared: all cases must have done
the same work.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import logging
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from nexus_core import Engine
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.jsonl import JsonlPlugin
from nexus_plugins.lr_cosine import LrCosinePlugin

ROWS, WIDTH, CLASSES = 16, 64, 10
LEARNING_RATE = 1e-3
MAX_NORM = 0.5  # below every gradient norm here, so every step is clipped
LOG_EVERY = 10  # also the length of the timed stretches
WARMUP = 5  # stretches at the start of a run that are not counted
MOST_OVERHEAD, MOST_OF_TUTORIAL = 60.0, 0.95
ROUNDS, STEPS, QUICK_ROUNDS, QUICK_STEPS = 30, 300, 2, 30

Batch = tuple[Tensor, Tensor]


@dataclass
class Feed:
    """An iterable of ready batches that records when each stretch starts."""

    ready: Sequence[Batch]
    length: int
    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        for place in range(self.length):
            if place % LOG_EVERY == 0:
                self.processor.append(time.process_time())
                self.wall.append(time.perf_counter())
            yield self.ready[place % len(self.ready)]


def microseconds(stamps: Sequence[float]) -> float:
    """Microseconds per step: the median over the stretches after the warm-up."""
    stretches = [end - begin for begin, end in pairwise(stamps[WARMUP:])]
    return 1e6 * statistics.median(stretches) / LOG_EVERY


@dataclass
class Run:
    """The input of a case: a new network with the same weights, the feed, and a folder."""

    model: nn.Module
    feed: Feed
    folder: Path
    losses: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.feed)

    def fused(self) -> AdamW:
        """The optimizer of all cases except the tutorial."""
        return AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def cosine(self, optimizer: Optimizer) -> CosineAnnealingLR:
        """The schedule of all cases that use PyTorch's."""
        return CosineAnnealingLR(optimizer, T_max=self.steps)


Case = Callable[[Run], None]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the network on a batch."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def bare() -> Case:
    """A handwritten loop with the same optimizer and nothing unnecessary."""

    def train(run: Run) -> None:
        model, optimizer = run.model, run.fused()
        parameters = list(model.parameters())
        for step, batch in enumerate(run.feed):
            rate = 0.5 * LEARNING_RATE * (1 + math.cos(math.pi * step / run.steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(model, batch)
            loss.backward()
            clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % LOG_EVERY == 0:
                run.losses.append(loss.item())

    return train


def tutorial() -> Case:
    """As in "Training with PyTorch" on pytorch.org: a running loss that is read every step."""

    def train(run: Run) -> None:
        model, loss_fn = run.model, nn.CrossEntropyLoss()
        optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
        scheduler = run.cosine(optimizer)
        running_loss = 0.0
        for i, (inputs, labels) in enumerate(run.feed):
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, labels)
            loss.backward()
            clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            running_loss += loss.item()
            if i % LOG_EVERY == LOG_EVERY - 1:
                run.losses.append(running_loss / LOG_EVERY)
                running_loss = 0.0

    return train


def nexus() -> Case:
    """Our engine, embedded, as the README shows it."""

    def train(run: Run) -> None:
        engine = Engine(
            run.model,
            run.fused(),
            loss=loss_of,
            plugins=[
                ClipPlugin(max_norm=MAX_NORM),
                LrCosinePlugin(warmup=None, min_lr=0.0),
                JsonlPlugin(),
            ],
            log_every=LOG_EVERY,
            out=run.folder,
        )
        result = engine.fit(run.feed, until=run.steps)
        run.losses.append(result.metrics["train/loss"])

    return train


def lightning() -> Case:
    """A LightningModule with automatic optimization."""
    pl = importlib.import_module("lightning.pytorch")
    loggers = importlib.import_module("lightning.pytorch.loggers.logger")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Memory(loggers.Logger):  # type: ignore[name-defined, misc]
        """A minimal logger."""

        name = version = "memory"

        def __init__(self, losses: list[float]) -> None:
            super().__init__()
            self.losses = losses

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.losses.append(metrics["loss"])

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, run: Run) -> None:
            super().__init__()
            self.run = run
            self.model = run.model

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = loss_of(self.model, batch)
            if batch_idx % LOG_EVERY == LOG_EVERY - 1:  # only when due, to spare it calls
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = self.run.fused()
            scheduler = {"scheduler": self.run.cosine(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train(run: Run) -> None:
        trainer = pl.Trainer(
            max_steps=run.steps,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=MAX_NORM,
            logger=Memory(run.losses),  # barebones=True would forbid logging
            log_every_n_steps=LOG_EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
            default_root_dir=run.folder,
        )
        trainer.fit(Module(run), run.feed)

    return train


def ignite() -> Case:
    """An engine around an update function, and a handler for the log."""
    engines = importlib.import_module("ignite.engine")

    def train(run: Run) -> None:
        model, optimizer = run.model, run.fused()
        scheduler = run.cosine(optimizer)

        def update(_engine: Any, batch: Batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()  # here, to avoid another handler
            return loss.detach()  # not .item(): only read when logged

        def log(engine: Any) -> None:
            run.losses.append(engine.state.output.item())

        trainer = engines.Engine(update)
        trainer.add_event_handler(engines.Events.ITERATION_COMPLETED(every=LOG_EVERY), log)
        trainer.run(run.feed, max_epochs=1)

    return train


def accelerate() -> Case:
    """The loop of Accelerate's documentation; no `accumulate`, as there is one micro-batch."""
    library = importlib.import_module("accelerate")

    def train(run: Run) -> None:
        accelerator = library.Accelerator(cpu=True)
        optimizer = run.fused()
        # The feed is not prepared: batches are on their device already, so the wrapper would only
        # cost time.
        model, optimizer, scheduler = accelerator.prepare(
            run.model, optimizer, run.cosine(optimizer)
        )
        for step, batch in enumerate(run.feed, start=1):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            if step % LOG_EVERY == 0:
                run.losses.append(loss.item())

    return train


def transformers() -> Case:
    """The Hugging Face Trainer, with an optimizer of the same single group passed in."""
    library = importlib.import_module("transformers")
    importlib.import_module("accelerate")  # the Trainer only checks for it when created
    library.logging.set_verbosity_error()

    class Trainer(library.Trainer):  # type: ignore[name-defined, misc]
        def get_train_dataloader(self) -> Feed:
            feed: Feed = self.train_dataset
            return feed

        def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
            return loss_of(model, inputs)

    def train(run: Run) -> None:
        arguments = library.TrainingArguments(
            output_dir=str(run.folder),
            max_steps=run.steps,
            per_device_train_batch_size=ROWS,
            max_grad_norm=MAX_NORM,
            logging_steps=LOG_EVERY,
            logging_nan_inf_filter=False,  # it would read the loss every step
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        optimizer = run.fused()
        trainer = Trainer(
            model=run.model,
            args=arguments,
            train_dataset=run.feed,
            optimizers=(optimizer, run.cosine(optimizer)),
        )
        trainer.remove_callback(library.PrinterCallback)
        trainer.train()
        run.losses.extend(line["loss"] for line in trainer.state.log_history if "loss" in line)

    return train


OURS = (bare, tutorial, nexus)
PEERS = {
    lightning: "lightning",
    ignite: "pytorch-ignite",
    accelerate: "accelerate",
    transformers: "transformers",
}


@dataclass(frozen=True)
class Spread:
    """A number over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize one number per round."""
        return cls(statistics.median(values), min(values), max(values))


def available(peers: bool) -> tuple[dict[str, Case], dict[str, str]]:
    """The cases that can run here, and why the others cannot."""
    cases = {make.__name__: make() for make in OURS}
    skipped = {}
    for make, distribution in PEERS.items() if peers else ():
        try:
            cases[make.__name__] = make()
        except ImportError as error:
            skipped[make.__name__] = f"{error}; pip install {distribution}"
    return cases, skipped


def measure(
    cases: Mapping[str, Case], rounds: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Microseconds per step for each case and round: CPU time, and wall time."""
    torch.manual_seed(0)
    hidden = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))
    batches = [(torch.randn(ROWS, WIDTH), torch.randint(CLASSES, (ROWS,))) for _ in range(64)]
    length = (WARMUP + 1) * LOG_EVERY + steps
    processor: dict[str, list[float]] = {name: [] for name in cases}
    wall: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-1, rounds):  # the first round warms up
        trained: dict[str, nn.Module] = {}
        for name in list(cases)[:: 1 if turn % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                run = Run(copy.deepcopy(model), Feed(batches, length), Path(folder))
                gc.collect()
                gc.freeze()  # so that imports of other cases do not slow its garbage collection
                cases[name](run)
                gc.unfreeze()
            trained[name] = run.model
            if turn >= 0:
                processor[name].append(microseconds(run.feed.processor))
                wall[name].append(microseconds(run.feed.wall))
            if not (run.losses and all(map(math.isfinite, run.losses))):
                raise SystemExit(f"{name} logged no loss, or none that is finite: {run.losses}")
        _same_work(trained)
    return processor, wall


def _same_work(trained: Mapping[str, nn.Module]) -> None:
    """Reject runs that did not end with the same weights."""
    wanted = nn.utils.parameters_to_vector(trained["bare"].parameters())
    for name, model in trained.items():
        got = nn.utils.parameters_to_vector(model.parameters())
        if (apart := float((got - wanted).detach().abs().max())) > 1e-3:
            raise SystemExit(f"{name} ended {apart:.3g} away from the bare loop: not the same work")


def summarise(
    processor: Mapping[str, list[float]], wall: Mapping[str, list[float]]
) -> dict[str, dict[str, Any]]:
    """Per case: microseconds per step, the difference to the bare loop, and the ratios."""
    table: dict[str, dict[str, Any]] = {}
    for name, times in processor.items():
        over = [mine - base for mine, base in zip(times, processor["bare"], strict=True)]
        row = {
            "microseconds": Spread.of(times),
            "over_bare": Spread.of(over),
            "wall_microseconds": Spread.of(wall[name]),
        }
        for other in ("tutorial", "nexus"):
            pairs = zip(times, processor[other], strict=True)
            row[f"ratio_to_{other}"] = Spread.of([mine / theirs for mine, theirs in pairs])
        table[name] = {key: asdict(spread) for key, spread in row.items()}
    return table


def promises(table: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """The engine's targets, and whether they were met."""
    ours = table["nexus"]
    kept = {
        f"at most {MOST_OVERHEAD:g} us over the bare loop": (
            ours["over_bare"]["median"] <= MOST_OVERHEAD
        ),
        f"at most {MOST_OF_TUTORIAL:g} of the tutorial loop": (
            ours["ratio_to_tutorial"]["median"] <= MOST_OF_TUTORIAL
        ),
    }
    for peer in (make.__name__ for make in PEERS if make.__name__ in table):
        kept[f"below {peer}"] = table[peer]["ratio_to_nexus"]["median"] > 1
    return kept


def machine() -> dict[str, str]:
    """The machine and versions measured."""
    processor = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((x.split(": ")[1] for x in lines if x.startswith("model name")), processor)
    about = {
        "date": date.today().isoformat(),
        "processor": processor,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("pluggy", *PEERS.values()):
        with suppress(PackageNotFoundError):
            about[name] = version(name)
    return about


def show(results: Mapping[str, Any]) -> None:
    """Print the table, skipped cases, and the targets."""
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    print(f"{results['rounds']} rounds of {results['steps']} steps; microseconds per step\n")
    print(f"{'':13}{'median':>8}{'least':>8}{'most':>8}", end="")
    print(f"{'over bare':>11}{'x tutorial':>12}{'x nexus':>9}{'wall':>9}")
    for name, row in results["cases"].items():
        time_, over = row["microseconds"], row["over_bare"]["median"]
        print(f"{name:13}{time_['median']:8.1f}{time_['least']:8.1f}{time_['most']:8.1f}", end="")
        print(f"{over:+11.1f}{row['ratio_to_tutorial']['median']:12.3f}", end="")
        print(f"{row['ratio_to_nexus']['median']:9.3f}{row['wall_microseconds']['median']:9.1f}")
    for name, reason in results["skipped"].items():
        print(f"{name:13} skipped: {reason}")
    for promise, kept in results["promises"].items():
        print(f"{'met   ' if kept else 'MISSED'}  {promise}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON on request; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds per case")
    parser.add_argument("--steps", type=int, default=STEPS, help="per round; a multiple of 10")
    parser.add_argument("--no-peers", action="store_true", help="only the loops and our engine")
    parser.add_argument("--quick", action="store_true", help="a short run; never exits with 1")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.steps = QUICK_ROUNDS, QUICK_STEPS
    if options.rounds < 1 or options.steps < LOG_EVERY or options.steps % LOG_EVERY:
        parser.error(f"--rounds must be at least 1, and --steps a multiple of {LOG_EVERY}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peers warn of loaders without workers, and the like
    cases, skipped = available(peers=not options.no_peers)
    processor, wall = measure(cases, options.rounds, options.steps)
    table = summarise(processor, wall)
    results = {
        "machine": machine(),
        "rounds": options.rounds,
        "steps": options.steps,
        "cases": table,
        "skipped": skipped,
        "promises": promises(table),
        "microseconds_by_round": processor,
        "wall_microseconds_by_round": wall,
    }
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if options.quick or all(results["promises"].values()) else 1)


if __name__ == "__main__":
    main()
