"""worth: the loss without a module minus the loss with it, and unchanged training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import ConfigError, Engine, ResumableLoader
from nexus_plugins.diagnose import DiagnosePlugin
from nexus_plugins.loss_lm import LossLmPlugin
from nexus_plugins.model_nexus import ModelNexusPlugin, NEXUSCore
from nexus_plugins.worth import WorthPlugin


class Sum(nn.Module):
    """A trunk, a necessary module, and one without effect."""

    active_modules: tuple[str, ...] = ("slope", "idle")

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Parameter(torch.zeros(()))
        self.slope = nn.Parameter(torch.tensor(1.0))
        self.left_out: str | None = None

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        self.left_out = name
        try:
            yield
        finally:
            self.left_out = None

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk + (0.0 if self.left_out == "slope" else self.slope * x)


def squared(model: nn.Module, batch: Any) -> Tensor:
    error: Tensor = (model(batch["x"]) - 2 * batch["x"]).square().mean()
    return error


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [{"x": torch.randn(4, generator=generator)} for _ in range(count)]


def run(*plugins: Any, steps: int = 12, lr: float = 0.0, **options: Any) -> Engine:
    model = Sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    engine = Engine(model, optimizer, loss=squared, plugins=plugins, **options)
    sets = {"val": batches(5), "other": batches(3)}
    engine.fit(batches(steps), until=f"{steps} steps", eval_data=sets, eval_every="2 steps")
    return engine


@pytest.mark.parametrize("some", [None, 2])
def test_worth_is_the_loss_without_less_the_loss_with(some: int | None) -> None:
    """Fails if an essential module is called worthless, or vice versa.

    Half of the slope is missing: with the module the error is x, without it 2 x.
    """
    metrics = run(WorthPlugin(batches=some)).metrics
    squares = torch.stack([batch["x"].square().mean() for batch in batches(5)[:some]]).mean()
    assert metrics["module/slope_worth"] == pytest.approx(3 * float(squares), rel=1e-5)
    assert metrics["module/idle_worth"] == 0
    assert [name for name in metrics if "worth" in name] == [
        "module/slope_worth",
        "module/idle_worth",
    ]


def test_training_is_the_same_to_the_bit() -> None:
    """Fails if measuring the modules changes training."""
    with_worth, plain = run(WorthPlugin(), lr=0.1), run(lr=0.1)
    pairs = zip(with_worth.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert with_worth.metrics["val/loss"] == plain.metrics["val/loss"]


def test_it_is_measured_every_so_many_evaluations_and_on_request() -> None:
    """Fails if a period is ignored, or restarts when a run is resumed."""
    plugin = WorthPlugin(every=3)
    model = Sum()
    engine = Engine(model, torch.optim.SGD(model.parameters()), loss=squared, plugins=[plugin])
    seen = ["module/slope_worth" in engine.evaluate(batches(2)) for _ in range(5)]
    assert seen == [True, False, False, True, False]
    again = WorthPlugin(every=3)
    again.load_state_dict(plugin.state_dict())
    engine = Engine(model, torch.optim.SGD(model.parameters()), loss=squared, plugins=[again])
    assert ["module/slope_worth" in engine.evaluate(batches(2)) for _ in range(2)] == [False, True]


def test_modules_of_nexus_are_left_out_one_by_one_and_report_as_ever() -> None:
    """Fails if the worth belongs to another module, or the modules' losses break."""
    sizes = {"vocab_size": 11, "d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16}
    sizes["reason"] = True
    nexus = ModelNexusPlugin(**sizes)
    model = NEXUSCore(**sizes)
    optimizer = torch.optim.SGD(model.parameters())
    engine = Engine(model, optimizer, plugins=[nexus, LossLmPlugin(), WorthPlugin()])
    ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    data = ResumableLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in ids], 2)
    gates = {
        name: next(
            gate for of, gate in engine.model.parts[name].named_parameters() if of.endswith("gate")
        )
        for name in engine.model.writing_modules
    }
    with torch.no_grad():
        for gate in gates.values():
            gate.fill_(1.0)
    metrics = engine.evaluate(data)
    assert "module/world_worth" not in metrics, "it shapes states in training, and writes nothing"
    for name, gate in gates.items():
        with torch.no_grad():
            gate.zero_()
            without = engine.evaluate(data)["val/loss"]
            gate.fill_(1.0)
        assert metrics[f"module/{name}_worth"] == pytest.approx(
            without - metrics["val/loss"], abs=1e-6
        )
        assert metrics[f"module/{name}_worth"] != 0
    before = engine.model.eval().hidden(ids)
    with engine.model.without("reason"):
        silent = engine.model.hidden(ids)
        torch.testing.assert_close(
            engine.model.step(ids[:, 0], engine.model.initial_state(4))[0], silent.logits[:, 0]
        )
    assert torch.equal(before.module_outputs["reason"], silent.module_outputs["reason"])
    assert not torch.equal(before.hidden, silent.hidden)


def test_diagnose_names_the_module_that_is_worth_nothing() -> None:
    """Fails if a useless module goes unnoticed, or a useful one is named."""
    diagnose = DiagnosePlugin(every=1, ignore=("loss_explosion", "slow_convergence"))
    with pytest.warns(RuntimeWarning, match="worthless module"):
        run(WorthPlugin(), diagnose)
    (finding,) = [found for found in diagnose.findings if found.rule == "worthless_module"]
    assert finding.step == 7  # the step after the third evaluation
    assert "idle +0" in finding.text
    assert "slope" not in finding.text


@pytest.mark.parametrize("model", [nn.Linear(1, 1), Sum()])
def test_a_model_without_modules_is_refused(model: Any) -> None:
    """Fails if the metric is silently never logged."""
    model.active_modules = ()
    engine = Engine(
        model, torch.optim.SGD(model.parameters()), loss=squared, plugins=[WorthPlugin()]
    )
    with pytest.raises(ConfigError, match=f"got {type(model).__name__}.*remove the plugin"):
        engine.fit(batches(1), until="1 steps")
