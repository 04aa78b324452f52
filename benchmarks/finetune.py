"""Fine-tuning a small Llama: this trainer, the Hugging Face Trainer and TRL's SFTTrainer.

    pip install -e '.[bench]'
    python -m benchmarks.finetune                     # rounds of full and LoRA training
    python -m benchmarks.finetune --json out.json --rounds 5 --steps 6

All train the same random Llama (vocabulary 32,000, width 256, 6 layers) on the same rows of 2,048
ids in the same order with AdamW in float32, in full or with LoRA of rank 8 on every linear layer of
its blocks. Each measurement is a separate process, and the sides alternate, so that a busy machine
slows all alike. The time excludes the first step; the memory is the peak during training minus what
the process had with its model loaded and all weights read.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

VOCABULARY, LENGTH, RATE, RANK = 32_000, 2_048, 1e-3, 8
SIDES = ("ours", "trainer", "trl")
KINDS = ("full", "lora")


class Watch:
    """Measures a side: called when training starts, with the model loaded, and after each step."""

    def __init__(self) -> None:
        self.held = 0.0
        self.stamps: list[float] = []
        self.worked: list[float] = []  # CPU seconds, which other load hardly affects

    def begin(self, model: torch.nn.Module) -> None:
        """Measure peak memory from here on.

        Weights in safetensors are memory-mapped, and become resident when first read. Reading them
        here keeps that memory, which every side needs, out of the measurement.
        """
        for parameter in model.parameters():
            parameter.detach().sum()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self.held = memory("VmRSS")

    def step(self) -> None:
        """Record the time."""
        self.stamps.append(time.perf_counter())
        self.worked.append(time.process_time())


Run = Callable[[Path, list[Tensor], bool, Watch], list[float]]
"""Given the model folder, rows, whether to use adapters, and the `Watch`: the losses."""


def main() -> None:
    """Measure, print a table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=5, help="steps per measurement; the first is warm-up"
    )
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as place:
        save_model(Path(place))
        found = {
            kind: rounds(kind, Path(place), options.rounds, options.steps, options.length)
            for kind in KINDS
        }
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def save_model(folder: Path) -> None:
    """A random Llama, and a tokenizer, which the peers require."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
            num_attention_heads=4, max_position_embeddings=LENGTH, pad_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    words = {"<pad>": 0, "<eos>": 1, **{str(n): n for n in range(2, VOCABULARY)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<eos>",
    ).save_pretrained(folder)  # fmt: skip


def rounds(kind: str, folder: Path, count: int, steps: int, length: int) -> dict[str, Any]:
    """Measure every side in turn, repeatedly."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(count):
        order = SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]
        for side in order:
            words = ["--side", side, "--kind", kind, "--folder", str(folder)]
            words += ["--steps", str(steps), "--length", str(length)]
            ran = subprocess.run(
                [sys.executable, "-m", "benchmarks.finetune", *words],
                capture_output=True, text=True, check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                     "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
            if ran.returncode:
                raise SystemExit(f"{side} ({kind}) failed:\n{ran.stderr[-3000:]}")
            results[side].append(json.loads(ran.stdout.strip().splitlines()[-1]))
    return {side: summary(measured) for side, measured in results.items()}


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the result of each round."""
    return {
        "tokens_per_s": median(m["tokens_per_s"] for m in measured),
        "tokens_per_cpu_s": median(m["tokens_per_cpu_s"] for m in measured),
        "rise_mb": median(m["rise_mb"] for m in measured),
        "peak_mb": median(m["peak_mb"] for m in measured),
        "losses": measured[0]["losses"],
        "rounds": measured,
    }


def table(found: dict[str, Any]) -> str:
    """Print the measurements, and how the losses compare."""
    lines = [
        f"{'':18}{'tokens/s':>10}{'by CPU':>10}{'rise MB':>10}{'peak MB':>10}  first and last loss"
    ]
    for kind, sides in found.items():
        for side, row in sides.items():
            losses = row["losses"]
            lines.append(
                f"{kind:6}{side:12}{row['tokens_per_s']:10.0f}"
                f"{row['tokens_per_cpu_s']:10.0f}{row['rise_mb']:10.0f}"
                f"{row['peak_mb']:10.0f}  {losses[0]:.6f} {losses[-1]:.6f}"
            )
        ours, peers = sides["ours"], [sides["trainer"], sides["trl"]]
        fastest = max(peers, key=lambda row: row["tokens_per_cpu_s"])
        speed, room = (ours[key] / fastest[key] for key in ("tokens_per_cpu_s", "rise_mb"))
        lines.append(
            f"{kind:6}ours over the faster peer: {speed:.2f} times the tokens per CPU second, "
            f"{room:.2f} of its memory"
        )
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train one side in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(10, VOCABULARY + 10, dtype=torch.float)  # Zipf's law, like words
    rows = [
        torch.multinomial(weights, options.length, replacement=True, generator=generator)
        for _ in range(options.steps)
    ]
    watch = Watch()
    run: Run = {"ours": ours, "trainer": trainer, "trl": trl}[options.side]
    losses = run(options.folder, rows, options.kind == "lora", watch)
    peak, tokens = memory("VmHWM"), (len(rows) - 1) * options.length
    return {
        "tokens_per_s": tokens / (watch.stamps[-1] - watch.stamps[0]),
        "tokens_per_cpu_s": tokens / (watch.worked[-1] - watch.worked[0]),
        "peak_mb": peak,
        "rise_mb": peak - watch.held,
        "losses": losses,
    }


def memory(what: str) -> float:
    """Resident megabytes of the process, now (VmRSS) or at their peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def ours(folder: Path, rows: list[Tensor], by_adapters: bool, watch: Watch) -> list[float]:
    """The engine with `model_hf`, `loss_lm` and, on request, `peft`."""
    from nexus_core import Engine, Plugin, PluginConfig, RunData, hookimpl
    from nexus_plugins.loss_lm import LossLmPlugin
    from nexus_plugins.optim_adamw import OptimAdamwPlugin
    from nexus_plugins_contrib.model_hf import ModelHfPlugin
    from nexus_plugins_contrib.peft import PeftPlugin

    class RowsPlugin(Plugin[PluginConfig]):
        @hookimpl
        def make_data(self) -> RunData:
            end = torch.tensor([-100])
            return RunData(
                [{"input_ids": r[None], "labels": torch.cat([r[1:], end])[None]} for r in rows], {}
            )

    plugins: list[Plugin[Any]] = [
        RowsPlugin(), ModelHfPlugin(path=str(folder)), LossLmPlugin(label_smoothing=0.0),
        OptimAdamwPlugin(lr=RATE, betas=(0.9, 0.999), weight_decay=0.0),
    ]  # fmt: skip
    if by_adapters:
        plugins.append(PeftPlugin(r=RANK, alpha=16))
    engine = Engine(plugins=plugins, seed=0, log_every=1)
    losses = []
    watch.begin(engine.model)
    for _ in engine.steps(until=f"{len(rows)} steps"):
        watch.step()
        losses.append(engine.metrics["train/lm_loss"])
    return losses


def trainer(folder: Path, rows: list[Tensor], by_adapters: bool, watch: Watch) -> list[float]:
    """transformers.Trainer."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder)
    if by_adapters:
        from peft import get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, lora())
    made = _in_order(Trainer)(
        model=model,
        args=TrainingArguments(**arguments(len(rows))),
        train_dataset=data(rows, labels=True),
        callbacks=[watcher(watch)],
    )
    return _losses(made)


def trl(folder: Path, rows: list[Tensor], by_adapters: bool, watch: Watch) -> list[float]:
    """TRL's SFTTrainer."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    made = _in_order(SFTTrainer)(
        model=str(folder),
        args=SFTConfig(
            **arguments(len(rows)), max_length=LENGTH, model_init_kwargs={"dtype": "float32"}
        ),
        train_dataset=data(rows, labels=False),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora() if by_adapters else None,
        callbacks=[watcher(watch)],
    )
    return _losses(made)


