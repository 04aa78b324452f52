"""The folder of a run: which run owns it, and what to remove if the run never starts."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from nexus_core.cli import distributed, yaml12
from nexus_core.cli.build import Build
from nexus_core.cli.copies import check_free, write_copies
from nexus_core.cli.lineage import Relation, note_parent
from nexus_core.errors import ConfigError
from nexus_core.sources import Source

__all__ = ["RunFolder", "automatic", "run_folder", "write_config"]

RUNS = Path("runs")
CONFIG = "config.yaml"


@dataclass
class RunFolder:
    """The folder of one run.

    Args:
        path: path of the folder.
        made: folders that this process created for it, outermost first.
        claimed: whether this process owns the run in it.
        copies: copies of local code, with their folders, that this process made, outermost first.
        parent: the checkpoint that a branch continues from; None: not a branch.
    """

    path: Path
    made: list[Path] = field(default_factory=list)
    claimed: bool = False
    copies: list[Path] = field(default_factory=list)
    parent: Relation | None = None

    def claim(
        self, settings: Mapping[str, Any], code: Sequence[Source] = (), *, resuming: bool
    ) -> bool:
        """Claim the folder for this run, with a config that no other process can have written.

        Args:
            settings: the resolved settings.
            code: the local files whose copies the settings name.
            resuming: whether the run in it is resumed.

        Returns:
            Whether the config was written; False if the run is resumed.

        Raises:
            ConfigError: another run has claimed the folder, or it cannot be written.
        """
        try:
            self.make()
            if not resuming:
                check_free(code, self.path)
            self.claimed = _write_new(self.path / CONFIG, yaml12.dump(dict(settings)))
            if self.claimed:
                self.copies = write_copies(code, self.path)
                if self.parent is not None:
                    note_parent(self.path, self.parent)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if not self.claimed and not resuming:
            raise _taken(self.path)
        return self.claimed

    def make(self) -> None:
        """Create it, and note which folders are new."""
        for path in reversed([self.path, *self.path.parents]):
            if not path.is_dir():
                with suppress(FileExistsError):  # another process was faster
                    path.mkdir()
                    self.made.append(path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Remove the empty folder if an error ends the run before it starts."""
        if kind is not None:
            self._remove_empty()

    def remove(self) -> None:
        """Undo what this process did to it, and nothing that others did."""
        if self.claimed and self.path in self.made:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.claimed:
            (self.path / CONFIG).unlink(missing_ok=True)
            for path in reversed(self.copies):
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
        self._remove_empty()

    def _remove_empty(self) -> None:
        for path in reversed(self.made):
            with suppress(OSError):  # another run uses it now
                path.rmdir()


def run_folder(build: Build, resume: str | None, *, make: bool = True) -> RunFolder:
    """The folder of this run: the one set, that of the run to resume, or a new one under `runs/`.

    All ranks get the folder that rank 0 found.

    Args:
        build: the run's build.
        resume: as given; None starts a new run.
        make: whether to create a new one under `runs/` at once, to reserve its name.

    Raises:
        ConfigError: it holds another run, and `resume` is not set.
    """
    ranks = distributed.join(build)
    source = distributed.resume_source(resume)
    return distributed.of_main(ranks, lambda: _found(build, source, make=make))


def write_config(settings: Mapping[str, Any], code: Sequence[Source], out: Path) -> None:
    """Write the resolved config and the copies of code to the run folder, replacing earlier ones.

    Raises:
        ConfigError: the folder cannot be written.
    """
    draft = out / f".{CONFIG}.{os.getpid()}.tmp"
    try:
        write_copies(code, out)
        draft.write_text(yaml12.dump(dict(settings)), encoding="utf-8")
        draft.replace(out / CONFIG)
    except OSError as error:
        raise _cannot_write(out, error) from error


def _found(build: Build, resume: str | None, *, make: bool) -> RunFolder:
    out = build.run.out
    if out is not None:
        try:
            taken = resume is None and (out / CONFIG).exists()
        except OSError as error:  # name too long, folder not accessible
            raise _cannot_write(out, error) from error
        if taken:
            raise _taken(out)
        return RunFolder(out)
    if resume == "auto" and (earlier := _newest(build.name)):
        return RunFolder(earlier)
    folders = (RunFolder(path) for path in automatic(build.name) if not path.exists())
    return next(folder for folder in folders if not make or _is_first(folder))


def _is_first(folder: RunFolder) -> bool:
    """Create a folder; returns whether this process was first."""
    try:
        folder.make()
    except OSError as error:
        raise _cannot_write(folder.path, error) from error
    return folder.path in folder.made


def automatic(name: str) -> Iterator[Path]:
    """Names under `runs/` for an unnamed run, with the current time, best first."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    yield RUNS / f"{name}-{stamp}"
    for number in count(2):
        yield RUNS / f"{name}-{stamp}-{number}"


def _newest(name: str) -> Path | None:
    """The newest run of this name with a checkpoint."""
    pattern = re.compile(rf"{re.escape(name)}-(\d{{8}}-\d{{6}})(?:-(\d+)|([b-k]))?")
    runs = []
    for path in RUNS.glob("*"):
        match = pattern.fullmatch(path.name)
        if match and any(path.glob("checkpoints*")):
            letter = ord(match[3]) if match[3] else 0  # numbering of earlier releases
            runs.append((match[1], int(match[2] or letter), path))
    return max(runs)[2] if runs else None


def _write_new(path: Path, text: str) -> bool:
    """Write a file atomically; False if it already exists."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # the file system has no links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        draft.unlink()
    return True


def _taken(out: Path) -> ConfigError:
    return ConfigError(
        f"'{out}' already holds a run; resume it with --resume auto, or choose another folder "
        "with --out"
    )


def _cannot_write(out: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write to the run folder '{out}': {error.strerror}; "
        "choose another with --out, or free some space"
    )
