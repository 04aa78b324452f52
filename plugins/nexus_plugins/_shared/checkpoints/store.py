"""The folder of a run's checkpoints: names, retention, and cleanup after a crash."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import count
from pathlib import Path

from nexus_core.errors import CheckpointError, hint_out
from nexus_plugins._shared.checkpoints.folder import MANIFEST, Content, read_manifest, sync, write
from nexus_plugins._shared.files import read_small

__all__ = [
    "NAMES",
    "Store",
    "checkpoint_at",
    "is_checkpoint",
    "newest_first",
    "step_of",
    "stores_at",
]

NAMES = ("best", "final")
_STEP = re.compile(r"step-(\d{8,20})")
_LEFTOVERS = (".tmp-", ".trash-", ".name-")
_REPLACED = ".replaced-"
_ASIDE = "set-aside"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EACCES)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Store:
    """The checkpoints of one run.

    Cleaning up never raises: what cannot be deleted or renamed stays, and is reported once in
    `notices`.

    Args:
        root: their folder, which is created with the first one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._notices: list[str] = []
        self._left: set[str] = set()

    def notices(self) -> list[str]:
        """What could not be cleaned up since the last call, in words."""
        said, self._notices = self._notices, []
        return said

    def folders(self) -> list[Path]:
        """All checkpoint folders, oldest first, complete or not; files and links are ignored."""
        if not self.root.is_dir():
            return []
        found = {path.name: path for path in self.root.iterdir()}
        for name in [name for name in found if name.startswith(_REPLACED)]:
            found.setdefault(name.removeprefix(_REPLACED), found[name])  # a crash while replacing
        names = sorted(filter(_STEP.fullmatch, found), key=step_of)
        return [found[n] for n in names if found[n].is_dir() and not found[n].is_symlink()]

    def named(self, name: str) -> Path:
        """The folder that `best` or `final` links to.

        Raises:
            CheckpointError: no checkpoint has this name, or it points to another folder.
        """
        target = self._target(name)
        if target is None:
            raise CheckpointError(f"no checkpoint '{name}' in {self.root}")
        if not (_STEP.fullmatch(target) or target == name):
            raise CheckpointError(
                f"{self.root / name} points to '{target[:80]}', not a checkpoint in this folder"
            )
        return self.root / target

    def save(
        self,
        content: Content,
        names: Iterable[str],
        keep_last: int,
        write_parts: Callable[[Path], Mapping[str, tuple[int, str]]] = lambda folder: {},
    ) -> Path:
        """Write a checkpoint, update the links, then apply retention.

        Raises:
            OSError: the disk is full, broken or read-only; existing checkpoints are unchanged.
        """
        folder = self.root / f"step-{content.step:08d}"
        replaced = folder.with_name(_REPLACED + folder.name)

        def make_room() -> None:
            if os.path.lexists(folder):
                if os.path.lexists(replaced):
                    replaced.rename(self._free(f".trash-{folder.name}"))
                folder.rename(replaced)

        write(folder, content, make_room, write_parts)
        for name in names:
            self._give_name(name, folder)
        if os.path.lexists(replaced):
            self._delete(replaced)
        self._retain(keep_last, newest=folder)
        return folder

    def recover(self) -> None:
        """Clean up after a crash: restore half-replaced folders, delete half-written ones."""
        if not self.root.is_dir():
            return
        for path in list(self.root.iterdir()):
            if path.name.startswith(_REPLACED):
                folder = self.root / path.name.removeprefix(_REPLACED)
                if os.path.lexists(folder):
                    self._delete(path)
                else:
                    self._tidy(path, "put back", partial(path.rename, folder))
            elif path.name.startswith(_LEFTOVERS):
                self._tidy(path, "deleted", partial(_remove, path))

    def set_aside(self, after: int) -> list[Path]:
        """Move checkpoints of later steps away, newest first: they belong to an abandoned history.

        Returns:
            Their new paths.

        Raises:
            CheckpointError: one cannot be moved, and would be mistaken for one of this run's
                history.
        """
        moved = []
        aside = self.root / _ASIDE
        for folder in reversed(self.folders()):
            if step_of(folder.name) <= after:
                continue
            try:
                aside.mkdir(exist_ok=True)
                if aside.is_symlink():
                    raise NotADirectoryError(errno.ENOTDIR, f"{aside} is a link")
                moved.append(folder.rename(_unused(aside, folder.name)))
            except OSError as error:
                raise CheckpointError(
                    f"{folder} is from a different course of this run, and "
                    f"cannot be moved to {aside}: {error.strerror}; move it away, or choose "
                    "another folder: ",
                    hint_out(),
                ) from error
        for name in NAMES:
            target = self._target(name)
            if target not in (None, name) and not (self.root / str(target)).exists():
                self._tidy(self.root / name, "deleted", (self.root / name).unlink)
        return moved

    def _target(self, name: str) -> str | None:
        """The target of a name: of a link, or the text of a file if there are no links.

        A folder of that name is its own target, as in a copy of a run that followed links.
        """
        path = self.root / name
        if path.is_symlink():
            return str(path.readlink())
        if is_checkpoint(path):
            return name
        try:
            return read_small(path, 256).decode(errors="replace").strip()
        except (OSError, CheckpointError):
            return None

    def _give_name(self, name: str, folder: Path) -> None:
        beside = self.root / f".name-{name}"

        def give() -> None:
            _remove(beside)
            try:
                beside.symlink_to(folder.name)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                beside.write_text(f"{folder.name}\n", encoding="utf-8")
            beside.replace(self.root / name)
            sync(self.root)

        self._tidy(self.root / name, f"made the name of {folder.name}", give, but=_DISK)

    def _retain(self, keep_last: int, newest: Path) -> None:
        """Keep the newest complete ones, those to keep forever, and named ones (`best`)."""
        linked = {self._target(name) for name in NAMES}
        whole = 0
        for folder in reversed(self.folders()):
            try:
                manifest = read_manifest(folder)
            except CheckpointError:
                continue  # not usable, but shows what went wrong
            whole += 1
            spared = manifest.keep or folder == newest or folder.name in linked
            if whole > keep_last and not spared:
                self._delete(folder)

    def _delete(self, folder: Path) -> None:
        name = folder.name.lstrip(".").removeprefix("replaced-")

        def delete() -> None:
            _remove(folder.rename(self._free(f".trash-{name}")))

        self._tidy(folder, "deleted", delete)

    def _free(self, name: str) -> Path:
        return _unused(self.root, f"{name}-{os.getpid()}")

    def _tidy(
        self, path: Path, done: str, work: Callable[[], object], but: tuple[int, ...] = ()
    ) -> None:
        """Do what may fail safely, except for the reasons `but`; report a failure once per path."""
        try:
            work()
        except OSError as error:
            if error.errno in but:
                raise
            if path.name not in self._left:
                self._left.add(path.name)
                self._notices.append(
                    f"{path} cannot be {done}: {error.strerror or error}; it stays, and the run "
                    "continues"
                )


