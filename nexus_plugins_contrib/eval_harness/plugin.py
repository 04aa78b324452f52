"""Evaluates the run's model on lm-evaluation-harness tasks."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict, Field

from nexus_core import ConfigError, Plugin, PluginConfig, hookimpl
from nexus_core.paths import PathField
from nexus_core.signatures import Several

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["EvalHarnessConfig", "EvalHarnessPlugin"]


class EvalHarnessConfig(PluginConfig):
    """Which tasks to evaluate, and how many examples of each."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tasks": ["arc_easy"]}]})

    tasks: Several[str] = Field(min_length=1, description="names of tasks or task groups")
    include: PathField | None = Field(
        default=None,
        description="folder of additional tasks, as YAML; null: only those of the package",
    )
    limit: int | None = Field(default=None, ge=1, description="examples per task; null: all")
    shots: int | None = Field(
        default=None, ge=0, description="few-shot examples per question; null: the task's default"
    )
    batch_size: int = Field(default=8, ge=1, description="rows per model call")
    max_length: int = Field(
        default=1024,
        ge=2,
        description="context length in tokens; longer contexts are truncated on the left",
    )


class EvalHarnessPlugin(Plugin[EvalHarnessConfig]):
    """Evaluates lm-evaluation-harness tasks at each evaluation.

    The model is queried through the run's own forward pass, so any token model works, with the
    weights under evaluation. Tasks stored on this machine need no network.
    """

    config_class = EvalHarnessConfig
    api_version: ClassVar[str] = "1.2"
    _done_at: int = -1

    @hookimpl
    def on_build(self) -> None:
        """Check that the package is installed, before training starts.

        Raises:
            ConfigError: it is not.
        """
        if find_spec("lm_eval") is None:
            raise ConfigError("eval_harness needs the package lm-eval: pip install lm-eval")

    @hookimpl
    def measure(self, engine: Engine, split: str, data: Iterable[Batch]) -> dict[str, float]:
        """The metrics of all tasks, as `harness/<task>/<metric>`; only with the first set.

        Raises:
            ConfigError: the data has no tokenizer, or a task does not exist.
        """
        if self._done_at == engine.state.step:
            return {}
        from nexus_plugins_contrib.eval_harness.model import asked

        self._done_at = engine.state.step
        codec = engine.data.codec if engine.data is not None else None
        if codec is None:
            raise ConfigError("eval_harness needs text, but the data has no tokenizer")
        return asked(engine, codec, self.config)
