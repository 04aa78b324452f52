"""Stores every metric with Trackio, in its store on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from nexus_core import ConfigError, hookimpl
from nexus_core.bases.background import BackgroundConfig, BackgroundLogger, Ending, RunInfo
from nexus_core.images import Image

try:
    import trackio
    from trackio.markdown import Markdown
    from trackio.run import Run
    from trackio.sqlite_storage import SQLiteStorage
except ImportError as error:
    raise ConfigError(
        "the plugin trackio needs the package trackio: pip install 'nexus-trainer[trackio]'"
    ) from error

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["TrackioConfig", "TrackioPlugin"]

NOT_METRICS = ("step", "timestamp")
NOTE, IMAGE = "/text", "/image"  # suffixes, since a title may equal a metric's name


class TrackioConfig(BackgroundConfig):
    """Settings of Trackio logging."""

    project: str = Field(default="nexus", min_length=1, description="project of the run")
    run_name: str | None = Field(
        default=None, description="run name; null: name of the run folder plus a few digits"
    )
    group: str | None = Field(default=None, description="group of runs in the dashboard")


class TrackioPlugin(BackgroundLogger[TrackioConfig]):
    """Stores each log and each evaluation with Trackio; does not affect training.

    The store is Trackio's own, `TRACKIO_DIR` or its default, so that the dashboard shows the runs
    of a project together. A resumed run continues under the same name; repeated steps are not
    stored again.
    """

    config_class = TrackioConfig
    _run: Run | None = None

    def connect(self, run: RunInfo) -> Mapping[str, int]:
        """Start or resume the run."""
        self._run = trackio.init(
            project=self.config.project,
            name=self.config.run_name or f"{run.name}-{run.key}",
            group=self.config.group,
            config=dict(run.config),
            resume="allow" if run.step else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return self._last_steps(self._run) if run.step else {}

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics to Trackio."""
        assert self._run is not None
        self._run.log(dict(metrics), step=step)

    def send_note(self, step: int, title: str, text: str) -> None:
        """Send the note to Trackio as Markdown, which its dashboard shows under reports."""
        assert self._run is not None
        paragraphs = text.replace("\n", "\n\n")  # the dashboard joins lines of a paragraph
        self._run.log({title + NOTE: Markdown(paragraphs)}, step=step)

    def send_image(self, step: int, title: str, image: Image) -> None:
        """Send the image to Trackio, with its caption."""
        assert self._run is not None
        shown = trackio.Image(image.opened(), caption=image.caption or None)
        self._run.log({title + IMAGE: shown}, step=step)

    def disconnect(self, run: RunInfo, ending: Ending) -> None:
        """Flush everything to the store."""
        assert self._run is not None
        self._run.finish()  # type: ignore[no-untyped-call]

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Say how to view the curves."""
        show = f"trackio show --project {self.config.project}"
        place = {"trackio": f"{show}, run {self._run.name}"} if self._run is not None else {}
        return {**place, **super().summarize(engine)}

    def _last_steps(self, run: Run) -> dict[str, int]:
        """The last step of each metric, and of each note or image by its title, in the store."""
        steps: dict[str, int] = {}
        for line in SQLiteStorage.get_logs(self.config.project, run.name, run_id=run.id):
            for name in line.keys() - set(NOT_METRICS):
                name = name.removesuffix(NOTE).removesuffix(IMAGE)
                steps[name] = max(line["step"], steps.get(name, -1))
        return steps
