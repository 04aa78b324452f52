"""Metrics over whole evaluation sets, outputs in order, and metrics with their own state."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nexus_core import (
    ConfigError,
    DataError,
    Engine,
    Plugin,
    PluginConfig,
    ResumableLoader,
    hookimpl,
)
from nexus_core.cli.build import build_plugins
from nexus_core.cli.settings import read_settings
from nexus_core.places import only_named
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.early_stop import EarlyStopPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins_contrib.metrics import MetricsPlugin
from tests.distributed.processes import together


class Share:
    """The accuracy: a custom metric with the interface of torchmetrics."""

    def __init__(self) -> None:
        self.reset()

    def update(self, scores: Tensor, target: Tensor) -> None:
        self.right += int((scores.argmax(-1) == target).sum())
        self.rows += len(target)

    def compute(self) -> float:
        return self.right / self.rows

    def reset(self) -> None:
        self.right = self.rows = 0

    def merge_state(self, other: Share) -> None:
        self.right, self.rows = self.right + other.right, self.rows + other.rows


class Points:
    """Rows `(x, y)`: a point and its class, in dicts or tuples."""

    def __init__(self, size: int = 23, as_dict: bool = True) -> None:
        generator = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = torch.randint(3, (size,), generator=generator)
        self._as_dict = as_dict

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> Any:
        row = {"input": self.x[place], "label": self.y[place]}
        return row if self._as_dict else (self.x[place], self.y[place])


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = (batch["input"], batch["label"]) if isinstance(batch, dict) else batch
    return cross_entropy(model(x), y)


def engine_with(*plugins: Plugin[Any], **options: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return Engine(model, optimizer, loss=loss_of, plugins=plugins, **options)


def shares(engine: Engine, points: Points) -> float:
    """The expected result, from all rows at once."""
    with torch.no_grad():
        scores = engine.model[0](points.x)  # type: ignore[index]
    return (scores.argmax(1) == points.y).double().mean().item()


@pytest.mark.parametrize("as_dict", [True, False])
def test_each_set_is_measured_whole_and_reaches_all_that_look_at_evaluations(
    as_dict: bool, tmp_path: Path
) -> None:
    """Fails if a metric is the mean of batches, or mixes two sets."""
    best = CheckpointPlugin(best="hard/share", mode="max")
    stop = EarlyStopPlugin(metric="val/share", mode="max", patience=99)
    engine = engine_with(MetricsPlugin({"share": Share()}), best, stop, out=tmp_path)
    sets = {"val": Points(23, as_dict), "hard": Points(7, as_dict)}
    loaders = {name: ResumableLoader(points, 5, shuffle=False) for name, points in sets.items()}
    loader = ResumableLoader(Points(40, as_dict), 8)
    result = engine.fit(loader, until=6, eval_data=loaders, eval_every=2)
    for name, points in sets.items():
        assert result.metrics[f"{name}/share"] == shares(engine, points)
    assert best.state_dict()["value"] is not None
    assert (tmp_path / "checkpoints/best").exists()
    assert stop.state_dict()["best"] >= result.metrics["val/share"]  # type: ignore[operator]


def test_a_metric_of_several_numbers_and_a_choice_of_what_it_gets() -> None:
    class Counts(Share):
        def compute(self) -> Any:
            return {"right": self.right, "both": torch.tensor([self.right, self.rows])}

    plugin = MetricsPlugin({"n": Counts()}, pick=lambda batch, output: (output, batch["label"] * 0))
    found = engine_with(plugin).evaluate(ResumableLoader(Points(), 5))
    assert found["val/n_both_1"] == 23
    assert found["val/n_right"] == found["val/n_both_0"]


def test_an_evaluation_that_was_given_up_leaves_nothing_behind() -> None:
    """Fails if rows of a failed evaluation count in the next one."""
    engine = engine_with(MetricsPlugin({"share": Share()}))
    whole = [{"input": Points().x, "label": Points().y}]
    with pytest.raises(KeyError):
        engine.evaluate([*whole, {}])
    assert engine.evaluate(whole)["val/share"] == shares(engine, Points())


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (lambda: MetricsPlugin(), "metrics has no metrics; add some"),
        (lambda: MetricsPlugin({"share": 3}), "'share' is 3, without update"),
        (lambda: MetricsPlugin(metrics={"a": {"metric": "no.such"}}),
         r"metrics\.metrics\.a: 'no' cannot be imported"),
        (lambda: MetricsPlugin(metrics={"a": {"metric": "math.nosuch"}}), "'math' has no 'nosuch'"),
        (lambda: MetricsPlugin({"share": Share()}, target="lable"),
         r"metrics\.target is 'lable', which does not exist; there are \['input', 'label'"),
        (lambda: MetricsPlugin({"share": Share()}, output="no"), r"metrics\.output is 'no'"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_clear_error(plugin: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        engine_with(plugin()).evaluate(ResumableLoader(Points(), 5))


def test_a_config_that_nobody_named_imports_no_metric() -> None:
    """Fails if resuming somebody else's run executes code named in its config."""
    with only_named((), "name it yourself"), pytest.raises(ConfigError, match="name it yourself"):
        MetricsPlugin(metrics={"a": {"metric": "this.s"}})
    assert "this" not in sys.modules


