"""The code of NEXUS as files that transformers loads from a model folder."""

from __future__ import annotations

import ast
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_plugins.model_nexus import NEXUSConfig, NEXUSCore

__all__ = ["write_code", "write_config"]

_PACKAGES = ("nexus_plugins.model_nexus", "nexus_plugins._shared")
_TEMPLATES = ("standalone.py", "configuration_nexus.py", "modeling_nexus.py")
_OURS = re.compile(r"^from nexus_plugins\.(?:model_nexus|_shared)\.", re.MULTILINE)
_OTHERS = re.compile(r"^from (?:nexus_core\.\w+|pydantic) import", re.MULTILINE)


def write_code(folder: Path) -> None:
    """Write the model's code with relative imports, and the adapter for transformers."""
    known, pending = set[str](), [f"{_PACKAGES[0]}.nexus"]
    while pending:
        module = pending.pop()
        if module in known:
            continue
        known.add(module)
        package, _, name = module.rpartition(".")
        text = resources.files(package).joinpath(f"{name}.py").read_text(encoding="utf-8")
        pending += _neighbours(text)
        (folder / f"{name}.py").write_text(_standing_alone(text), encoding="utf-8")
    templates = resources.files("nexus_plugins_contrib.export_hf").joinpath("templates")
    for name in _TEMPLATES:
        text = templates.joinpath(f"{name}.tmpl").read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")


def _neighbours(text: str) -> list[str]:
    modules = [n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    return [module for module in modules if module.rpartition(".")[0] in _PACKAGES]


def _standing_alone(text: str) -> str:
    return _OTHERS.sub("from .standalone import", _OURS.sub("from .", text))


def write_config(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Write the files that transformers reads for a NEXUS model.

    Returns:
        Its weights by their names in transformers.
    """
    core: Any = model
    assert isinstance(core, NEXUSCore)
    sizes = {name: getattr(core.config, name) for name in NEXUSConfig.model_fields}
    facts = {
        "architectures": ["NexusForCausalLM"],
        "model_type": "nexus",
        "auto_map": {
            "AutoConfig": "configuration_nexus.NexusConfig",
            "AutoModelForCausalLM": "modeling_nexus.NexusForCausalLM",
        },
        "dtype": str(next(core.parameters()).dtype).removeprefix("torch."),
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    tied = core.config.tie_embeddings
    state: dict[str, torch.Tensor] = core.state_dict()
    return {f"model.{n}": t for n, t in state.items() if not (tied and n == "head.weight")}
