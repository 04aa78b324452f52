"""What a checkpoint cannot store is named at the first step; the rest keeps its type."""

from __future__ import annotations

import enum
import json
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.mutations import resign
from nexus_core import CheckpointError, Engine, Plugin, PluginConfig, ResumableLoader, hookimpl
from nexus_plugins._shared.checkpoints import tensorfile
from nexus_plugins.checkpoint import CheckpointPlugin
from tiny import Regression, tiny_engine


class HolderPlugin(Plugin[PluginConfig]):
    """Has a value as its state."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"v": self.value} if self.value is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["v"]


def engine_in(out: Path, *plugins: Plugin[Any], **settings: Any) -> Engine:
    settings = {"every": "1000 steps", **settings}
    return tiny_engine(CheckpointPlugin(**settings), *plugins, out=out)


def train(engine: Engine, until: int, **options: Any) -> None:
    engine.fit(ResumableLoader(Regression(), 4, seed=1), until=until, **options)


class Level(enum.IntEnum):
    HIGH = 3


class Word(enum.StrEnum):
    A = "a"


class Text(str):
    """A subclass of str."""


Point = namedtuple("Point", "x y")
DEEP: list[Any] = []
for _ in range(3000):
    DEEP = [DEEP]
CYCLE: dict[str, Any] = {}
CYCLE["me"] = CYCLE


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (Level.HIGH, ".value"),
        (Word.A, ".value"),
        (Text("a"), r"str\(\.\.\.\)"),
        (Point(1, 2), r"tuple\(\.\.\.\)"),
        (torch.Size([1, 2]), r"tuple\(\.\.\.\)"),
        (Counter("aab"), r"dict\(\.\.\.\)"),
        (np.float64(1.5), r"\.item\(\)"),
        (np.float32(1.5), r"\.item\(\)"),
        (np.arange(3), "from_numpy"),
        ({1, 2}, "list of its items"),
        ({(1, 2): 3}, "of type tuple"),
        ({Level.HIGH: 3}, "of type Level"),
        (DEEP, "nested more than 100 levels deep"),
        (CYCLE, "contains itself"),
        (lambda: torch.zeros(2, dtype=torch.complex128), "view_as_real"),
        (lambda: torch.zeros(2, dtype=torch.complex32), "view_as_real"),
        (
            lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu),
            r"view\(torch\.uint8\)",
        ),
        (lambda: torch.eye(3).to_sparse(), "to_dense"),
        (lambda: torch.eye(4).to_sparse_csr(), "to_dense"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), r"values\(\)"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "int_repr"),
        (lambda: torch.empty(2, device="meta"), "no values"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:.*(ComplexHalf|Sparse|nested|quantize|torch.ao)")
def test_what_cannot_be_stored_is_named_at_the_first_step(
    value: object, advice: str, tmp_path: Path
) -> None:
    """Fails if only the first save finds it, after hours of training."""
    held = value() if isinstance(value, FunctionType) else value
    engine = engine_in(tmp_path, HolderPlugin(held))
    with pytest.raises(CheckpointError, match=rf"(?s)holder.*{advice}") as refused:
        train(engine, 9)
    assert engine.state.step == 1
    assert "disk" not in str(refused.value)


def test_a_buffer_of_the_model_is_named_with_a_way_out(tmp_path: Path) -> None:
    """Fails if the message does not name the buffer."""
    engine = engine_in(tmp_path)
    engine.model.register_buffer("freqs", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match=r"the model's tensor 'freqs'.*persistent=False"):
        train(engine, 9)
    assert engine.state.step == 1


def test_names_beyond_the_header_are_refused_when_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a file is written that its own reader rejects."""
    monkeypatch.setattr(tensorfile, "_HEADER_LIMIT", 2000)
    many = {f"a rather long name, number {n}": torch.zeros(1) for n in range(50)}
    with pytest.raises(CheckpointError, match="too many for a safetensors file"):
        train(engine_in(tmp_path, HolderPlugin(many)), 9)


