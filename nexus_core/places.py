"""Load code by path or module: `./net.py:build`, `package.module:Name`, `package.module.Name`.

A file is loaded as the module that Python would import from its folder (`net`, or `package.net` if
the folder is a package), after everything installed: its neighbours can be imported, a second name
in it refers to the same module, and worker processes find its classes by name. A process has one
module per name, so a file whose name is taken is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator

from nexus_core.errors import ConfigError, suggestion
from nexus_core.paths import expanded
from nexus_core.sources import Source, keep, kept, local, look_in, module_of, of_file, owner

if TYPE_CHECKING:
    from nexus_core.plugin import Plugin

__all__ = [
    "FOLDER",
    "PlaceField",
    "absolute",
    "in_run_folder",
    "in_settings",
    "load",
    "only_named",
    "shown",
    "sources",
    "split",
    "used",
    "with_colon",
]

FOLDER = "plugins"
"""Folder within a run folder for copies of the run's local files."""

_SETTING = re.compile(r"(\S.*\.py|[^\W\d][\w.]*):[^\W\d][\w.]*(@\w+)?")

# Code comes only from the user's own command and config. A command that reads a config which the
# user did not name wraps everything it does in `only_named`.
_named: tuple[Collection[str], str] | None = None


@contextmanager
def only_named(places: Collection[str], fix: str) -> Iterator[None]:
    """Refuse to load code from other places inside this context.

    Args:
        places: those that the user's own command names, as returned by `absolute`; a file or module
            includes everything in it.
        fix: what the error suggests if another one is requested.
    """
    global _named  # per process: code loaded by threads counts too
    before, _named = _named, (places, fix)
    try:
        yield
    finally:
        _named = before


def load(place: str, base: Path | None = None) -> object:
    """Import the object at a place.

    Args:
        place: `file.py:name`, `package.module:name` or `package.module.name`; without a name it is
            the module itself.
        base: the folder that relative files are in; None: the current one.

    Raises:
        ConfigError: there is no such file, module or name, Python has another module of the file's
            name, importing it fails, or the user's command does not name it.
    """
    place = absolute(place, base)
    where, name = split(place)
    if _named is not None and not {place, where} & set(_named[0]):
        raise ConfigError(f"'{shown(place)}' is not loaded: {_named[1]}")
    if where.endswith(".py"):
        thing: object = _import_file(Path(where))
    elif not where.replace(".", "_").isidentifier():
        ways = "file.py:name or package.module:name"
        raise ConfigError(f"'{shown(place)}' cannot be loaded; expected {ways}")
    else:
        where, name = (where, name) if name else _module_and_name(where)
        thing = _import(where, local(where))
    for part in name.split(".") if name else ():
        if not hasattr(thing, part):
            known = [key for key in dir(thing) if not key.startswith("_")]
            raise ConfigError(f"'{shown(where)}' has no '{name}'.{suggestion(part, known)}")
        thing = getattr(thing, part)
    return thing


def sources(place: str) -> tuple[Source, ...]:
    """The local files of a place, the named one first; none if it is installed.

    If the place has been loaded, the files are as they were then.

    Args:
        place: as returned by `absolute`.
    """
    where, _ = split(place)
    if where.endswith(".py"):
        return of_file(Path(where))
    words = where.split(".")
    modules = (".".join(words[:end]) for end in range(len(words), 0, -1))
    return next((found for found in map(local, modules) if found), ())


def used(plugin: Plugin[Any]) -> tuple[Source, ...]:
    """The local files of a plugin: its class, and what its settings name."""
    found = list(kept(type(plugin).__module__))
    for value in _leaves(plugin.config.model_dump(mode="json")):
        found += sources(value) if in_settings(value) else ()
    return tuple({source.file: source for source in reversed(found)}.values())[::-1]


def in_run_folder(value: Any) -> Any:
    """Settings with local files replaced by their copies in the run folder.

    `/home/me/net.py:build` becomes `./plugins/net.py:build`; everything else stays.
    """
    if isinstance(value, dict):
        return {in_run_folder(key): in_run_folder(item) for key, item in value.items()}
    if isinstance(value, list):
        return [in_run_folder(item) for item in value]
    if in_settings(value) and (files := sources(absolute(value))):
        return f"./{FOLDER}/{files[0].file}:{split(value)[1]}"
    return value