def test_torchmetrics_by_name_gives_its_own_numbers() -> None:
    """Fails if a metric gets other inputs, or its result is read differently, than users expect."""
    torchmetrics = pytest.importorskip("torchmetrics", reason="its numbers are compared")
    args: dict[str, Any] = {"task": "multiclass", "num_classes": 3}
    names = {
        "acc": "Accuracy",
        "auroc": "AUROC",
        "f1": "torchmetrics.classification.MulticlassF1Score",
    }
    settings = {
        name: {"metric": path, "args": args if "." not in path else {"num_classes": 3}}
        for name, path in names.items()
    }
    engine = engine_with(MetricsPlugin(metrics=settings))
    found = engine.evaluate(ResumableLoader(Points(), 5, shuffle=False))
    with torch.no_grad():
        scores = engine.model[0](Points().x)  # type: ignore[index]
    for name, whole in (
        ("acc", torchmetrics.Accuracy(**args)), ("auroc", torchmetrics.AUROC(**args)),
        ("f1", torchmetrics.F1Score(**args, average="macro")),
    ):  # fmt: skip
        assert found[f"val/{name}"] == float(whole(scores, Points().y)), name
    with pytest.raises(ConfigError, match="Accuracy does not take"):
        MetricsPlugin(metrics={"a": {"metric": "Accuracy", "args": {"tusk": 1}}})
    with pytest.raises(ConfigError, match="Did you mean 'Accuracy'"):
        MetricsPlugin(metrics={"a": {"metric": "Accuracie"}})
    made = build_plugins(
        read_settings("quickstart", "metrics", ("metrics.metrics.a.metric=MeanMetric",))
    )
    assert "metrics" in made.configs


# -- engine.log and engine.predict


class RunningPlugin(Plugin[PluginConfig]):
    """Logs a metric with its own state."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Any) -> None:
        if engine.training:
            self._share.update(
                torch.eye(3)[batch["label"]], batch["label"] * (engine.state.step > 2)
            )
            engine.log("share", self._share)


def test_a_metric_that_is_logged_is_computed_when_due_and_begins_anew() -> None:
    logged: list[float] = []

    class LogPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_log(self, metrics: dict[str, float]) -> None:
            logged.append(metrics["train/share"])

    engine = engine_with(RunningPlugin(Share()), LogPlugin(), log_every=3)
    engine.fit(ResumableLoader(Points(), 5), until=6)
    assert logged[0] < 1.0 == logged[1]


def test_outputs_come_in_order_as_an_evaluation_computes_them() -> None:
    """Fails if prediction trains, draws random numbers, calls the loss, or ignores the average."""
    engine = engine_with(EmaPlugin(decay=0.5))
    engine.fit(ResumableLoader(Points(), 5), until=4)
    average = copy.deepcopy(engine.model)
    average.load_state_dict(engine.plugins["ema"].weights())  # type: ignore[attr-defined]
    generator, before = torch.get_rng_state(), copy.deepcopy(engine.model.state_dict())
    outputs = engine.predict(ResumableLoader(Points(), 5, shuffle=False))
    assert [len(part) for part in outputs] == [5, 5, 5, 5, 3]
    with torch.no_grad():
        assert torch.allclose(torch.cat(outputs), average[0](Points().x), atol=1e-6)
    assert torch.equal(generator, torch.get_rng_state())
    assert engine.model.training
    assert engine.training
    assert all(torch.equal(before[name], now) for name, now in engine.model.state_dict().items())
    assert torch.equal(engine.predict([Points().x])[0], engine.predict([(Points().x, None)])[0])


def measured_together(names: list[str]) -> Any:
    """In each of several processes: the metrics and outputs of a shared set."""
    from nexus_core.processes import Ranks
    from nexus_plugins.ddp import DdpPlugin

    metrics: dict[str, Any] = {"share": Share()}
    if names:
        import torchmetrics

        metrics |= {n: getattr(torchmetrics, n)(task="multiclass", num_classes=3) for n in names}
    ddp = DdpPlugin(timeout=30)
    ddp.join()
    engine = engine_with(MetricsPlugin(metrics), ddp)
    ranks = engine.ranks
    loader = ResumableLoader(Points(13), 4, ranks=ranks, shuffle=False)
    few = ResumableLoader(Points(2), 3, ranks=ranks, shuffle=False) if ranks.size == 3 else loader
    engine.fit(loader, until=2, eval_data={"val": loader, "few": few})
    plain = engine.predict([Points(3).x])
    sampler: Any = torch.utils.data.distributed.DistributedSampler(
        Points(13), ranks.size, ranks.rank
    )
    with pytest.raises(DataError, match="distributes the rows"):
        engine.predict(torch.utils.data.DataLoader(Points(13), 4, sampler=sampler))
    kept = {n: v for n, v in engine.metrics.items() if n.rpartition("/")[2] in metrics}
    weights = {name: value.tolist() for name, value in engine.model.state_dict().items()}
    assert isinstance(ranks, Ranks)
    return kept, torch.cat(engine.predict(loader)).tolist(), len(plain), weights


@pytest.mark.slow
def test_several_processes_measure_and_predict_as_one() -> None:
    """Fails if padding rows count, or processes disagree."""
    try:
        import torchmetrics  # noqa: F401

        names = ["Accuracy", "AUROC"]
    except ImportError:
        names = []
    answers = together(3, measured_together, names)
    metrics, outputs, plain, weights = answers[0]
    assert all(answer == answers[0] for answer in answers)
    engine = engine_with(MetricsPlugin({"share": Share()}))
    engine.model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    with torch.no_grad():
        assert torch.allclose(torch.tensor(outputs), engine.model[0](Points(13).x), atol=1e-6)  # type: ignore[index]
    assert plain == 1
    assert metrics["val/share"] == shares(engine, Points(13))
    assert metrics["few/share"] == shares(engine, Points(2))
    assert metrics.get("val/Accuracy", metrics["val/share"]) == pytest.approx(metrics["val/share"])
