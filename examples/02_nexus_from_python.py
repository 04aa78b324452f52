"""Train NEXUS from Python: every part of a `nexus-run` is an object that you can create yourself.

    python examples/02_nexus_from_python.py --steps 60 --out runs/from-python

The text is the source code of Python's standard library, so nothing is downloaded.
"""

import argparse

import torch

from nexus_core import Engine
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.data_text import DataTextPlugin
from nexus_plugins.guard import GuardPlugin
from nexus_plugins.jsonl import JsonlPlugin
from nexus_plugins.loss_lm import LossLmPlugin
from nexus_plugins.loss_world import LossWorldPlugin
from nexus_plugins.lr_cosine import LrCosinePlugin
from nexus_plugins.model_nexus import ModelNexusPlugin
from nexus_plugins.optim_adamw import OptimAdamwPlugin


def main() -> None:
    arguments = parsed_arguments()
    engine = Engine(
        plugins=[
            DataTextPlugin(seq_len=128, batch_size=8, valid_limit=8192),
            ModelNexusPlugin(d_model=96, ssm_n_layers=2, reason=False, energy=False, causal=False),
            LossLmPlugin(label_smoothing=0.0),
            LossWorldPlugin(weight=0.1),
            OptimAdamwPlugin(lr=6e-3),
            LrCosinePlugin(warmup=f"{max(1, arguments.steps // 10)} steps"),
            GuardPlugin(),
            ClipPlugin(max_norm=1.0),
            JsonlPlugin(),
        ],
        seed=0,
        out=arguments.out,
    )
    result = engine.fit(until=f"{arguments.steps} steps")

    bits = result.metrics["val/bits_per_byte"]
    print(f"{result.status} after {result.step} steps: {bits:.2f} bits per byte (untrained: 8)")
    prompt = torch.tensor([list(b"def ")])
    written = engine.model.generate(prompt, 60, temperature=0.7)
    print(repr(bytes(written[0].tolist()).decode(errors="replace")))


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--out", default="runs/from-python", help="folder of the run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