def stores_at(path: Path) -> list[Store]:
    """The stores of a run, by the labels of its instances, or the one at the path itself."""
    labelled = sorted(path.glob("checkpoints@*"), reverse=True)
    return [Store(root) for root in (path, *labelled, path / "checkpoints")]


def newest_first(stores: Iterable[Store]) -> list[Path]:
    """The checkpoint folders of several stores; for equal steps, the last store's comes first."""
    found = [folder for store in stores for folder in store.folders()]
    return sorted(found, key=lambda folder: step_of(folder.name))[::-1]


def step_of(name: str) -> int:
    """The number of steps in the name of a checkpoint folder."""
    return int(name.rpartition("-")[2])


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is named or laid out as a checkpoint."""
    return (folder / MANIFEST).exists()


def checkpoint_at(path: Path) -> Path | None:
    """The checkpoint at a path, directly or through a link or name; None if nothing is there.

    Raises:
        CheckpointError: it is a name that points to another folder.
    """
    if is_checkpoint(path):
        return path.resolve()
    if path.name in NAMES and path.is_file():
        return Store(path.parent).named(path.name)
    return None


def _unused(folder: Path, name: str) -> Path:
    """An unused name in a folder, with a number at its end."""
    return next(p for n in count() if not os.path.lexists(p := folder / f"{name}-{n}"))


def _remove(path: Path) -> None:
    """Delete a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
