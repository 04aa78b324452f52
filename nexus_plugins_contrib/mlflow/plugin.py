"""Stores every metric with MLflow, in a database in the run folder or on a tracking server."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import Field

from nexus_core import ConfigError, hookimpl
from nexus_core.bases.background import BackgroundConfig, BackgroundLogger, Ending, RunInfo
from nexus_core.images import Image
from nexus_plugins_contrib.mlflow.names import (
    name_for_mlflow,
    name_of_image,
    named,
    parameters,
    steps_of_images,
)

try:
    from mlflow.entities import Metric, Param, Run
    from mlflow.tracking import MlflowClient
except ImportError as error:
    raise ConfigError(
        "the plugin mlflow needs the package mlflow: pip install 'nexus-trainer[mlflow]'"
    ) from error
except RuntimeError as error:
    raise ConfigError(f"the package mlflow cannot be imported: {error} Set HOME.") from error

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["MlflowConfig", "MlflowPlugin"]

KEY = "nexus.run"
LONGEST_TAG = 8000  # characters: limits of
METRICS_AT_ONCE, PARAMETERS_AT_ONCE = 1000, 100  # MLflow
STATUS: Mapping[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowConfig(BackgroundConfig):
    """Settings of MLflow logging."""

    timeout: float = Field(
        default=60.0,
        gt=0,
        le=31_536_000,
        description="timeout in seconds for one MLflow call, and for closing; the logger is then "
        "disabled (creating the tables of a new database takes some time)",
        json_schema_extra={"resume": "ignored"},
    )
    tracking_uri: str | None = Field(
        default=None,
        description="tracking URI, such as http://HOST:5000 or sqlite:////PATH/mlflow.db; null: "
        "MLFLOW_TRACKING_URI, else mlflow.db in the run folder",
    )
    experiment: str = Field(default="nexus", min_length=1, description="experiment name")
    run_name: str | None = Field(
        default=None, description="display name; null: name of the run folder"
    )
    run_id: str | None = Field(default=None, description="id of a run to resume; null: a new run")
    tags: dict[str, str] = Field(default={}, description="run tags, by name")
    artifact: bool = Field(
        default=False,
        description="store the checkpoint `final` as an artifact at the end",
        json_schema_extra={"resume": "ignored"},
    )


class MlflowPlugin(BackgroundLogger[MlflowConfig]):
    """Sends each log and each evaluation to MLflow, and the config as parameters.

    Does not affect training. A resumed run continues the same MLflow run; repeated steps are not
    sent again.
    """

    config_class = MlflowConfig
    writes_files = True
    before = ("checkpoint",)  # so that it closes after it, when `final` is complete
    _client: MlflowClient
    _run_id: str = ""
    _last_steps: Mapping[str, int] = MappingProxyType({})
    _image_steps: Mapping[str, int] = MappingProxyType({})
    _place: str = ""

    def connect(self, run: RunInfo) -> Mapping[str, int]:
        """Start or resume the run."""
        assert run.folder is not None
        uri = self.config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        store = uri or f"sqlite:///{run.folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=store)
        found = self._found(run, self._experiment(None if uri else run.folder))
        self._run_id = found.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        known = found.data.params
        new = [Param(key, text) for key, text in parameters(run.config) if key not in known]
        for start in range(0, len(new), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run_id, params=new[start : start + PARAMETERS_AT_ONCE])
        self._place = f"run {self._run_id}; mlflow ui --backend-store-uri {store}"
        self._last_steps = {name: self._last_step(name) for name in found.data.metrics}
        files = self._client.list_artifacts(self._run_id, "images") if run.step else []
        self._image_steps = steps_of_images(file.path for file in files)
        return self._last_steps

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store the metrics, in one transaction if MLflow allows it."""
        now = int(time.time() * 1000)
        points = [Metric(name, value, now, step) for name, value in named(metrics).items()]
        new = [point for point in points if step > self._last_steps.get(point.key, -1)]
        for start in range(0, len(new), METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=new[start : start + METRICS_AT_ONCE])

    def send_note(self, step: int, title: str, text: str) -> None:
        """Store the note as a tag of the run; a later note with the same title replaces it."""
        self._client.set_tag(
            self._run_id, name_for_mlflow(title), f"step {step:,}: {text}"[:LONGEST_TAG]
        )

    def send_image(self, step: int, title: str, image: Image) -> None:
        """Store the image as an artifact that MLflow shows by step; its caption as a note."""
        key = name_of_image(title)
        if step > self._image_steps.get(key, -1):
            self._client.log_image(self._run_id, image.opened(), key=key, step=step)
        if image.caption:
            self.send_note(step, title, image.caption)

    def disconnect(self, run: RunInfo, ending: Ending) -> None:
        """Upload the artifact, if configured, and end the run."""
        assert run.folder is not None
        final = run.folder / "checkpoints" / "final"
        if self.config.artifact and final.is_dir():
            self._client.log_artifacts(self._run_id, str(final.resolve()), "final")
        self._client.set_terminated(self._run_id, STATUS[ending])

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Say where to view the run."""
        place = {"mlflow": self._place} if self._place else {}
        return {**place, **super().summarize(engine)}

    def _experiment(self, folder: Path | None) -> str:
        """The id of the experiment; a new one stores its artifacts in `folder`, if given."""
        name = self.config.experiment
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        location = (folder / "mlflow-artifacts").as_uri() if folder else None
        return str(self._client.create_experiment(name, artifact_location=location))

    def _found(self, run: RunInfo, experiment: str) -> Run:
        """The run of this id or key; a new one if it does not exist."""
        if self.config.run_id is not None:
            return self._client.get_run(self.config.run_id)
        earlier = self._client.search_runs([experiment], f"tags.`{KEY}` = '{run.key}'")
        if earlier:
            return earlier[0]
        tags = {**self.config.tags, KEY: run.key}
        name = self.config.run_name or run.name
        return self._client.create_run(experiment, run_name=name, tags=tags)

    def _last_step(self, name: str) -> int:
        return max(point.step for point in self._client.get_metric_history(self._run_id, name))
