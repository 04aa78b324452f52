"""The JSON schema of a block of settings, with defaults as a config file has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import WithDefaultSchema

from nexus_core.intervals import Interval

__all__ = ["Schema", "block_schema", "changed"]

Schema = dict[str, Any]


def block_schema(model: type[BaseModel], prefix: str = "") -> Schema:
    """The JSON schema of a block of settings, with defaults as a config file has them.

    Args:
        prefix: prefix of the names of nested blocks, since two plugins may use the same name.
    """
    template = f"#/$defs/{prefix}{{model}}"
    schema = model.model_json_schema(ref_template=template, schema_generator=_Generator)
    if definitions := schema.pop("$defs", None):
        schema["$defs"] = {f"{prefix}{name}": block for name, block in definitions.items()}
    return schema


class _Generator(GenerateJsonSchema):
    """Omits titles, which repeat the names, and writes default intervals as text."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: WithDefaultSchema) -> Schema:
        made = super().default_schema(schema)
        if isinstance(schema.get("default"), Interval):
            made["default"] = str(schema["default"])
        finite: Schema = changed(made, _finite)
        return finite


def changed(node: Any, change: Callable[[Schema], Schema]) -> Any:
    """Apply a change to a schema and to every schema nested in it."""
    if isinstance(node, list):
        return [changed(item, change) for item in node]
    if not isinstance(node, dict):
        return node
    return change({key: changed(item, change) for key, item in node.items()})


def _finite(node: Schema) -> Schema:
    """The schema, with numbers that JSON cannot represent as text."""
    infinite = {k for k, v in node.items() if isinstance(v, float) and not math.isfinite(v)}
    return {key: str(value) if key in infinite else value for key, value in node.items()}
