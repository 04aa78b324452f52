"""The check that the bits of a step in cells do not depend on its division into batches."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from unittest import SkipTest

from nexus_core.batches import batch_size
from nexus_core.testing.probes import StillPlugin, gradients_of_a_step, joined
from nexus_core.testing.trial import Settings, Trial

__all__ = ["Division"]

CELLS = 3


class Division(Trial):
    """Part of `PluginContract`."""

    def test_division_of_a_step_changes_no_bit(self, settings: Settings, tmp_path: Path) -> None:
        """With cells, a step has the same gradient in one batch as in three."""
        if not self.plugin_class().topology_invariant:
            raise SkipTest("bits depend on the division, as it declares (topology_invariant)")
        first = [StillPlugin()]
        split = self._engine(settings, tmp_path / "split", CELLS, cells=CELLS, first=first)
        assert split.data is not None
        batches = list(islice(iter(split.data.train), split.accumulate))
        if len({batch_size(batch) for batch in batches}) > 1:
            raise SkipTest("its batches differ in their number of rows, so the cells would too")
        found = gradients_of_a_step(split, batches, self.horizon)
        whole = self._engine(settings, tmp_path / "whole", cells=CELLS, first=[StillPlugin()])
        self._same(
            gradients_of_a_step(whole, [joined(batches)], self.horizon),
            found,
            "a step in three cells is not bitwise the same in one batch as in three: draw and sum "
            "per cell (engine.hook.sum_cells), or set topology_invariant = False",
        )
