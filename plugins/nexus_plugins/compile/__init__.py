"""Compiled models and graph-replayed steps.

`plugin` compiles the model, `graphs` captures and replays the gradient of whole steps, `inputs`
holds their static inputs, `facts` checks that a replay is still valid.
"""

from __future__ import annotations

from nexus_plugins.compile.plugin import CompileConfig, CompilePlugin

__all__ = ["CompileConfig", "CompilePlugin"]
