"""What a user sees of a run: history, result, tables and plots; and Ctrl-C.

Training does not depend on it.
"""

from nexus_core.views.history import History, Metrics
from nexus_core.views.keyboard import stopping_on_interrupt
from nexus_core.views.result import Result
from nexus_core.views.shown import ShownEngine, ShownPlan

__all__ = ["History", "Metrics", "Result", "ShownEngine", "ShownPlan", "stopping_on_interrupt"]
