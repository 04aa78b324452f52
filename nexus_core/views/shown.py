"""How an engine and its plan are displayed, and what to call instead of other trainers' methods."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from nexus_core.defaults import Defaults
from nexus_core.errors import PluginError, hint_add
from nexus_core.events import Hooks
from nexus_core.images import tell
from nexus_core.intervals import Interval, TrainState
from nexus_core.optimizers import members
from nexus_core.plan import CORE, HOOK_NAMES, Plan, answering
from nexus_core.plugin import Plugin
from nexus_core.processes import Ranks
from nexus_core.relay import implementations
from nexus_core.views.history import History, Metrics
from nexus_core.views.tables import counted, headlines, metric_table, table

__all__ = ["ShownEngine", "ShownPlan"]

_SAVE = (
    "for the weights, call torch.save(engine.model.state_dict(), path); for the whole run, call "
    'engine.state_dict(), or save it to disk: Engine(..., out="runs/mine") with'
)
_LOAD = (
    "for the weights, call engine.model.load_state_dict(torch.load(path)); for a whole run, "
    "engine.load_state_dict(snapshot), or engine.resume('auto') from disk"
)
_EVALUATE = "call engine.evaluate(batches), or engine.evaluate({'test': batches}) by name"
ELSEWHERE = {
    **dict.fromkeys(("save", "save_checkpoint", "save_model", "save_pretrained"), _SAVE),
    **dict.fromkeys(("load", "load_checkpoint", "load_model"), _LOAD),
    **dict.fromkeys(("test", "validate"), _EVALUATE),
    "train": "call engine.fit(batches, until='1000 steps')",
}
"""What to call instead of methods of other trainers."""
READS = "load_snapshot"  # the plugin that reads a saved run also writes it


class ShownPlan(Plan):
    """An engine's plan with a readable repr: the plugins called at each event, in order."""

    @classmethod
    def of(cls, plan: Plan) -> ShownPlan:
        """The same plan."""
        return cls(plan.plugins, plan.declared)

    def __repr__(self) -> str:
        rows = list(self._rows())
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"  {e:<{wide[0]}}  {s:<{wide[1]}}  {calls}" for e, s, calls in rows]
        return "\n".join([f"<Plan of {self._size()}>", *map(str.rstrip, lines)])

    def _repr_html_(self) -> str:
        rows = table(self._rows(), ["event", "stage", "plugins, in order"])
        return f"<p><b>Plan of {self._size()}</b></p>{rows}"

    def _size(self) -> str:
        return counted(len(self.plugins), "plugin")

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        """Event, stage and plugins, for every event that a plugin answers."""
        for hook in HOOK_NAMES:
            impls = [i for i in implementations(self, hook, Defaults()) if i.plugin != CORE]
            for number, (stage, some) in enumerate(groupby(impls, lambda impl: impl.stage[1])):
                yield "" if number else hook, stage, ", ".join(impl.plugin for impl in some)


class ShownEngine:
    """The display side of an engine: repr, tables, history and notes."""

    state: TrainState
    horizon: Interval | None
    device: torch.device
    ranks: Ranks
    model: nn.Module
    optimizer: Optimizer
    plugins: dict[str, Plugin[Any]]
    metrics: Metrics
    hook: Hooks
    _running: bool

    @property
    def history(self) -> History:
        """The metrics so far, in columns; thinned evenly beyond 5,000 logs or evaluations."""
        return self.metrics.history()

    def note(
        self, title: str, text: str = "", *, image: object = None, figure: object = None
    ) -> None:
        """Log text, an image or a figure at the current step, in every logger that stores notes.

        Loggers are open during a run: call it from a hook, or inside the loop over `steps`.
        Training is unchanged; an image on a device is copied to the host, which synchronizes. With
        several processes, only the loggers of rank 0 write.

        Args:
            title: the topic, in the style of a metric name: "samples", "attention/layer_0".
            text: plain text, without Markdown; the caption if there is an image or figure.
            image: a tensor or array (height, width), (channels, height, width) or (height, width,
                channels) of bytes, booleans, or floats from 0 to 1; a Pillow image; or the path of
                a PNG file.
            figure: a matplotlib figure; it stays open.

        Raises:
            ConfigError: the note is empty or invalid.
        """
        tell(self.hook, self, title, text, image, figure)
        if not self._running:
            warnings.warn(
                f"the note '{title}' is in no log: loggers are only open during a run; write it "
                "from a hook, or inside a loop over engine.steps(...)",
                RuntimeWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self._facts().items())
        return f"<Engine {facts}; {headlines(self.metrics) or 'no metric yet'}>"

    def _repr_html_(self) -> str:
        return f"<p><b>Engine</b></p>{table(self._facts().items())}{metric_table(self.metrics)}"

    def _facts(self) -> dict[str, str]:
        """The state of the run; works on an engine that is still being built."""
        made = vars(self)
        done = self.horizon.progress(self.state) if self.horizon else 0.0
        facts = {
            "step": f"{self.state.step:,}",
            "until": f"{self.horizon} ({done:.0%} done)" if self.horizon else "not begun",
        }
        if self.ranks.size > 1:
            facts["rank"] = f"{self.ranks.rank} of {self.ranks.size}"
        if "device" in made:
            facts["device"] = str(self.device)
        if "model" in made:
            facts["model"] = f"{type(self.model).__name__}, {_size(self.model)}"
        if "optimizer" in made:
            own = members(self.optimizer).values()
            facts["optimizer"] = ", ".join(_optimizer(each) for each in own)
        return facts | {"plugins": ", ".join(made.get("plugins", ())) or "none"}

    if not TYPE_CHECKING:  # type checkers must still report unknown attributes

        def __getattr__(self, name: str) -> NoReturn:
            """Say what to call instead of a method of another trainer."""
            if name not in ELSEWHERE:
                object.__getattribute__(self, name)  # raises, with the error of a property too
            said = f"'Engine' object has no attribute '{name}'; {ELSEWHERE[name]}"
            if ELSEWHERE[name] is _SAVE:
                with suppress(PluginError):  # no plugin that writes checkpoints is installed
                    said += f" {hint_add(answering(READS).name)}"
            raise AttributeError(said, name=name, obj=self)


def _size(model: nn.Module) -> str:
    """The number of parameters, and of trainable ones if they differ."""
    sizes = [
        (p.numel(), p.requires_grad) for p in model.parameters() if not nn.parameter.is_lazy(p)
    ]
    total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    return f"{total:,} parameters" + ("" if trained == total else f", {trained:,} trained")


def _optimizer(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__name__}, lr {float(optimizer.param_groups[0]['lr']):.3g}"
