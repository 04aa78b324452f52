"""Logs the worth of each module: the validation loss without it minus the loss with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from nexus_core.errors import ConfigError, hint_leave_out
from nexus_core.plugin import Plugin, PluginConfig, StateDict, hookimpl

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["WorthConfig", "WorthPlugin"]


class WorthConfig(PluginConfig):
    """How often, and on how much of the evaluation data."""

    every: int = Field(default=1, ge=1, description="evaluations between measurements")
    batches: int | None = Field(
        default=16,
        ge=1,
        description="batches of the first evaluation set to measure on; null: all of it",
    )


class WorthPlugin(Plugin[WorthConfig]):
    """Evaluates with each module ablated in turn; does not affect training.

    `module/<name>_worth` is the increase of the loss (`val/loss`, in its own unit) when the
    module's output is zero, on the same batches and with the same weights: above 0, the module
    helps. It does not show what the module's loss taught the rest of the model; that takes a run
    without the module.

    The model must have `active_modules`, a tuple of names, and `without(name)`, a context manager;
    it may have `writing_modules`, the ones among them that can be ablated. A measurement costs one
    evaluation of these batches, plus one for each module.
    """

    config_class = WorthConfig
    api_version: ClassVar[str] = "1.2"

    def __post_init__(self) -> None:
        self._evaluations = 0
        self._measured = False

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Reject a model without modules that can be ablated (ConfigError)."""
        model = engine.model
        if not getattr(model, "active_modules", ()) or not hasattr(model, "without"):
            raise ConfigError(
                "worth needs a model with active_modules, a tuple of at least one name, and "
                f"without(name), a context manager; got {type(model).__name__}. Enable a module, "
                "or remove the plugin: ",
                hint_leave_out(self.name),
            )

    @hookimpl
    def evaluating(self) -> None:
        """Start an evaluation; its first set will be measured."""
        self._measured = self._evaluations % self.config.every > 0

    @hookimpl
    def measure(self, engine: Engine, split: str, data: Iterable[Batch]) -> dict[str, float]:
        """Measure the worth of each module on the first set, as `module/<name>_worth`."""
        if self._measured:
            return {}
        self._measured = True  # also for the evaluations below, which call this again
        model = cast(Any, engine.model)
        names = getattr(model, "writing_modules", model.active_modules)
        if not names:
            return {}
        part = {split: data if self.config.batches is None else _First(data, self.config.batches)}
        whole, worth = engine.evaluate(part)[f"{split}/loss"], {}
        for name in names:
            with model.without(name):
                lesioned = engine.evaluate(part)[f"{split}/loss"]
            worth[f"module/{name}_worth"] = lesioned - whole
        return worth

    @hookimpl
    def on_eval(self) -> None:
        """Count a finished evaluation."""
        self._evaluations += 1

    def state_dict(self) -> StateDict:
        """The number of evaluations so far."""
        return {"evaluations": self._evaluations}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the count."""
        self._evaluations = cast(int, state["evaluations"])


class _First:
    """The first batches of a loader, with the loader's other attributes kept.

    Args:
        data: batches that can be read again.
        count: how many.
    """

    def __init__(self, data: Iterable[Batch], count: int) -> None:
        self._data, self._count = data, count

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self._data), self._count)

    def in_cells(self, count: int) -> Iterable[Batch]:
        """The same for data in cells; data that cannot distribute cells is left whole."""
        dealing = getattr(self._data, "in_cells", None)
        return self if dealing is None else _First(dealing(count), self._count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)
