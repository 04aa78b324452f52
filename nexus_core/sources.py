"""The local files that code is made of: one that the user names, and its local imports."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

__all__ = ["Source", "forget", "keep", "kept", "local", "look_in", "module_of", "of_file", "owner"]

_OWN = __name__.partition(".")[0]
_NONE: Mapping[str, Source] = MappingProxyType({})


@dataclass(frozen=True)
class Source:
    """A local file loaded for a place: the named file, or one that it imports.

    Args:
        module: its module name in Python.
        path: path of the file.
        content: its content when the place was loaded.
    """

    module: str
    path: Path
    content: bytes

    @property
    def file(self) -> str:
        """Relative path for a copy, so that it is imported by the same name: `package/net.py`."""
        name = self.module.replace(".", "/")
        return f"{name}/__init__.py" if self.path.name == "__init__.py" else f"{name}.py"

    @property
    def root(self) -> Path:
        """The folder that it is imported from."""
        return self.path.parents[self.file.count("/")]

    @property
    def sha256(self) -> str:
        """The digest of the content."""
        return hashlib.sha256(self.content).hexdigest()


class _Folder(str):
    """An entry of `sys.path` for code loaded by path."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)  # an ordinary entry in worker processes


def look_in(folder: Path) -> None:
    """Let Python find the modules of a folder, after everything installed."""
    entry = _Folder(folder.absolute())
    if entry not in _folders():
        sys.path.append(entry)


def forget() -> None:
    """Forget folders and modules loaded before, as at the start of a command."""
    sys.path[:] = [entry for entry in sys.path if not isinstance(entry, _Folder)]
    for name in list(sys.modules):
        for source in kept(name):
            sys.modules.pop(source.module, None)


def module_of(path: Path) -> tuple[str, Path]:
    """The module name of a file, and the folder that Python imports it from."""
    name, root = path.stem, path.parent
    while os.path.isfile(root / "__init__.py"):  # noqa: PTH113 (no error for an odd name)
        name, root = f"{root.name}.{name}", root.parent
    return name.removesuffix(".__init__"), root


def of_file(path: Path) -> tuple[Source, ...]:
    """A file and what it imports from the same folder; the file first."""
    name, root = module_of(path)
    found = kept(name)
    return found if found and found[0].path == path else _read(name, root)


def local(name: str) -> tuple[Source, ...]:
    """The files of a module in one of the folders; empty if it is an installed one."""
    if found := kept(name):
        return found
    for folder in map(Path, _folders()):
        found = _read(name, folder)
        if found and owner(found[0]) is None:
            return found
    return ()


def owner(source: Source) -> str | None:
    """The origin of another module with this file's name; None if the name is free."""
    top = source.module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # the main program, or a module created at run time
        return f"the '{top}' of this program"
    if spec is None:
        return None
    own = source.root.resolve() / top
    found = [*(spec.submodule_search_locations or ()), spec.origin or ""]
    is_own = any(Path(place).resolve() in (own, own.with_suffix(".py")) for place in found)
    return None if is_own else str(spec.origin)


def keep(files: tuple[Source, ...]) -> None:
    """Record on loaded modules which files each consists of."""
    known = {source.module: source for source in files}
    for source in files:
        spec = getattr(sys.modules.get(source.module), "__spec__", None)
        if spec is not None and not kept(source.module):
            spec.loader_state = _read(source.module, source.root, known)


def kept(name: str) -> tuple[Source, ...]:
    """The files recorded on a loaded module."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    state = getattr(spec, "loader_state", None)
    return state if isinstance(state, tuple) and isinstance(state[0], Source) else ()


def _read(name: str, root: Path, known: Mapping[str, Source] = _NONE) -> tuple[Source, ...]:
    """Read a module and everything it imports from the same folder, by parsing the code.

    Args:
        name: the module, which comes first in the result.
        root: the folder.
        known: sources already read.
    """
    found: dict[str, Source] = {}
    waiting = [name]
    for wanted in waiting:
        source = known.get(wanted) or _file(wanted, root)
        if source is not None and wanted not in found:
            found[wanted] = source
            waiting += _imported(source)
    return tuple(found.values())


def _file(name: str, root: Path) -> Source | None:
    """The file of a module, if it can be read."""
    place = root.joinpath(*name.split("."))
    files = (place / "__init__.py", place.with_suffix(".py"))
    for path in files if name.partition(".")[0] != _OWN else ():
        with suppress(OSError, ValueError):
            return Source(name, path, path.read_bytes())
    return None


def _imported(source: Source) -> Iterator[str]:
    """The modules that a file may import, each with its parent packages."""
    try:
        tree = ast.parse(source.content)
    except (SyntaxError, ValueError):  # importing it will report this
        return
    names = [source.module]
    package = source.module.split(".")[: source.file.count("/")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    for words in (name.split(".") for name in names):
        yield from (".".join(words[:end]) for end in range(1, len(words) + 1))


def _folders() -> list[_Folder]:
    return [entry for entry in sys.path if isinstance(entry, _Folder)]
