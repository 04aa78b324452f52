"""Trained parameters are looked up each time, and trained like in a handwritten loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from nexus_core import ConfigError, Engine, Loss, LossConfig, Plugin, PluginConfig, hookimpl
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.auto_accumulate import AutoAccumulatePlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.curriculum import CurriculumPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.guard import GuardPlugin
from nexus_plugins.lr_linear import LrLinearPlugin
from nexus_plugins.recompute import RecomputePlugin

STEPS, MAX_NORM, DECAY = 6, 0.1, 0.5
BATCHES = [torch.randn(6, 4, generator=torch.Generator().manual_seed(n)) * 5 for n in range(4)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 2).square().mean()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def add_group(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})


def thaw(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(True)


def parts(change: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = net()
    model[0].requires_grad_(False)
    known = model[2] if change is add_group else model
    return model, torch.optim.SGD(known.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("change", [add_group, thaw])
@pytest.mark.parametrize("where", ["between steps", "in a plugin", "between fits"])
def test_what_is_added_or_thawed_is_clipped_scheduled_and_averaged(
    change: Callable[..., None], where: str
) -> None:
    class ThawPlugin(Plugin[PluginConfig]):
        @hookimpl(stage="restore")
        def on_step(self, engine: Engine) -> None:
            if engine.state.step == 3 and where == "in a plugin":
                change(engine.model, engine.optimizer)

    model, optimizer = parts(change)
    ema = EmaPlugin(decay=DECAY, ramp=False)
    watchers = [ClipPlugin(max_norm=MAX_NORM), GuardPlugin(), ema, ThawPlugin()]
    schedule = LrLinearPlugin(warmup=None, min_lr=0.0)
    engine = Engine(model, optimizer, loss=loss, plugins=[schedule, *watchers])
    for state in engine.steps(BATCHES, until=STEPS):
        if state.step == 3 and where == "between steps":
            change(model, optimizer)
        if state.step == 3 and where == "between fits":
            break
    if where == "between fits":
        change(model, optimizer)
        engine.fit(BATCHES, until=STEPS)

    twin, by_hand = parts(change)
    average = {n: p.detach().clone() for n, p in twin.named_parameters() if p.requires_grad}
    bases = [group["lr"] for group in by_hand.param_groups]
    for step in range(STEPS):
        if step == 3:
            change(twin, by_hand)
            bases = [0.1, 0.05]
            average |= {
                n: p.detach().clone() for n, p in twin.named_parameters() if n not in average
            }
        for group, base in zip(by_hand.param_groups, bases, strict=False):
            group["lr"] = base * (1 - step / STEPS)
        twin.zero_grad()
        loss(twin, BATCHES[step % 4]).backward()
        clip_grad_norm_([p for p in twin.parameters() if p.requires_grad], MAX_NORM)
        by_hand.step()
        for name, mean in average.items():
            mean.lerp_(twin.get_parameter(name).detach(), torch.tensor(1 - DECAY))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert ema.weights().keys() == average.keys()
    assert all(torch.equal(mean, average[name]) for name, mean in ema.weights().items())


class BadGradient(torch.autograd.Function):
    """The identity, with a non-finite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def test_what_is_added_is_guarded() -> None:
    model, optimizer = parts(add_group)

    def bad(model: nn.Sequential, batch: Tensor) -> Tensor:
        return model[2](model[1](BadGradient.apply(model[0](batch)))).square().mean()

    engine = Engine(model, optimizer, loss=bad, plugins=[GuardPlugin()])
    engine.fit(BATCHES, until=3)
    add_group(model, optimizer)
    with pytest.warns(RuntimeWarning, match="skipped the update of step 4"):
        engine.fit(BATCHES, until=4)
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_the_optimizer_does_not_train_gathers_no_gradient() -> None:
    model = net()
    engine = Engine(model, torch.optim.SGD(model[2].parameters(), lr=0.0), loss=loss)
    engine.fit(BATCHES[:1], until=4)
    twin = net()
    loss(twin, BATCHES[0]).backward()
    assert torch.equal(model[0].weight.grad, twin[0].weight.grad)


def test_a_parameter_in_two_places_of_a_group_is_clipped_and_averaged_once() -> None:
    model, twin = net(), net()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        by_hand = torch.optim.SGD([*twin.parameters(), twin[0].weight], lr=0.1)
    clip = ClipPlugin(max_norm=MAX_NORM)
    engine = Engine(model, optimizer, loss=loss, plugins=[clip, GuardPlugin()], log_every=1)
    engine.fit(BATCHES[:1], until=1)
    loss(twin, BATCHES[0]).backward()
    norm = clip_grad_norm_(twin.parameters(), MAX_NORM)
    by_hand.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert engine.metrics["train/grad_norm"] == norm.item()


