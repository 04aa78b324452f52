"""Averages the weights over the run, and evaluates with the average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nexus_core import Batch, CheckpointError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.processes import local_part

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["EmaConfig", "EmaPlugin"]

LIVE = "_live"  # suffix of a set that is evaluated with the raw weights


class EmaConfig(PluginConfig):
    """Settings of the averaged weights."""

    decay: float = Field(default=0.999, ge=0, lt=1, description="decay of the average per update")
    update_every: int = Field(default=1, ge=1, description="steps between updates of the average")
    ramp: bool = Field(
        default=True, description="ramp up the decay: at most (1+n)/(10+n) after n updates"
    )
    power: float | None = Field(
        default=None,
        gt=0,
        description="alternative ramp: decay is at most 1-n**-power at update n; 2/3 suits long "
        "runs, 3/4 runs of up to about 100,000 steps",
    )
    buffers: bool = Field(
        default=False,
        description="also average floating-point buffers (running statistics), instead of "
        "evaluating with the model's own",
    )
    evaluate: bool | Literal["both"] = Field(
        default=True,
        description="evaluate with the average instead of the weights; both: first the average, "
        "then the weights as val_live/...",
    )


class EmaPlugin(Plugin[EmaConfig]):
    """Keeps an exponential moving average of the trained weights.

    Training is not affected. Evaluation runs with the average instead of the weights, and the
    weights are restored bitwise. The average is kept in float32 at least, is saved with the
    plugin's state, and `weights()` returns it keyed like the model's `state_dict`. Buffers
    (running statistics) are the model's own, unless they are averaged too.

    Source: Polyak and Juditsky 1992; the ramp is that of `tf.train.ExponentialMovingAverage`, the
    power ramp that of Katherine Crowson's EMA warmup.
    """

    config_class = EmaConfig
    api_version: ClassVar[str] = "1.2"
    _average: dict[str, Tensor]
    _updates: int
    _live: dict[str, Tensor]
    """The tensors that are averaged, by name."""
    _seen: tuple[tuple[int, bool, bool], ...]
    """Identity of each parameter, whether it was trained, and whether it had no shape yet."""

    def __post_init__(self) -> None:
        self._average, self._updates, self._live, self._seen = {}, 0, {}, ()
        self._put_by: list[Tensor] = []

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters and buffers, keyed like the model's `state_dict`."""
        return dict(self._average)

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Start from the current weights, unless an average was restored.

        Raises:
            CheckpointError: the saved average belongs to a different model.
        """
        named = engine.model.state_dict().keys() | dict(engine.model.named_parameters()).keys()
        if odd := self._average.keys() - named:
            raise CheckpointError(
                f"{self.name}: the saved average has '{min(odd)}', which the model lacks; "
                "resume with the config that wrote the checkpoint"
            )
        self._seen = ()
        self._collect(engine)

    @hookimpl(stage="measure")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Add parameters that are newly trained, before their first update."""
        if not step.again:
            self._collect(engine)

    @hookimpl
    @torch.no_grad()
    def on_step(self, step: Step) -> None:
        """Update the average; a refused step leaves it unchanged."""
        if step.number % self.config.update_every:
            return
        self._updates += 1
        decay = min(self.config.decay, self._ramp(self._updates))
        average = [local_part(self._average[name]) for name in self._live]
        move = 1 - decay if step.refused is None else (1 - decay) * (1 - step.refused)
        weights = [_weight(move, mean) for mean in average]
        torch._foreach_lerp_(average, [_wide(local_part(p)) for p in self._live.values()], weights)

    def _ramp(self, update: int) -> float:
        """The maximum decay at an update, counted from 1."""
        if self.config.power is not None:
            return 1.0 - float(update**-self.config.power)
        return (1 + update) / (10 + update) if self.config.ramp else 1.0

    @hookimpl
    def evaluating(self, engine: Engine) -> AbstractContextManager[object] | None:
        """Evaluate with the averaged weights, then restore the originals bitwise."""
        if self._average and not self._live:  # loaded, but not trained since
            self._collect(engine)
        return self._shown() if self.config.evaluate else None

    @hookimpl(trylast=True)  # so that plugins that measure once see the average
    def measure(self, engine: Engine, split: str, data: Iterable[Batch]) -> dict[str, float] | None:
        """Evaluate the raw weights as well, if both are requested."""
        if self.config.evaluate != "both" or split.endswith(LIVE):
            return None
        _fill(self._live.values(), self._put_by)
        try:
            return engine.evaluate({f"{split}{LIVE}": data})
        finally:
            _fill(self._live.values(), [self._average[name] for name in self._live])

    @contextmanager
    def _shown(self) -> Iterator[None]:
        self._put_by = [tensor.detach().clone() for tensor in self._live.values()]
        _fill(self._live.values(), [self._average[name] for name in self._live])
        try:
            yield
        finally:
            _fill(self._live.values(), self._put_by)
            self._put_by = []

    def _collect(self, engine: Engine) -> None:
        """Add tensors that are newly trained, starting from their current values."""
        buffers = _averaged_buffers(engine.model) if self.config.buffers else {}
        watched = [*engine.parameters(), *buffers.values()]
        seen = tuple((id(p), p.requires_grad, is_lazy(p)) for p in watched)
        if seen == self._seen:
            return
        named = engine.model.named_parameters()
        self._live = {n: p for n, p in named if p.requires_grad and not is_lazy(p)} | buffers
        for name, parameter in self._live.items():
            known = name in self._average
            mean = self._fitting(name, parameter) if known else _wide(parameter).clone()
            self._average[name] = mean
        self._seen = seen

    def state_dict(self) -> StateDict:
        """The average and the number of steps it covers."""
        return {"average": dict(self._average), "updates": self._updates} if self._average else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the average."""
        average = cast(dict[str, Tensor], state["average"])
        self._average = {name: tensor.clone() for name, tensor in average.items()}
        self._updates = int(cast(int, state["updates"]))
        self._live, self._seen = {}, ()  # the averaged parameters may be different ones

    def _fitting(self, name: str, parameter: Tensor) -> Tensor:
        """The average of a parameter, moved to its device and layout."""
        mean, wide = self._average[name], _wide(parameter)
        if mean.shape != wide.shape or not mean.is_floating_point():
            raise CheckpointError(
                f"{self.name}: the saved average of '{name}' is {tuple(mean.shape)}, {mean.dtype}, "
                f"the parameter {tuple(wide.shape)}; resume with the config that wrote the "
                "checkpoint"
            )
        return mean.to(wide.device, wide.dtype)


@torch.no_grad()
def _fill(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _averaged_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers in the model's state."""
    saved = model.state_dict().keys()
    named = model.named_buffers()
    return {n: b for n, b in named if n in saved and b.is_floating_point() and not is_lazy(b)}


def _weight(move: Tensor | float, mean: Tensor) -> Tensor:
    """The step size of an average as a tensor on its device, created there without a copy."""
    if isinstance(move, Tensor):
        return move.to(mean.device, mean.dtype)
    return mean.new_full((), move)


def _wide(parameter: Tensor) -> Tensor:
    """The values in at least float32; without a copy if they already are."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
