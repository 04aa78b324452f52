"""Parse YAML settings: YAML 1.2 scalars, no duplicate keys, bounded in size.

PyYAML reads YAML 1.1, where `010` is 8, `yes` is true and `1:30` is 90. Here plain scalars follow
the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/, 10.3.2). How each number, boolean and
list was written is kept for settings that want text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

__all__ = ["Document", "Path", "YamlError", "dump", "parse", "parse_value"]

Path: TypeAlias = tuple[str | int, ...]
"""Path of a value: mapping keys and list indices, outermost first."""

MOST_CHARACTERS = 2**20
MOST_VALUES = 40_000  # with every alias expanded; PyYAML needs a kilobyte for each
DEEPEST = 50
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_PLAIN = {
    "null": re.compile(r"|~|null|Null|NULL"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}


class YamlError(ValueError):
    """The text is not YAML, or uses YAML that configs do not allow."""


@dataclass(frozen=True)
class Document:
    """A parsed text.

    Args:
        value: dicts with text keys, lists, text, numbers, booleans and None.
        written: the original text of each value that is not text, by its path.
    """

    value: Any
    written: dict[Path, str] = field(default_factory=dict)


def parse(text: str) -> Document:
    """Parse one document; None if the text is empty.

    Raises:
        YamlError: it is not YAML, repeats a key, or is too large or too deep.
    """
    if len(text) > MOST_CHARACTERS:
        raise YamlError(f"{len(text):,} characters; at most {MOST_CHARACTERS:,} are allowed")
    try:
        root = yaml.compose(text, Loader=_Loader)
        builder = _Builder()
        return Document(builder.value(root, ()) if root else None, builder.written)
    except yaml.MarkedYAMLError as error:
        said = " ".join(filter(None, [error.context, error.problem]))
        place = error.problem_mark or error.context_mark
        raise YamlError(f"line {place.line + 1}: {said}" if place else said) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    except RecursionError:
        raise YamlError(f"nested deeper than {DEEPEST} levels") from None


def parse_value(text: str) -> Document:
    """Parse what follows `KEY=`: a number, `true`, `null`, `[a, b]`, `{a: 1}`, else text.

    It has no comments, and what starts like a list but is not one is text.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        try:
            root = yaml.compose(text, Loader=_Loader)
            if root is None or root.end_mark.pointer != len(text):
                return Document(text)
            builder = _Builder()
            return Document(builder.value(root, ()), builder.written)
        except (yaml.YAMLError, YamlError, RecursionError):
            return Document(text)
    value = _plain(_kind(text), text)
    return Document(value) if isinstance(value, str) else Document(value, {(): text})


def dump(settings: object) -> str:
    """Write settings so that both `parse` and a YAML 1.1 reader get them back."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's parser, with the plain scalars of YAML 1.2 and a size limit."""

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node of the tree.

        Raises:
            YamlError: there are too many.
        """
        self.composed += 1
        if self.composed > MOST_VALUES:
            raise YamlError(f"more than {MOST_VALUES:,} values")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that a YAML 1.1 or 1.2 reader would not read as text."""

    def ignore_aliases(self, data: object) -> bool:
        """Write repeated values out instead of using aliases."""
        return True


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {
    start: list(found) for start, found in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _name, _pattern in _PLAIN.items():
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _starts = list("-+.0123456789~nNtTfF") + ([""] if _name == "null" else [])
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", _whole, _starts)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])


class _Builder:
    """Turns nodes into values, recording how those that are not text were written."""

    def __init__(self) -> None:
        self.written: dict[Path, str] = {}
        self._values = 0
        self._read: dict[int, Any] = {}  # by node: an alias costs no extra time or memory
        self._keys: dict[int, str] = {}

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._count()
        if len(path) > DEEPEST:
            raise YamlError(f"{_line(node)}: nested deeper than {DEEPEST} levels")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        assert isinstance(node, yaml.CollectionNode)
        kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag != _TAG + kind:
            raise YamlError(f"{_line(node)}: the tag '{node.tag}' is not allowed in settings")
        if node.flow_style and node.start_mark.buffer is not None:
            if id(node) not in self._read:
                written = node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
                self._read[id(node)] = written
            self.written[path] = self._read[id(node)]
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, place)) for place, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return {key: self.value(item, (*path, key)) for key, item in self._items(node, len(path))}

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        if id(node) not in self._read:
            self._read[id(node)] = _scalar(node)
        value = self._read[id(node)]
        if not isinstance(value, str):
            self.written[path] = node.value
        return value

    def _items(self, node: yaml.MappingNode, depth: int) -> Iterator[tuple[str, yaml.Node]]:
        """The entries; those from a merge key `<<` first, unless overridden."""
        own: dict[str, yaml.Node] = {}
        merged: list[yaml.Node] = []
        lines: dict[str, int] = {}
        for key_node, item in node.value:
            self._count()
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(f"{_line(key_node)}: keys must be text")
            if id(key_node) not in self._keys:
                self._keys[id(key_node)] = _joined(key_node.value)
            key, line = self._keys[id(key_node)], key_node.start_mark.line + 1
            if (first := lines.setdefault(key, line)) != line or key in own:
                where = f"lines {first} and {line}" if first != line else f"line {line}"
                raise YamlError(f"duplicate key '{key}', in {where}; keep one")
            if key_node.tag == _MERGE:
                merged += item.value if isinstance(item, yaml.SequenceNode) else [item]
            else:
                own[key] = item
        for source in merged:
            if not isinstance(source, yaml.MappingNode) or depth > DEEPEST:
                raise YamlError(f"{_line(source)}: '<<' takes a mapping, or a list of them")
            for key, item in self._items(source, depth + 1):
                if key not in own:
                    own[key] = item
        yield from own.items()

    def _count(self) -> None:
        self._values += 1
        if self._values > MOST_VALUES:
            raise YamlError(f"more than {MOST_VALUES:,} values, with every alias expanded")


def _scalar(node: yaml.ScalarNode) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if kind not in (*_PLAIN, "str") or (kind in _PLAIN and not _fits(kind, node.value)):
        raise YamlError(f"{_line(node)}: {node.value!r:.60} cannot be read as '{node.tag}'")
    return _plain(kind, node.value)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _kind(text: str) -> str:
    return next((kind for kind in _PLAIN if _fits(kind, text)), "str")


def _fits(kind: str, text: str) -> bool:
    return _PLAIN[kind].fullmatch(text) is not None


def _plain(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(re.sub(r"\.(?=[infINFnaNA])", "", text))
    if kind == "int" and len(text) <= 100:  # longer numbers stay text
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text.removeprefix("0o").removeprefix("0x"), base)
    return _joined(text)


def _joined(text: str) -> str:
    """Join surrogate pairs: JSON writes a character beyond 16 bits as two escapes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