def test_a_learning_rate_in_a_tensor_stays_that_tensor() -> None:
    """Graphs and compiled optimizers keep a reference to it."""
    model, twin = net(), net()
    rate = torch.tensor(0.1)
    schedule = LrLinearPlugin(warmup=None, min_lr=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    Engine(model, optimizer, loss=loss, plugins=[schedule]).fit(BATCHES, until=4)
    assert optimizer.param_groups[0]["lr"] is rate
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step, batch in enumerate(BATCHES):
        by_hand.param_groups[0]["lr"] = torch.tensor(0.1).item() * (1 - step / 4)
        twin.zero_grad()
        loss(twin, batch).backward()
        by_hand.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class WeightedPlugin(Loss[LossConfig]):
    """Importance weights as units: they may sum to less than one."""

    def units(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["weight"].sum()

    def loss(self, batch: dict[str, Tensor], output: Tensor) -> Tensor:
        return (output.squeeze(1).square() * batch["weight"]).sum()


@pytest.mark.parametrize("size", [0.01, 1e-6, 3.0])
def test_units_below_one_are_divided_by(size: float) -> None:
    model, twin = net(), net()
    batches = [{"input": x, "weight": torch.full((6,), size)} for x in BATCHES[:2]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugins = [WeightedPlugin()]
    engine = Engine(model, optimizer, plugins=plugins, accumulate=2, log_every=1)
    engine.fit(batches, until=1)
    total = sum((twin(x).squeeze(1).square() * size).sum() for x in BATCHES[:2]) / (12 * size)
    total.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.1 * other.grad, rtol=1e-5, atol=1e-6)
    assert engine.metrics["train/weighted_loss"] == pytest.approx(total.item(), rel=1e-5)
    assert engine.metrics["train/total_loss"] == pytest.approx(total.item(), rel=1e-5)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_step_whose_loss_reaches_no_parameter_passes(dtype: Any, clip: bool) -> None:
    """With alternating tasks, a head is only trained in its steps."""
    model = TwoHeads()
    before = model.a.weight.detach().clone()
    heads = iter([model.b, model.a, model.b])
    plugins: list[Plugin[Any]] = [AmpPlugin(dtype=dtype, initial_scale=16.0), GuardPlugin()]
    plugins += [ClipPlugin()] if clip else []
    optimizer = torch.optim.SGD(model.a.parameters(), lr=0.1)
    moved = []
    engine = Engine(model, optimizer, loss=lambda m, b: next(heads)(b).mean(), plugins=plugins)
    for _ in engine.steps(BATCHES, until=3):
        moved.append(not torch.equal(before, model.a.weight))
    assert moved == [False, True, True]


def test_an_average_passes_over_refused_steps_takes_lazy_modules_and_leaves_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    ema = EmaPlugin(decay=DECAY, ramp=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine = Engine(model, optimizer, loss=loss, plugins=[GuardPlugin(), ema])
    average: dict[str, Tensor] = {}
    data = [*BATCHES[:2], BATCHES[2] * float("inf"), BATCHES[3]]
    for state in engine.steps(data, until=2):
        for name, p in model.named_parameters():
            if name in average:
                average[name].lerp_(p.detach(), torch.tensor(1 - DECAY))
            elif state.step == 1:
                average[name] = ema.weights()[name].clone()
    with pytest.warns(RuntimeWarning, match="skipped the update of step 3"):
        engine.fit(data, until=3)
    assert ema.weights().keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(mean, average[name]) for name, mean in ema.weights().items())
    running = model[1].running_mean.clone()
    model[1].running_mean.fill_(1.0)
    engine.evaluate(BATCHES[:2])
    assert torch.equal(model[1].running_mean, torch.ones(3)), "running statistics are the model's"
    assert running.shape == (3,)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_function_loss_cut_into_unequal_parts_is_the_mean_of_all_rows(rows: int) -> None:
    model, twin = net(), net()
    batch = {"x": torch.cat(BATCHES[:2])[:10]}

    def mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss(model, batch["x"])

    plugins = [AutoAccumulatePlugin(rows=rows)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, loss=mean, plugins=plugins, log_every=1)
    engine.fit([batch], until=1)
    value = mean(twin, batch)
    value.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.1 * other.grad, rtol=1e-4, atol=1e-5)
    assert engine.metrics["train/loss"] == pytest.approx(value.item(), rel=1e-5)


def test_recompute_gives_a_forward_back_that_was_patched() -> None:
    """Adapters and offload hooks replace `forward` on the object."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            for block in self.blocks:
                old = block.forward
                block.forward = lambda x, old=old: 2.0 * old(x)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, twin = Blocks(), Blocks()
    patched = [block.forward for block in model.blocks]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    Engine(model, optimizer, loss=loss, plugins=[RecomputePlugin()]).fit(BATCHES[:1], until=1)
    loss(twin, BATCHES[0]).backward()
    torch.optim.SGD(twin.parameters(), lr=1e-3).step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert [block.forward for block in model.blocks] == patched


@pytest.mark.parametrize("shape", ["(B, T)", "(B, 1, T, T)", "(B, H, T, T)"])
def test_truncated_rows_take_masks_of_any_shape_with_them(shape: str) -> None:
    rows, time, short = 2, 8, 4
    sizes = {"B": rows, "H": 3, "T": time, "1": 1}
    mask = torch.randn([sizes[name] for name in shape.strip("()").split(", ")])
    seen: list[Tensor] = []
    model = nn.Embedding(9, 1)

    def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch["mask"])
        return model(batch["input_ids"]).mean()

    truncate = CurriculumPlugin(start_length=short, end_length=time, round_to=1, mode="truncate")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, loss=masked, plugins=[truncate])
    ids = torch.randint(9, (rows, time))
    engine.fit([{"input_ids": ids, "mask": mask}], until=1)
    cut = mask[..., :short] if mask.ndim == 2 else mask[..., :short, :short]
    assert torch.equal(seen[0], cut)


def test_an_optimizer_that_trains_nothing_of_the_model_is_refused_at_once() -> None:
    other = net()
    with pytest.raises(ConfigError, match="trains no parameter of the model"):
        Engine(net(), torch.optim.SGD(other.parameters(), lr=0.1), loss=loss)


def test_a_parameter_that_was_replaced_is_said() -> None:
    """Resizing embeddings does this; the optimizer then trains parameters outside the model."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].weight = nn.Parameter(copy.deepcopy(model[0].weight.data))
    with pytest.warns(RuntimeWarning, match=r"'0.weight' is not trained.*last change"):
        Engine(model, optimizer, loss=loss)


def test_a_model_without_values_is_refused_in_words() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 1)
    for device in (None, "cpu"):
        with pytest.raises(ConfigError, match="'weight' is on the meta device"):
            Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss, device=device)


