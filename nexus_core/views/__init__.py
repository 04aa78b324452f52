"""A run and the person who watches it: history, result, tables and pictures, and Ctrl-C.

Beside the loop: what a run does can be known without it.
"""

from nexus_core.views.history import History, Metrics
from nexus_core.views.keyboard import stopping_on_interrupt
from nexus_core.views.result import Result
from nexus_core.views.shown import ShownEngine, ShownPlan

__all__ = ["History", "Metrics", "Result", "ShownEngine", "ShownPlan", "stopping_on_interrupt"]
