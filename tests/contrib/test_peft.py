"""Adapters: the numbers of peft, on any model, with only the adapters in checkpoints."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from nexus_core import CheckpointError, ConfigError, Engine, Plugin
from nexus_core.cli.run import main as nexus_run
from nexus_core.plan import load
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.loss_dpo import LossDpoPlugin
from nexus_plugins.loss_lm import LossLmPlugin
from nexus_plugins.model_nexus import ModelNexusPlugin, NEXUSCore
from nexus_plugins.optim_adamw import OptimAdamwPlugin

pytest.importorskip("peft")
from nexus_plugins_contrib.model_hf import ModelHfPlugin
from nexus_plugins_contrib.peft import PeftPlugin
from tests.contrib import hf

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_check.* is deprecated:FutureWarning",
    "ignore:peft. the loss does not reach .*parts:RuntimeWarning",  # those have their own losses
)
NEXUS = {"vocab_size": hf.VOCABULARY, "d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 8}


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    return [hf.padded(hf.documents(2, seed=n)) for n in range(count)]


def engine_of(
    origin: Plugin[Any], adapters: PeftPlugin, *more: Plugin[Any], **options: Any
) -> Engine:
    parts = [hf.RowsPlugin(batches()), origin, adapters, LossLmPlugin(label_smoothing=0.0)]
    optimizer = OptimAdamwPlugin(lr=1e-2, weight_decay=0.0)
    return Engine(plugins=[*parts, optimizer, *more], seed=1, log_every=1, **options)


def llama(folder: Path) -> ModelHfPlugin:
    if not folder.exists():
        hf.saved(folder, "llama")
    return ModelHfPlugin(path=str(folder))


def test_training_is_that_of_peft_by_hand(tmp_path: Path) -> None:
    """Fails if other layers are adapted, scaled or trained than by peft."""
    from peft import LoraConfig, get_peft_model

    origin = llama(tmp_path / "llama")
    engine = engine_of(origin, PeftPlugin(r=4, alpha=8, target=("*.q_proj", "*.v_proj")))
    start = copy.deepcopy(engine.model.state_dict())
    engine.fit(until=3)
    base = hf.tiny("llama").train()
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, settings)
    base.load_state_dict(start)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for batch in batches()[:3]:
        optimizer.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        optimizer.step()
    found, expected = engine.model.state_dict(), base.state_dict()
    assert found.keys() == expected.keys()
    assert max((found[n] - expected[n]).abs().max().item() for n in found) <= 1e-6
    moved = {n for n in found if not torch.equal(found[n], start[n])}
    assert moved == {n for n in found if "lora_" in n}


def origins(kind: str, folder: Path) -> Plugin[Any]:
    return ModelNexusPlugin(**NEXUS) if kind == "nexus" else llama(folder / "llama")


@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "lora"), ("nexus", "lora"), ("llama", "ia3"), ("llama", "loha")]
)
def test_a_checkpoint_has_the_adapters_alone_and_resumes_to_the_same_bits(
    kind: str, method: str, tmp_path: Path
) -> None:
    """Fails if base weights are saved, adapters are lost, or the continuation differs."""
    dropout = 0.1 if method == "lora" else None
    args = {"target": ("*.q_proj", "*.down_proj"), "args": {"feedforward_modules": ["*.down_proj"]}}
    settings = {**(args if method == "ia3" else {}), "method": method, "dropout": dropout}

    def engine(out: Path) -> Engine:
        saves = CheckpointPlugin(every="2 steps", sync=True, best=None)
        return engine_of(origins(kind, tmp_path), PeftPlugin(**settings), saves, out=out)

    (whole := engine(tmp_path / "a")).fit(until=4)
    engine(tmp_path / "b").fit(until=2)
    again = engine(tmp_path / "b")
    again.resume()
    again.fit(until=4)
    one, other = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    stored = load_file(tmp_path / "b/checkpoints/final/model.safetensors")
    trained = {n for n, p in again.model.named_parameters() if p.requires_grad}
    below = {n for n, p in again.model.named_parameters() if not p.requires_grad}
    assert trained <= stored.keys()
    assert not below & stored.keys()


def test_other_weights_below_are_refused(tmp_path: Path) -> None:
    """Fails if adapters are loaded on a model that they were not trained on."""
    first = engine_of(llama(tmp_path / "one"), PeftPlugin())
    first.fit(until=1)
    hf.saved(tmp_path / "two", "llama", seed=5)
    other = engine_of(llama(tmp_path / "two"), PeftPlugin())
    with pytest.raises(CheckpointError, match="trained on other weights"):
        other.load_state_dict(first.state_dict())


def test_weights_that_were_thawed_for_a_while_are_kept(tmp_path: Path) -> None:
    """Fails if a trained base weight is mistaken for an unchanged one."""
    engine = engine_of(llama(tmp_path / "one"), PeftPlugin())
    name = "model.norm.weight"
    engine.model.get_parameter(name).requires_grad_(True)
    engine.optimizer.add_param_group({"params": [engine.model.get_parameter(name)]})
    engine.fit(until=2)
    engine.model.get_parameter(name).requires_grad_(False)
    engine.fit(until=3)
    assert name in engine.state_dict()["model"]


def test_base_weights_of_a_run_lie_below(tmp_path: Path) -> None:
    """Fails if adapters on a trained NEXUS start from random or incomplete weights."""
    torch.manual_seed(7)
    before = NEXUSCore(**NEXUS)
    save_model(before, tmp_path / "before.safetensors")
    source = PeftPlugin(base=tmp_path / "before.safetensors")
    engine = engine_of(ModelNexusPlugin(**NEXUS), source)
    ids = batches()[0]["input_ids"]
    engine.model.eval()
    assert torch.equal(engine.model(ids), before.eval()(ids)), "adapters begin as nothing"
    tensors = load_file(tmp_path / "before.safetensors")
    tensors.pop("final_norm.weight")
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match="has no 'final_norm.weight'"):
        engine_of(ModelNexusPlugin(**NEXUS), PeftPlugin(base=tmp_path / "part.safetensors"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "lara"}, "Did you mean 'lora'"),
        ({"method": "prefix_tuning"}, "'prefix_tuning'. It trains prompt inputs"),
        ({"method": "prompt_tuning"}, "'prompt_tuning'. It trains prompt inputs"),
        ({"method": "adalora"}, "'adalora'. It changes its ranks during training"),
        ({"adapter": "nowhere"}, "nowhere has no adapter_config.json"),
        ({"adapter": "nowhere", "r": 4}, "r has no effect with adapter"),
        ({"method": "ia3", "r": 4}, "'ia3' has no such setting"),
        ({"args": {"use_dorra": True}}, "Did you mean 'use_dora'"),
        ({"target": ("*.nothing",)}, "peft.target: the pattern"),
        ({"target": ("*.norm",)}, "peft: Target module"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        engine_of(llama(tmp_path / "one"), PeftPlugin(**settings))


def test_an_optimizer_that_was_made_before_is_refused() -> None:
    model = hf.tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="before its optimizer is created"):
        Engine(model, optimizer, plugins=[PeftPlugin(), load("loss_lm")()])


def test_adapters_that_the_loss_does_not_reach_are_named() -> None:
    """Fails if a layer whose weight is read without calling it is adapted without a warning."""

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(x) @ self.read.weight

    plugins = [PeftPlugin(), OptimAdamwPlugin()]
    engine = Engine(Direct(), loss=lambda m, b: m(b).square().mean(), plugins=plugins)
    with pytest.warns(RuntimeWarning, match=r"does not reach 2 of 4 .* read\.lora_A"):
        engine.fit([torch.randn(4, 16)], until=1)


def pairs(seed: int = 0) -> dict[str, Tensor]:
    sides = {"chosen": hf.padded(hf.documents(3, seed)), "rejected": hf.padded(hf.documents(3, 9))}
    return {f"{side}_{name}": value for side, b in sides.items() for name, value in b.items()}


def test_preferences_take_the_model_without_its_adapters_as_reference(tmp_path: Path) -> None:
    """Fails if the reference changes with the adapters, or they stay disabled or frozen."""

    def engine(reference: str) -> Engine:
        parts = [hf.RowsPlugin([pairs(n) for n in range(3)]), llama(tmp_path / "one"), PeftPlugin()]
        losses = LossDpoPlugin(reference=reference, beta=0.5)
        rest = [losses, OptimAdamwPlugin(lr=1e-2, weight_decay=0.0)]
        return Engine(plugins=[*parts, *rest], seed=1, log_every=1)

    off, copied = engine("auto"), engine("copy")
    ours, theirs = (
        [one.metrics["train/total_loss"] for _ in one.steps(until="6 steps")]
        for one in (off, copied)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours[-1] < ours[0] - 0.01
    assert off.plugins["loss_dpo"]._copy is None


def saved_adapters(origin: Path, folder: Path, **changes: Any) -> Path:
    """Nonzero adapters, saved by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(origin), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_adapters_of_a_folder_are_the_start_and_the_reference(tmp_path: Path) -> None:
    """Fails if preferences start from, or are compared with, other weights, or do not resume."""
    llama(tmp_path / "one")
    folder = saved_adapters(tmp_path / "one", tmp_path / "sft")

    def engine(reference: str, out: Path | None = None) -> Engine:
        origin, adapters = llama(tmp_path / "one"), PeftPlugin(adapter=folder)
        parts = [hf.RowsPlugin([pairs(n) for n in range(3)]), origin, adapters]
        rest = [LossDpoPlugin(reference=reference, beta=0.5), OptimAdamwPlugin(lr=1e-2)]
        saves = [CheckpointPlugin(every="2 steps", sync=True, best=None)] if out else []
        made = Engine(plugins=[*parts, *rest, *saves], seed=1, log_every=1, out=out)
        blocks = {"model_hf": {"path": str(tmp_path / "one")}, "peft": {"adapter": str(folder)}}
        made.config["plugins"] = blocks
        return made

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = engine("auto", tmp_path / "a")
    below = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    ids, theirs = batches()[0]["input_ids"], PeftModel.from_pretrained(below, folder).eval()
    whole.model.eval()
    assert torch.equal(whole.model(ids).logits, theirs(ids).logits)
    whole.model.train()
    losses = [
        [one.metrics["train/total_loss"] for _ in one.steps(until="5 steps")]
        for one in (whole, engine("copy"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0][-1] < losses[0][0] - 0.01
    engine("auto", tmp_path / "b").fit(until=2)
    again = engine("auto", tmp_path / "b")
    again.resume()
    again.fit(until=5)
    one, other = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    stored = load_file(tmp_path / "b/checkpoints/final/model.safetensors")
    assert stored.keys() == {n for n, p in again.model.named_parameters() if p.requires_grad}
    words = ["export", str(tmp_path / "b"), "--to", "hf", "--out", str(tmp_path / "merged")]
    ran = CliRunner().invoke(nexus_run, words)
    assert ran.exit_code == 0, ran.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again.model.eval()
    assert torch.allclose(merged(ids).logits, again.model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "has whole modules besides the adapters .*lm_head"),
        ({"target_modules": ["gone"]}, "peft: Target modules"),
        ({"r": 2}, "does not fit the model: .*size mismatch"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    origin = llama(tmp_path / "one")
    fitting = changes if "modules_to_save" in changes else {}
    folder = saved_adapters(tmp_path / "one", tmp_path / "sft", **fitting)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ConfigError, match=said):
        engine_of(origin, PeftPlugin(adapter=folder))


@pytest.mark.slow
def test_adapters_on_four_bits_resume_to_the_same_bits_and_are_exported_alone(
    tmp_path: Path,
) -> None:
    """Fails if quantized weights are saved, or an export merges into rounded ones."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    folder = hf.saved(tmp_path / "base", "llama", **sizes)
    blocks: dict[str, Any] = {"model_hf": {"path": folder, "quantize": "nf4"}, "peft": {"r": 4}}

    def engine(out: Path) -> Engine:
        saves = CheckpointPlugin(every="2 steps", sync=True, best=None)
        origin = ModelHfPlugin(**blocks["model_hf"])
        made = engine_of(origin, PeftPlugin(**blocks["peft"]), saves, out=out)
        made.config["plugins"] = blocks
        return made

    (whole := engine(tmp_path / "a")).fit(until=4)
    engine(tmp_path / "b").fit(until=2)
    again = engine(tmp_path / "b")
    again.resume()
    again.fit(until=4)
    trained = [n for n, p in whole.model.named_parameters() if p.requires_grad]
    one, other = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in trained)
    stored = load_file(tmp_path / "b/checkpoints/final/model.safetensors")
    assert stored.keys() == {*trained}
    words = ["export", str(tmp_path / "b"), "--to", "hf", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(nexus_run, words)
    assert refused.exit_code == 2, refused.output
    assert "--adapters alone" in refused.output
    written = CliRunner().invoke(nexus_run, [*words, "--adapters", "alone"])
    assert written.exit_code == 0, written.output
    assert (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, "train adapters on them"), ({"weights": "random"}, "is for pretrained weights")],
)
def test_quantized_weights_alone_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = hf.saved(tmp_path / "base", "llama")
    origin = ModelHfPlugin(path=folder, quantize="nf4", **settings)
    with pytest.raises(ConfigError, match=said):
        Engine(plugins=[hf.RowsPlugin(batches()), origin, LossLmPlugin(), OptimAdamwPlugin()])
