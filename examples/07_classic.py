"""Train NEXUS with the classic API: a config object, two loaders, a trainer.

    python examples/07_classic.py --steps 200 --out runs/classic

Run it again with --resume to continue from the last checkpoint.
"""

import argparse
import json
import logging
from pathlib import Path

from nexus_plugins.classic import NEXUSTrainer, TrainingConfig, create_dataloader
from nexus_plugins.model_nexus import NEXUSConfig, NEXUSCore


def main() -> None:
    arguments = parsed_arguments()
    config = TrainingConfig(
        vocab_size=256,  # bytes
        d_model=128,
        ssm_n_layers=2,
        learning_rate=3e-3,
        warmup_steps=arguments.steps // 10,
        max_steps=arguments.steps,
        batch_size=8,
        max_seq_length=256,
        eval_steps=max(1, arguments.steps // 2),
        save_steps=max(1, arguments.steps // 4),
        output_dir=arguments.out,
    )
    # Text available on every machine: two packages of the standard library, one document per file.
    train_loader = create_dataloader(sources_of(logging), config)
    val_loader = create_dataloader(sources_of(json), config, train=False)

    model = NEXUSCore(NEXUSConfig(**config.model_settings()))
    trainer = NEXUSTrainer(model, config)
    result = trainer.train(
        train_loader, val_loader, resume_from="auto" if arguments.resume else None
    )

    print(f"{result.status} after {result.step} steps, {result.tokens} tokens")
    for name, value in sorted(result.metrics.items()):
        print(f"{name:32} {value:.4f}")


def sources_of(package) -> list[bytes]:
    """The modules of a package, as documents of bytes."""
    files = sorted(Path(package.__file__).parent.glob("*.py"))
    return [file.read_bytes() for file in files]


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--out", default="runs/classic", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()