def arguments(steps: int) -> dict[str, Any]:
    """The arguments of both peers: plain AdamW at a constant rate, no saving or reporting."""
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": steps, "per_device_train_batch_size": 1,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "weight_decay": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def lora() -> Any:
    """The adapters of all sides."""
    from peft import LoraConfig

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=RANK, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")


def data(rows: list[Tensor], *, labels: bool) -> Any:
    """The rows as a Hugging Face data set."""
    from datasets import Dataset

    ids = [row.tolist() for row in rows]
    mask = [[1] * len(row) for row in ids]
    columns = {"input_ids": ids, **({"labels": ids, "attention_mask": mask} if labels else {})}
    return Dataset.from_dict(columns)


def _in_order(kind: Any) -> Any:
    """A trainer that reads the rows in order."""

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *_: object) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def watcher(watch: Watch) -> Any:
    """A callback that measures the peers."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_train_begin(self, *_: object, **given: Any) -> None:
            watch.begin(given["model"])

        def on_step_end(self, *_: object, **__: object) -> None:
            watch.step()

    return Watcher()


def _losses(made: Any) -> list[float]:
    with tempfile.TemporaryDirectory():
        stdout, sys.stdout = sys.stdout, sys.stderr  # the peers print their logs
        try:
            made.train()
        finally:
            sys.stdout = stdout
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
