"""Train a model of `transformers`, with the same losses as a plain PyTorch loop.

    pip install transformers
    python examples/04_huggingface_model.py

The GPT-2 is created from a config, so nothing is downloaded. It has dropout, and both runs start
from the same seed: the losses must be bitwise equal at every step.
"""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from nexus_core import Engine
from nexus_plugins.clip import ClipPlugin

SEED, STEPS, LR = 0, 30, 3e-3
TEXT = b"the quick brown fox jumps over the lazy dog. " * 60


def main() -> None:
    batches = rows_of_bytes(length=32, rows=8)
    by_engine = losses_by_engine(fresh_model(), batches)
    by_hand = losses_by_hand(fresh_model(), batches)
    print("step  engine    by hand")
    for step in range(0, STEPS, 5):
        print(f"{step + 1:>4}  {by_engine[step]:.6f}  {by_hand[step]:.6f}")
    equal = sum(a == b for a, b in zip(by_engine, by_hand, strict=True))
    print(f"{equal} of {STEPS} losses are bitwise equal")


def losses_by_engine(model: GPT2LMHeadModel, batches: list[dict[str, Tensor]]) -> list[float]:
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=LR),
        loss=lambda model, batch: model(**batch).loss,
        plugins=[ClipPlugin(max_norm=1.0)],
        log_every=1,
        seed=SEED,
    )
    return [engine.metrics["train/loss"] for _ in engine.steps(batches, until=f"{STEPS} steps")]


def losses_by_hand(model: GPT2LMHeadModel, batches: list[dict[str, Tensor]]) -> list[float]:
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh_model() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=2,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config).train()


def rows_of_bytes(length: int, rows: int) -> list[dict[str, Tensor]]:
    """Batches of (rows, length); the model shifts the labels itself."""
    ids = torch.tensor(list(TEXT))
    batches = ids[: len(ids) // (rows * length) * rows * length].view(-1, rows, length)
    return [{"input_ids": batch, "labels": batch} for batch in batches]


if __name__ == "__main__":
    main()
