"""The JSON schema of config files, for editors: it accepts every config that a run accepts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nexus_core.cli.config import RunConfig
from nexus_core.cli.listing import listed_plugins
from nexus_core.cli.schema import Schema, block_schema, changed
from nexus_core.cli.settings import presets
from nexus_core.intervals import AMOUNT, UNITS
from nexus_core.plan import load, scan

__all__ = ["json_schema"]

_NUMBER = r"^\s*[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?\s*$|^\s*[-+]?[iI][nN][fF]"
_TRUTH = r"^([tT][rR][uU][eE]|[fF][aA][lL][sS][eE]|[tTfFyYnN01]|[yY][eE][sS]|[nN][oO]|[oO][nN]|[oO][fF][fF])$"  # noqa: E501
_AS_READ: Mapping[str, Schema] = {
    "integer": {"type": ["integer", "string"], "pattern": _NUMBER},
    "number": {"type": ["number", "string"], "pattern": _NUMBER},
    "boolean": {"type": ["boolean", "integer", "string"], "pattern": _TRUTH},
    "string": {"type": ["string", "number", "boolean", "null", "array", "object"]},
}
"""Other types that are also read as a value of this type: a quoted number, `007` as text."""
_LABEL = "@[A-Za-z0-9_]+"
_BLOCK = {"type": ["object", "boolean", "null"]}


def json_schema() -> Schema:
    """The JSON schema of a config file, covering every installed plugin.

    The block of a plugin whose vendor package is missing may contain anything.
    """
    schema = block_schema(RunConfig, "")
    definitions, blocks = schema.setdefault("$defs", {}), dict[str, Schema]()
    scanned = scan()
    for row in sorted(listed_plugins(), key=lambda row: row.name):
        if row.status == "missing":
            blocks[row.name] = {**_BLOCK, "description": f"not installed: {row.what}"}
        elif row.status == "ready":
            block = block_schema(load(row.name, scanned).config_class, f"{row.name}.")
            definitions |= block.pop("$defs", {})
            block.pop("required", None)  # a preset or --set may provide them
            blocks[row.name] = {**block, **_BLOCK}
    properties = schema["properties"]
    properties["plugins"] = {
        "type": ["object", "null"],
        "description": properties["plugins"]["description"],
        "properties": blocks,
        "patternProperties": {
            "[./:]": _BLOCK,  # `./mine.py: {...}`
            **{f"^{n}{_LABEL}$": {"$ref": f"#/properties/plugins/properties/{n}"} for n in blocks},
        },
        "additionalProperties": False,
    }
    properties["until"]["pattern"] = _interval(share=False)
    properties["preset"] = {
        "enum": sorted(presets()),
        "description": "preset that this file changes; left out: none",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **changed(schema, _as_read)}


def _interval(*, share: bool = True) -> str:
    """The pattern of an interval, case-insensitive."""
    units = [f"{unit}s?" if len(unit) > 1 else unit for unit in UNITS if unit.isalpha()]
    units = [unit for unit in units if share or unit != "percents?"]
    either = re.sub(r"[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", "|".join(units))
    sign = "|%" if share else ""
    return rf"^\s*{AMOUNT}\s*([kKMB]?\s*({either})?{sign})\s*$"


def _as_read(node: Schema) -> Schema:
    """The schema, also accepting what is read as its type; choices of texts are unchanged."""
    if any("$ref" in str(choice.get("items")) for choice in node.get("anyOf", ())):
        return {**node, "anyOf": [_without_values(choice) for choice in node["anyOf"]]}
    kind = node.get("type")
    if node.get("format") == "interval":
        return {"pattern": _interval(), **node, "type": ["string", "number"], "minimum": 0}
    if not isinstance(kind, str) or kind not in _AS_READ or {"enum", "const"} & node.keys():
        return node
    if kind == "string" and "pattern" in node:
        return node
    return {**node, **_AS_READ[kind]}


def _without_values(choice: Schema) -> Schema:
    """The schema of text or a list of texts; next to blocks in a union, a block is not text."""
    if "items" in choice:
        return {**choice, "items": _without_values(choice["items"])}
    kinds = choice.get("type")
    if not isinstance(kinds, list) or "object" not in kinds:
        return choice
    return {**choice, "type": [kind for kind in kinds if kind not in ("array", "object")]}
