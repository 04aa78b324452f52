"""Engine attributes for plugins of API 1.0 and 1.1; since 1.2 hooks get them as `step`."""

from __future__ import annotations

import warnings

from torch import Tensor

from nexus_core.progress import Progress
from nexus_core.step import Step

__all__ = ["EarlierNames"]


class EarlierNames:
    """Deprecated attributes: they work during a step, and warn."""

    _progress: Progress

    @property
    def losses(self) -> dict[str, Tensor]:
        """The mean of each loss term of the step: `step.losses`."""
        return self._of_step("losses", "step.losses").losses

    @property
    def refused(self) -> Tensor | None:
        """Whether the step was refused: `step.refused`."""
        return self._of_step("refused", "step.refused").refused

    @refused.setter
    def refused(self, value: Tensor | None) -> None:
        self._of_step("refused", "step.refused").refused = value

    @property
    def last_micro_batch(self) -> bool:
        """Whether the step's last micro-batch is being computed: `step.is_last`."""
        return self._of_step("last_micro_batch", "step.is_last").is_last

    def _of_step(self, name: str, now: str) -> Step:
        text = f"engine.{name} is {now} since plugin API 1.2: let the hook take `step`"
        warnings.warn(text, FutureWarning, stacklevel=3)
        return self._progress.step or Step(0, ())
