"""Record which checkpoint a run was resumed from, until its first own save.

A run may be resumed from another run's checkpoint, or from an earlier one of its own. If it is
killed before it saves, the newest checkpoint in its folder belongs to the abandoned history. So
`course.json` records the resumed checkpoint before any other is set aside, and `--resume auto`
reads it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nexus_core.errors import CheckpointError, hint_out
from nexus_plugins._shared.files import read_small

__all__ = ["FILE", "Course", "begun", "forget", "note", "source_for"]

FILE = "course.json"
_LIMIT = 1 << 16


@dataclass(frozen=True)
class Course:
    """A start from an explicitly named checkpoint.

    Args:
        asked: what was given: "best", "final", or an absolute path.
        source: the folder of the checkpoint.
        ready: whether later checkpoints of the old history have been set aside.
        launch: host and process id of the launcher that started the run.
    """

    asked: str
    source: str
    ready: bool
    launch: Sequence[str]

    def is_foreign(self, root: Path) -> bool:
        """Whether the checkpoint is outside the run's own checkpoint folder."""
        return Path(self.source).parent != root.resolve()


def begun(asked: str, source: Path) -> Course:
    """Start a course."""
    return Course(_absolute(asked), str(source.resolve()), False, _launch())


def note(course: Course, root: Path, *, ready: bool) -> None:
    """Write it atomically.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    draft = root / f".tmp-{FILE}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(replace(course, ready=ready)), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(root / FILE)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {root}: {error.strerror}; make it writable, or choose another: ",
            hint_out(),
        ) from error


def forget(root: Path) -> None:
    """Delete the record: a run from scratch has not been resumed."""
    with suppress(FileNotFoundError, NotADirectoryError):
        (root / FILE).unlink()


def source_for(asked: str, root: Path, *, saved: bool) -> str:
    """The checkpoint to read if `asked` is to be resumed from.

    Args:
        asked: "auto", a name or a path.
        root: the run's own folder of checkpoints.
        saved: whether it holds a checkpoint.

    Returns:
        `asked`; or "auto" if the launcher has since restarted this run; or the checkpoint that the
        run was resumed from, if it has not saved since.

    Raises:
        CheckpointError: the record cannot be read.
    """
    course = _read(root)
    if course is None:
        return asked
    if asked != "auto" and not _taken_already(asked, course):
        return asked
    return "auto" if course.ready and saved else course.source


def _taken_already(asked: str, course: Course) -> bool:
    """Whether this launch has been resumed from there already."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or course.asked != _absolute(asked):
        return False
    ours = _launch()
    return list(course.launch) == ours or course.launch[0] != ours[0]  # started on another machine


def _absolute(asked: str) -> str:
    return asked if asked in ("auto", "best", "final") else str(Path(asked).absolute())


def _launch() -> list[str]:
    """Host and parent process id, with the parent's start time, since ids are reused."""
    parent = os.getppid()
    try:
        start = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        start = ""
    return [socket.gethostname(), str(parent), start]


def _read(root: Path) -> Course | None:
    path = root / FILE
    try:
        found = json.loads(read_small(path, _LIMIT))
        course = Course(**found)
        texts = (course.asked, course.source, *course.launch)
        if not all(isinstance(text, str) for text in texts) or len(course.launch) != 3:
            raise TypeError("expected text")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError, CheckpointError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; it names the checkpoint that this run was resumed "
            "from. Remove it to resume from the newest checkpoint in this folder"
        ) from error
    return course
