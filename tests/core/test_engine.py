"""The loop: which hooks fire when, when it ends, and what it reports."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nexus_core import (
    ConfigError,
    DataError,
    Engine,
    Loss,
    LossConfig,
    Plugin,
    PluginConfig,
    PluginError,
    ResumableLoader,
    RunData,
    hookimpl,
)
from nexus_core.plan import HOOK_NAMES
from tiny import Net, RecorderPlugin, Regression, SquaredPlugin, tiny_engine, weights


def loader(batch_size: int = 4, **options: Any) -> ResumableLoader:
    return ResumableLoader(Regression(), batch_size, seed=1, **options)


def listener(log: list[str], name: str = "listener") -> Plugin[PluginConfig]:
    """A plugin that records every event and seam, and answers none."""

    def answer(hook: str) -> Any:
        def method(self: Plugin[PluginConfig], engine: Engine) -> None:
            log.append(hook)

        method.__name__ = hook
        return hookimpl(method)

    silent = {"loss_units", "loss_terms", "loss_weight", "lr_scale", "collect_metrics", "summarize"}
    hooks = {hook: answer(hook) for hook in HOOK_NAMES if hook not in silent}
    return type("ListenerPlugin", (Plugin,), {**hooks, "name": name})()


def test_events_fire_in_the_order_that_is_documented() -> None:
    log: list[str] = []
    engine = tiny_engine(listener(log), accumulate=2, log_every=2)
    engine.fit(loader(), until="2 steps", eval_data=loader(8, shuffle=False), eval_every="2 steps")
    micro = ["forward", "backward"]
    step = [*["on_batch", "cut_batch"] * 2, "take_turns", "weigh_losses"]
    step += ["accumulate_gradient", *micro, *micro]
    step += ["after_backward", "optimizer_step", "on_step"]
    evaluation = ["evaluating", "forward", "forward", "forward", "measure", "on_eval"]
    assert log == [
        *["on_build", "on_start"],
        *[*step, "on_step_end"],
        *[*step, "on_log", *evaluation, "on_step_end"],
        *["on_finish", "on_close"],
    ]


def test_loop_by_hand_gives_the_same_weights_bit_for_bit() -> None:
    """The oracle is a handwritten loop."""
    engine = tiny_engine()
    engine.fit(loader(), until="9 steps")
    torch.manual_seed(3)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [batch for epoch in range(2) for batch in loader().batches(epoch)][:9]
    for batch in batches:
        optimizer.zero_grad()
        counted = batch["y"].isfinite()
        error = (model(batch["x"]) - batch["y"])[counted].square().sum()
        (error / counted.sum()).backward()
        optimizer.step()
    assert all(map(torch.equal, weights(engine), model.parameters()))


def test_embedding_needs_no_config_and_no_base_class() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    data = [{"x": torch.randn(8, 5)} for _ in range(10)]
    data = [{**batch, "y": batch["x"].sum(1, keepdim=True)} for batch in data]
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        loss=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]),
        seed=0,
    )
    result = engine.fit(data, until="200 steps", eval_data=data[:2], eval_every="100 steps")
    assert result.status == "finished"
    assert result.step == 200
    assert result.metrics["val/loss"] < 0.05
    assert result.metrics["train/loss"] == result.metrics["train/total_loss"]


@pytest.mark.parametrize(
    ("until", "steps"),
    [("7 steps", 7), ("2 epochs", 12), ("30 samples", 8), ("0.5 epochs", 3), ("1e0 steps", 1)],
)
def test_horizon_ends_the_run(until: str, steps: int) -> None:
    assert tiny_engine().fit(loader(), until=until).step == steps


def test_last_step_of_an_epoch_horizon_may_have_fewer_micro_batches() -> None:
    engine = tiny_engine(accumulate=4)
    assert engine.fit(loader(), until="1 epoch").step == 2
    assert engine.state.samples == 23


def test_time_horizon_ends_a_run() -> None:
    assert tiny_engine().fit(loader(), until="0.05 s").seconds >= 0.05


def test_generator_can_be_closed_and_gone_on_with() -> None:
    """A program that owns the loop gets the same weights as `fit`."""
    whole = tiny_engine(dropout=0.3)
    whole.fit(loader(), until="10 steps")
    engine = tiny_engine(dropout=0.3)
    for state in engine.steps(loader(), until="10 steps"):
        if state.step == 4:
            break
    assert engine.fit(loader(), until="10 steps").step == 10
    assert all(map(torch.equal, weights(whole), weights(engine)))


def test_stop_ends_after_the_present_step_and_says_why() -> None:
    class StopperPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_step(self, engine: Engine) -> None:
            if engine.state.step == 3:
                engine.stop("enough")

    log: list[str] = []
    engine = tiny_engine(StopperPlugin(), listener(log))
    result = engine.fit(loader(), until="10 steps", eval_data=loader())
    assert (result.status, result.reason, result.step) == ("stopped", "enough", 3)
    assert log[-3:] == ["on_step_end", "on_finish", "on_close"]


class BuilderPlugin(Plugin[PluginConfig]):
    """Answers every seam that builds a part of the run."""

    @hookimpl
    def make_data(self) -> RunData:
        return RunData(loader(), {"held_out": loader(8, shuffle=False)})

    @hookimpl
    def make_model(self, engine: Engine) -> nn.Module:
        assert engine.data is not None, "the model may depend on the data"
        return Net()

    @hookimpl
    def make_optimizer(self, engine: Engine) -> torch.optim.Optimizer:
        return torch.optim.SGD(engine.model.parameters(), lr=0.1)


def test_plugins_build_what_is_not_passed() -> None:
    engine = Engine(plugins=[BuilderPlugin(), SquaredPlugin()], seed=0)
    result = engine.fit(until="3 steps")
    assert result.step == 3
    assert "held_out/loss" in result.metrics


class PadPlugin(Loss[LossConfig]):
    """The output itself, over units given in the batch."""

    def units(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return batch["units"].sum()

    def loss(self, batch: Mapping[str, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return (batch["units"] * batch["value"]).sum() + 0 * output.sum()


def test_evaluation_is_weighted_by_units_not_by_batches() -> None:
    """Mean of batch means would give (1 + 9) / 2."""
    data = [
        {"x": torch.ones(1, 5), "units": torch.tensor([99.0]), "value": torch.tensor([1.0])},
        {"x": torch.ones(1, 5), "units": torch.tensor([1.0]), "value": torch.tensor([9.0])},
    ]
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = Engine(model, optimizer, plugins=[PadPlugin(weight=2.0)])
    metrics = engine.evaluate({"val": data, "other": data[:1]})
    assert metrics["val/pad_loss"] == pytest.approx((99 + 9) / 100)
    assert metrics["val/loss"] == metrics["val/total_loss"] == pytest.approx(2 * (99 + 9) / 100)
    assert metrics["other/pad_loss"] == pytest.approx(1.0)


def test_evaluation_leaves_no_trace_in_training() -> None:
    """Dropout draws the same numbers with or without an evaluation in between."""
    runs = []
    for options in ({}, {"eval_data": loader(3), "eval_every": "2 steps"}):
        recorder = RecorderPlugin()
        engine = tiny_engine(recorder, dropout=0.5)
        engine.fit(loader(), until="8 steps", **options)
        assert engine.model.training
        lines = [line for line in recorder.lines if "train/total_loss" in line[1]]
        runs.append((weights(engine), lines))
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    assert runs[0][1] == runs[1][1]


def test_logged_metrics_are_means_over_the_period() -> None:
    recorder = RecorderPlugin()
    every_step = RecorderPlugin()
    tiny_engine(recorder, log_every=4).fit(loader(), until="10 steps")
    tiny_engine(every_step, log_every=1).fit(loader(), until="10 steps")
    totals = [line["train/total_loss"] for _, line in every_step.lines]
    assert [step for step, _ in recorder.lines] == [4, 8, 10]
    for (_, line), part in zip(recorder.lines, [totals[:4], totals[4:8], totals[8:]], strict=True):
        assert line["train/total_loss"] == pytest.approx(sum(part) / len(part))
        assert line["train/learning_rate"] == pytest.approx(1e-2)


class ScalePlugin(Plugin[PluginConfig]):
    """Halves the learning rate with each step."""

    @hookimpl
    def lr_scale(self, engine: Engine) -> float:
        return 0.5**engine.state.step


def test_schedules_multiply_and_none_leaves_the_rate_alone() -> None:
    other = type("OtherPlugin", (ScalePlugin,), {})()
    engine = tiny_engine(ScalePlugin(), other)
    engine.fit(loader(), until="3 steps")
    assert engine.optimizer.param_groups[0]["lr"] == 1e-2 * 0.25**2
    alone = tiny_engine()
    alone.optimizer.param_groups[0]["lr"] = 0.3
    alone.fit(loader(), until="1 step")
    assert alone.optimizer.param_groups[0]["lr"] == 0.3


class FailingPlugin(Plugin[PluginConfig]):
    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        if engine.state.step == 2:
            raise ZeroDivisionError("planted")


def test_error_names_plugin_event_and_step_and_everything_is_closed() -> None:
    closed: list[str] = []

    class BadCloserPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_close(self) -> None:
            closed.append("bad")
            raise OSError("disk gone")

    class CloserPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_close(self) -> None:
            closed.append("good")

        @hookimpl
        def on_error(self, error: BaseException) -> None:
            closed.append(type(error).__name__)

    engine = tiny_engine(CloserPlugin(), FailingPlugin(), BadCloserPlugin())
    with pytest.raises(ZeroDivisionError, match="planted") as caught:
        engine.fit(loader(), until="5 steps")
    assert closed == ["ZeroDivisionError", "bad", "good"], "closed in reverse, all of them"
    assert caught.value.__notes__ == [
        "plugin 'failing', after_backward, step 2",
        "plugin 'bad_closer', on_close: OSError('disk gone')",
    ]
    with pytest.raises(OSError, match="disk gone") as caught_alone:
        tiny_engine(BadCloserPlugin()).fit(loader(), until="1 step")
    assert caught_alone.value.__notes__ == ["plugin 'bad_closer', on_close"]


def test_wrappers_first_in_the_plan_are_outermost() -> None:
    log: list[str] = []

    def wrapper(name: str) -> Plugin[PluginConfig]:
        def forward(self: object) -> Any:
            log.append(f"{name} in")
            output = yield
            log.append(f"{name} out")
            return output

        return type("WrapPlugin", (Plugin,), {"forward": hookimpl(wrapper=True)(forward),
                                              "name": name})()  # fmt: skip

    tiny_engine(wrapper("outer"), wrapper("inner")).fit(loader(), until="1 step")
    assert log == ["outer in", "inner in", "inner out", "outer out"]


def test_batch_may_be_changed_without_changing_the_data() -> None:
    class EraserPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_batch(self, batch: dict[str, torch.Tensor]) -> None:
            batch["x"] = batch["x"][:1]
            batch["y"] = batch.pop("y")[:1]

    data = [{"x": torch.ones(3, 5), "y": torch.ones(3, 4)}]
    engine = tiny_engine(EraserPlugin())
    engine.fit(data, until="3 steps")
    assert len(data[0]["x"]) == 3
    assert engine.state.samples == 3


def test_two_engines_do_not_see_each_other() -> None:
    logs: tuple[list[str], list[str]] = ([], [])
    one, two = (tiny_engine(listener(log)) for log in logs)
    one.fit(loader(), until="1 step")
    assert len(logs[0]) > 1
    assert logs[1] == ["on_build"]
    assert two.state.step == 0


def test_parts_that_are_missing_are_named() -> None:
    model = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="no loss: pass"):
        Engine(model, optimizer)
    with pytest.raises(ConfigError, match="no optimizer: pass"):
        Engine(model, plugins=[SquaredPlugin()])
    with pytest.raises(DataError, match="no training data"):
        Engine(plugins=[SquaredPlugin()])
    with pytest.raises(DataError, match="no training data"):
        Engine(model, optimizer, plugins=[SquaredPlugin()]).fit(until="1 step")
    with pytest.raises(ConfigError, match="accumulate"):
        tiny_engine(accumulate=0)
    with pytest.raises(ConfigError, match="cannot use the device"):
        tiny_engine(device="toaster")
    with pytest.raises(DataError, match="has no batch"):
        tiny_engine().evaluate([])


def test_default_forward_passes_what_the_model_accepts() -> None:
    """`sample_ids` and labels in a batch are not passed to a model that does not accept them."""
    engine = tiny_engine()
    engine.fit([{"x": torch.ones(2, 5), "y": torch.ones(2, 4), "sample_ids": torch.ones(2)}],
               until="1 step")  # fmt: skip
    model = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class TuplePlugin(Loss[LossConfig]):
        def units(self, batch: tuple[torch.Tensor, ...]) -> float:
            return float(len(batch[0]))

        def loss(self, batch: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return (output - batch[1]).square().sum()

    tuples = Engine(model, optimizer, plugins=[TuplePlugin()])
    assert tuples.fit([(torch.ones(2, 5), torch.ones(2, 1))], until="2 steps").step == 2


def test_a_snapshot_can_be_gone_back_to_again_and_again() -> None:
    """Fails if further training changes the moments in the snapshot it started from."""
    engine = tiny_engine()
    engine.fit(loader(), until="3 steps")
    snapshot = copy.deepcopy(engine.state_dict())
    ends = []
    for _ in range(3):
        engine.load_state_dict(snapshot)
        engine.fit(loader(), until="9 steps")
        ends.append(weights(engine))
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))


def test_modules_that_are_frozen_stay_frozen_through_an_evaluation() -> None:
    engine = tiny_engine(dropout=0.5)
    engine.model.dropout.eval()
    engine.fit(loader(), until="4 steps", eval_data=loader(), eval_every="1 step")
    assert engine.model.training
    assert not engine.model.dropout.training


class OnlyInPlugin(Loss[LossConfig]):
    """A constant term, only in batches of one kind."""

    def __init__(self, kind: int, value: float) -> None:
        super().__init__()
        self.kind, self.value = kind, value

    def units(self, batch: dict[str, torch.Tensor]) -> float:
        return float(batch["kind"] == self.kind)

    def loss(self, batch: dict[str, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.sum() * 0.0 + self.value * (batch["kind"] == self.kind)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_total_loss_of_an_evaluation_counts_the_terms_of_all_its_batches(
    order: tuple[int, int],
) -> None:
    """Fails if the total depends on which batch is last, or a set without labels has loss 0."""
    first = type("FirstPlugin", (OnlyInPlugin,), {})(0, 3.0)
    other = type("OtherPlugin", (OnlyInPlugin,), {})(1, 1.0)
    model = nn.Linear(2, 1)
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), plugins=[first, other])
    batches = [{"input": torch.ones(1, 2), "kind": torch.tensor(kind)} for kind in order]
    metrics = engine.evaluate(batches)
    assert (metrics["val/first_loss"], metrics["val/other_loss"]) == (3.0, 1.0)
    assert metrics["val/total_loss"] == 4.0
    with pytest.raises(DataError, match="no batch with loss units"):
        engine.evaluate([{"input": torch.ones(1, 2), "kind": torch.tensor(7)}])


def test_evaluation_data_without_a_length_is_read_and_what_ends_for_good_is_said() -> None:
    class Endless(IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            rows = Regression()
            return (rows[i] for i in range(8))

    engine = tiny_engine()
    result = engine.fit(loader(), until="4 steps", eval_data=DataLoader(Endless(), 4), eval_every=2)
    assert "val/loss" in result.metrics
    once = (batch for batch in loader())
    with pytest.raises(DataError, match="can be read again"):
        tiny_engine().fit(loader(), until="4 steps", eval_data=once, eval_every=2)


def test_a_stop_in_the_last_step_takes_nothing_from_its_end() -> None:
    """Fails if a stop in the last step suppresses the last evaluation."""

    class StopperPlugin(Plugin[PluginConfig]):
        @hookimpl
        def on_step_end(self, engine: Engine) -> None:
            if engine.state.step == 4:
                engine.stop("SIGTERM")

    result = tiny_engine(StopperPlugin()).fit(loader(), until="4 steps", eval_data=loader())
    assert result.status == "finished"
    assert "val/loss" in result.metrics


def test_groups_that_come_later_follow_the_schedule() -> None:
    engine = tiny_engine(ScalePlugin())
    for state in engine.steps(loader(), until="3 steps"):
        if state.step == 1:
            extra = {"params": [nn.Parameter(torch.ones(1))], "lr": 0.5}
            engine.optimizer.add_param_group(extra)
    assert [group["lr"] for group in engine.optimizer.param_groups] == [1e-2 * 0.25, 0.5 * 0.25]


@pytest.mark.parametrize("wrong", [None, 3.0, torch.ones(2)], ids=["none", "float", "two"])
def test_a_loss_function_that_gives_no_loss_is_refused(wrong: Any) -> None:
    """Fails if a forgotten `return` trains the model on its own output."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, loss=lambda model, batch: wrong)
    with pytest.raises(ConfigError, match=r"one number, got (None|3.0|shape .2,., torch)"):
        engine.fit([torch.ones(1, 2)], until="1 step")


