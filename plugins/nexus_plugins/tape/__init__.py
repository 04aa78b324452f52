"""What a run was made of, step by step: a chain of digests, and what can be told by it.

`plugin` takes the digests, `parts` says of what, `lines` is their file. `again` executes a part of
a recorded run again; `probe` takes one of its steps apart, `sides` does so for two runs at once.
`facts` compares what lies there, `diff` finds the first difference of two runs, `itself` that of a
run and its re-execution, `audit` looks for false ones; `cells` is for runs in cells.
"""

from __future__ import annotations

from nexus_plugins.tape.plugin import TapeConfig, TapePlugin

__all__ = ["TapeConfig", "TapePlugin"]
