"""The checks of the contract that run on the simulated accelerator."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from nexus_core.device import seed_everything
from nexus_core.snapshot import Snapshot
from nexus_core.testing.states import of_training
from nexus_core.testing.syncs import WaitWatch
from nexus_core.testing.trial import RESUMED_AT, STEPS, Settings, Trial

__all__ = ["AcceleratorChecks"]

WAITS_ALLOWED = 1  # watched steps that may wait, for a plugin with its own period


class AcceleratorChecks(Trial):
    """Whether a plugin runs on an accelerator, and where it synchronizes with it."""

    def test_runs_on_an_accelerator(self, settings: Settings, tmp_path: Path) -> None:
        """It trains, saves and resumes on a device with its own memory and generator.

        The device is simulated in host memory, so the check runs on every machine.
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
            what = f"resumed on an accelerator at step {at}, step {STEPS} differs from the "
            self._same(of_training(whole), of_training(self._run(again)), f"{what}whole run")

    def test_device_is_not_waited_for(self, settings: Settings, tmp_path: Path) -> None:
        """An ordinary step does not synchronize with the accelerator; logs and saves may."""
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
        self._say(f"runs on an accelerator: yes; device syncs: {places or 'never'}")
        waits = "; ".join(f"{wait.what} at {wait.where}" for wait in dict.fromkeys(watch.waits))
        self._expect(
            waiting <= WAITS_ALLOWED,
            f"it synchronizes with the device in {waiting} of {STEPS - 1} steps: {waits}. Keep the "
            "value on the device (engine.log accepts tensors), or read it in collect_metrics",
        )
