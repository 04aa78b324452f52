"""Bad numbers never reach the weights.

`plugin` refuses, `held` holds the optimizer back, `record` notes down, `replay` explains.
"""

from __future__ import annotations

from nexus_plugins.guard.plugin import GuardConfig, GuardPlugin

__all__ = ["GuardConfig", "GuardPlugin"]
