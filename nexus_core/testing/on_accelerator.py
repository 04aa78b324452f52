"""The checks of the contract that are made on an accelerator, of host memory."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from nexus_core.device import seed_everything
from nexus_core.snapshot import Snapshot
from nexus_core.testing.states import of_training
from nexus_core.testing.syncs import WaitWatch
from nexus_core.testing.trial import RESUMED_AT, STEPS, Settings, Trial

__all__ = ["AcceleratorChecks"]

WAITS_ALLOWED = 1  # of the watched steps may wait: a period of its own, as the log has


class AcceleratorChecks(Trial):
    """Whether a plugin runs on an accelerator, and where it waits for it."""

    def test_runs_on_an_accelerator(self, settings: Settings, tmp_path: Path) -> None:
        """On a device with memory and random numbers of its own it trains, saves and resumes.

        The device is made of host memory, so that it is there on every machine.
        """
        at = RESUMED_AT[-1]
        with self._accelerator() as accelerator:
            taken: dict[int, Snapshot] = {}
            first = self._engine(settings, tmp_path / "whole", device=accelerator.device)
            whole = self._run(first, taken, [at])
            bad = [n for n, p in first.model.named_parameters() if not bool(p.isfinite().all())]
            self._expect(not bad, f"on an accelerator, parameters are not finite: {bad}")
            again = self._engine(settings, tmp_path / "resumed", device=accelerator.device)
            seed_everything(1234)  # generators are elsewhere, as in a new process
            again.load_state_dict(taken[at])
            what = f"resumed on an accelerator at step {at}, step {STEPS} is not that of the run "
            self._same(of_training(whole), of_training(self._run(again)), f"{what} that continued")

    def test_device_is_not_waited_for(self, settings: Settings, tmp_path: Path) -> None:
        """The host does not wait for an accelerator in an ordinary step; logs and saves may."""
        with self._accelerator() as accelerator:
            device = accelerator.device
            engine = self._engine(settings, tmp_path, log_every=self.horizon, device=device)
            watch = WaitWatch(engine, self._name())
            with closing(self._steps(engine, evaluate=False)) as steps:
                next(steps)
                waiting = 0
                for _ in range(STEPS - 1):
                    before = len(watch.waits)
                    with accelerator.told(watch):
                        next(steps)
                    waiting += len(watch.waits) > before
        places = "; ".join(dict.fromkeys(f"at {wait.where}" for wait in watch.waits))
        self._say(f"runs on an accelerator: yes; waits for it: {places or 'never'}")
        waits = "; ".join(f"{wait.what} at {wait.where}" for wait in dict.fromkeys(watch.waits))
        self._expect(
            waiting <= WAITS_ALLOWED,
            f"the device is waited for in {waiting} of {STEPS - 1} steps: {waits}. Keep the "
            "number on the device (engine.log takes tensors), or read it in collect_metrics",
        )
