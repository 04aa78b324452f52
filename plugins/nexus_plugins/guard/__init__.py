"""Keep non-finite numbers out of the weights.

`plugin` rejects steps, `held` keeps the optimizer unchanged, `record` dumps, `replay` explains.
"""

from __future__ import annotations

from nexus_plugins.guard.plugin import GuardConfig, GuardPlugin

__all__ = ["GuardConfig", "GuardPlugin"]
