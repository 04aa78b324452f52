"""Averages the weights over the run, and evaluates with the average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nexus_core import CheckpointError, Plugin, PluginConfig, StateDict, hookimpl
from nexus_core.processes import local_part

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["EmaConfig", "EmaPlugin"]


class EmaConfig(PluginConfig):
    """Settings of the averaged weights."""

    decay: float = Field(0.999, ge=0, lt=1, description="what the average keeps of itself a step")
    ramp: bool = Field(
        True,
        description="average over fewer steps while there are few: decay is at most (1+n)/(10+n)",
    )
    evaluate: bool = Field(True, description="evaluate with the average instead of the weights")


class EmaPlugin(Plugin[EmaConfig]):
    """Keeps an exponential moving average of the trained weights beside them.

    Training is not changed. Evaluation runs with the average in the model's place, and the
    weights come back bit for bit. The average is kept in float32 at least, is saved with the
    plugin's state, and `weights()` gives it in the names of the model's `state_dict`. Buffers
    (running statistics) are the model's own.

    Source: Polyak and Juditsky 1992; the ramp is that of `tf.train.ExponentialMovingAverage`.
    """

    api_version: ClassVar[str] = "1.2"
    _average: dict[str, Tensor]
    _updates: int
    _live: dict[str, nn.Parameter]
    """The parameters that are averaged, by name."""
    _seen: tuple[tuple[int, bool, bool], ...]
    """Which parameters there were, and of each whether it was trained and without a shape yet."""

    def __init__(self, config: EmaConfig | None = None, /, **settings: object) -> None:
        super().__init__(config, **settings)
        self._average, self._updates, self._live, self._seen = {}, 0, {}, ()

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters, by their names in the model."""
        return dict(self._average)

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Begin with the weights as they are, unless there is an average from before.

        Raises:
            CheckpointError: the saved average is of another model.
        """
        named = dict(engine.model.named_parameters())
        if odd := self._average.keys() - named.keys():
            raise CheckpointError(
                f"{self.name}: the saved average has '{min(odd)}', which the model does not; "
                "resume with the config that wrote the checkpoint"
            )
        self._seen = ()
        self._collect(engine)

    @hookimpl(stage="measure")
    def after_backward(self, engine: Engine, step: Step) -> None:
        """Take in what has begun to be trained, before it moves."""
        if not step.again:
            self._collect(engine)

    @hookimpl
    @torch.no_grad()
    def on_step(self, step: Step) -> None:
        """Move the average towards the weights; a refused step leaves it where it is."""
        self._updates += 1
        decay = self.config.decay
        if self.config.ramp:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        average = [local_part(self._average[name]) for name in self._live]
        move = 1 - decay if step.refused is None else (1 - decay) * (1 - step.refused)
        weights = [torch.as_tensor(move, dtype=mean.dtype, device=mean.device) for mean in average]
        torch._foreach_lerp_(average, [_wide(local_part(p)) for p in self._live.values()], weights)

    @hookimpl
    def evaluating(self) -> AbstractContextManager[object] | None:
        """Evaluate with the average in the weights' place, and bring them back bit for bit."""
        return self._shown() if self.config.evaluate else None

    @contextmanager
    def _shown(self) -> Iterator[None]:
        before = [parameter.detach().clone() for parameter in self._live.values()]
        _fill(self._live.values(), [self._average[name] for name in self._live])
        try:
            yield
        finally:
            _fill(self._live.values(), before)

    def _collect(self, engine: Engine) -> None:
        """Take in what has begun to be trained, with its weights as they are now."""
        parameters = engine.parameters()
        seen = tuple((id(p), p.requires_grad, is_lazy(p)) for p in parameters)
        if seen == self._seen:
            return
        named = engine.model.named_parameters()
        self._live = {n: p for n, p in named if p.requires_grad and not is_lazy(p)}
        for name, parameter in self._live.items():
            known = name in self._average
            mean = self._fitting(name, parameter) if known else _wide(parameter).clone()
            self._average[name] = mean
        self._seen = seen

    def state_dict(self) -> StateDict:
        """The average and how many steps are in it."""
        return {"average": dict(self._average), "updates": self._updates} if self._average else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Take over the average."""
        average = cast(dict[str, Tensor], state["average"])
        self._average = {name: tensor.clone() for name, tensor in average.items()}
        self._updates = int(cast(int, state["updates"]))

    def _fitting(self, name: str, parameter: Tensor) -> Tensor:
        """The average of a parameter, where the parameter is."""
        mean, wide = self._average[name], _wide(parameter)
        if mean.shape != wide.shape or not mean.is_floating_point():
            raise CheckpointError(
                f"{self.name}: the saved average of '{name}' is {tuple(mean.shape)}, {mean.dtype}, "
                f"the parameter {tuple(wide.shape)}; resume with the config that wrote the "
                "checkpoint"
            )
        return mean.to(wide.device, wide.dtype)


@torch.no_grad()
def _fill(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _wide(parameter: Tensor) -> Tensor:
    """The values in float32 at least; the parameter's own memory where it is so wide already."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
