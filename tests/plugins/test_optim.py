"""Any optimizer by import path: its arguments, groups by pattern, and error messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import called
from nexus_core import ConfigError, Engine
from nexus_core.cli.settings import read_settings
from nexus_plugins.optim import OptimPlugin


def optimizer_of(**settings: Any) -> Optimizer:
    return OptimPlugin(**settings).make_optimizer(engine_over(called.Net()))


def engine_over(model: nn.Module) -> Any:
    """The parts of an engine that the hook uses."""
    return type("Run", (), {"model": model})()


def by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("call", "settings"),
    [
        ("torch.optim:RAdam", {"lr": 0.01}),
        ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("torch.optim:AdamW", {"lr": 0.1, "betas": [0.8, 0.9], "weight_decay": 0.2}),
        ("torch.optim:Adafactor", {}),
        ("torch.optim:LBFGS", {"lr": 1, "max_iter": 3}),
    ],
)
def test_any_class_trains_as_when_made_by_hand(call: str, settings: dict[str, Any]) -> None:
    """Fails if an argument is lost or replaced by another default."""

    def trained(optimizer: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = called.Net()
        made = {"plugins": [OptimPlugin(call=call, **settings)]} if optimizer is None else {}
        engine = Engine(
            net,
            None if optimizer is None else optimizer(net.parameters(), **settings),
            loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
            **made,
        )
        engine.fit(list(called.batches([5, 6])), until="4 steps")
        return list(net.parameters())

    by_hand = trained(getattr(torch.optim, call.replace(":", ".").rpartition(".")[2]))
    assert all(map(torch.equal, trained(None), by_hand))


def test_groups_have_their_own_settings_and_the_first_match_counts() -> None:
    net = called.Net()
    plugin = OptimPlugin(
        call="torch.optim:SGD",
        lr=0.1,
        momentum=0.9,
        groups=[{"match": "head.*", "lr": 0.01}, {"match": "*.bias", "momentum": 0.0}],
        freeze=["body.0.weight"],
    )
    found = by_name(net, plugin.make_optimizer(engine_over(net)))
    assert {n: (g["lr"], g["momentum"]) for n, g in found.items()} == {
        "head.weight": (0.01, 0.9),
        "head.bias": (0.01, 0.9),
        "body.0.bias": (0.1, 0.0),
    }


def test_a_function_of_the_model_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(optimizer_of(call="called:of_model", lr=0.5), SGD)
    with pytest.raises(ConfigError, match=r"optim\.groups: called:of_model takes the model"):
        OptimPlugin(call="called:of_model", groups=[{"match": "*"}])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"momentun": 0.9}, r"unknown key 'optim\.momentun': torch\.optim:SGD .*mean 'momentum'"),
        ({"momentum": "much"}, r"optim\.momentum: got 'much'; 'momentum' of .*SGD is float"),
        ({"params": [1]}, "the trainer passes 'params' to torch.optim:SGD; remove it"),
        ({"groups": [{"match": "*.bias", "learning": 1}]}, r"unknown key 'optim\.groups\.0\.learn"),
        ({"groups": [{"lr": 1}]}, r"optim\.groups\.0\.match: field required"),
        ({"lr": -1}, r"optim\.lr: got -1"),
        ({"groups": [{"match": "haed.*"}]}, r"optim\.groups: the pattern 'haed\.\*' matches no"),
        ({"groups": [{"match": "*"}, {"match": "*.bias"}]}, "parameter without a group"),
        ({"freeze": ["*"]}, "no parameter is left to train"),
        ({"momentum": -1.0}, r"torch\.optim:SGD rejects its arguments: Invalid momentum"),
        ({"nesterov": True}, r"SGD rejects its arguments: Nesterov"),
    ],
)
def test_mistakes_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        optimizer_of(call="torch.optim:SGD", **settings)


def test_arguments_stay_beside_the_others_when_they_are_written_down() -> None:
    """So `--set optim.momentum=0.5` works on a run's stored config as on the user's file."""
    settings = {"call": "torch.optim:SGD", "momentum": 0.9, "groups": [{"match": "*", "lr": 1.0}]}
    stored = OptimPlugin(**settings).config.model_dump(mode="json")
    assert stored["momentum"] == 0.9
    assert stored["groups"] == [{"match": "*", "lr": 1.0}]
    again = OptimPlugin(**{**stored, "momentum": 0.5})
    assert again.config.args == {"momentum": 0.5}
    read = read_settings("quickstart", "optim,no:optim_muon", ("optim.momentum=0.5",))
    assert read.run.plugins["optim"] == {"momentum": 0.5}


def test_a_program_may_give_the_class_itself_and_tuples() -> None:
    plugin = OptimPlugin(call=torch.optim.AdamW, betas=(0.8, 0.9))
    assert plugin.make_optimizer(engine_over(called.Net())).defaults["betas"] == (0.8, 0.9)


def test_the_schema_of_config_files_admits_them() -> None:
    schema = OptimPlugin.config_class.model_json_schema()
    groups = schema["$defs"]["OptimGroupConfig"]
    assert schema["additionalProperties"] is groups["additionalProperties"] is True
