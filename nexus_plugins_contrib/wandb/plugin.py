"""Stores every metric with Weights & Biases, offline without an account."""

from __future__ import annotations

import json
import netrc
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args
from urllib.parse import urlsplit

from pydantic import Field

from nexus_core import ConfigError, hookimpl
from nexus_core.bases.background import BackgroundConfig, BackgroundLogger, Ending, RunInfo
from nexus_core.images import Image
from nexus_core.signatures import Several
from nexus_plugins_contrib.wandb.handed import HandedLines, Line, last_steps

try:
    import wandb

    from nexus_plugins_contrib.wandb.notes import as_image, as_text, shown, title_of
except ImportError as error:
    raise ConfigError(
        "the plugin wandb needs the package wandb: pip install 'nexus-trainer[wandb]'"
    ) from error

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["WandbConfig", "WandbPlugin"]

Mode: TypeAlias = Literal["online", "offline", "disabled", "shared"]
MODES = {"dryrun": "offline", "run": "online", **{mode: mode for mode in get_args(Mode)}}
"""The possible values of WANDB_MODE, including earlier names."""
TRUE = ("1", "on", "true", "yes")
KIND = "._type"  # suffix of text and images in the reader's output


class WandbConfig(BackgroundConfig):
    """Settings of Weights & Biases logging."""

    project: str = Field(default="nexus", min_length=1, description="project of the run")
    entity: str | None = Field(
        default=None, description="user or team; null: the account's default"
    )
    run_name: str | None = Field(
        default=None, description="display name; null: name of the run folder"
    )
    run_id: str | None = Field(default=None, description="id of a run to resume; null: a new run")
    tags: Several[str] = Field(default=(), description="run tags")
    mode: Literal["auto", "online", "offline"] = Field(
        default="auto",
        description="auto: from WANDB_MODE or WANDB_DISABLED, else online if there are "
        "credentials (an environment variable or .netrc), else offline",
        json_schema_extra={"resume": "ignored"},
    )
    artifact: bool = Field(
        default=False,
        description="store the checkpoint `final` as an artifact at the end",
        json_schema_extra={"resume": "ignored"},
    )


class WandbPlugin(BackgroundLogger[WandbConfig]):
    """Sends each log and each evaluation to Weights & Biases; does not affect training.

    Offline, everything is in `OUT/wandb`, and `wandb sync` uploads it later. A resumed run
    continues the same W&B run: it resends what was lost in a crash, and nothing twice.
    """

    config_class = WandbConfig
    writes_files = True
    before = ("checkpoint",)  # so that it closes after it, when `final` is complete
    _run: wandb.Run
    _mode: Mode = "offline"
    _place: str = ""
    _handed: HandedLines

    @hookimpl
    def on_start(self, engine: Engine) -> None:
        """Determine the mode, and start the run.

        Raises:
            ConfigError: WANDB_MODE is not a valid mode.
        """
        self._mode = _mode(self.config.mode)
        super().on_start(engine)

    def connect(self, run: RunInfo) -> Mapping[str, int]:
        """Start or resume the run."""
        config, t = self.config, self.config.timeout
        assert run.folder is not None
        if self._mode == "disabled":
            self._place = "disabled by the environment (WANDB_MODE or WANDB_DISABLED)"
            return {}
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.run_name or run.name,
            id=config.run_id or run.key,
            tags=config.tags,
            mode=self._mode,
            config=dict(run.config),
            dir=run.folder,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", init_timeout=t, finish_timeout=t),
        )
        offline = f"wandb sync {Path(self._run.dir).parent}"
        self._place = offline if self._run.offline else str(self._run.url)
        self._handed = HandedLines(run.folder / "wandb" / f"lines-{self._run.id}.jsonl")
        if run.step == 0:
            return {}
        found = _stored(run.folder / "wandb", self._run.id) if self._run.offline else ()
        stored = last_steps(found)
        for step, metrics in self._handed.missing(stored, self._run.starting_step):
            self._log(step, metrics)
        steps = stored | last_steps(self._handed)
        return steps | {title_of(name): step for name, step in steps.items()}

    def send(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics, and send them to wandb's process, which buffers them in memory."""
        if self._mode == "disabled":
            return
        self._handed.add(step, metrics)
        self._log(step, metrics)

    def send_note(self, step: int, title: str, text: str) -> None:
        """Send a note, which wandb shows by step as the title plus `/text`."""
        self.send(step, as_text(title, text))

    def send_image(self, step: int, title: str, image: Image) -> None:
        """Send an image, which wandb shows by step as the title plus `/image`."""
        self.send(step, as_image(title, image))

    def _log(self, step: int, line: Mapping[str, Any]) -> None:
        self._run.log({name: shown(value) for name, value in line.items()}, step=step)

    def disconnect(self, run: RunInfo, ending: Ending) -> None:
        """Upload the artifact, if configured, and end the run."""
        assert run.folder is not None
        if self._mode == "disabled":
            return
        final = run.folder / "checkpoints" / "final"
        if self.config.artifact and final.is_dir():
            artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model")
            artifact.add_dir(str(final.resolve()), skip_cache=True, policy="immutable")
            self._run.log_artifact(artifact, aliases=["final"])
        self._run.finish(exit_code=1 if ending == "failed" else 0)

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Say where to view the run, or how to upload it."""
        place = {"wandb": self._place} if self._place else {}
        return {**place, **super().summarize(engine)}


def _mode(wish: str) -> Mode:
    """The mode to pass to wandb, which reads WANDB_MODE only once per process."""
    if wish != "auto":
        return cast(Mode, wish)
    if os.environ.get("WANDB_DISABLED", "").lower() in TRUE:
        return "disabled"
    said = os.environ.get("WANDB_MODE") or ("online" if _has_credentials() else "offline")
    if said.lower() not in MODES:
        raise ConfigError(f"WANDB_MODE is '{said}'; expected one of {', '.join(MODES)}")
    return cast(Mode, MODES[said.lower()])


def _has_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    with suppress(OSError, netrc.NetrcParseError, RuntimeError):  # RuntimeError: no home folder
        paths = [path for file in files if (path := Path(file).expanduser()).exists()]
        return any(netrc.netrc(str(path)).authenticators(host) for path in paths[:1])
    return False


def _stored(folder: Path, run_id: str) -> Iterator[Line]:
    """The lines that wandb's own reader finds in its files."""
    for path in folder.glob(f"*run-*-{run_id}/*.wandb"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        for record in map(json.loads, printed.splitlines()):
            if item := record.get("history", {}).get("item"):
                media = {name.removesuffix(KIND): None for name in item if name.endswith(KIND)}
                yield item["_step"], {**item, **media}
