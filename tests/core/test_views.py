"""What users see of a run: history, result, plan and plots."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nexus_core
from nexus_core import ConfigError, Engine, History, Plugin, PluginConfig, TrainState, hookimpl
from nexus_core.views import Metrics, history
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.jsonl import JsonlPlugin
from nexus_plugins.lr_cosine import LrCosinePlugin

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(6)]


class SeenPlugin(Plugin[PluginConfig]):
    """Records all metrics that loggers get, by step: the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    @hookimpl(stage="record")
    def on_log(self, engine: Engine, metrics: dict[str, float]) -> None:
        self.rows.setdefault(engine.state.step, {}).update(metrics)

    @hookimpl(stage="record")
    def on_eval(self, engine: Engine, metrics: dict[str, float]) -> None:
        self.on_log(engine, metrics)


def engine_of(*plugins: Plugin[Any], **options: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"loss": lambda m, b: m(b).square().mean(), "log_every": 2, **options}
    return Engine(model, made, plugins=plugins, **options)


SETS = {"val": BATCHES[:2], "test": BATCHES[2:]}


def trained(*plugins: Plugin[Any], until: str = "14 steps", **options: Any) -> Engine:
    engine = engine_of(*plugins, **options)
    engine.fit(BATCHES, until, eval_data=SETS, eval_every="5 steps")
    return engine


def same(one: History, other: History) -> bool:
    """Whether two histories have the same columns of the same numbers, where NaN equals NaN."""
    return list(one) == list(other) and all(
        len(one[name]) == len(other[name])
        and all(a == b or (a != a and b != b) for a, b in zip(one[name], other[name], strict=True))
        for name in one
    )


# -- the history


def test_a_history_holds_what_loggers_get_in_columns_of_equal_length() -> None:
    engine = trained(SeenPlugin())
    shown, seen = engine.result().history, engine.plugins["seen"]
    assert isinstance(seen, SeenPlugin)
    assert shown["step"] == sorted(seen.rows) == [2, 4, 5, 6, 8, 10, 12, 14]
    assert shown["tokens"] == [4 * step for step in shown["step"]]
    for name in {name for row in seen.rows.values() for name in row}:
        expected = [seen.rows[int(step)].get(name, math.nan) for step in shown["step"]]
        assert same(History(x=shown[name]), History(x=expected)), name
    assert shown.points("val/loss")[0] == [5, 10, 14]
    assert same(shown, engine.history)
    with pytest.raises(ConfigError, match=r"no metric 'loss'; there are train/loss"):
        shown.points("loss")


def test_pandas_and_pyplot_take_a_history_as_it_is() -> None:
    pandas = pytest.importorskip("pandas", reason="a data frame is pandas'")
    shown = trained().result().history
    frame = pandas.DataFrame(shown)
    assert list(frame.columns) == list(shown)
    assert frame["val/loss"].count() == 3
    assert frame["step"].dtype.kind == "i"


def test_a_resumed_run_has_the_history_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    """The oracle is an uninterrupted run; the resumed engine only has the folder."""

    def parts(name: str) -> dict[str, Any]:
        return {"out": tmp_path / name}

    def plugins() -> list[Plugin[Any]]:
        return [CheckpointPlugin(every="4 steps", sync=True), JsonlPlugin()]

    whole = trained(*plugins(), **parts("whole"))
    first = engine_of(*plugins(), **parts("parts"))
    for state in first.steps(BATCHES, until="14 steps", eval_data=SETS, eval_every="5 steps"):
        if state.step == 11:  # three steps and an evaluation are repeated
            break
    second = engine_of(*plugins(), **parts("parts"))
    second.resume(str(tmp_path / "parts/checkpoints/step-00000008"))
    assert second.history["step"][-1] == 8
    assert second.history.points("val/loss")[0] == [5]
    with pytest.warns(RuntimeWarning, match="the run continues from step 8"):
        second.fit(BATCHES, "14 steps", eval_data=SETS, eval_every="5 steps")
    assert same(second.history, whole.history)
    assert same(History.read(tmp_path / "parts"), whole.history)
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl; pass the folder of a run"):
        History.read(tmp_path)


