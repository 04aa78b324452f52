"""The whole NEXUS model with all modules: laws that hold for all of them together."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nexus_core.engine import Engine
from nexus_core.errors import ConfigError
from nexus_plugins.loss_causal import LossCausalPlugin
from nexus_plugins.loss_energy import LossEnergyPlugin
from nexus_plugins.loss_lm import LossLmPlugin
from nexus_plugins.loss_reason import LossReasonPlugin
from nexus_plugins.loss_world import LossWorldPlugin
from nexus_plugins.model_nexus import ModelNexusPlugin, NEXUSCore
from nexus_plugins.model_nexus.residual import Part

VOCAB = 23
MODULES = ("world", "reason", "energy", "causal")


def gate_of(part: Part) -> nn.Parameter:
    return next(value for name, value in part.named_parameters() if name.endswith("gate"))


def small_model(**settings) -> NEXUSCore:
    """A model with all modules and open gates, so that each module has a visible effect."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "ssm_n_layers": 2, "ssm_head_dim": 16}
    of_world = {} if settings.get("classic") else {"world_memory": 8}
    model = NEXUSCore(
        **{
            **sizes,
            **of_world,
            "ssm_d_state": 8,
            "ssm_chunk_length": 8,
            "reason": True,
            "causal": True,
            **settings,
        }
    )
    with torch.no_grad():
        for part in model.parts.values():
            if part.writes:
                gate_of(part).fill_(1.0)
        if model.config.energy and not model.config.classic:  # some tokens settle early, some late
            model.parts["energy"].values.weight[-1] *= 9
            model.parts["energy"].values.bias[-1] = 0.05
    return model.eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (rows, length))


def five_losses(classic: bool = False):
    return [
        LossLmPlugin(),
        LossWorldPlugin(classic=classic),
        LossReasonPlugin(classic=classic),
        LossEnergyPlugin(classic=classic),
        # The cost is the same for each of them.
        LossCausalPlugin(classic=True) if classic else LossCausalPlugin(dag_growth=1),
    ]


def batches(count: int, rows: int = 4, length: int = 24) -> list[dict[str, Tensor]]:
    """Rows that each repeat a short pattern, with the next token as label."""
    made = []
    for _ in range(count):
        pattern = tokens(rows, 4).repeat(1, length // 4 + 1)
        made.append({"input_ids": pattern[:, :length], "labels": pattern[:, 1 : length + 1]})
    return made


def engine_for(model: NEXUSCore, **settings) -> Engine:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    plugins = [ModelNexusPlugin(), *five_losses(model.config.classic)]
    return Engine(model, optimizer, plugins=plugins, seed=0, **settings)


@pytest.mark.parametrize("classic", [False, True])
def test_outputs_have_the_documented_names_and_shapes(classic):
    """Fails if readers of `module_outputs` would break."""
    sizes = {"d_latent": 6, "world_levels": 2, "reasoning_steps": 3, "n_rules": 5, "n_variables": 7}
    model = small_model(classic=classic, **sizes, **({} if classic else {"world_heads": 1}))
    logits, info = model(tokens(2, 9), return_all_outputs=True)
    outputs = info["module_outputs"]
    assert logits.shape == (2, 9, VOCAB)
    width = 6 if classic else 32
    assert outputs["world"].shape == outputs["world_targets"].shape == (2, 9, 2, width)
    assert outputs["world_mask"].shape == (2, 9, 2)
    assert outputs["reason"].shape == ((2, 9, 3, 5) if classic else (2, 9, 5))
    assert outputs["energy"]["refinements"].shape == (2, 9)
    if classic:
        assert outputs["energy"]["iterations"].shape == (2, 9)
        assert outputs["energy"]["final_energy"].shape == (2, 9)
    else:
        assert outputs["world_heads"].shape == (2, 9, 1, 32)
        assert outputs["energy"]["early"].shape == (2, 9, 32)
        assert outputs["energy"]["foreseen"].shape == (2, 9)
    assert outputs["causal"]["adjacency"].shape == (7, 7)


@given(length=st.integers(2, 30), data=st.data())
def test_no_logit_depends_on_a_later_token(length, data):
    """Fails if the model sees the answer in training, which makes it useless in generation."""
    model = small_model()
    changed_at = data.draw(st.integers(1, length - 1))
    ids = tokens(2, length)
    other = ids.clone()
    other[:, changed_at:] = (ids[:, changed_at:] + 1 + tokens(2, length - changed_at)) % VOCAB
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :changed_at], model(other)[:, :changed_at])


