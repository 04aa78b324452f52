"""The classic trainer: every field of its config has an effect, and it runs the engine."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexus_core import ConfigError, DataError, PluginError
from nexus_core.plan import installed
from nexus_plugins.classic import (
    NEXUSCollator,
    NEXUSDataset,
    NEXUSTrainer,
    TrainingConfig,
    create_dataloader,
)
from nexus_plugins.model_nexus import NEXUSCore

EXAMPLE = Path(__file__).parents[2] / "examples" / "07_classic.py"
DOCUMENTS = [bytes([65 + (start + place) % 20 for place in range(33)]) for start in range(12)]
TINY = {
    "vocab_size": 128,
    "d_model": 32,
    "ssm_n_layers": 1,
    "max_seq_length": 16,
    "batch_size": 4,
    "eval_batch_size": 3,
    "warmup_steps": 0,
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "log_steps": 1,
    "device": "cpu",
}
ACTS_ON = {
    "learning_rate": ("optim_adamw", "lr", 3e-4),
    "weight_decay": ("optim_adamw", "weight_decay", 0.2),
    "betas": ("optim_adamw", "betas", (0.5, 0.6)),
    "eps": ("optim_adamw", "eps", 1e-5),
    "min_learning_rate": ("lr_cosine", "min_lr", 2e-6),
    "max_grad_norm": ("clip", "max_norm", 0.3),
    "label_smoothing": ("loss_lm", "label_smoothing", 0.3),
    "save_total_limit": ("checkpoint", "keep_last", 2),
    **{f"{term}_loss_weight": (f"loss_{term}", "weight", 0.7) for term in
       ("lm", "world", "reason", "energy", "causal")},
}  # fmt: skip


def tiny(folder: Path, **settings) -> TrainingConfig:
    return TrainingConfig(**{**TINY, "output_dir": str(folder), **settings})


def train(folder: Path, resume_from: str | None = None, **settings) -> NEXUSTrainer:
    config = tiny(folder, **settings)
    trainer = NEXUSTrainer(None, config)
    loaders = create_dataloader(DOCUMENTS, config), create_dataloader(DOCUMENTS, config, False)
    trainer.train(*loaders, resume_from=resume_from)
    return trainer


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("field", ACTS_ON)
def test_a_field_reaches_its_plugin(field, tmp_path):
    """Fails if a setting has no effect."""
    plugin, setting, value = ACTS_ON[field]
    trainer = NEXUSTrainer(None, tiny(tmp_path, **{field: value}))
    assert getattr(trainer.engine.plugins[plugin].config, setting) == value


@pytest.mark.parametrize(
    ("settings", "present", "absent"),
    [
        ({"lr_decay": "linear"}, "lr_linear", "lr_cosine"),
        ({"lr_decay": "constant"}, "lr_constant", "lr_cosine"),
        ({"max_grad_norm": 0}, "loss_lm", "clip"),
        ({"energy_loss_weight": 0}, "loss_lm", "loss_energy"),
    ],
)
def test_a_field_chooses_its_plugin(settings, present, absent, tmp_path):
    """Fails if training does not use the configured choice."""
    names = NEXUSTrainer(None, tiny(tmp_path, **settings)).engine.plugins
    assert present in names
    assert absent not in names


@pytest.mark.parametrize(
    ("settings", "plugin"),
    [({"fp16": True}, "amp"), ({"compile": True}, "compile"), ({"wandb_project": "p"}, "wandb")],
)
def test_what_needs_another_plugin_loads_it_or_says_so(settings, plugin, tmp_path):
    """Fails if 16-bit training, compilation or external logging is silently skipped."""
    if plugin in installed():
        names = {chosen.name for chosen in tiny(tmp_path, **settings).plugins()}
        assert plugin in names
    else:
        with pytest.raises(PluginError, match=plugin):
            NEXUSTrainer(None, tiny(tmp_path, **settings))


def test_steps_batches_logs_evaluations_and_checkpoints_are_as_configured(tmp_path):
    """Fails if a run is longer, larger or less verbose than configured."""
    trainer = train(tmp_path, gradient_accumulation_steps=2, max_steps=5, save_total_limit=1)
    state = trainer.engine.state
    assert (state.step, state.samples) == (5, 5 * 2 * 4)
    records = logged(tmp_path)
    assert [r["step"] for r in records if "train/total_loss" in r] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records if "val/loss" in r] == [2, 4, 5]
    assert {f"train/{term}_loss" for term in ("lm", "world", "reason", "energy", "causal")} <= set(
        records[0]
    )
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()
    assert (tmp_path / "checkpoints" / "final").exists()


def test_warmup_and_dropout_and_seed_act(tmp_path):
    """Fails if one of them has no effect."""
    warm = train(tmp_path / "warm", warmup_steps=4, max_steps=4)
    records = logged(tmp_path / "warm")
    rates = [r["train/learning_rate"] for r in records if "train/total_loss" in r]
    assert rates == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4])
    assert warm.model.config.dropout == 0.0
    assert NEXUSTrainer(None, tiny(tmp_path, dropout=0.2)).model.config.dropout == 0.2
    weights = [NEXUSTrainer(None, tiny(tmp_path, seed=s)).model.head.weight for s in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    """Fails if `resume_from` does not continue the same run."""
    whole = train(tmp_path / "whole", lr_decay="constant").model.state_dict()
    train(tmp_path / "parts", lr_decay="constant", max_steps=2)
    parts = train(tmp_path / "parts", "auto", lr_decay="constant").model.state_dict()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_a_model_of_other_sizes_is_refused(tmp_path):
    """Fails if config and model may disagree."""
    model = NEXUSCore(vocab_size=128, d_model=64, ssm_n_layers=1)
    with pytest.raises(ConfigError, match=r"d_model=64.*says 32"):
        NEXUSTrainer(model, tiny(tmp_path))
    fitting = NEXUSCore(vocab_size=128, d_model=32, ssm_n_layers=1)
    assert NEXUSTrainer(fitting, tiny(tmp_path)).model is fitting


def test_a_module_of_ones_own_trains_on_its_logits(tmp_path):
    """Fails if the trainer only works for one model."""
    model = torch.nn.Sequential(torch.nn.Embedding(128, 8), torch.nn.Linear(8, 128))
    model.forward = lambda input_ids: model[1](model[0](input_ids))
    others = {f"{term}_loss_weight": 0 for term in ("world", "reason", "energy", "causal")}
    config = tiny(tmp_path, learning_rate=1e-2, max_steps=20, **others)
    result = NEXUSTrainer(model, config).train(create_dataloader(DOCUMENTS, config))
    assert result.metrics["train/lm_loss"] < 4.8  # log(128) at the start


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), row_length=st.integers(1, 12))
def test_every_token_but_the_first_is_a_label_once(lengths, row_length):
    """Fails if tokens are lost at the end of rows, or trained on twice."""
    documents = [list(range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)]
    dataset = NEXUSDataset(documents, row_length)
    batch = NEXUSCollator(pad_id=7)([dataset[row] for row in range(len(dataset))])
    counted = batch["labels"] != -100
    assert batch["labels"][counted].tolist() == [t for d in documents for t in d[1:]]
    assert (batch["input_ids"][counted] == batch["labels"][counted] - 1).all()
    assert (batch["input_ids"][~counted] == 7).all()
    assert batch["input_ids"].shape[1] <= row_length


@pytest.mark.parametrize("documents", [[], [[1, 2], [3]]])
def test_documents_without_anything_to_predict_are_refused(documents):
    """Fails if the run only fails later, on an empty batch."""
    with pytest.raises(DataError, match="two tokens"):
        NEXUSDataset(documents, 8)


def test_loaders_have_the_batch_sizes_of_the_config(tmp_path):
    """Fails if `batch_size`, `eval_batch_size` or `num_workers` has no effect."""
    config = tiny(tmp_path, num_workers=2)
    train_loader, val_loader = (create_dataloader(DOCUMENTS, config, t) for t in (True, False))
    assert (train_loader.batch_size, val_loader.batch_size) == (4, 3)
    plain = create_dataloader(DOCUMENTS, tiny(tmp_path))
    first = next(iter(plain))["input_ids"]
    assert first.shape == (4, 16)
    if torch.multiprocessing.get_start_method() != "spawn":
        assert torch.equal(next(iter(train_loader))["input_ids"], first)


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """Fails if the example script is broken."""
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--steps", "4", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "val/perplexity" in capsys.readouterr().out