def test_a_snapshot_of_before_takes_the_history_back_with_it() -> None:
    engine = engine_of()
    engine.fit(BATCHES, "6 steps")
    snapshot, before = engine.state_dict(), engine.history
    engine.fit(BATCHES, "12 steps")
    whole = engine.history
    engine.load_state_dict(snapshot)
    assert same(engine.history, before)
    engine.fit(BATCHES, "12 steps")
    assert len(engine.history["step"]) == len(whole["step"])


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 12))
def test_a_long_history_is_an_even_spread_and_the_newest(logs: int, evaluate: int) -> None:
    """Law: bounded, evenly spaced, includes the newest, and logs do not displace evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "MOST", 8)
        state = TrainState()
        metrics = Metrics(state)
        for step in range(1, logs + 1):
            state.step = step
            metrics.keep({"train/x": float(step)})
            if step % evaluate == 0:
                metrics.keep({"val/x": float(step), "val/total_loss": 0.0})
        found = metrics.history()
    for name, period in (("train/x", 1), ("val/x", evaluate)):
        done = list(range(period, logs + 1, period))
        steps = found.points(name)[0] if done else []
        assert len(steps) <= 9
        assert (steps[:1], steps[-1:]) == (done[:1], done[-1:])
        gaps = {later - step for step, later in pairwise(steps[:-1])}
        assert len(gaps) <= 1
        assert len(steps) >= min(len(done), 4)


# -- plots


def test_a_plot_has_training_and_evaluations_in_one_panel() -> None:
    pytest.importorskip("matplotlib", reason="plots are matplotlib's")
    result = trained(LrCosinePlugin()).result()
    figure: Any = result.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["loss", "learning_rate"], "the total of one loss is not drawn twice"
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["train", "val", "test"]
    assert len({line.get_color() for line in lines.values()}) == 3
    assert list(lines["val"].get_xdata()) == [5, 10, 14], "no gap within the line"
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it without pyplot"
    alone: Any = result.plot("val/loss", "learning_rate")
    assert [len(axes.lines) for axes in alone.axes] == [1, 1]
    with pytest.raises(ConfigError, match=r"no metric 'los'\. Did you mean 'loss'\? There are: "):
        result.plot("los")


def test_a_plot_without_matplotlib_or_metrics_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"no metric yet to plot; train first: fit\("):
        engine_of().history.plot()
    monkeypatch.setattr("nexus_core.views.picture.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nexus-trainer\[plot\]'"):
        engine_of().history.plot()


# -- display of an engine, its plan and its result


def test_an_engine_shows_where_it_is_and_what_it_is_made_of() -> None:
    engine = engine_of(ClipPlugin())
    assert "until: not begun" in repr(engine)
    engine.fit(BATCHES, "6 steps", eval_data=BATCHES)
    for text in (repr(engine), engine._repr_html_()):
        for part in ("6 steps (100% done)", "cpu", "Linear, 4 parameters", "SGD, lr 0.1",
                     "clip, loss", f"{engine.metrics['val/loss']:.4f}"):  # fmt: skip
            assert part in text


def test_an_engine_in_the_making_can_be_shown() -> None:
    """Fails if displaying a half-built engine raises an error."""
    seen: list[str] = []

    class EarlyPlugin(Plugin[PluginConfig]):
        @hookimpl
        def make_model(self, engine: Engine) -> nn.Module:
            seen.append(repr(engine) + engine._repr_html_())
            return nn.Linear(3, 1)

        @hookimpl
        def make_data(self) -> nexus_core.RunData:
            return nexus_core.RunData(train=BATCHES)

        @hookimpl
        def make_optimizer(self, engine: Engine) -> torch.optim.Optimizer:
            return torch.optim.SGD(engine.model.parameters(), lr=0.1)

    Engine(loss=lambda m, b: m(b).mean(), plugins=[EarlyPlugin()])
    assert "plugins: early, loss" in seen[0]


def test_a_plan_is_a_table_of_events_stages_and_plugins() -> None:
    plan: Any = engine_of(LrCosinePlugin(), ClipPlugin()).plan
    lines = [line.split() for line in repr(plan).splitlines()]
    assert ["after_backward", "transform", "lr_cosine"] in lines
    assert ["limit", "clip"] in lines, "the next stage of the same event"
    cells = [re.findall(r">([^<>]*)</t[hd]>", row) for row in plan._repr_html_().split("<tr>")]
    assert ["event", "stage", "plugins, in order"] in cells
    assert ["", "limit", "clip"] in cells
    assert "the core" not in repr(plan)


def test_a_result_says_how_it_went_in_a_line_and_as_a_table() -> None:
    result = trained(until="3 steps").result()
    value = result.metrics["val/loss"]
    assert repr(result).startswith("<Result finished at step 3, 12 samples, ")
    assert f"val/loss {value:.4f}" in repr(result)
    table = result._repr_html_()
    assert [f">{split}</th>" in table for split in SETS] == [True, True]
    assert f">{value:.4f}</td>" in table
    assert "total_loss" not in table, "the total of one loss is not shown twice"


def test_what_is_shown_is_escaped() -> None:
    result = engine_of().fit(BATCHES, "1 step", eval_data={"<b>": BATCHES})
    assert "<b>/loss" not in result._repr_html_()
    assert "&lt;b&gt;" in result._repr_html_()


# -- names


class RatedEngine(Engine):
    """A user's engine with an error in a property."""

    @property
    def rate(self) -> object:
        return self.optimizer.no_such_thing


def test_a_mistake_in_a_property_is_not_hidden() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    engine = RatedEngine(model, optimizer, loss=lambda model, batch: model(batch).mean())
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = engine.rate


def test_odd_lines_of_a_log_do_not_stop_a_history(tmp_path: Path) -> None:
    """Fails if a damaged metrics file prevents resuming."""
    lines = ['{"step": "x", "a": 1}', "torn", '{"step": 2, "a": "so", "b": 3}', '{"a": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    history = History.read(tmp_path)
    assert history["step"] == [2]
    assert history["b"] == [3]
    assert math.isnan(history["a"][0])


def test_every_name_is_there_to_complete() -> None:
    """In a separate process, since here all modules have been imported already."""
    code = "import nexus_core; print(*dir(nexus_core))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(nexus_core.__all__) <= set(shown.stdout.split())
    engine = engine_of()
    assert {"fit", "history", "plan", "state", "predict"} <= set(dir(engine))
    assert {"step", "epoch", "tokens"} <= set(dir(engine.state))
    assert {"plugins", "declared"} <= set(dir(engine.plan))
    assert {"on_step", "forward"} <= set(dir(engine.hook))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "save",
            r"for the weights, call torch\.save.*, out=.*plugins=\[\.\.\., CheckpointPlugin\(\)\]$",
        ),
        ("load_checkpoint", r"load_state_dict\(torch\.load\(path\)\).*engine\.resume\('auto'\)"),
        ("validate", r"; call engine\.evaluate\(batches\)"),
        ("train", r"; call engine\.fit\(batches, until='1000 steps'\)"),
        ("sparkle", r"'Engine' object has no attribute 'sparkle'$"),
    ],
)
def test_a_method_of_another_trainer_says_what_to_write(name: str, said: str) -> None:
    engine = engine_of()
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError, match=said):
        getattr(engine, name)