def test_no_sequence_depends_on_its_neighbours():
    """Fails if a prediction depends on the rest of its batch."""
    model = small_model()
    ids, others = tokens(3, 17), tokens(3, 17)
    others[1] = ids[1]
    with torch.no_grad():
        assert torch.equal(model(ids)[1], model(others)[1])


def test_documents_of_a_packed_row_are_isolated():
    """Fails if a document's logits or latents depend on the one packed before it."""
    model = small_model()
    first, second = tokens(1, 9), tokens(1, 12)
    packed = torch.cat([first, second], 1)
    segments = torch.cat([torch.zeros_like(first), torch.ones_like(second)], 1)
    with torch.no_grad():
        together = model.hidden(packed, segments)
        alone = model.hidden(second)
    torch.testing.assert_close(together.hidden[:, 9:], alone.hidden, atol=1e-5, rtol=1e-4)
    for name in ("world", "world_targets", "world_mask"):
        mask = alone.module_outputs["world_mask"].unsqueeze(-1)
        both = [out.module_outputs[name] for out in (together, alone)]
        of_pack, of_one = (v * mask if v.dim() > 3 else v for v in (both[0][:, -12:], both[1]))
        torch.testing.assert_close(of_pack, of_one, atol=1e-4, rtol=1e-4)
    assert not together.module_outputs["world_mask"][0, 8].any()


def test_generation_steps_equal_the_whole_sequence():
    """Fails if generation differs from the trained model."""
    model = small_model()
    ids = tokens(2, 19)
    states = model.initial_state(2)
    with torch.no_grad():
        whole = model(ids)
        for position, token in enumerate(ids.unbind(1)):
            logits, states = model.step(token, states)
            torch.testing.assert_close(logits, whole[:, position], atol=1e-4, rtol=1e-4)