@pytest.mark.parametrize("wrong", [RecorderPlugin, "clip"])
def test_what_is_no_plugin_is_refused(wrong: Any) -> None:
    with pytest.raises(PluginError, match="plugins must be objects such as"):
        tiny_engine(wrong)


def test_a_compiled_model_gets_the_entries_that_it_accepts() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(torch.compile(model, backend="eager"), optimizer, plugins=[SumPlugin()])
    engine.fit([{"input": torch.ones(1, 2), "labels": torch.ones(1)}], until="1 step")


class SumPlugin(Loss[LossConfig]):
    """The sum of the model's output."""

    def units(self, batch: dict[str, torch.Tensor]) -> float:
        return 1.0

    def loss(self, batch: dict[str, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.sum()


# -- what users of other trainers try first


PAIRS = [(torch.full((2, 3), float(i)), torch.tensor([0, 1])) for i in range(4)]


@pytest.mark.parametrize(
    "compare",
    [
        nn.CrossEntropyLoss(),
        nn.functional.cross_entropy,
        lambda out, y: nn.CrossEntropyLoss()(out, y),
    ],
    ids=["module", "function", "by the name of the second argument"],
)
def test_a_loss_of_input_and_target_trains_on_pairs(compare: Any) -> None:
    def weights(loss: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss)
        engine.fit(PAIRS, "6 steps")
        return model.weight.detach()

    by_hand = weights(lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    assert torch.equal(weights(compare), by_hand)


@pytest.mark.parametrize(
    ("options", "data", "said"),
    [
        ({"loss": nn.MSELoss()}, [torch.ones(2, 3)], "a batch is Tensor; expected a pair"),
        ({"optimizer": torch.optim.SGD}, PAIRS, r"SGD\(model.parameters\(\), lr=...\)"),
        ({"until": None}, PAIRS, 'the length of the run .until. is None; expected "500 steps"'),
        ({"eval_data": [DataLoader([0]), DataLoader([1])]}, PAIRS, "{'val': one, 'test': other}"),
        ({}, TensorDataset(torch.ones(4, 3), torch.zeros(4)), "which yields rows; pass batches"),
        ({"eval_data": TensorDataset(torch.ones(4, 3))}, PAIRS, "which yields rows; pass batches"),
        ({"loss": nn.CrossEntropyLoss}, PAIRS, "give an object that averages"),
        ({"loss": nn.MSELoss(reduction="sum")}, PAIRS, "loss must return a mean"),
        ({"loss": "mse"}, PAIRS, "loss must return a mean, got 'mse'"),
        (
            {"loss": nn.GaussianNLLLoss()},
            PAIRS,
            r"\(input, target, var\).*def loss\(model, batch\)",
        ),
        ({"loss": lambda model, x, y: 0}, PAIRS, r"takes \(model, x, y\), and is called with"),
        (
            {"until": DataLoader(PAIRS)},
            PAIRS,
            r"until.*DataLoader.*fit\(batches, '500 steps', eval_data=",
        ),
        ({}, nn.Linear(1, 1), "the data is a Linear, which yields no batches; pass batches"),
        ({"optimizer": [torch.optim.SGD, 3]}, PAIRS, "expected optimizers, got type, int"),
    ],
    ids=[
        "no pairs",
        "optimizer class",
        "no end",
        "eval sets in a list",
        "rows",
        "eval rows",
        "loss class",
        "sum",
        "text",
        "three inputs",
        "three of one's own",
        "evaluation data second",
        "no data",
        "no optimizers",
    ],
)
def test_a_first_try_that_cannot_be_says_what_to_write(
    options: dict[str, Any], data: Any, said: str
) -> None:
    model = nn.Linear(3, 2)
    parts = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss": nn.CrossEntropyLoss(),
    }
    made = {name: options.get(name, part) for name, part in parts.items()}
    run = {"until": "2 steps"} | {k: v for k, v in options.items() if k not in parts}
    with pytest.raises(ConfigError, match=said):
        Engine(model, **made).fit(data, **run)


@pytest.mark.parametrize("wrong", [TensorDataset(torch.ones(4, 3)), {"val": PAIRS}])
def test_what_cannot_be_predicted_says_what_to_write(wrong: Any) -> None:
    model = nn.Linear(3, 2)
    engine = Engine(model, torch.optim.SGD(model.parameters()), loss=nn.CrossEntropyLoss())
    with pytest.raises(ConfigError, match="pass batches: ResumableLoader"):
        engine.predict(wrong)
