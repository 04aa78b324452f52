"""Steps of fewer and larger pieces of work.

`plugin` compiles the model, `graphs` replays the gradient of whole steps, `inputs` is what goes
into them, `facts` what must stay as it is for that.
"""

from __future__ import annotations

from nexus_plugins.compile.plugin import CompileConfig, CompilePlugin

__all__ = ["CompileConfig", "CompilePlugin"]
