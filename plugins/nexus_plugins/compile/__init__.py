"""Compiled models and graph-replayed steps.

`plugin` compiles the model. `graphs` decides whether the gradient of a step is replayed, `replay`
does it, and `inputs` holds the static inputs; `update` and `on_device` do the same for an
optimizer, and `recorder` captures both. `facts` is the host state that must be the same, `parts`
compares objects in it, and `watch` finds what else the host does in a step.
"""

from __future__ import annotations

from nexus_plugins.compile.plugin import CompileConfig, CompilePlugin

__all__ = ["CompileConfig", "CompilePlugin"]
