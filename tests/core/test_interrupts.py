"""A step that fails or is interrupted anywhere has not happened, as the next `fit` shows.

The oracle is an undisturbed run: the same rows, each once, bitwise equal weights, the same log.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from nexus_core import Engine, Plugin, PluginConfig, PluginError, ResumableLoader, hookimpl
from nexus_core.plan import HOOK_NAMES
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.guard import GuardPlugin
from nexus_plugins.lr_linear import LrLinearPlugin
from tiny import RecorderPlugin

ROWS, SIZE, STEPS = 10, 2, 5
BEFORE_A_LOOP = {"make_data", "make_model", "make_optimizer", "on_build"}
NOTES = {"on_note", "on_image"}
NOT_IN_A_LOOP = {"load_snapshot", "on_load", "on_save", "on_error", "summarize"} | NOTES
IN_A_LOOP = [name for name in HOOK_NAMES if name not in BEFORE_A_LOOP | NOT_IN_A_LOOP]


class Rows:
    """Ten rows of three numbers with their index."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(3, generator=generator), "id": torch.tensor(index)}


class Unsized:
    """Batches that can be read again, without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(batches())


def batches() -> list[dict[str, Tensor]]:
    return list(ResumableLoader(Rows(), SIZE, shuffle=False))


def endless() -> Iterator[dict[str, Tensor]]:
    while True:
        yield from batches()


DATA: dict[str, Callable[[], Iterable[Any]]] = {
    "list": batches,
    "loader": lambda: ResumableLoader(Rows(), SIZE, seed=3),
    "generator": endless,
    "unsized": Unsized,
}


class LedgerPlugin(Plugin[PluginConfig]):
    """Records the rows of completed steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    @hookimpl
    def on_step(self, step: Any) -> None:
        self.rows += [row for micro in step.micro for row in micro.batch["id"].tolist()]


