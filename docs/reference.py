"""Reference pages out of the code, at every build of the site (docs/conf.py).

A page carries a marker, and the marker is replaced where the page is built, so that no table can
fall behind the code:

    <!-- settings: clip -->   the settings of a plugin, its hooks and its place among the others
    <!-- plugins -->          every plugin of this distribution, by what it is for
    <!-- contents -->         the navigation
    <!-- commands: GROUP -->  the help of every command, as the command prints it
    <!-- api: MODULE -->      every public name of a module with its docstring
    <!-- examples -->         the examples, with their pictures and their code
    <!-- file: PATH -->       another file of the repository
    <!-- hooks -->            every hook, and who answers it
    <!-- stages -->           the stages of the hooks that have some, and who is there
    <!-- loop -->             the loop of `nexus_core.events`, drawn
    <!-- config -->           the engine's own settings
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from itertools import takewhile
from pathlib import Path
from textwrap import indent
from typing import Any

import click

import nexus_core
from nexus_core import Plugin, events
from nexus_core.cli.config import RunConfig
from nexus_core.cli.groups import GROUPS, group_of
from nexus_core.cli.schema import block_schema
from nexus_core.events import Hooks
from nexus_core.plan import HOOK_NAMES, AnyPlugin, installed, load

__all__ = ["MARKER", "first_party", "plugin_groups", "with_reference"]

MARKER = re.compile(
    r"^<!-- (settings|plugins|hooks|stages|loop|config|contents|commands|api|examples|file)"
    r"(?:: (\S+))? -->$",
    re.MULTILINE,
)
OWN = "nexus-trainer"
DOCS = Path(__file__).parent
PAGES = DOCS / "plugins"
Schema = Mapping[str, Any]
NAVIGATION = """
Start: tutorial examples glossary
Train: howto/own data howto/embed howto/finetune howto/schedules howto/generate
Follow and compare: loggers howto/resume howto/pairs howto/compare profiling
Several processes: distributed cells platforms
Extend: howto/one_file howto/plugin howto/loss howto/log testing
Plugins: plugins
Reference: hooks config commands checkpoints nexus architecture plugin_api
Python API: api/index api/run api/bases api/testing
Other trainers: comparison migration benchmarks
"""
"""Every page of the site but the plugins', by caption."""
PARTS = {
    "Engine": ("nexus_core.engine", "nexus_core.step", "nexus_core.snapshot"),
    "Plugins": ("nexus_core.plugin", "nexus_core.bases"),
    "Data and lengths": ("nexus_core.batches", "nexus_core.data", "nexus_core.intervals"),
    "Errors": ("nexus_core.errors",),
}
"""Where the names of `nexus_core` come from, by what they are for."""


# -- pages


def with_reference(markdown: str) -> str:
    """A page with every marker replaced by what the code says now."""
    return MARKER.sub(lambda found: _SECTIONS[found[1]](found[2]), markdown)


def first_party() -> list[str]:
    """The names of the plugins that come with this distribution."""
    return [name for name, entry in installed().items() if _is_ours(entry)]


def plugin_groups() -> dict[str, list[str]]:
    """The names of the plugins of this distribution by the headings of `plugins.md`."""
    found = _grouped().items()
    return {_heading(group): [plugin.name for plugin in members] for group, members in found}


def _plugin_section(name: str) -> str:
    plugin = load(name)
    schema = block_schema(plugin.config_class)
    facts = {"answers": ", ".join(f"[`{hook}`](../hooks.md#{hook})" for hook in _hooks_of(plugin))}
    facts["fills the slot"] = f"`{plugin.slot}`" if plugin.slot else ""
    for rule, said in _RULES.items():
        facts[said] = ", ".join(map(_linked, getattr(plugin, rule)))
    facts["keeps state in checkpoints"] = "yes" if _keeps_state(plugin) else "no"
    told = [f"- {what}: {value}" for what, value in facts.items() if value]
    tables = _settings_tables(schema, f"{name}.")
    return "\n".join([*tables, *told, "\n[interval]: ../config.md#intervals"])