def test_every_parameter_gets_a_gradient_from_the_total_loss_at_the_start():
    """Fails if part of the model is never trained, or starts with NaN."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "ssm_n_layers": 2, "ssm_head_dim": 16, "world_heads": 2}
    model = NEXUSCore(vocab_size=VOCAB, **sizes, reason=True, causal=True)
    engine = engine_for(model)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    engine.fit(batches(1), until="1 steps")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_modules_start_near_zero():
    """Fails if a new module disturbs the backbone."""
    sizes = {"vocab_size": VOCAB, "d_model": 32, "ssm_n_layers": 2, "ssm_head_dim": 16}
    torch.manual_seed(0)
    whole = NEXUSCore(**sizes, reason=True, causal=True).eval()
    torch.manual_seed(0)
    bare = NEXUSCore(**sizes, **dict.fromkeys(MODULES, False)).eval()
    ids = tokens(2, 20)
    with torch.no_grad():
        difference, logits = whole(ids) - bare(ids), bare(ids)
    assert 0 < difference.std() < 0.05 * logits.std()


@pytest.mark.parametrize("missing", MODULES)
def test_a_module_that_is_off_reports_nothing_and_its_loss_says_so(missing):
    """Fails if a switch has no effect, or a loss fails with an unclear error."""
    model = small_model(**{missing: False})
    assert missing not in model.active_modules
    _, info = model(tokens(1, 5), return_all_outputs=True)
    kept = {name.split("_")[0] for name in info["module_outputs"]}
    assert kept == set(MODULES) - {missing}
    with pytest.raises(ConfigError, match=f"drop Loss{missing.title()}Plugin"):
        engine_for(model).fit(batches(1), until="1 steps")


def test_cost_is_linear_in_length():
    """Fails if the cost grows faster than linearly."""
    model = small_model().train()  # an evaluation skips settled tokens

    def operations(length: int) -> int:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(tokens(1, length))
        return counter.get_total_flops()

    first, second, third = (operations(length) for length in (64, 128, 192))
    assert third - second == second - first


@pytest.mark.parametrize("classic", [False, True])
def test_one_seed_gives_one_run_and_a_resumed_run_the_same_bits(classic):
    """Fails if a killed run ends differently: the target encoder or the noise was lost."""

    def state_after(cuts: tuple[int, ...]) -> dict[str, Tensor]:
        data, snapshot = batches_of_seed(), None
        for cut in cuts:
            model = small_model(dropout=0.1, classic=classic).train()
            engine = engine_for(model)
            if snapshot is not None:
                engine.load_state_dict(snapshot)
            engine.fit(data, until=f"{cut} steps")
            snapshot = engine.state_dict()
        return model.state_dict()

    def batches_of_seed():
        torch.manual_seed(1)
        return batches(4)

    whole, again, resumed = state_after((4,)), state_after((4,)), state_after((2, 4))
    assert any("target_encoder" in name for name in whole) == classic
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
def test_all_five_terms_move_in_the_sensible_direction():
    """Fails if the losses conflict, or one of them is not trained."""
    torch.manual_seed(0)
    model = NEXUSCore(
        vocab_size=VOCAB, d_model=32, ssm_n_layers=2, ssm_head_dim=16, reason=True, causal=True
    )
    engine = engine_for(model, log_every=1)
    seen = []
    steps = engine.steps(batches(2) * 30, until="60 steps")
    for _ in steps:
        seen.append(dict(engine.metrics))
    terms = ["train/lm_loss", "train/world_loss", "train/reason_loss", "train/energy_loss"]
    for name in [*terms, "train/causal_loss"]:
        # From the second step on, as rules have no mean firing in the first.
        first, last = (sum(m[name] for m in part) / 10 for part in (seen[1:11], seen[-10:]))
        assert last < first, name
    assert 0 <= seen[-1]["reasoning/idle_rules"] <= 128
    assert 1 <= seen[-1]["energy/avg_iterations"] <= 8
    assert seen[-1]["causal/dag_constraint"] >= 0
    measured = engine.evaluate(batches(1))
    assert {f"val/{name}_loss" for name in ("lm", *MODULES)} <= set(measured)


@pytest.mark.filterwarnings("ignore:the model is in evaluation mode")  # no dropout
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("split", [1, 3])
def test_gradient_is_the_same_for_every_split_of_a_step(padded, split):
    """Fails if accumulation or padding changes what is learned."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (6, 12), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    for row in range(6):
        labels[row, 3 + row :] = -100

    def gradients(rows_of_each: int, extra: int) -> dict[str, Tensor]:
        model = small_model().double()
        rows = list(zip(ids.split(rows_of_each), labels.split(rows_of_each), strict=True))
        data = [
            {
                "input_ids": torch.nn.functional.pad(part, (0, extra)),
                "labels": torch.nn.functional.pad(label, (0, extra), value=-100),
            }
            for part, label in rows
        ]
        plugins = [ModelNexusPlugin(), *five_losses()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        Engine(model, optimizer, plugins=plugins, accumulate=len(data)).fit(data, until="1 steps")
        return {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not name.endswith("noise_scale")
        }

    whole, parts = gradients(6, 0), gradients(6 // split, 4 if padded else 0)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-9, rtol=1e-7, msg=name)


def test_the_model_computes_in_weights_of_16_bits() -> None:
    """Fails if a module mixes float32 values with weights in 16 bits."""
    model = small_model()
    narrow = copy.deepcopy(model).bfloat16()
    input_ids = tokens(2, 40)
    output = narrow(input_ids)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), model(input_ids), rtol=0.0, atol=0.1)
    assert narrow.generate(input_ids[0, :5], 3).shape == (8,)