def absolute(place: str, base: Path | None = None) -> str:
    """The place with an absolute path; a module stays as it is.

    Args:
        place: as written.
        base: the folder that relative files are in; None: the current one.
    """
    where, name = split(place)
    if not where.endswith(".py"):
        return place
    path = os.path.abspath((base or Path()) / expanded(where))  # noqa: PTH100 (".." goes too)
    return f"{path}:{name}" if name else path


def split(place: str) -> tuple[str, str]:
    """The file or module of a place, and the name in it, or ""."""
    where, colon, name = place.rpartition(":")
    return (where, name) if colon else (place, "")


def in_settings(value: object) -> bool:
    """Whether the value of a setting can be a place: `./net.py:build`, `package.module:build`."""
    return isinstance(value, str) and _SETTING.fullmatch(value) is not None


def with_colon(place: str) -> str:
    """`net.Net` of a local module as `net:Net`, so that a run keeps a copy; others stay."""
    words = place.split(".") if place.replace(".", "_").isidentifier() else []
    ends = [end for end in range(1, len(words)) if local(".".join(words[:end]))]
    return f"{'.'.join(words[: ends[-1]])}:{'.'.join(words[ends[-1] :])}" if ends else place


PlaceField: TypeAlias = Annotated[str, AfterValidator(with_colon)]
"""The type of a config field for a place."""


def shown(place: str) -> str:
    """A place as written from the current folder."""
    where, name = split(place)
    path = Path(where)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        where = f"./{path.relative_to(Path.cwd())}"
    return f"{where}:{name}" if name else where


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _import_file(path: Path) -> ModuleType:
    what = f"'{shown(str(path))}'"
    if not os.path.isfile(path):  # noqa: PTH113 (no error for an odd name)
        beside = suggestion(path.name, [file.name for file in path.parent.glob("*.py")])
        raise ConfigError(f"no file {what}.{beside}")
    name, root = module_of(path)
    if not name.replace(".", "_").isidentifier():
        fix = "rename it: letters, digits and underscores"
        raise ConfigError(f"{what} is not a name that Python can import; {fix}")
    look_in(root)
    return _import(name, of_file(path))


def _import(name: str, files: tuple[Source, ...]) -> ModuleType:
    """Import a module, and record on it which local files it consists of."""
    importlib.invalidate_caches()
    for source in files:
        if taken := owner(source):
            raise ConfigError(
                f"'{shown(str(source.path))}' cannot be imported: its name is taken by another "
                f"module, {taken}; rename the file"
            )
    # Write no bytecode: Python only notices edits by seconds and size.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        what = shown(str(files[0].path)) if files else name
        reason = f"{type(error).__name__}: {getattr(error, 'msg', error)}{_line(error, files)}"
        raise ConfigError(f"'{what}' cannot be imported: {reason}") from error
    finally:
        sys.dont_write_bytecode = before
    keep(files)
    return module


def _module_and_name(dotted: str) -> tuple[str, str]:
    """Split `torch.optim.AdamW` into module and name."""
    words = dotted.split(".")
    for end in range(1, len(words)):
        parent, child = ".".join(words[:end]), ".".join(words[: end + 1])
        module = _import(parent, local(parent))
        if not hasattr(module, "__path__") or importlib.util.find_spec(child) is None:
            return parent, ".".join(words[end:])
    return dotted, ""


def _line(error: BaseException, files: tuple[Source, ...]) -> str:
    """Where an error comes from: the innermost line of user code, else of any code."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)[1:]]
    frames = [frame for frame in frames if "importlib" not in frame[0]]  # Python's import machinery
    own = [frame for frame in frames if Path(frame[0]) in {source.path for source in files}]
    if isinstance(error, SyntaxError) and error.filename:
        own = [(error.filename, error.lineno)]
    return "".join(f" ({shown(place)}, line {line})" for place, line in (own or frames)[-1:])