def test_a_model_in_evaluation_mode_is_said_and_left_as_it_is() -> None:
    model = net().eval()
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss)
    with pytest.warns(RuntimeWarning, match="evaluation mode"):
        engine.fit(BATCHES, until=1)
    assert not model.training


def register_pre(optimizer: torch.optim.Optimizer, hook: Any) -> Any:
    return optimizer.register_step_pre_hook(hook)


def register_post(optimizer: torch.optim.Optimizer, hook: Any) -> Any:
    return optimizer.register_step_post_hook(hook)


def register_pre_of_all(optimizer: torch.optim.Optimizer, hook: Any) -> Any:
    return register_optimizer_step_pre_hook(hook)


def register_post_of_all(optimizer: torch.optim.Optimizer, hook: Any) -> Any:
    return register_optimizer_step_post_hook(hook)


def replace_step(optimizer: torch.optim.Optimizer, hook: Any) -> None:
    step = optimizer.step

    def replaced() -> None:
        hook()
        step()

    optimizer.step = replaced  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    "register",
    [register_pre, register_post, register_pre_of_all, register_post_of_all, replace_step],
)
def test_what_is_hooked_to_the_optimizer_is_called_at_each_step(register: Any) -> None:
    """Fails if the fast path of `optimizer.step` bypasses the user's hooks."""
    calls: list[int] = []
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = Engine(model, optimizer, loss=loss)
    for state in engine.steps(BATCHES, until=STEPS):
        if state.step == 2:  # also if it is added during a run
            handle = register(optimizer, lambda *_: calls.append(engine.state.step))
    if handle is not None:
        handle.remove()
    assert calls == list(range(2, STEPS))


def test_a_step_that_is_written_over_the_one_of_pytorch_is_taken() -> None:
    """Fails if a decorated step is bypassed like PyTorch's own wrapper."""
    calls: list[int] = []

    class Counting(torch.optim.SGD):
        @functools.wraps(torch.optim.SGD.step)
        def step(self, closure: Any = None) -> Any:
            calls.append(1)
            return super().step(closure)

    model = net()
    engine = Engine(model, Counting(model.parameters(), lr=0.1), loss=loss)
    engine.fit(BATCHES, until=3)
    assert len(calls) == 3


def test_a_profiler_sees_the_steps_of_the_optimizer() -> None:
    model = net()
    engine = Engine(model, torch.optim.AdamW(model.parameters()), loss=loss)
    with torch.autograd.profiler.profile() as profile:
        engine.fit(BATCHES, until=STEPS)
    names = [event.name for event in profile.function_events]
    assert names.count("Optimizer.step#AdamW.step") == STEPS
