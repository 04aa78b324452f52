"""Train several small models in one run, each with its own data and losses."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from nexus_core.bases.loss import Loss
from nexus_core.defaults import accepted
from nexus_core.errors import ConfigError
from nexus_core.plan import load
from nexus_core.plugin import Plugin, PluginConfig, StateDict, hookimpl
from nexus_plugins.modules.looks import Look, looks
from nexus_plugins.modules.picture import draw, is_drawable

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine
    from nexus_core.events import Run
    from nexus_core.step import Step

__all__ = ["ContestConfig", "ContestPlugin"]

Plugins = dict[str, dict[str, JsonValue]]
"""Settings of plugins by their names."""
SHARED = "all"
LONGEST_GRADIENT = 1.0


class ContestConfig(PluginConfig):
    """Which models compete on which puzzles."""

    puzzles: dict[str, dict[str, Plugins]] = Field(
        min_length=1,
        description="by the name of a part of the batch the contenders on it, by their names: for "
        "each the plugins that make its model and its losses, with their settings; `all` holds "
        "what all contenders on a puzzle have",
    )
    picture: str = Field(
        default="modules.png", description="file in the run's folder that the picture is written to"
    )


@dataclass(frozen=True)
class Contender:
    """One model on one puzzle."""

    puzzle: str
    name: str
    maker: Plugin[Any]
    """The plugin that makes the model and may run it."""
    losses: tuple[Loss[Any], ...]

    @classmethod
    def of(cls, puzzle: str, name: str, plugins: Plugins) -> Contender:
        """From the settings of its plugins.

        Raises:
            ConfigError: they are not one that makes a model, and losses.
        """
        made = [load(plugin)(**settings) for plugin, settings in plugins.items()]
        makers = [plugin for plugin in made if plugin.slot == "model"]
        others = [plugin for plugin in made if plugin.slot != "model"]
        if len(makers) != 1 or not others or not all(hasattr(one, "units") for one in others):
            raise ConfigError(
                f"contest.puzzles.{puzzle}.{name} has {', '.join(plugins) or 'no plugins'}; give "
                "one plugin that makes a model, such as model_nexus, and at least one loss"
            )
        return cls(puzzle, name, makers[0], tuple(cast("list[Loss[Any]]", others)))

    @property
    def place(self) -> str:
        """The prefix of its terms and metrics."""
        return f"{self.puzzle}/{self.name}"


class ContestPlugin(Plugin[ContestConfig]):
    """Trains several models side by side, and plots how they learn.

    A batch is a dict with a part for each puzzle. A contender sees only its puzzle's part, and its
    gradient is clipped separately (norm 1), so each is trained as if it were the only model. Losses
    are logged as `train/<puzzle>/<contender>/<term>_loss` and, in evaluations, under `val/`; so are
    refinements, hops and edges, where a puzzle has them.

    The plot, `modules.png`, shows the held-out cross-entropy of each over the run, and the measure
    specific to each puzzle; it needs matplotlib (`pip install 'nexus-trainer[plot]'`).
    """

    config_class = ContestConfig
    api_version: ClassVar[str] = "1.2"
    slot: ClassVar[str | None] = "model"

    def __post_init__(self) -> None:
        self._contenders = tuple(_contenders(self.config.puzzles))
        self._curves: dict[str, list[list[float]]] = {one.place: [] for one in self._contenders}
        self._looks: tuple[Look, ...] = ()
        self._picture: Path | None = None

    @hookimpl
    def make_model(self, engine: Run) -> nn.Module:
        """Build a model for each contender; those of one puzzle share the random seed."""
        models = nn.ModuleDict({one.puzzle: nn.ModuleDict() for one in self._contenders})
        alone = SimpleNamespace(data=None)
        for one in self._contenders:
            torch.manual_seed(engine.seed)
            cast(nn.ModuleDict, models[one.puzzle])[one.name] = _ask(
                one.maker, "make_model", engine=alone
            )
        return models

    @hookimpl
    def forward(self, engine: Run, batch: Batch) -> dict[str, Any]:
        """Run each contender on its part of the batch."""
        return {
            one.place: self._run(one, engine.model, batch[one.puzzle]) for one in self._contenders
        }

    @hookimpl
    def loss_units(self, batch: Batch) -> dict[str, Tensor | float]:
        """Count the units of each contender's losses in its part."""
        return {term: loss.units(batch[one.puzzle]) for one, loss, term in self._terms()}

    @hookimpl
    def loss_weight(self) -> dict[str, float]:
        """The weights of the losses."""
        return {term: loss.weight for _, loss, term in self._terms()}

    @hookimpl
    def loss_terms(
        self, engine: Run, batch: Batch, output: Any, step: Step | None
    ) -> dict[str, Tensor]:
        """The terms of each contender's losses, by its place."""
        found = {}
        for one, loss, term in self._terms():
            given = {"batch": batch[one.puzzle], "output": output[one.place]}
            found[term] = (
                _ask(loss, "loss_terms", engine=engine, step=step, **given)[loss.term]
                if engine.training
                else loss.validation_loss(**given)
            )
        return found

    @hookimpl(stage="limit")
    def after_backward(self, engine: Run) -> None:
        """Clip the gradient of each model separately."""
        for one in self._contenders:
            weights = _model(one, engine.model).parameters()
            torch.nn.utils.clip_grad_norm_(weights, LONGEST_GRADIENT)

    @hookimpl
    def measure(self, engine: Run, split: str, data: Iterable[Batch]) -> dict[str, float]:
        """The puzzle-specific measures: refinements, hops, edges."""
        seen: dict[str, list[tuple[Batch, Any]]] = {one.place: [] for one in self._contenders}
        for batch in data:
            for one in self._contenders:
                part = batch[one.puzzle]
                seen[one.place].append((part, self._run(one, engine.model, part)))
        self._looks = tuple(look for place, pairs in seen.items() for look in looks(place, pairs))
        return {
            f"{split}/{look.place}/{name}": value
            for look in self._looks
            for name, value in look.metrics.items()
        }

    @hookimpl
    def on_eval(self, engine: Run, metrics: dict[str, float]) -> None:
        """Record the held-out cross-entropies for the plot."""
        for place, curve in self._curves.items():
            if (nats := metrics.get(f"val/{place}/lm_loss")) is not None:
                curve.append([float(engine.state.step), nats])

    @hookimpl
    def on_finish(self, engine: Engine) -> None:
        """Draw the plot, if matplotlib is installed and there is a run folder."""
        if engine.out is not None and engine.ranks.is_main and is_drawable():
            self._picture = engine.out / self.config.picture
            draw(self._curves, self._looks, self._picture)
            engine.note("modules", image=self._picture)

    @hookimpl
    def summarize(self) -> dict[str, str]:
        """The final result of each contender, puzzle by puzzle, and the path of the plot."""
        missing = "none: it needs matplotlib: pip install 'nexus-trainer[plot]'"
        ends = dict(self._ends())
        return {**ends, "picture": str(self._picture or missing)} if ends else {}

    def state_dict(self) -> StateDict:
        """The curves so far."""
        return {"curves": cast(StateDict, self._curves)}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the curves."""
        self._curves = cast("dict[str, list[list[float]]]", state["curves"])

    def _run(self, one: Contender, models: nn.Module, part: Batch) -> Any:
        model = _model(one, models)
        if hasattr(one.maker, "forward"):
            return _ask(one.maker, "forward", engine=SimpleNamespace(model=model), batch=part)
        return model(**accepted(model, part))

    def _terms(self) -> Iterator[tuple[Contender, Loss[Any], str]]:
        """Each contender with each of its losses, and the name of the term in this run."""
        for one in self._contenders:
            yield from ((one, loss, f"{one.place}/{loss.term}") for loss in one.losses)

    def _ends(self) -> Iterator[tuple[str, str]]:
        for puzzle in self.config.puzzles:
            mine = [one for one in self._contenders if one.puzzle == puzzle]
            nats = {one.name: self._curves[one.place][-1:] for one in mine}
            told = [f"{name} {last[0][1]:.3f}" for name, last in nats.items() if last]
            told += [look.told for look in self._looks if look.place == mine[0].place]
            if told:
                yield puzzle, ", ".join(told)


def _contenders(puzzles: Mapping[str, Mapping[str, Plugins]]) -> Iterator[Contender]:
    for puzzle, entries in puzzles.items():
        shared = entries.get(SHARED, {})
        for name, own in entries.items():
            if name != SHARED:
                plugins = {p: {**shared.get(p, {}), **own.get(p, {})} for p in {**shared, **own}}
                yield Contender.of(puzzle, name, plugins)


def _model(one: Contender, models: nn.Module) -> nn.Module:
    return models.get_submodule(f"{one.puzzle}.{one.name}")


def _ask(plugin: Plugin[Any], hook: str, **given: Any) -> Any:
    """What a plugin answers, given those of the arguments that it wants."""
    answer = getattr(plugin, hook)
    wanted = inspect.signature(answer).parameters
    return answer(**{name: value for name, value in given.items() if name in wanted})
