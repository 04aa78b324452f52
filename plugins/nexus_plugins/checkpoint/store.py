"""The folder of a run's checkpoints: their names, which of them stay, and what a crash left."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from nexus_core.errors import CheckpointError
from nexus_plugins.checkpoint.folder import MANIFEST, Content, read_manifest, sync, write

__all__ = ["NAMES", "Store", "is_checkpoint", "step_of"]

NAMES = ("best", "final")
_STEP = re.compile(r"step-(\d{8,20})")
_LEFTOVERS = (".tmp-", ".trash-", ".name-")
_REPLACED = ".replaced-"
_ASIDE = "set-aside"


class Store:
    """The checkpoints of one run.

    Args:
        root: the folder that holds them; it is made when the first one is saved.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self) -> list[Path]:
        """All checkpoint folders, oldest first, whole or not."""
        if not self.root.is_dir():
            return []
        found = {path.name: path for path in self.root.iterdir()}
        for name in [name for name in found if name.startswith(_REPLACED)]:
            found.setdefault(name.removeprefix(_REPLACED), found[name])  # a crash in the exchange
        return [found[name] for name in sorted(filter(_STEP.fullmatch, found), key=step_of)]

    def named(self, name: str) -> Path:
        """The folder that goes by the name `best` or `final`.

        Raises:
            CheckpointError: no checkpoint has it, or the name leads elsewhere.
        """
        link = self.root / name
        if not link.is_symlink():
            raise CheckpointError(f"there is no checkpoint '{name}' in {self.root}")
        target = str(link.readlink())
        if not _STEP.fullmatch(target):
            raise CheckpointError(f"{link} leads to '{target}', which is no checkpoint beside it")
        return self.root / target

    def save(
        self,
        content: Content,
        names: Iterable[str],
        keep_last: int,
        write_parts: Callable[[Path], Mapping[str, tuple[int, str]]] = lambda folder: {},
    ) -> Path:
        """Write a checkpoint, give it its names, then delete those that need not stay.

        Raises:
            OSError: the disk is full, broken or read-only; what was there before still is.
        """
        folder = self.root / f"step-{content.step:08d}"
        replaced = folder.with_name(_REPLACED + folder.name)

        def make_room() -> None:
            if folder.exists():
                folder.rename(replaced)

        write(folder, content, make_room, write_parts)
        for name in names:
            self._give_name(name, folder)
        if replaced.exists():
            self._delete(replaced)
        self._retain(keep_last, newest=folder)
        return folder

    def recover(self) -> None:
        """Put back what a crash left half replaced; delete what it left half written or deleted."""
        if not self.root.is_dir():
            return
        for path in list(self.root.iterdir()):
            if path.name.startswith(_REPLACED):
                folder = self.root / path.name.removeprefix(_REPLACED)
                if folder.exists():
                    self._delete(path)
                else:
                    path.rename(folder)
            elif path.name.startswith(_LEFTOVERS):
                path.unlink() if path.is_symlink() else shutil.rmtree(path)

    def set_aside(self, after: int) -> list[Path]:
        """Move checkpoints of later steps away: the run has gone back behind them.

        Returns:
            Where they are now.
        """
        moved = []
        for folder in self.folders():
            if step_of(folder.name) > after:
                aside = self.root / _ASIDE
                aside.mkdir(exist_ok=True)
                number = sum(1 for path in aside.iterdir() if path.name.startswith(folder.name))
                moved.append(folder.rename(aside / f"{folder.name}-{number}"))
        for name in NAMES:
            link = self.root / name
            if link.is_symlink() and not link.exists():
                link.unlink()
        return moved

    def _give_name(self, name: str, folder: Path) -> None:
        beside = self.root / f".name-{name}"
        beside.unlink(missing_ok=True)
        beside.symlink_to(folder.name)
        beside.replace(self.root / name)
        sync(self.root)

    def _retain(self, keep_last: int, newest: Path) -> None:
        """Keep the newest whole ones, those to be kept for good, and those with a name."""
        linked = {(self.root / name).resolve().name for name in NAMES}
        whole = 0
        for folder in reversed(self.folders()):
            try:
                manifest = read_manifest(folder)
            except CheckpointError:
                continue  # no checkpoint to count on, and evidence of what went wrong
            whole += 1
            spared = manifest.keep or folder == newest or folder.name in linked
            if whole > keep_last and not spared:
                self._delete(folder)

    def _delete(self, folder: Path) -> None:
        trash = folder.rename(self.root / f".trash-{folder.name.lstrip('.')}-{os.getpid()}")
        shutil.rmtree(trash)


def step_of(name: str) -> int:
    """The number of steps in the name of a checkpoint folder."""
    return int(name.rpartition("-")[2])


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder claims to be one checkpoint."""
    return (folder / MANIFEST).exists()
