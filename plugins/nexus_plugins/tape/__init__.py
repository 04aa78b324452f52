"""What a run was made of, step by step: a chain of digests, and what can be told by it.

`plugin` takes the digests, `lines` is their file, `parts` says of what they are.
"""

from __future__ import annotations

from nexus_plugins.tape.plugin import TapeConfig, TapePlugin

__all__ = ["TapeConfig", "TapePlugin"]
