"""From settings to files: the sources of a run, and their evaluation data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nexus_core.errors import DataError
from nexus_plugins._shared.paths import expanded, of_setting
from nexus_plugins.data_text.apart import Split, copies, in_words, repeated, split_by_name
from nexus_plugins.data_text.config import DataTextConfig, SourceConfig, SourceList
from nexus_plugins.data_text.folders import HELD_OUT, TRAIN, find, root_of
from nexus_plugins.data_text.formats import is_text

__all__ = ["Source", "Sources", "find_sources", "has_held_out"]

_EMBEDDED = "stdlib"


@dataclass(frozen=True)
class Source:
    """A source with its resolved files; the embedded text has none.

    Args:
        name: name of the source.
        weight: its share of rows.
        files: files to train on.
        held_out: the held-out file of prepared data.
        apart: files whose names mark them as held out.
        named: the files that were given explicitly.
        as_text: read all files as text.
    """

    name: str
    weight: float
    files: tuple[Path, ...]
    held_out: Mapping[Path, Path] = field(default_factory=dict)
    apart: tuple[Path, ...] = ()
    named: frozenset[Path] = frozenset()
    as_text: bool = False

    @property
    def texts(self) -> list[Path]:
        """The files that hold text."""
        return [path for path in self.files if is_text(path, self.as_text)]

    @property
    def ids(self) -> list[Path]:
        """The files that hold ids."""
        return [path for path in self.files if not is_text(path, self.as_text)]

    def for_evaluation(self) -> Source:
        """The held-out part of prepared data and of folders with a training part."""
        files = tuple(self.held_out.get(path, path) for path in self.files)
        by_name = any("train" in path.name.lower() for path in self.files) and self.apart
        return replace(self, files=self.apart if by_name else (*files, *self.apart), apart=())


@dataclass(frozen=True)
class Sources:
    """The training and evaluation data, and notes for the user about the choice."""

    train: list[Source]
    valid: list[Source]
    remarks: tuple[str, ...]


def find_sources(config: DataTextConfig) -> Sources:
    """Find the files of the settings, and keep evaluation data out of training.

    Raises:
        DataError: no file is found, or one cannot be read.
    """
    finder, other = _Finder(), _Finder()
    train = of_setting("data_text.train", finder.find, config.train)
    found = [] if config.valid is None else of_setting("data_text.valid", other.find, config.valid)
    valid = [one.for_evaluation() for one in found]
    if config.valid is None:
        finder.say_apart(train, evaluated=config.valid_share > 0)
    else:
        finder.say_apart(train, evaluated=False)
        train = finder.without_evaluated(train, valid)
    finder.say_twice(train)
    return Sources(train, valid, tuple(dict.fromkeys(finder.remarks + other.remarks)))


def has_held_out(wish: SourceList) -> bool:
    """Whether the files of a setting include a held-out part."""
    return any(one.held_out or one.apart for one in _Finder().find(wish))


class _Finder:
    """Finds sources, and collects notes for the user."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def find(self, wish: SourceList) -> list[Source]:
        """The sources of a setting; a path or a list of paths is one source."""
        if isinstance(wish, str):
            return [self._source(SourceConfig(path=wish))]
        paths = [one for one in wish if isinstance(one, str)]
        if paths:
            return [self._files("text", 1.0, paths, False)]
        sources = [self._source(one) for one in wish if isinstance(one, SourceConfig)]
        if not sources:
            raise DataError("the list of sources is empty; name at least one file, folder or glob")
        names = [source.name for source in sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"two sources are called '{twice}'; give them different names (name:)")
        return sources

    def _source(self, wish: SourceConfig) -> Source:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(wish.path).name.partition(".")[0])
        name = wish.name or stem or "text"
        if wish.path == _EMBEDDED:
            return Source(name, wish.weight, ())
        return self._files(name, wish.weight, [wish.path], wish.as_ == "text")

    def _files(self, name: str, weight: float, paths: Sequence[str], as_text: bool) -> Source:
        """The files to train on, and those held out for evaluation.

        A file given explicitly is never held out; one found in a folder or glob may be.
        """
        files: list[Path] = []
        apart: list[Path] = []
        held_out: dict[Path, Path] = {}
        named: set[Path] = set()
        for one in paths:
            found = find(one, as_text)
            self.remarks += [f"{one}: {note}" for note in found.left_out]
            here = list(found.files)
            if found.named:
                named.update(here)
            elif as_text:
                self._say_taken(here, one)
            else:
                pairs = {path: path.with_name(HELD_OUT) for path in here if path.name == TRAIN}
                pairs = {path: part for path, part in pairs.items() if part in here}
                held_out |= pairs
                prepared = {*pairs, *pairs.values()}
                by_name = self._by_name([path for path in here if path not in prepared], one)
                apart += by_name.valid
                here = [path for path in here if path in pairs or path in by_name.train]
            files += here
        apart = [path for path in dict.fromkeys(apart) if path not in named]
        return Source(name, weight, tuple(files), held_out, tuple(apart), frozenset(named), as_text)

    def _say_taken(self, files: Sequence[Path], wish: str) -> None:
        """Note files used although named as held out, since `validation.py` may be code."""
        if taken := split_by_name(files, root_of(expanded(wish))).valid:
            self.remarks.append(
                f"{in_words(taken)} named as held-out text, but trained on, because all files of "
                f"{wish} are read as text"
            )

    def _by_name(self, files: Sequence[Path], wish: str) -> Split:
        split = split_by_name(files, root_of(expanded(wish)))
        if split.test:
            self.remarks.append(
                f"{in_words(split.test)} named as test data: not trained on; name a file "
                "explicitly to use it"
            )
        return split

    def say_apart(self, sources: Sequence[Source], evaluated: bool) -> None:
        """Note what is excluded from training because of its name."""
        files = [path for one in sources for path in one.apart]
        if files:
            what = "evaluated on, instead of a share, and " if evaluated else ""
            self.remarks.append(
                f"{in_words(files)} named as held-out text: {what}not trained on; name a file "
                "explicitly to train on it"
            )

    def without_evaluated(self, train: list[Source], valid: list[Source]) -> list[Source]:
        """Exclude evaluation data from training, except for files given explicitly."""
        evaluated = [path for one in valid for path in one.files]
        kept, brought, meant = [], [], []
        for source in train:
            both = copies(source.files, evaluated)
            here = {path for path in both if path not in source.named}
            rest = tuple(path for path in source.files if path not in here)
            if source.files and not rest:
                here, rest = set(), source.files
            brought += sorted(here)
            meant += [path for path in both if path not in here]
            kept.append(replace(source, files=rest))
        if brought:
            self.remarks.append(f"{in_words(brought)} evaluated on, so excluded from training")
        if meant:
            self.remarks.append(
                f"{in_words(meant)} both trained on and evaluated on: val/loss says nothing "
                "about unseen text; set data_text.valid to other files"
            )
        if any(not one.files for one in train) and any(not one.files for one in valid):
            self.remarks.append(
                f"all of '{_EMBEDDED}' is both trained on and evaluated on; leave data_text.valid "
                "unset to hold out a share of it"
            )
        return kept

    def say_twice(self, train: Sequence[Source]) -> None:
        """Note what is trained on twice, within one list or across lists."""
        twice = repeated([path for one in train for path in one.files])
        if twice:
            self.remarks.append(
                f"{in_words(twice)} named twice, or identical to others: trained on as "
                "often as they occur"
            )
