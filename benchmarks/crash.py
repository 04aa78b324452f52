"""Kill a small run with every first-party plugin repeatedly, and compare its result bit by bit.

    python -m benchmarks.crash [--kills 200] [--terms 0.33] [--workers 2] [--seed 0] [--out DIR]

The same as `nexus-run verify-resume`, with its own config: the NEXUS model and all its losses on a
few kilobytes of text, accumulation, AMP, curriculum, EMA, guard, loggers, evaluation, two loader
workers, and a checkpoint every other step. One kill in three occurs while a checkpoint is written,
and one in three is a SIGTERM to the run and its workers, after which it has saved.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import yaml

from nexus_core.cli.verify_resume import Report, verify_resume
from nexus_core.plan import installed

__all__ = ["config_of", "crash"]

STEPS_PER_KILL = 6


def config_of(steps: int, train: str, valid: str, workers: int = 0) -> dict[str, object]:
    """A config with all first-party plugins that can be combined, on two text files."""
    text: dict[str, object] = {"train": train, "valid": valid, "seq_len": 32, "batch_size": 2}
    plugins: dict[str, dict[str, object]] = {
        "data_text": {**text, "num_workers": workers},
        "model_nexus": {"d_model": 32, "ssm_n_layers": 1, "reason": True, "causal": True},
        "loss_lm": {},
        "loss_world": {},
        "loss_reason": {},
        "loss_energy": {},
        "loss_causal": {},
        "optim_adamw": {"lr": 0.001},
        "lr_cosine": {"warmup": "2 steps"},
        "weigh_uncertainty": {},
        "amp": {},
        "guard": {"spike_threshold": 50.0},
        "clip": {},
        "curriculum": {},
        "ema": {},
        "early_stop": {"patience": 1_000_000},  # watches, but never ends the run early
        "throughput": {},
        "diagnose": {},
        "grad_stats": {},
        "checkpoint": {"every": "2 steps", "keep_last": 3},
        "jsonl": {},
        "tensorboard": {},
        "console": {},
    }
    there = installed()
    return {
        "until": f"{steps} steps",
        "log_every": "3 steps",
        "eval_every": "5 steps",
        "accumulate": 2,
        "seed": 1,
        "plugins": {name: block for name, block in plugins.items() if name in there},
    }


def crash(
    kills: int, out: Path, seed: int = 0, *, terms: float = 1 / 3, workers: int = 2
) -> Report:
    """Kill the run repeatedly; leaves the config in `out` next to the certificate.

    Args:
        kills: number of kills.
        out: a new folder.
        seed: seed of the moments.
        terms: share of kills that are a SIGTERM.
        workers: loader workers.
    """
    steps = STEPS_PER_KILL * kills + 10
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.with_suffix(".yaml")
    train, valid = out.with_suffix(".train.txt"), out.with_suffix(".valid.txt")
    train.write_text("".join(f"{n} squared is {n * n}. " for n in range(300)), encoding="utf-8")
    valid.write_text("".join(f"{n} squared is {n * n}. " for n in range(300, 310)), "utf-8")
    text = yaml.safe_dump(config_of(steps, str(train), str(valid), workers), sort_keys=False)
    config.write_text(text, encoding="utf-8")
    return verify_resume(str(config), out, kills=kills, seed=seed, threads=1, terms=terms)


def main() -> None:
    """Print the outcome; exit with 1 if any bit differs or fewer kills happened than requested."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--terms", type=float, default=1 / 3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="nexus-crash-")) / "crash"
    begin = time.perf_counter()
    terms, workers = options.terms, options.workers
    report = crash(options.kills, out, options.seed, terms=terms, workers=workers)
    print(
        f"{report.kills} kills, {report.terms} of them SIGTERM, {report.within_saves} while "
        f"saving, {report.kills} resumes, "
        f"{report.steps} steps, {time.perf_counter() - begin:.0f} s: "
        f"{'identical to the undisturbed run' if report.holds else 'DIFFERENT'}"
    )
    for difference in report.differences:
        print(f"  {difference}")
    print(f"state {report.fingerprint}; certificate and runs in {out}")
    raise SystemExit(0 if report.holds and report.kills == options.kills else 1)


if __name__ == "__main__":
    main()
