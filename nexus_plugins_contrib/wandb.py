"""Stores every metric with Weights & Biases, offline where there is no account."""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast
from urllib.parse import urlsplit

from pydantic import Field

from nexus_core import ConfigError, hookimpl
from nexus_parts.background import BackgroundConfig, BackgroundLogger, Ending, RunInfo

try:
    import wandb
except ImportError as error:
    raise ConfigError(
        "the plugin wandb needs the package wandb: pip install 'nexus-trainer[wandb]'"
    ) from error

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["WandbConfig", "WandbPlugin"]

Mode: TypeAlias = Literal["online", "offline", "disabled", "shared"]
HOST = "https://api.wandb.ai"
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


class WandbConfig(BackgroundConfig):
    """Settings of the run with Weights & Biases."""

    project: str = Field("nexus", min_length=1, description="project that the run belongs to")
    entity: str | None = Field(None, description="user or team; null: the account's default")
    run_name: str | None = Field(None, description="shown name; null: that of the run's folder")
    run_id: str | None = Field(None, description="id of a run to go on with; null: a new run")
    tags: tuple[str, ...] = Field((), description="labels of the run")
    mode: Literal["auto", "online", "offline"] = Field(
        "auto",
        description="auto: as WANDB_MODE says, else online where there are credentials (an "
        "environment variable or .netrc) and offline where there are none",
        json_schema_extra={"resume": "ignored"},
    )
    artifact: bool = Field(
        False,
        description="store the checkpoint `final` as an artifact at the end",
        json_schema_extra={"resume": "ignored"},
    )


class WandbPlugin(BackgroundLogger[WandbConfig]):
    """Sends each log and each evaluation to Weights & Biases; changes nothing in training.

    Offline, everything is in `OUT/wandb`, and `wandb sync` uploads it later. A resumed run goes
    on in the same run; steps that are done again are not sent again.
    """

    writes_files = True
    before = ("checkpoint",)  # and so closes after it, when `final` is whole
    _run: wandb.Run | None = None
    _logged: dict[str, int] | None = None
    _place: str = ""

    def connect(self, run: RunInfo) -> Mapping[str, int]:
        """Begin the run, or go on with it."""
        config = self.config
        assert run.folder is not None
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.run_name or run.name,
            id=config.run_id or run.key,
            tags=config.tags,
            mode=_mode(config.mode),
            config=dict(run.config),
            dir=run.folder,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=config.timeout,
                finish_timeout=config.timeout,
            ),
        )
        offline = f"wandb sync {Path(self._run.dir).parent}"
        self._place = offline if self._run.offline else str(self._run.url)
        self._log_file = run.folder / "wandb" / f"logged-{self._run.id}.json"
        self._logged = _read(self._log_file) if run.step else {}
        return self._logged

    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to wandb's own process, and note that it has them."""
        assert self._run is not None
        assert self._logged is not None
        self._run.log(dict(metrics), step=step)
        self._logged |= dict.fromkeys(metrics, step)
        draft = self._log_file.with_suffix(".tmp")
        draft.write_text(json.dumps(self._logged), encoding="utf-8")
        draft.replace(self._log_file)

    def disconnect(self, run: RunInfo, ending: Ending) -> None:
        """Store the artifact, where asked for, and end the run."""
        assert self._run is not None
        assert run.folder is not None
        final = run.folder / "checkpoints" / "final"
        if self.config.artifact and final.is_dir():
            artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model")
            artifact.add_dir(str(final.resolve()), skip_cache=True, policy="immutable")
            self._run.log_artifact(artifact, aliases=["final"])
        self._run.finish(exit_code=1 if ending == "failed" else 0)

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Where to look at the run, or how to upload it."""
        place = {"wandb": self._place} if self._place else {}
        return {**place, **super().summarize(engine)}


def _mode(wish: str) -> Mode:
    """What to ask wandb for: it reads WANDB_MODE only once in a process."""
    said = os.environ.get("WANDB_MODE") if wish == "auto" else wish
    return cast(Mode, said or ("online" if _has_credentials() else "offline"))


def _has_credentials() -> bool:
    if any(os.environ.get(key) for key in KEYS):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", HOST)).hostname or ""
    homes = (Path.home() / ".netrc", Path.home() / "_netrc")
    for path in (Path(os.environ["NETRC"]),) if "NETRC" in os.environ else homes:
        try:
            return netrc.netrc(str(path)).authenticators(host) is not None
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _read(path: Path) -> dict[str, int]:
    """The last step of each metric that a session before this one handed over."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): int(step) for name, step in content.items()}
