"""Check that a reloaded model computes the same as the trained one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus_core.errors import CheckpointError

__all__ = ["Receipt", "compare", "fixed_batch", "logits_of", "logits_of_fresh_process"]

_ROWS, _LENGTH, _SEED = 2, 32, 0
_PRECISE, _COARSE = 1e-5, 3e-2
"""Tolerance relative to the largest logit: in float32, and in narrower dtypes."""
_SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, batch, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(load_file(batch)["input_ids"]).logits
save_file({"logits": logits.float().contiguous()}, out)
"""


@dataclass(frozen=True)
class Receipt:
    """How far the logits of a loaded model are from those of the trained one, on fixed ids.

    Args:
        largest_logit_difference: largest absolute difference of a logit.
        kl_divergence: KL divergence of the next-token distributions in nats, maximum over
            positions.
        bound: the bound on both.
        rows, length, seed: of the batch, which has uniform ids from torch's CPU generator.
        checkpoint: the exported checkpoint.
        step: step of the checkpoint.
    """

    largest_logit_difference: float
    kl_divergence: float
    bound: float
    rows: int
    length: int
    seed: int
    checkpoint: str
    step: int

    def write(self, path: Path) -> None:
        """Save it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def fixed_batch(vocabulary: int, limit: int | None) -> Tensor:
    """Ids `(2, 32)`, always the same for a vocabulary size; shorter if a model's context is."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocabulary, (_ROWS, min(_LENGTH, limit or _LENGTH)), generator=generator)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits `(B, T, V)` in float32 of a model in evaluation mode."""
    output: Any = model.eval()(ids)
    logits: Tensor = getattr(output, "logits", output)
    return logits.float()


def logits_of_fresh_process(folder: Path, ids: Tensor) -> Tensor:
    """The same for a model loaded in a new process, with the code next to it.

    Raises:
        CheckpointError: it does not load there.
    """
    with tempfile.TemporaryDirectory() as place:
        batch, out = Path(place) / "batch.safetensors", Path(place) / "logits.safetensors"
        save_file({"input_ids": ids}, batch)
        words = [sys.executable, "-I", "-c", _SCRIPT, str(folder), str(batch), str(out)]
        environment = {**os.environ, "HF_MODULES_CACHE": place, "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if ran.returncode != 0:
            last = ran.stderr.strip().splitlines()[-1:] or ["no output"]
            raise CheckpointError(f"the export does not load in a fresh process: {last[0][:300]}")
        return load_file(out)["logits"]


def compare(
    trained: Tensor, loaded: Tensor, is_precise: bool, checkpoint: Path, step: int
) -> Receipt:
    """Compare logits `(B, T, V)`.

    Raises:
        CheckpointError: they differ by more than the bound.
    """
    largest = (trained - loaded).abs().max().item()
    ours, theirs = (logits.double().log_softmax(-1) for logits in (trained, loaded))
    kl = (ours.exp() * (ours - theirs)).sum(-1).max().item()
    part = _PRECISE if is_precise else _COARSE
    bound = part * max(1.0, trained.abs().max().item())
    rows, length = trained.shape[:2]
    receipt = Receipt(largest, kl, bound, rows, length, _SEED, str(checkpoint), step)
    if not (largest <= bound and kl <= bound):
        raise CheckpointError(
            f"the export does not match the trained model: logits differ by up to {largest:.3g} "
            f"and the KL divergence is {kl:.3g}, above the limit of {bound:.3g}; nothing was "
            "written"
        )
    return receipt