class Fuse:
    """Raises once, in one call of one hook."""

    def __init__(self, hook: str = "", call: int = 0, error: BaseException | None = None) -> None:
        self.hook, self.call, self.error = hook, call, error
        self.calls: Counter[str] = Counter()

    def burn(self, hook: str) -> None:
        self.calls[hook] += 1
        if self.error is not None and hook == self.hook and self.calls[hook] == self.call:
            raise self.error

    def plugin(self) -> Plugin[PluginConfig]:
        def answer(hook: str) -> Any:
            def method(plugin: Plugin[PluginConfig]) -> None:
                self.burn(hook)

            method.__name__ = hook
            return hookimpl(method)

        return type("FusePlugin", (Plugin,), {name: answer(name) for name in IN_A_LOOP})()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss that draws from every generator."""
    noise = random.random() + np.random.rand() + torch.rand(())
    target = batch["x"].sum(1, keepdim=True) * (1 + 0.1 * noise)
    return mse_loss(model(batch["x"]), target)


def start(
    fuse: Fuse, accumulate: int, cells: bool = False
) -> tuple[Engine, LedgerPlugin, RecorderPlugin]:
    ledger, recorder = LedgerPlugin(), RecorderPlugin()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
    watchers = [EmaPlugin(decay=0.5), GuardPlugin(), ClipPlugin(max_norm=0.5)]
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        loss=loss,
        plugins=[LrLinearPlugin(warmup=None), *watchers, ledger, recorder, fuse.plugin()],
        seed=1,
        accumulate=accumulate,
        cells=accumulate if cells else None,
        log_every=2,
    )
    return engine, ledger, recorder


def train(engine: Engine, data: Iterable[Any]) -> None:
    engine.fit(data, until=STEPS, eval_data=batches()[:2], eval_every=2)


def tensors(engine: Engine) -> list[Tensor]:
    """The result of a run: weights, buffers, moments and average."""
    moments = [v for state in engine.optimizer.state.values() for v in state.values()]
    average = engine.plugins["ema"].weights().values()
    return [*engine.model.state_dict().values(), *moments, *average]


@cache
def undisturbed(
    kind: str, accumulate: int, cells: bool
) -> tuple[Fuse, Engine, LedgerPlugin, RecorderPlugin]:
    """The oracle, trained once, and how often each hook was called."""
    calm = Fuse()
    run = start(calm, accumulate, cells)
    train(run[0], DATA[kind]())
    return calm, *run


@pytest.mark.parametrize("hook", IN_A_LOOP)
@given(
    share=st.floats(0, 1, exclude_max=True),
    accumulate=st.integers(1, 3),
    kind=st.sampled_from(sorted(DATA)),
    error=st.sampled_from([ZeroDivisionError, KeyboardInterrupt]),
)
@settings(max_examples=3, deadline=None)
def test_after_an_error_in_any_hook_the_run_goes_on_as_if_there_had_been_none(
    hook: str, share: float, accumulate: int, kind: str, error: type[BaseException]
) -> None:
    """Fails if rows are lost or repeated, generators or buffers advance, or a log is missing."""
    cells = hook == "sum_cells"
    calm, whole, ledger, recorder = undisturbed(kind, accumulate, cells)
    assert calm.calls[hook], f"'{hook}' does not fire in a loop"

    fuse = Fuse(hook, 1 + int(share * calm.calls[hook]), error("planted"))
    engine, again, records = start(fuse, accumulate, cells)
    data = DATA[kind]()
    with pytest.raises(error, match="planted"):
        train(engine, data)
    train(engine, data)

    assert again.rows == ledger.rows
    assert all(map(torch.equal, tensors(whole), tensors(engine)))
    assert records.lines == recorder.lines
    counters = [
        (e.state.step, e.state.samples, e.state.epoch, e.state.batch) for e in (whole, engine)
    ]
    assert counters[0] == counters[1]


class Alternating(Plugin[PluginConfig]):
    """Two turns per step, each with its own loss."""

    name = "alternating"

    @hookimpl
    def take_turns(self) -> tuple[str, ...]:
        return ("first", "second")


@pytest.mark.parametrize("hook", ["forward", "backward", "after_backward", "optimizer_step"])
@given(share=st.floats(0, 1, exclude_max=True), accumulate=st.integers(1, 2))
@settings(max_examples=4, deadline=None)
def test_an_error_between_two_turns_leaves_the_first_as_it_is(
    hook: str, share: float, accumulate: int
) -> None:
    """Fails if an optimizer whose turn was over steps again on the same rows."""

    def new(fuse: Fuse) -> Engine:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        optimizers = {
            "first": torch.optim.AdamW(model[0].parameters(), lr=0.05),
            "second": torch.optim.SGD(model[2].parameters(), lr=0.05, momentum=0.9),
        }
        plugins = [Alternating(), fuse.plugin()]
        return Engine(model, optimizers, loss=loss, plugins=plugins, accumulate=accumulate, seed=1)

    calm = Fuse()
    whole = new(calm)
    whole.fit(batches(), until=STEPS)
    place = 1 + int(share * calm.calls[hook])
    fuse = Fuse(hook, place, KeyboardInterrupt("planted"))
    engine, data = new(fuse), batches()
    with pytest.raises(KeyboardInterrupt, match="planted"):
        engine.fit(data, until=STEPS)
    if hook == "optimizer_step" and place % 2 == 0:
        torch.rand(1)  # draws between two calls within a step have no effect
    engine.fit(data, until=STEPS)
    assert all(
        map(torch.equal, whole.model.state_dict().values(), engine.model.state_dict().values())
    )
    assert whole.metrics == engine.metrics
    assert engine.state.samples == whole.state.samples


def test_the_rest_of_an_epoch_that_failed_is_taken_again_from_an_iterator() -> None:
    """Fails if the end of the epoch, detected in the failed step, is forgotten."""
    fuse = Fuse("after_backward", 3, ZeroDivisionError("planted"))
    model = nn.Linear(3, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=loss,
        plugins=[fuse.plugin()],
        accumulate=2,
        step_at_epoch_end=True,
    )
    data = iter(batches())
    with pytest.raises(ZeroDivisionError, match="planted"):
        engine.fit(data, until="1 epochs")
    engine.fit(data, until="1 epochs")
    assert (engine.state.step, engine.state.epoch, engine.state.samples) == (3, 1, ROWS)


class Caching(nn.Module):
    """A buffer that is cleared and refilled, and one whose shape depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 1), nn.LazyBatchNorm1d()
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        filled = self.cache is None
        self.cache = x.mean(0).detach() if filled else None
        output: Tensor = self.norm(self.linear(x)) + (0.5 if filled else -0.5)
        return output


def test_a_step_that_failed_leaves_a_buffer_that_comes_and_goes_as_it_was() -> None:
    """Fails if a missing buffer ends the run, or the failed step's buffer is kept."""

    def trained(*errors: BaseException) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, fuse = Caching(), Fuse("after_backward", 3, *errors)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, data = (
            Engine(model, optimizer, loss=loss, plugins=[fuse.plugin()], seed=1),
            batches(),
        )
        for error in errors:
            with pytest.raises(type(error), match="planted"):
                engine.fit(data, until=STEPS)
        engine.fit(data, until=STEPS)
        return engine.model.state_dict()

    whole, again = trained(), trained(ZeroDivisionError("planted"))
    assert whole.keys() == again.keys() > {"cache"}
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_follows_a_step_cannot_be_wrapped() -> None:
    """Fails if a wrapper causes a plugin to be called twice for one step when another fails."""

    class AroundPlugin(Plugin[PluginConfig]):
        @hookimpl(wrapper=True)
        def on_step(self) -> Iterator[None]:
            yield

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PluginError, match="on_step cannot be wrapped: plugins are called one by"):
        Engine(model, optimizer, loss=loss, plugins=[AroundPlugin()])