class Gathers(Plugin[PluginConfig]):
    """Its state becomes unstorable at step 2."""

    name = "gathers"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        if engine.state.step == 2:
            self.seen.append({1})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(b=1, a=torch.zeros(2)), OrderedDict({1: {"x": OrderedDict()}}),
        {1: "a", "1": 2}, {"$tensor": "x"}, [(1, (2.0, "x")), None, True], -(10**40),
        nn.Linear(2, 2).state_dict(),
    ],
)  # fmt: skip
def test_what_is_stored_comes_back_in_its_type(value: object, tmp_path: Path) -> None:
    """Fails if an OrderedDict, such as a module's state, is restored as another type."""
    train(engine_in(tmp_path, HolderPlugin(value)), 2)
    holder = HolderPlugin()
    engine_in(tmp_path, holder).resume()
    assert same(holder.value, value)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return (
            type(one) is type(other)
            and list(one) == list(other)
            and all(same(one[key], other[key]) for key in one)
        )
    return type(one) is type(other) and bool(one == other)


def test_what_cannot_be_stored_later_is_no_trouble_of_the_disk(tmp_path: Path) -> None:
    """Fails if the message blames the disk."""
    with pytest.raises(CheckpointError, match=r"plugins\.gathers\.state\.seen\.0.*builtins\.set"):
        train(engine_in(tmp_path, Gathers(), every=1), 9)


class ScorePlugin(Plugin[PluginConfig]):
    before: ClassVar[tuple[str, ...]] = ("checkpoint",)

    def __init__(self, kind: Callable[[int], Any]) -> None:
        super().__init__()
        self.kind = kind

    @hookimpl
    def on_eval(self, engine: Engine, metrics: dict[str, Any]) -> None:
        metrics["val/score"] = self.kind(7)


@pytest.mark.parametrize("kind", [int, float, np.int64, np.float32, torch.tensor])
def test_best_of_a_metric_of_any_number_type_resumes(
    kind: Callable[[int], Any], tmp_path: Path
) -> None:
    """Fails if a run with an integer metric is saved but cannot be resumed."""
    held = ResumableLoader(Regression(), 8, shuffle=False)

    def engine() -> Engine:
        return engine_in(tmp_path, ScorePlugin(kind), best="val/score", mode="max")

    train(engine(), 2, eval_data=held)
    again = engine()
    again.resume("best")
    assert again.plugins["checkpoint"].state_dict() == {"value": 7.0, "step": 2}
    train(again, 4, eval_data=held)


class KindsPlugin(Plugin[PluginConfig]):
    """Has a state of every type."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {
            "n": 1, "t": "x", "d": {"x": 1.0}, "l": [1], "w": torch.zeros(2), "o": None,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"n": "1"}, r"\.n is text; expected a number"),
        ({"n": None}, r"\.n is None; expected a number"),
        ({"t": 1}, r"\.t is a number; expected text"),
        ({"d": {"x": [1]}}, r"\.d\.x is a list; expected a number"),
        ({"l": {}}, r"\.l is a dict; expected a list"),
        ({"w": [1.0]}, r"\.w is a list; expected a tensor"),
        ({"n": 2.5, "l": [], "d": {}, "o": 5}, None),
    ],
)
def test_a_state_of_other_kinds_is_refused_before_the_plugin_trusts_it(
    change: dict[str, Any], place: str | None, tmp_path: Path
) -> None:
    """Fails if text instead of a number is only found in the first step, far from the cause."""
    plugin = KindsPlugin()
    engine = engine_in(tmp_path, plugin)
    plugin.state |= change
    train(engine, 2)
    again = engine_in(tmp_path, KindsPlugin())
    if place is None:
        again.resume()
        assert again.plugins["kinds"].state_dict()["n"] == 2.5
        return
    with pytest.raises(CheckpointError, match=f"plugin 'kinds'{place}"):
        again.resume()


class LaterPlugin(KindsPlugin):
    """Its state has a value from the first step on."""

    @hookimpl
    def on_step(self, engine: Engine) -> None:
        self.state["o"] = [engine.state.step]


def test_an_engine_that_has_trained_takes_back_what_it_had_not_yet(tmp_path: Path) -> None:
    """Fails if an initial state is rejected because the plugin's state has changed since."""
    engine = engine_in(tmp_path, LaterPlugin(), every=1)
    train(engine, 2)
    folder = tmp_path / "checkpoints" / "step-00000001"
    state = json.loads((folder / "state.json").read_text())
    state["plugins"]["later"]["state"]["o"] = None
    (folder / "state.json").write_text(json.dumps(state))
    resign(folder)
    engine.resume(str(folder))
    assert engine.plugins["later"].state_dict()["o"] is None
