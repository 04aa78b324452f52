"""Writes every metric as a line of JSON."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import Field

from nexus_core import Logger, LoggerConfig, hookimpl
from nexus_core.paths import PathText
from nexus_plugins._shared.files import write_whole

if TYPE_CHECKING:
    from nexus_core import TrainState
    from nexus_core.engine import Engine
    from nexus_core.images import Image

__all__ = ["JsonlConfig", "JsonlPlugin"]

IMAGES = "images"  # folder next to the file
LONGEST_NAME = 80  # characters of a title in a file name
_IMAGE = re.compile(rf"{IMAGES}/step-\d+-[\w.-]*\.png", re.ASCII)
_ENCODER = json.JSONEncoder(allow_nan=False)


class JsonlConfig(LoggerConfig):
    """Settings of the metrics file."""

    file: PathText = Field(
        default="metrics.jsonl", min_length=1, description="file name in the run folder"
    )


class JsonlPlugin(Logger[JsonlConfig]):
    """Appends logs, evaluations and notes to `metrics.jsonl`; does not affect training.

    Each line is an object: `step`, `time` (seconds since 1970), `tokens`, and either
    the metrics by name or a note: `note`, its title, and `text`. An image is a PNG file in the
    folder `images` next to it, and a note with `image`, the file's relative path, whose `text` is
    the caption. Non-finite numbers are written as null, since JSON cannot represent them. Each line
    is flushed immediately. On resume, lines and images of steps that will be repeated are removed,
    so that no step appears twice.
    """

    config_class = JsonlConfig
    writes_files = True
    _stream: IO[str] | None = None
    _resumed_at: int = 0
    _repeated: frozenset[frozenset[str | None]] = frozenset()

    def open(self, engine: Engine) -> None:
        """Truncate the file to the step the run resumes from, and open it."""
        assert engine.out is not None
        path = engine.out / self.config.file
        path.parent.mkdir(parents=True, exist_ok=True)
        step = self._resumed_at = engine.state.step
        records = list(_records(path))
        kept = [record for record in records if record["step"] <= step] if step else []
        _remove_images(path.parent, records, kept)
        self._repeated = frozenset(_kind(record) for record in kept if record["step"] == step)
        write_whole(path, "".join(map(_line, kept)).encode())
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Append the metrics as a line."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._append(engine.state, finite)

    def write_note(self, engine: Engine, title: str, text: str) -> None:
        """Append the note as a line."""
        self._append(engine.state, {"note": title, "text": text})

    def write_image(self, engine: Engine, title: str, image: Image) -> None:
        """Write the PNG file and append a line with its path."""
        assert engine.out is not None
        path = (engine.out / self.config.file).parent / _image_file(engine.state.step, title, image)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, image.png)
        file = f"{IMAGES}/{path.name}"
        self._append(engine.state, {"note": title, "text": image.caption, "image": file})

    def _append(self, state: TrainState, content: Mapping[str, Any]) -> None:
        """Write a line, unless the previous session already wrote it."""
        now = {"step": state.step, "time": round(time.time(), 3), "tokens": state.tokens}
        record = {**now, **content}
        if state.step == self._resumed_at and _kind(record) in self._repeated:
            return
        if self._stream is not None:
            self._stream.write(_line(record))

    @hookimpl
    def summarize(self, engine: Engine) -> dict[str, str]:
        """Say where the metrics are."""
        return {
            "metrics": str(Path(engine.out or "", self.config.file)),
            **super().summarize(engine),
        }

    def close(self, engine: Engine) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _kind(record: Mapping[str, Any]) -> frozenset[str | None]:
    """The identity of a line within its step: names of metrics, or title and text of a note."""
    return frozenset({*record, *(record.get(key) for key in ("note", "text", "image"))})


def _image_file(step: int, title: str, image: Image) -> str:
    """The file name of an image; the same for equal images, so repeated steps add no files."""
    digest = hashlib.sha256(image.png).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", title, flags=re.ASCII).strip(".-")[:LONGEST_NAME]
    return f"{IMAGES}/step-{step:08}-{name}-{digest}.png"


def _remove_images(
    folder: Path, records: Iterable[Mapping[str, Any]], kept: Iterable[Mapping[str, Any]]
) -> None:
    """Remove the images of dropped lines, and no other files."""
    named = {str(record.get("image")) for record in records}
    for name in named - {str(record.get("image")) for record in kept}:
        if _IMAGE.fullmatch(name) and not (folder / IMAGES).is_symlink():
            (folder / name).unlink(missing_ok=True)


def _line(record: Mapping[str, Any]) -> str:
    return _ENCODER.encode(record) + "\n"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a metrics file; a killed process may have left a partial one."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
