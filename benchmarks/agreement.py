"""Losses and weights of a few steps compared with a plain PyTorch loop: ours, Trainer, SFTTrainer.

    pip install -e '.[bench]'
    python -m benchmarks.agreement
    python -m benchmarks.agreement --steps 5 --json out.json

All train the same tiny random Llama and GPT-2 on the same documents in the same order, with SGD and
momentum in float32; the loss covers only the end of each document. The reference loop processes
each document separately, in float64, and takes the mean over all labels of the step. Reported are
the largest differences from that loop: of a step's logged loss, and of a weight after the last
step.

The optimizer is SGD because the step size of AdamW hardly depends on the scale of the gradient, so
AdamW would hide a wrong factor.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD

VOCABULARY, ROW, ROWS, IGNORED, RATE = 97, 24, 2, -100, 0.05
KINDS = ("llama", "gpt2")
LAYOUTS = ("padded", "packed")
ACCUMULATIONS = (1, 3, 4)


@dataclass(frozen=True)
class Document:
    """Ids and labels of equal length: the label is the id if it is learned, as in Hugging Face."""

    ids: Tensor
    labels: Tensor


Micro = list[list[Document]]
"""A micro-batch: rows of documents; one per row if padded."""
Run = Callable[[str, list[Micro], int], tuple[list[float], Any]]
"""Given the kind of model, micro-batches and their number per step: losses, and the model."""


@dataclass(frozen=True)
class Found:
    """The largest differences of one side from the handwritten loop."""

    model: str
    layout: str
    accumulate: int
    side: str
    loss: float
    weight: float


def main() -> None:
    """Train every side, print a table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    for package in sorted({needed for needed in NEEDS.values() if not find_spec(needed)}):
        print(f"skipped, needs {package}: pip install '.[bench]'")
    found = [
        one
        for kind, layout, accumulate in product(KINDS, LAYOUTS, ACCUMULATIONS)
        for one in differences(kind, layout, accumulate, options.steps)
    ]
    print(table(found))
    if options.json:
        text = json.dumps([asdict(one) for one in found], indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


def differences(kind: str, layout: str, accumulate: int, steps: int) -> list[Found]:
    """Compare every installed side that supports this layout with the handwritten loop."""
    micro = micro_batches(layout == "packed", steps * accumulate)
    losses, reference = by_hand(kind, micro, accumulate, torch.float64)
    weights = {name: p.detach() for name, p in reference.named_parameters()}
    found = []
    for side, run in SIDES[layout].items():
        if not installed(side):
            continue
        theirs, model = run(kind, micro, accumulate)
        assert len(theirs) == len(losses), (side, theirs)
        loss = max(abs(one - other) for one, other in zip(theirs, losses, strict=True))
        weight = max(
            float((p.detach().double() - weights[name]).abs().max())
            for name, p in model.named_parameters()
        )
        found.append(Found(kind, layout, accumulate, side, loss, weight))
    return found


def installed(side: str) -> bool:
    """Whether the packages that a side needs are installed."""
    return all(find_spec(needed) for name, needed in NEEDS.items() if side.startswith(name))


def table(found: list[Found]) -> str:
    """One line per side and layout: the differences of loss and weights for each accumulation."""
    lines = [f"{'':41}" + "".join(f"{f'accumulate {n}':>22}" for n in ACCUMULATIONS)]
    lines.append(f"{'':41}" + f"{'loss':>12}{'weights':>10}" * len(ACCUMULATIONS))
    for kind, layout in product(KINDS, LAYOUTS):
        for side in filter(installed, SIDES[layout]):
            row = [f for f in found if (f.model, f.layout, f.side) == (kind, layout, side)]
            figures = "".join(f"{f.loss:12.0e}{f.weight:10.0e}" for f in row)
            lines.append(f"{kind:6}{layout:8}{side:27}{figures}")
    return "\n".join(lines)


def micro_batches(packed: bool, count: int) -> list[Micro]:
    """Documents of at least 2 ids, which start with a prompt of zero to all but one ids.

    Packed rows are full to the last position, so that rows contain the same documents on all sides.
    """
    generator = torch.Generator().manual_seed(1)

    def some(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    def document(length: int) -> Document:
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: some(0, length - 1)] = IGNORED
        return Document(ids, labels)

    def row() -> list[Document]:
        if not packed:
            return [document(some(2, 12))]
        first = some(2, 9)
        second = some(2, 9)
        return [document(n) for n in (first, second, ROW - first - second)]

    return [[row() for _ in range(ROWS)] for _ in range(count)]


def model_of(kind: str) -> Any:
    """A tiny random model, always the same, without dropout, sensitive to document boundaries."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common = {"vocab_size": VOCABULARY, "initializer_range": 0.1, "pad_token_id": 1}
    common |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, **common,
            )
        ).train()  # fmt: skip
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet, **common)).train()


def sgd(model: Any) -> SGD:
    """The optimizer of all sides."""
    return SGD(model.parameters(), lr=RATE, momentum=0.9)


def by_hand(
    kind: str, micro: list[Micro], accumulate: int, dtype: torch.dtype = torch.float32
) -> tuple[list[float], Any]:
    """Each document separately; the sum over the step's labels divided by their number."""
    model = model_of(kind).to(dtype)
    optimizer = sgd(model)
    losses = []
    for start in range(0, len(micro), accumulate):
        documents = [d for batch in micro[start : start + accumulate] for row in batch for d in row]
        labels = sum(int((d.labels[1:] != IGNORED).sum()) for d in documents)
        optimizer.zero_grad()
        total = 0.0
        for document in documents:
            logits = model(input_ids=document.ids[None]).logits[0, :-1]
            loss = cross_entropy(logits, document.labels[1:], reduction="sum") / labels
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses, model


def ours(kind: str, micro: list[Micro], accumulate: int) -> tuple[list[float], Any]:
    """The engine with `model_hf` and `loss_lm`."""
    from nexus_core import Engine
    from nexus_plugins.loss_lm import LossLmPlugin
    from nexus_plugins_contrib.model_hf import ModelHfPlugin

    model = model_of(kind)
    plugins = [ModelHfPlugin(path="."), LossLmPlugin(label_smoothing=0.0)]
    engine = Engine(model, sgd(model), plugins=plugins, log_every=1, accumulate=accumulate)
    batches = [tensors(rows) for rows in micro]
    steps = engine.steps(batches, until=f"{len(micro) // accumulate} steps")
    return [engine.metrics["train/lm_loss"] for _ in steps], model


def tensors(rows: list[list[Document]]) -> dict[str, Tensor]:
    """A batch for the engine: labels are the next ids, and documents are numbered."""
    width = max(sum(len(d.ids) for d in row) for row in rows)
    shape = (len(rows), width)
    batch = {
        "input_ids": torch.ones(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
        "segment_ids": torch.zeros(shape, dtype=torch.int32),
    }
    for number, row in enumerate(rows):
        at = 0
        for place, document in enumerate(row):
            end = at + len(document.ids)
            batch["input_ids"][number, at:end] = document.ids
            batch["labels"][number, at : end - 1] = document.labels[1:]
            batch["segment_ids"][number, at:end] = place
            at = end
        batch["segment_ids"][number, at:] = len(row)
    if all(len(row) == 1 for row in rows):
        batch["attention_mask"] = (batch.pop("segment_ids") == 0).long()
    return batch


def trainer_padded(kind: str, micro: list[Micro], accumulate: int) -> tuple[list[float], Any]:
    """transformers.Trainer, padded by its collator for custom labels."""
    from transformers import DataCollatorForSeq2Seq

    return _trained_by_trainer(kind, micro, accumulate, DataCollatorForSeq2Seq(tokenizer()))


def trainer_first(kind: str, micro: list[Micro], accumulate: int) -> tuple[list[float], Any]:
    """transformers.Trainer, with the label that no position predicts removed beforehand."""

    def without_first(document: Document) -> Document:
        ignored = document.labels.new_tensor([IGNORED])
        return Document(document.ids, torch.cat([ignored, document.labels[1:]]))

    changed = [[[without_first(d) for d in row] for row in batch] for batch in micro]
    return trainer_padded(kind, changed, accumulate)


def trainer_packed(kind: str, micro: list[Micro], accumulate: int) -> tuple[list[float], Any]:
    """transformers.Trainer, documents packed into one row by its collator."""
    from transformers import DataCollatorWithFlattening

    return _trained_by_trainer(kind, micro, accumulate, DataCollatorWithFlattening())


def _trained_by_trainer(
    kind: str, micro: list[Micro], accumulate: int, collator: Any
) -> tuple[list[float], Any]:
    from transformers import Trainer, TrainingArguments

    model = model_of(kind)
    made = _in_order(Trainer)(
        model=model,
        args=TrainingArguments(**arguments(micro, accumulate)),
        train_dataset=data(micro),
        data_collator=collator,
        optimizers=(sgd(model), None),
    )
    return _losses(made), model


def trl_padded(kind: str, micro: list[Micro], accumulate: int) -> tuple[list[float], Any]:
    """TRL's SFTTrainer with its own collator."""
    return _trained_by_trl(kind, micro, accumulate, max_length=ROW)


def trl_padding_free(kind: str, micro: list[Micro], accumulate: int) -> tuple[list[float], Any]:
    """TRL's SFTTrainer, a micro-batch's documents in one row, which is also what `packing` does."""
    return _trained_by_trl(kind, micro, accumulate, padding_free=True, max_length=None)


def trl_wrapped(kind: str, micro: list[Micro], accumulate: int) -> tuple[list[float], Any]:
    """TRL's SFTTrainer with documents concatenated and cut at the row length."""
    settings = {"packing": True, "packing_strategy": "wrapped", "max_length": ROW}
    return _trained_by_trl(kind, micro, accumulate, per_device_train_batch_size=ROWS, **settings)


def _trained_by_trl(
    kind: str, micro: list[Micro], accumulate: int, **settings: Any
) -> tuple[list[float], Any]:
    from trl import SFTConfig, SFTTrainer

    model = model_of(kind)
    given = arguments(micro, accumulate) | {"gradient_checkpointing": False} | settings
    made = _in_order(SFTTrainer)(
        model=model,
        args=SFTConfig(**given),
        train_dataset=data(micro),
        processing_class=tokenizer(),
        optimizers=(sgd(model), None),
    )
    return _losses(made), model


def arguments(micro: list[Micro], accumulate: int) -> dict[str, Any]:
    """The arguments of both peers: a constant rate, no clipping, no saving or reporting."""
    return {
        "output_dir": tempfile.gettempdir(), "max_steps": len(micro) // accumulate,
        "per_device_train_batch_size": sum(map(len, micro[0])),
        "gradient_accumulation_steps": accumulate, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "bf16": False, "dataloader_pin_memory": False,
    }  # fmt: skip


def data(micro: list[Micro]) -> Any:
    """The documents as a Hugging Face data set, one per row."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    documents = [document for batch in micro for row in batch for document in row]
    columns = {
        "input_ids": [document.ids.tolist() for document in documents],
        "labels": [document.labels.tolist() for document in documents],
    }
    return Dataset.from_dict(columns)


def tokenizer() -> Any:
    """A tokenizer, which the peers require."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<pad>": 1, **{str(n): n for n in range(2, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>"
    )


def _in_order(kind: Any) -> Any:
    """A trainer that reads the rows in order."""

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *_: object) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def _losses(made: Any) -> list[float]:
    from transformers import PrinterCallback

    made.remove_callback(PrinterCallback)
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


SIDES: dict[str, dict[str, Run]] = {
    "padded": {
        "by hand in float32": by_hand,
        "ours": ours,
        "Trainer": trainer_padded,
        "SFTTrainer": trl_padded,
        "Trainer, first label -100": trainer_first,
    },
    "packed": {
        "by hand in float32": by_hand,
        "ours": ours,
        "Trainer, flattening": trainer_packed,
        "SFTTrainer, padding_free": trl_padding_free,
        "SFTTrainer, wrapped": trl_wrapped,
    },
}

NEEDS = {"Trainer": "accelerate", "SFTTrainer": "trl"}
"""The package that sides with this prefix need, besides transformers."""


if __name__ == "__main__":
    main()
