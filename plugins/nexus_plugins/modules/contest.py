"""Train several small models in one run, each with its own data and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus_core.device import seed_everything
from nexus_core.errors import ConfigError
from nexus_core.plugin import Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.step import merge
from nexus_plugins.modules.contender import Contender, Plugins
from nexus_plugins.modules.looks import Look, looks
from nexus_plugins.modules.picture import draw, is_drawable

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine
    from nexus_core.events import Run
    from nexus_core.snapshot import PluginState
    from nexus_core.step import Step

__all__ = ["ContestConfig", "ContestPlugin"]

Value = TypeVar("Value")
SHARED = "all"
LONGEST_GRADIENT = 1.0
NO_PICTURE = "none: it needs matplotlib: pip install 'nexus-trainer[plot]'"


class ContestConfig(PluginConfig):
    """Which models compete on which puzzles."""

    puzzles: dict[str, dict[str, Plugins]] = Field(
        min_length=1,
        description="for each puzzle, a part of the batch, its contenders by name: the plugins "
        "that make the model and its losses, with their settings; the entry `all` holds plugins "
        "and settings that all contenders on a puzzle share",
    )
    picture: str = Field(default="modules.png", description="file in the run folder for the plot")


class ContestPlugin(Plugin[ContestConfig]):
    """Trains several models side by side, and plots how they learn.

    A batch is a dict with a part for each puzzle. A contender's plugins see only its puzzle's part,
    its model and its terms, and its gradient is clipped separately (norm 1), so each is trained as
    if it were the only model. Only random numbers drawn in training, as by dropout, come from one
    generator for all. Losses are logged as `train/<puzzle>/<contender>/<term>_loss` and, in
    evaluations, under `val/`; so are refinements, hops and edges, where a puzzle has them.

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
        """Build a model for each contender; all start from the run's seed."""
        models = nn.ModuleDict({one.puzzle: nn.ModuleDict() for one in self._contenders})
        for one in self._contenders:
            seed_everything(engine.seed)
            made = one.hook.make_model(engine=one.alone(engine))
            cast(nn.ModuleDict, models[one.puzzle])[one.name] = made
        return models

    @hookimpl
    def on_build(self, engine: Run) -> None:
        """Let each contender's plugins see its model."""
        for one in self._contenders:
            one.hook.on_build(engine=one.alone(engine))

    @hookimpl
    def on_start(self, engine: Run) -> None:
        """Let each contender's plugins check its model."""
        for one in self._contenders:
            one.hook.on_start(engine=one.alone(engine))

    @hookimpl
    def forward(self, engine: Run, batch: Batch, step: Step | None) -> dict[str, Any]:
        """Run each contender on its part of the batch."""
        return {one.place: _run(one, engine, batch, step) for one in self._contenders}

    @hookimpl
    def loss_units(self, engine: Run, batch: Batch, step: Step | None) -> dict[str, Tensor | float]:
        """Count the units of each contender's losses in its part."""
        return self._by_term(
            lambda one: one.hook.loss_units(
                engine=one.alone(engine), batch=one.part(batch), step=one.own(step)
            )
        )

    @hookimpl
    def loss_weight(self, engine: Run) -> dict[str, float]:
        """The weights of the losses."""
        return self._by_term(lambda one: one.hook.loss_weight(engine=one.alone(engine)))

    @hookimpl
    def loss_terms(
        self, engine: Run, batch: Batch, output: Any, step: Step | None
    ) -> dict[str, Tensor]:
        """The terms of each contender's losses, by its place."""
        return self._by_term(
            lambda one: one.hook.loss_terms(
                engine=one.alone(engine),
                batch=one.part(batch),
                output=output[one.place],
                step=one.own(step),
            )
        )

    @hookimpl(stage="limit")
    def after_backward(self, engine: Run) -> None:
        """Clip the gradient of each model separately."""
        for one in self._contenders:
            torch.nn.utils.clip_grad_norm_(one.alone(engine).parameters(), LONGEST_GRADIENT)

    @hookimpl
    def on_step(self, engine: Run, step: Step) -> None:
        """Let each contender's plugins follow its update."""
        for one in self._contenders:
            one.hook.on_step(engine=one.alone(engine), step=cast("Step", one.own(step)))

    @hookimpl
    def measure(self, engine: Run, split: str, data: Iterable[Batch]) -> dict[str, float]:
        """The puzzle-specific measures: refinements, hops, edges."""
        seen: dict[str, list[tuple[Batch, Any]]] = {one.place: [] for one in self._contenders}
        for batch in data:
            for one in self._contenders:
                output = _run(one, engine, batch, None)
                seen[one.place].append((one.part(batch), output))
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
    def summarize(self, engine: Run) -> dict[str, str]:
        """The final result on each puzzle, the contenders' own lines, and the path of the plot."""
        results = {p: line for p in self.config.puzzles if (line := ", ".join(self._result(p)))}
        said = {
            f"{one.place} {label}": line
            for one in self._contenders
            for lines in one.hook.summarize(engine=one.alone(engine))
            for label, line in lines.items()
        }
        picture = self._picture or (None if is_drawable() else NO_PICTURE)
        return {**results, **said, **({"picture": str(picture)} if results and picture else {})}

    def state_dict(self) -> StateDict:
        """The curves so far, and what the contenders' plugins keep."""
        kept = {one.place: one.state_dict() for one in self._contenders}
        return cast(StateDict, {"curves": self._curves, "contenders": kept})

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the curves and the contenders' plugins."""
        self._curves = cast("dict[str, list[list[float]]]", state["curves"])
        kept = cast("dict[str, dict[str, PluginState]]", state.get("contenders", {}))
        for one in self._contenders:
            one.load_state_dict(kept.get(one.place, {}))

    def _by_term(
        self, ask: Callable[[Contender], Iterable[Mapping[str, Value]]]
    ) -> dict[str, Value]:
        """What the plugins of each contender answer, by the name of the term in this run."""
        return {f"{one.place}/{term}": value for one in self._contenders
                for term, value in merge(ask(one)).items()}  # fmt: skip

    def _result(self, puzzle: str) -> Iterator[str]:
        """Each contender's last cross-entropy, and what the measure says of the first."""
        mine = [one for one in self._contenders if one.puzzle == puzzle]
        for one in mine:
            if curve := self._curves[one.place]:
                yield f"{one.name} {curve[-1][1]:.3f}"
        yield from (look.summary for look in self._looks if look.place == mine[0].place)


def _contenders(puzzles: Mapping[str, Mapping[str, Plugins]]) -> Iterator[Contender]:
    for puzzle, entries in puzzles.items():
        if not entries.keys() - {SHARED}:
            raise ConfigError(f"contest.puzzles.{puzzle} has no contender; give one, or remove it")
        shared = entries.get(SHARED, {})
        for name, own in entries.items():
            if name != SHARED:
                plugins = {p: {**shared.get(p, {}), **own.get(p, {})} for p in {**shared, **own}}
                yield Contender.of(puzzle, name, plugins)


def _run(one: Contender, engine: Run, batch: Batch, step: Step | None) -> Any:
    return one.hook.forward(engine=one.alone(engine), batch=one.part(batch), step=one.own(step))