def _plugins_section(_: str) -> str:
    """A table for each group, and the group's pages below it in the navigation."""
    said = []
    for group, members in _grouped().items():
        rows = [(_linked(plugin.name, "plugins/"), _purpose(plugin)) for plugin in members]
        pages = [f"{plugin.name} <plugins/{plugin.name}>" for plugin in members]
        table = _table(("plugin", "what it does"), rows)
        slots = {plugin.slot for plugin in members if plugin.slot}
        said += [f"## {_heading(group)}"]
        said += [f"A run uses at most one plugin for the slot `{slot}`." for slot in sorted(slots)]
        said += ["\n".join(table), _toctree(pages)]
    return "\n\n".join(said)


def _heading(group: str) -> str:
    return group.capitalize()


def _grouped() -> dict[str, list[type[AnyPlugin]]]:
    """The plugins by the groups of `nexus-plugins list`."""
    plugins = [plugin for _, plugin in sorted(_first_party_classes())]
    groups = {group: [p for p in plugins if group_of(p) == group] for group in GROUPS}
    return {group: members for group, members in groups.items() if members}


def _toctree(pages: Sequence[str], caption: str = "") -> str:
    head = ["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join([*head, "", *pages, "```"])


def _contents_section(_: str) -> str:
    captions: dict[str, list[str]] = {}
    for line in NAVIGATION.strip().splitlines():
        caption, pages = line.split(": ")
        captions.setdefault(caption, []).extend(pages.split())
    return "\n\n".join(_toctree(pages, caption) for caption, pages in captions.items())


def _hooks_section(_: str) -> str:
    answers = {name: _hooks_of(plugin) for name, plugin in _first_party_classes()}
    return "\n\n".join(
        _hook(name, [p for p in answers if name in answers[p]]) for name in HOOK_NAMES
    )


def _hook(name: str, answered_by: list[str]) -> str:
    spec = getattr(Hooks, name)
    kind, said = re.split(r"[:.] ", inspect.cleandoc(spec.__doc__ or ""), maxsplit=1)
    arguments = ", ".join(p for p in inspect.signature(spec).parameters if p != "self")
    answer = inspect.signature(spec).return_annotation
    plugins = ", ".join(_linked(plugin, "plugins/") for plugin in answered_by)
    return "\n\n".join([
        f"### `{name}`",
        f"`{name}(self, {arguments}) -> {answer}` · *{kind.lower()}*",
        said[:1].upper() + said[1:],
        f"Answered by: {plugins or 'no plugin of this distribution'}.",
    ])  # fmt: skip


def _stages_section(_: str) -> str:
    plugins = [plugin for _, plugin in _first_party_classes()]
    rows = []
    for hook, stages in events.STAGES.items():
        for stage in stages:
            there = [p.name for p in plugins if _stage_of(p, hook) == stage]
            first = f"[`{hook}`](#{hook})" if stage == stages[0] else ""
            rows.append((first, f"`{stage}`", ", ".join(_linked(n, "plugins/") for n in there)))
    return "\n".join(_table(("hook", "stage", "who is there"), rows))


def _config_section(_: str) -> str:
    schema = block_schema(RunConfig)
    properties = {k: v for k, v in schema["properties"].items() if k != "plugins"}
    tables = _settings_tables({**schema, "properties": properties}, "")
    return "\n".join([*tables, "[interval]: #intervals"])


def _file_section(path: str) -> str:
    """A file that is kept elsewhere in the repository; its links to pages lead there."""
    return (DOCS.parent / path).read_text().replace("](../docs/", "](")


# -- examples


def _examples_section(_: str) -> str:
    """A card with a picture for each example, and below them what each says and its code."""
    found = sorted((DOCS.parent / "examples").glob("[0-9]*.py"))
    cards = [_card(path, _title(path)) for path in found if _picture(path).exists()]
    grid = ["::::{grid} 1 2 2 3", ":gutter: 2", "", *cards, "::::"]
    return "\n\n".join(["\n".join(grid), *map(_example, found)])


def _said_by(path: Path) -> str:
    return inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text())) or "")


def _title(path: Path) -> str:
    return path.stem.replace("_", " ")


def _picture(path: Path) -> Path:
    return DOCS / f"images/examples/{path.stem}.svg"


def _card(path: Path, title: str) -> str:
    anchor = title.replace(" ", "-")
    return (
        f":::{{grid-item-card}} {title}\n:link: {anchor}\n:link-type: ref\n"
        f":img-top: images/examples/{path.stem}.svg\n\n{_said_by(path).splitlines()[0]}\n:::"
    )


def _example(path: Path) -> str:
    text, said = path.read_text(), _said_by(path)
    said = re.sub(r"(?m)^(?: {4})?((?:pip install|python|tensorboard) .*)$", r"    \1", said)
    title = _title(path)
    return "\n".join([
        f"({title.replace(' ', '-')})=", "", f"## {title}", "", said, "",
        ":::{dropdown} examples/" + path.name, "", "```python", text.strip(), "```", "", ":::",
    ])  # fmt: skip


# -- the API, and the commands


def _api_section(place: str) -> str:
    """Every public name of a module with its docstring, or one name of a module."""
    try:
        exported = nexus_core._HOME if place != "nexus_core" else {}
        names = [f"{place}.{n}" for n in import_module(place).__all__ if n not in exported]
    except ModuleNotFoundError:
        names = [place]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_part(name), []).append(_documented(name))
    said = [
        f"## {part}\n\n" * (len(groups) > 1) + "\n".join(groups[part])
        for part in sorted(groups, key=[*PARTS, "More"].index)
    ]
    return "\n\n".join(said)


def _home(name: str) -> str:
    """The module that a public name comes from."""
    package, _, last = name.rpartition(".")
    return nexus_core._HOME.get(last, package) if package == "nexus_core" else package


def _part(name: str) -> str:
    """The heading below which a public name stands."""
    home = _home(name)
    return next((part for part, homes in PARTS.items() if home.startswith(homes)), "More")


def _documented(name: str) -> str:
    module, _, last = name.rpartition(".")
    thing = getattr(import_module(module), last)
    if inspect.isclass(thing) and thing.__module__.startswith("nexus"):  # `Batch` is typing's Any
        said = f".. autoclass:: {name}\n   :members:\n   :exclude-members: model_config"
    elif inspect.isroutine(thing):
        said = f".. autofunction:: {name}"
    else:
        told = indent(_said_below(_home(name), last), "   ")
        said = f".. py:data:: {name}\n\n{told}"
    return f"```{{eval-rst}}\n{said}\n```"


def _said_below(module: str, name: str) -> str:
    """The text below the assignment of a name, or after it in its line."""
    source = inspect.getsource(import_module(module))
    below = re.search(rf'^{name}\b.*?^"""(.*?)"""', source, re.MULTILINE | re.DOTALL)
    beside = re.search(rf"^{name}\b.*  # (.+)$", source, re.MULTILINE)
    found = beside or below
    return found[1].replace("`", "``") if found else ""


def _commands_section(_: str) -> str:
    """The help of every command, as the command prints it."""
    scripts = {e.name: e for e in entry_points(group="console_scripts") if _is_ours(e)}
    extra = [e for e in entry_points(group="nexus.commands") if _is_ours(e)]
    said = list(_help("nexus-run", scripts["nexus-run"].load()))
    for entry in sorted(extra, key=lambda entry: entry.name):
        said += _help(f"nexus-run {entry.name}", entry.load())
    said += _help("nexus-plugins", scripts["nexus-plugins"].load())
    said += _help("nexus-data", import_module(scripts["nexus-data"].module)._group)
    return "\n\n".join(said)


def _is_ours(entry: EntryPoint) -> bool:
    return entry.dist is not None and entry.dist.name == OWN


def _help(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield f"## `{name}`\n\n```text\n{usage}\n```"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        as_it_is = paragraph.startswith("\b\n")  # how click marks lines that are not filled
        yield f"```text\n{paragraph[2:]}\n```" if as_it_is else paragraph
    said = filter(None, (p.get_help_record(context) for p in command.get_params(context)))
    rows = [(f"`{option}`", meaning) for option, meaning in said if meaning]
    yield "\n".join(_table(("option", "meaning"), rows))
    if isinstance(command, click.Group):
        for sub, called in sorted(command.commands.items()):
            yield from _help(f"{name} {sub}", called)


# -- tables of settings, out of a JSON schema


def _settings_tables(schema: Schema, prefix: str) -> Iterator[str]:
    """A table of the settings, and one for each kind of block among them."""
    definitions = schema.get("$defs", {})
    required = schema.get("required", ())
    properties = schema.get("properties", {})
    if not properties:
        yield "It has no settings."
    rows = [
        (
            f"`{prefix}{key}`",
            _type(field, definitions),
            "required" if key in required else f"`{_default(field)}`",
            field.get("description", ""),
        )
        for key, field in properties.items()
    ]
    yield from _table(("setting", "type", "default", "meaning"), rows) if rows else ()
    yield ""
    for name in dict.fromkeys(re.findall(r"#/\$defs/(\w+)", json.dumps(properties))):
        if "properties" in definitions[name]:
            yield f"A `{name}` is a block of its own:\n"
            yield from _settings_tables({**definitions[name], "$defs": definitions}, "")


def _default(field: Schema) -> str:
    return json.dumps(field.get("default"))


def _type(schema: Schema, definitions: Schema) -> str:
    """The type of a setting in words: "number > 0", "interval or null"."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part, definitions) for part in schema["anyOf"]))
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"`{name}`" if "properties" in definitions[name] else _type(definitions[name], {})
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return " or ".join(f"`{value}`" for value in values)
    kind: str | list[str] = schema.get("type", "any value")
    if isinstance(kind, list):
        return "[interval]" if "string" in kind else " or ".join(kind)
    if kind == "array" and (parts := schema.get("prefixItems")):
        return f"list of {len(parts)}: {', '.join(_type(part, definitions) for part in parts)}"
    if kind == "array":
        return f"list of {_type(schema.get('items', {}), definitions)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"block of {_type(schema['additionalProperties'], definitions)}"
    if kind == "string":
        return {"path": "path"}.get(schema.get("format", ""), "text")
    names = {"boolean": "true or false", "object": "block"}
    limits = [f"{sign} {schema[key]}" for key, sign in _LIMITS.items() if key in schema]
    return " ".join([names.get(kind, kind), ", ".join(limits)]).strip()


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    rule = ["---"] * len(head)
    cells = [[_cell(str(cell or "")) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *cells)]


def _cell(text: str) -> str:
    """Text that stays in its cell; what stands in backticks is safe there, but for `|`."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        p.replace("|", "\\|") if p.startswith("`") else p.translate(_IN_A_CELL) for p in parts
    )


# -- what a plugin says of itself


@cache
def _first_party_classes() -> list[tuple[str, type[AnyPlugin]]]:
    return [(name, load(name)) for name in first_party()]


def _stage_of(plugin: type[AnyPlugin], hook: str) -> str | None:
    """The stage that a plugin answers a hook at, as the hook lists it."""
    if not hasattr(plugin, hook):
        return None
    named = getattr(getattr(plugin, hook), "nexus_stage", None)
    ordinary = named is None
    return next(
        s for s in events.STAGES[hook] if (s[-1] == "*" if ordinary else s.rstrip("*") == named)
    )


def _hooks_of(plugin: type[AnyPlugin]) -> list[str]:
    return [hook for hook in HOOK_NAMES if hasattr(plugin, hook)]


def _keeps_state(plugin: type[AnyPlugin]) -> bool:
    return plugin.state_dict is not Plugin.state_dict


def _purpose(plugin: type[AnyPlugin]) -> str:
    return re.split(r"(?<=\.)\s|\n\n", inspect.cleandoc(plugin.__doc__ or ""))[0]


def _linked(name: str, folder: str = "") -> str:
    page = PAGES / f"{name}.md"
    return f"[`{name}`]({folder}{page.name})" if page.exists() else f"`{name}`"


# -- the loop as a picture

CHAR, ROW, INDENT, LEFT, TOP, WIDTH = 7.4, 27, 4, 18, 58, 820  # in pixels, but INDENT
PAD = 4


@dataclass(frozen=True)
class _Line:
    """A line of the loop: how deep it stands, what it says, and the remark behind it."""

    depth: int
    text: str
    remark: str


def _loop_lines() -> list[_Line]:
    """The pseudocode at the top of `nexus_core.events`."""
    _, _, text = (events.__doc__ or "").partition("where they fire:\n\n")
    found = []
    for line in takewhile(str.strip, text.splitlines()):
        said, *remark = re.split(r"\s{3,}", line.strip().replace("`", ""), maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // INDENT - 1
        found.append(_Line(depth, said, "".join(remark)))
    return found


def _loop_section(_: str) -> str:
    lines = _loop_lines()
    body = [_frame(lines, place) for place, line in enumerate(lines) if line.text.endswith(":")]
    body += [_drawn_line(line, TOP + place * ROW) for place, line in enumerate(lines)]
    legend = _pill("EVENT", "event", LEFT, 20) + _pill("SEAM", "seam", LEFT + 70, 20)
    size = f'viewBox="0 0 {WIDTH} {TOP + len(lines) * ROW + 8}"'
    head = f'<svg class="loop" {size} role="img" aria-label="The loop with its hooks">'
    return f"<figure>{head}{legend}{''.join(body)}</svg></figure>"


def _frame(lines: list[_Line], place: int) -> str:
    """A box around the lines of a `for`, with an arrow back from its end to its start."""
    depth = lines[place].depth
    length = sum(1 for _ in takewhile(lambda line: line.depth > depth, lines[place + 1 :]))
    x, y = LEFT + depth * INDENT * CHAR - 8, TOP + place * ROW - 17
    width, height = WIDTH - 2 * x - 20, (length + 1) * ROW - 2
    right, end = x + width, y + height
    arrow = f"M{right} {end - 12} h10 V{y + 12} h-8 m5 -4 l-5 4 l5 4"  # out, up, back, and its head
    box = f'<rect class="frame" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{height}" rx="8"/>'
    return f'{box}<path class="back" d="{arrow}"/>'


def _drawn_line(line: _Line, y: int) -> str:
    x, drawn = LEFT + line.depth * INDENT * CHAR, ""
    for word in re.findall(r"[A-Z_]{2,}|(?:(?![A-Z_]{2}).)+", line.text):
        name = word.lower()
        if name in HOOK_NAMES:
            kind = "event" if (getattr(Hooks, name).__doc__ or "").startswith("Event") else "seam"
            drawn += f'<a href="#{name.replace("_", "-")}">{_pill(word, kind, x, y)}</a>'
            x += 2 * PAD
        else:
            drawn += _words(word, x, y)
        x += len(word) * CHAR
    return drawn + f'<text class="remark" x="{WIDTH - 350}" y="{y}">{escape(line.remark)}</text>'


def _pill(name: str, kind: str, x: float, y: int) -> str:
    size = f'width="{len(name) * CHAR + 2 * PAD:.1f}" height="19" rx="6"'
    box = f'<rect class="{kind}" x="{x:.1f}" y="{y - 14}" {size}/>'
    return box + _words(name, x + PAD, y, kind)


def _words(text: str, x: float, y: int, kind: str = "") -> str:
    length = f'textLength="{len(text) * CHAR:.1f}" lengthAdjust="spacingAndGlyphs"'
    words = escape(text).replace(" ", "\N{NO-BREAK SPACE}")
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" {length}>{words}</text>'


_IN_A_CELL = str.maketrans({"|": "\\|", "<": "&lt;"})
_RULES = {
    "before": "comes before",
    "after": "comes after",
    "requires": "requires",
    "conflicts": "cannot be with",
}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_SECTIONS: dict[str, Callable[[str], str]] = {
    "settings": _plugin_section,
    "plugins": _plugins_section,
    "hooks": _hooks_section,
    "stages": _stages_section,
    "loop": _loop_section,
    "config": _config_section,
    "contents": _contents_section,
    "commands": _commands_section,
    "api": _api_section,
    "examples": _examples_section,
    "file": _file_section,
}
