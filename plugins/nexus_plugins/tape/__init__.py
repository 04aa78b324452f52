"""Record a run step by step as a chain of digests, and compare runs by it.

`plugin` computes the digests, `parts` defines what they cover, `lines` is the file format. `again`
re-executes part of a recorded run; `probe` dissects one of its steps, `sides` does so for two runs
at once. `facts` compares run folders, `diff` finds the first difference of two runs, `itself` that
of a run and its re-execution, `audit` checks a run's records; `cells` is for runs in cells.
"""

from __future__ import annotations

from nexus_plugins.tape.plugin import TapeConfig, TapePlugin

__all__ = ["TapeConfig", "TapePlugin"]
