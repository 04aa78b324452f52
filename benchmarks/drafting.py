"""The speed-up of `generate` when the world model drafts.

    python -m benchmarks.drafting [--steps 300] [--drafts 1 2 4 8] [--json PATH]

Trains a byte model with only the world module on the standard library's source, then continues
prompts from the validation text one at a time, alternately with and without drafts. Times are CPU
times on one thread; a ratio is the median over the prompts. `tokens per pass` is the number of
tokens gained per pass of the model over a draft.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nexus_core import Engine
from nexus_core.plan import load
from nexus_plugins.model_nexus import NEXUSCore

PROMPT, NEW, PROMPTS = 64, 192, 8


class Counted:
    """Counts the passes of a model over several tokens."""

    def __init__(self, model: NEXUSCore) -> None:
        self.passes, self._read = 0, model.read
        model.read = self  # type: ignore[method-assign, assignment]

    def __call__(self, input_ids: Tensor, states: list[Any]) -> Any:
        self.passes += 1
        return self._read(input_ids, states)


def trained(steps: int, width: int, layers: int) -> tuple[NEXUSCore, list[Tensor], float]:
    """The model, prompts, and its bits per byte."""
    modules = dict.fromkeys(("reason", "energy", "causal"), False)
    settings: dict[str, dict[str, Any]] = {
        "data_text": {"train": "stdlib", "seq_len": 256, "batch_size": 8, "valid_limit": 65_536},
        "model_nexus": {"d_model": width, "ssm_n_layers": layers, "ssm_d_state": 16, **modules},
        "loss_lm": {"label_smoothing": 0.0},
        "loss_world": {},
        "optim_adamw": {"lr": 3e-3, "weight_decay": 0.1},
        "lr_constant": {"warmup": "20 steps"},
        "clip": {},
    }
    engine = Engine(plugins=[load(name)(**values) for name, values in settings.items()], seed=0)
    engine.fit(until=f"{steps} steps")
    data = engine.data
    assert data is not None
    bits = engine.evaluate(data.valid)["val/bits_per_byte"]
    rows = next(iter(next(iter(data.valid.values()))))["input_ids"]
    return cast(NEXUSCore, engine.model), [row[:PROMPT] for row in rows[:PROMPTS]], bits


def race(model: NEXUSCore, prompts: list[Tensor], temperature: float, draft: int) -> dict[str, Any]:
    """Generate with and without drafts, prompt by prompt."""
    ratios, passes = [], 0
    for number, prompt in enumerate(prompts):
        seconds = {}
        for how in (0, draft) if number % 2 else (draft, 0):
            draw = torch.Generator().manual_seed(number)
            counted = Counted(model)
            begin = time.process_time()
            model.generate(prompt, NEW, temperature, generator=draw, draft=how)
            seconds[how] = time.process_time() - begin
            passes += counted.passes - 1 if how else 0
            del model.read
        ratios.append(seconds[0] / seconds[draft])
    return {
        "temperature": temperature,
        "draft": draft,
        "times as fast": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "tokens a pass": NEW * len(prompts) / passes,
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, race, print a table."""
    parser = argparse.ArgumentParser(prog="benchmarks.drafting", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, prompts, bits = trained(options.steps, options.width, options.layers)
    print(f"{bits:.3f} bits per byte after {options.steps} steps\n")
    print("| temperature | draft | speed-up | min | max | tokens per pass |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = [race(model, prompts, t, draft) for t in (0.0, 0.8) for draft in options.drafts]
    for row in rows:
        print("| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |", flush=True)
    if options.json:
        text = json.dumps({"bits_per_byte": bits, "rows": rows}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
