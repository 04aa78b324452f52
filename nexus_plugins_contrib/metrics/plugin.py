"""Evaluation metrics over whole sets: accuracy, F1, AUROC, any of torchmetrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from nexus_core import Batch, ConfigError, Plugin, PluginConfig, hookimpl
from nexus_core.processes import gather
from nexus_core.signatures import Lax
from nexus_plugins_contrib.metrics.measured import (
    Metric,
    MetricConfig,
    make,
    numbers,
    part_at,
    together,
)

if TYPE_CHECKING:
    from nexus_core import Engine, Step

__all__ = ["MetricsConfig", "MetricsPlugin"]

_TARGETS = ("labels", "label", "targets", "target", "y")
_OUTPUTS = ("logits", "output", "prediction")
_EXAMPLE: Any = {"metrics": {"spread": {"metric": "MeanMetric"}}}
Pick = Callable[[Batch, Any], tuple[Any, ...]]


class MetricsConfig(PluginConfig):
    """Settings of the evaluation metrics."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})
    metrics: Lax[dict[str, MetricConfig]] = Field(default={}, description="metrics by name")
    target: str | int | None = Field(
        default=None,
        description="key or index of the target in a batch; null: labels, label, targets, target "
        "or y, or the last of a tuple",
    )
    output: str | int | None = Field(
        default=None,
        description="key, attribute or index of the prediction in the model's output; null: "
        "logits, output or prediction, or the output itself",
    )


class MetricsPlugin(Plugin[MetricsConfig]):
    """Measures metrics over all rows of each evaluation set, such as F1 or AUROC.

    Each is computed over the whole set and all processes, not as a mean of batches, and is called
    `val/f1`, so it can be used by loggers, early stopping and the choice of the best checkpoint.
    Rows that two ranks share count once.

    Args:
        metrics: a config; or metrics by name: objects with `update`, `compute` and `reset`, of
            torchmetrics or your own (with `merge_state` if there are several processes).
        pick: returns their `update` arguments, given a batch and the model's output; None:
            prediction and target, by the settings `output` and `target`.
    """

    config_class = MetricsConfig
    topology_invariant: ClassVar[bool] = False  # torchmetrics adds up in rank order
    api_version: ClassVar[str] = "1.2"

    if TYPE_CHECKING:

        def __new__(cls, metrics: Any = None, /, *, pick: Any = None, **settings: Any) -> Self:
            """Takes the arguments of `__init__`: more than settings."""

    def __init__(
        self,
        metrics: MetricsConfig | Mapping[str, Any] | None = None,
        /,
        *,
        pick: Pick | None = None,
        **settings: object,
    ) -> None:
        config = metrics if isinstance(metrics, MetricsConfig) else None
        super().__init__(config, **settings)
        given = {} if metrics is None or config else cast(Mapping[str, Any], metrics)
        for name, metric in given.items():
            if lacking := [n for n in ("update", "compute", "reset") if not hasattr(metric, n)]:
                raise ConfigError(f"{self.name}: '{name}' is {metric!r:.80}, without {lacking[0]}")
        own = {name: make(name, c, self.name) for name, c in self.config.metrics.items()}
        self._metrics: dict[str, Metric] = {**own, **given}
        if not self._metrics:
            raise ConfigError(
                f"{self.name} has no metrics; add some, such as "
                f"{self.name}.metrics={{accuracy: {{metric: Accuracy, args: {{...}}}}}}"
            )
        self._pick = pick
        self._sets: dict[str, dict[str, Metric]] = {}
        self._rows: dict[str, int] = {}
        self._noted: list[Any] = []

    @hookimpl
    def evaluating(self, engine: Engine) -> AbstractContextManager[object]:
        """Reset the metrics, and capture the model's outputs."""
        return self._noting(engine.model)

    @hookimpl
    def loss_terms(self, engine: Engine, batch: Batch, output: Any, step: Step | None) -> None:
        """Update the set's metrics with a batch."""
        if step is not None or engine.training:
            return
        noted, self._noted[:] = self._noted[-1:], []
        is_loss = isinstance(output, Tensor) and output.ndim == 0  # with Engine(loss=...)
        found = noted[0] if is_loss and noted else output
        if engine.split not in self._sets:
            self._sets[engine.split] = copy.deepcopy(self._metrics)
        if engine.meter.counts:
            values = (self._pick or self._chosen)(batch, found)
            self._rows[engine.split] = self._rows.get(engine.split, 0) + 1
            for metric in self._sets[engine.split].values():
                if isinstance(metric, nn.Module):
                    metric.to(engine.device)
                metric.update(*values)

    @hookimpl
    def measure(self, engine: Engine, split: str) -> dict[str, float]:
        """Compute the metrics of a whole set, over all ranks.

        Raises:
            ConfigError: a custom metric cannot be merged over several ranks.
        """
        seen = gather(engine.ranks, self._rows.pop(split, 0))
        found: dict[str, float] = {}
        for name, metric in self._sets.pop(split, {}).items() if any(seen) else ():
            value = together(metric, seen, engine.ranks, f"{self.name}.{name}").compute()
            found |= {f"{split}/{key}": number for key, number in numbers(name, value)}
        return found

    @contextmanager
    def _noting(self, model: nn.Module) -> Iterator[None]:
        self._sets, self._rows, self._noted = {}, {}, []
        handle = model.register_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, model: nn.Module, given: object, output: Any) -> None:
        self._noted[:] = [output]

    def _chosen(self, batch: Batch, output: Any) -> tuple[Any, Any]:
        if isinstance(output, Tensor) and output.ndim == 0 and self.config.output is None:
            raise ConfigError(
                f"{self.name}: the loss did not call the model, so there is no prediction to "
                "measure; pass pick=lambda batch, output: (prediction, target)"
            )
        last = batch[-1] if isinstance(batch, list | tuple) else None
        return (
            part_at(output, self.config.output, _OUTPUTS, output, f"{self.name}.output"),
            part_at(batch, self.config.target, _TARGETS, last, f"{self.name}.target"),
        )
