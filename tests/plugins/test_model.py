"""A model by import path: calls, argument checks, and bitwise equality with a handwritten loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.optim import RAdam

import called
from nexus_core import ConfigError
from nexus_core.cli.run import main as nexus_run
from nexus_core.testing import tiny_engine
from nexus_plugins.model import ModelPlugin

NET = """
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

net = nn.Linear(2, 2)


@dataclass
class Sizes:
    width: int
    depth: int = 1


def build(width: int, act: Literal["relu", "gelu"] = "relu", ends: tuple[int, int] = (0, 1),
          rate: float = 0.0, sizes: Sizes | None = None, anything=None) -> nn.Module:
    model = nn.Linear(width, 2)
    model.seen = dict(act=act, ends=ends, rate=rate, sizes=sizes, anything=anything)
    return model


def open_ended(**settings) -> nn.Module:
    return nn.Linear(settings["width"], 2)


def text() -> str:
    return "no model"


def broken(width: int = 3) -> nn.Module:
    raise RuntimeError("no such layer")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in its own folder, with a code file of a unique name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"net_{tmp_path.name}.py").write_text(NET)
    return tmp_path


def plugin(folder: Path, name: str, **args: Any) -> ModelPlugin:
    return ModelPlugin(call=f"./net_{folder.name}.py:{name}", args=args)


def test_arguments_come_in_the_types_of_the_annotations(folder: Path) -> None:
    made = plugin(
        folder, "build", width=4, ends=[3, 4], rate=1, sizes={"width": 2}, anything=[1]
    ).make_model()
    seen: Any = made.seen
    assert made.in_features == 4
    assert seen["ends"] == (3, 4)
    assert isinstance(seen["rate"], float)
    assert (type(seen["sizes"]).__name__, seen["sizes"].width) == ("Sizes", 2)
    assert seen["anything"] == [1]


def test_a_class_and_any_keyword_work_as_well(folder: Path) -> None:
    assert ModelPlugin(call="called:Net", args={"width": 3}).make_model().head.in_features == 3
    assert plugin(folder, "open_ended", width=5).make_model().in_features == 5


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("build", {"widht": 4}, r"'model.args.widht'.*net_.*\.py:build .*'widht'.*mean 'width'"),
        ("build", {}, r"net_.*:build needs its argument 'width'.*model\.args\.width"),
        ("build", {"width": "4"}, r"model\.args\.width: got '4'; 'width' of .*:build is int"),
        ("build", {"width": 4, "act": "relo"}, r"model\.args\.act: got 'relo'.*'relu' or 'gelu'"),
        ("build", {"width": 4, "ends": [1]}, r"model\.args\.ends: got \[1\]"),
        ("build", {"width": 4, "sizes": {"depth": 2}}, r"model\.args\.sizes: got"),
        ("buidl", {}, r"model\.call: .*has no 'buidl'.*'build'"),
        ("net", {}, r"is a Linear; name a function or a class"),
    ],
)
def test_mistakes_name_file_function_and_argument(
    folder: Path, name: str, args: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plugin(folder, name, **args)


def test_a_file_alone_says_what_could_be_called(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"whole module; name what to call.*:Sizes"):
        ModelPlugin(call=f"./net_{folder.name}.py")


def test_what_is_no_model_is_refused_and_errors_within_name_the_setting(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"net_.*:text returned a str; .* torch\.nn\.Module"):
        tiny_engine(plugin(folder, "text"))
    with pytest.raises(RuntimeError, match="no such layer") as raised:
        tiny_engine(plugin(folder, "broken"))
    (line,) = (n for n, text in enumerate(NET.splitlines(), 1) if "no such layer" in text)
    assert any(re.match(rf"model: ./net_.*, line {line}$", n) for n in raised.value.__notes__)


def test_a_program_may_give_the_function_itself() -> None:
    plugin = ModelPlugin(call=called.Net, args={"width": 3})
    assert plugin.config.model_dump(mode="json")["call"] == "called:Net"
    assert plugin.make_model().head.in_features == 3
    with pytest.raises(ConfigError, match="is not defined at module level"):
        ModelPlugin(call=lambda: None)


def test_a_run_ends_in_the_bits_of_a_loop_by_hand() -> None:
    """Fails if any of the five plugins, or the engine, rounds differently than PyTorch.

    Batches have unequal sizes, dropout draws random numbers, and there are evaluations.
    """
    sizes = [7, 5, 3, 1]
    config = {
        "until": "3 epochs",
        "seed": 3,
        "eval_every": "1 epoch",
        "out": "run",
        "plugins": {
            "data": {"call": "called:both", "args": {"sizes": sizes}},
            "model": {"call": "called:Net", "args": {"width": 16}},
            "loss": {"call": "torch.nn:CrossEntropyLoss", "args": {"label_smoothing": 0.1}},
            "optim": {"call": "torch.optim:RAdam", "lr": 0.03, "weight_decay": 0.01},
            "checkpoint": {},
        },
    }
    Path("my.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    ran = CliRunner().invoke(nexus_run, ["my.yaml", "--quiet"])
    assert ran.exit_code == 0, ran.output

    torch.manual_seed(3)
    net = called.Net(width=16)
    optimizer = RAdam(net.parameters(), lr=0.03, weight_decay=0.01)
    for _ in range(3):
        for x, y in called.batches(sizes):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y, label_smoothing=0.1).backward()
            optimizer.step()
    found = load_file("run/checkpoints/final/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())
