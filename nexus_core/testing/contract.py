"""The contract of every plugin, as a test class for plugin authors to subclass."""

from __future__ import annotations

import difflib
import gc
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

from nexus_core import ConfigError, Engine, Plugin, PluginError
from nexus_core.defaults import Defaults
from nexus_core.device import seed_everything
from nexus_core.errors import CheckpointError
from nexus_core.plan import HOOK_NAMES, Plan, arrange, installed, load
from nexus_core.relay import Impl, implementations, relay
from nexus_core.signatures import own_doc
from nexus_core.snapshot import Snapshot
from nexus_core.testing.division import Division
from nexus_core.testing.on_accelerator import AcceleratorChecks
from nexus_core.testing.probes import (
    FailingPlugin,
    GradientProbePlugin,
    SnapshotProbePlugin,
    StillPlugin,
    answered,
    gradients,
    gradients_of_a_step,
    joined,
    make,
    models_of,
    shared_containers,
    unmarked_methods,
)
from nexus_core.testing.states import differences, foreign_leaves, of_training, stored
from nexus_core.testing.traces import changed, of_engine, of_process, of_torch
from nexus_core.testing.trial import RESUMED_AT, STEPS, Settings, some

if TYPE_CHECKING:
    import pytest

__all__ = ["PluginContract"]

ACCUMULATIONS = (1, 3)
SPLIT = 3  # micro-batches
UNKNOWN = "no_such_key"
PATIENCE = 2.0  # allowed slowdown in steps without the plugin, if that exceeds its budget
SAMPLES = 4  # runs, of which the fastest step counts
RENAMED = re.compile(r"plugin API|the hook is called")  # in the core's deprecation warnings
LIKENESS = 0.85  # similarity of a name to a known one from which it counts as a typo
IN_REVERSE = ("on_close",)


class PluginContract(Division, AcceleratorChecks):
    """The checks. Subclass this in a test file, name the plugin, and run pytest.

        class TestSparkle(PluginContract):
            plugin = "sparkle"                  # as installed; or the class itself
            configs = ({}, {"strength": 2.0})

    By default the plugin trains a tiny model of token ids with two loss terms. If it needs
    something else, override `model`, `data`, `optimizer`, `losses`, `beside` or `settings_in`. The
    loss terms and the plugins of `beside` are also in the runs without the plugin.

    Attributes:
        plugin: name of an installed plugin, or its class.
        configs: settings to run every check with; default: the examples of the config's JSON
            schema, or the default settings.
        off: settings with which training is bitwise the same as without the plugin (any settings of
            a logger, a limit that is never reached); None: there are none.
        split_invariant: whether a step's gradient is independent of its split into micro-batches;
            False for a plugin that changes the gradient of each micro-batch.
        resumes_after_stop: whether a stopped run (`on_finish`) can continue; False for a plugin
            whose work ends there, such as a learning-rate finder.
        tolerance: relative difference up to which these gradients count as equal.
        budget: tensor operations that the plugin may add to a step, as a multiple of those of the
            tiny step without it.
        seconds: time that it may add to the fastest step.
        horizon: horizon of the runs, which are stopped after six steps.
    """

    def test_trains(self, settings: Settings, accumulate: int, tmp_path: Path) -> None:
        """A run trains, evaluates, logs and ends; parameters stay finite."""
        engine = self._engine(settings, tmp_path, accumulate)
        self._run(engine)
        bad = [n for n, p in engine.model.named_parameters() if not bool(p.isfinite().all())]
        self._expect(not bad, f"parameters are not finite after {engine.state.step} steps: {bad}")
        told = engine.hook.summarize(engine=engine)
        self._expect(all(isinstance(answer, Mapping) for answer in told), f"summarize gives {told}")

    def test_config_is_strict(self, settings: Settings) -> None:
        """The config rejects unknown keys and later changes, also in nested blocks."""
        plugin_class = self.plugin_class()
        for model in models_of(plugin_class.config_class):
            rules = model.model_config
            for rule, wanted in (("extra", "forbid"), ("frozen", True)):
                fault = f"{model.__name__} must have {rule}={wanted!r}: derive it from PluginConfig"
                self._expect(rules.get(rule) == wanted, fault)
        try:
            plugin_class(**{**settings, UNKNOWN: 1})
        except ConfigError as error:
            self._expect(UNKNOWN in str(error), f"the error does not name the key: {error}")
        else:
            self._fail(f"the unknown key '{UNKNOWN}' is accepted")

    def test_config_is_described(self) -> None:
        """The plugin, its config and every field are documented; if not, it is a warning."""
        plugin_class = self.plugin_class()
        for owner in (plugin_class, plugin_class.config_class):
            self._advise(bool(own_doc(owner).strip()), f"{owner.__name__} has no docstring")
        missing = [
            f"{model.__name__}.{key}"
            for model in models_of(plugin_class.config_class)
            for key, field in model.model_fields.items()
            if not field.description
        ]
        self._advise(not missing, f"no description: {', '.join(missing)}; Field(description=...)")

    def test_config_is_repeated_by_its_dump(self, settings: Settings) -> None:
        """The config that a run writes to its folder loads as the same config."""
        config = self._made(settings).config
        again = self._made(config.model_dump(mode="json")).config
        self._expect(again == config, f"{config!r} comes back as {again!r}")

    def test_hooks_are_known(self, settings: Settings) -> None:
        """No hook is misspelt, marked or not, or has an unknown argument."""
        plugin = self._made(settings)
        try:
            relay(arrange([plugin, *self._needed(plugin)]), Defaults())
        except PluginError as error:
            self._fail(str(error))
        for name in unmarked_methods(type(plugin)):
            near = difflib.get_close_matches(name, HOOK_NAMES, 1, LIKENESS)
            self._expect(
                not near,
                f"the method '{name}' is never called: it is not a hook; did you mean "
                f"'{''.join(near)}'?",
            )

    def test_names_are_present(self, settings: Settings, tmp_path: Path) -> None:
        """It uses no deprecated hook or attribute."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self._run(self._engine(settings, tmp_path))
        said = dict.fromkeys(str(w.message) for w in told if w.category is FutureWarning)
        earlier = [text for text in said if RENAMED.search(text)]
        self._expect(not earlier, f"it uses a deprecated name: {some(earlier)}")

    def test_order_holds(self, settings: Settings) -> None:
        """Its declared order can be satisfied, and each hook is called in that order."""
        plugin = self._made(settings)
        named = (*plugin.before, *plugin.after, *plugin.requires, *plugin.conflicts)
        known = installed() if named else {}
        for name in named:
            near = difflib.get_close_matches(name, known, 1, LIKENESS)
            slip = name not in known and near
            self._expect(
                not slip, f"it names '{name}', which is not installed; did you mean {near}?"
            )
        others = self._companions(plugin)
        groups = [others, *([other] for other in others)]
        for group in [*groups, list(reversed(others))]:
            company = {p.name: p for p in [*self._needed(plugin), *group]}
            for given in ([plugin, *company.values()], [*company.values(), plugin]):
                try:
                    self._check_order(plugin, arrange(given))
                except PluginError as error:
                    self._fail(str(error))

    def test_state_round_trips(self, settings: Settings, tmp_path: Path) -> None:
        """Its saved state is JSON and tensors, and loading it restores the same state."""
        engine = self._engine(settings, tmp_path / "one")
        snapshot = self._run(engine)
        saved = snapshot["plugins"].get(self._name())
        if saved is None:
            return
        strange = foreign_leaves(saved["state"], f"{self._name()}.state_dict()")
        self._expect(not strange, f"neither tensors nor JSON: {'; '.join(strange)}")
        fresh = self._engine(settings, tmp_path / "other")
        fresh.load_state_dict({**snapshot, "plugins": stored(snapshot["plugins"])})
        loaded = fresh.plugins[self._name()].state_dict()
        self._same(saved["state"], loaded, "load_state_dict restores a state other than the saved")
        engine.load_state_dict(snapshot)  # the end of the run may have changed it
        assert engine.data is not None
        found, expected = (each.evaluate(engine.data.valid) for each in (fresh, engine))
        what = "evaluated right after loading, a run has other metrics than the run that saved"
        self._same(expected, found, what)

    def test_resume_is_bit_equal(self, settings: Settings, accumulate: int, tmp_path: Path) -> None:
        """A run resumed from a snapshot ends bitwise equal to an uninterrupted one."""
        whole = self._run(self._engine(settings, tmp_path / "whole", accumulate))
        taken: dict[int, Snapshot] = {}
        self._run(self._engine(settings, tmp_path / "saving", accumulate), taken, RESUMED_AT)
        for step, snapshot in taken.items():
            engine = self._engine(settings, tmp_path / f"from-{step}", accumulate)
            seed_everything(1234)  # generators are elsewhere, as in a new process
            engine.load_state_dict(snapshot)
            end = self._run(engine)
            what = f"resumed at step {step}, step {STEPS} differs from the uninterrupted run"
            self._same(of_training(whole), of_training(end), what)

    def test_checkpoint_is_bit_equal(self, settings: Settings, tmp_path: Path) -> None:
        """Stopped, saved to files and resumed twice, a run ends bitwise equal.

        Checkpoints are written by the first installed plugin, by name, that implements
        `load_snapshot`.
        """
        if not self.resumes_after_stop:
            raise SkipTest("its work ends when a run is stopped, as it declares")
        try:
            self._check_checkpoint(settings, tmp_path)
        except (CheckpointError, PluginError) as error:
            self._fail(f"its checkpoint cannot be written or resumed from: {error}")

    def test_saving_changes_nothing(self, settings: Settings, tmp_path: Path) -> None:
        """A run whose state is read at every step ends bitwise equal."""
        whole = self._run(self._engine(settings, tmp_path / "whole"))
        saving = self._run(self._engine(settings, tmp_path / "saving"), {}, range(STEPS))
        what = "reading the state (state_dict, on_save) changes the run"
        self._same(of_training(whole), of_training(saving), what)

    def test_split_of_a_step_is_free(self, settings: Settings, tmp_path: Path) -> None:
        """The gradient of three micro-batches equals that of one batch with all their rows."""
        if not self.split_invariant:
            raise SkipTest("the gradient depends on the split, as the plugin declares")
        split = self._engine(settings, tmp_path / "split", SPLIT, first=[StillPlugin()])
        assert split.data is not None
        batches = list(islice(iter(split.data.train), split.accumulate))
        found = gradients_of_a_step(split, batches, self.horizon)
        whole = self._engine(settings, tmp_path / "whole", first=[StillPlugin()])
        expected = gradients_of_a_step(whole, [joined(batches)], self.horizon)
        for name, wanted in expected.items():
            apart = (found[name] - wanted).norm() / wanted.norm().clamp(min=1e-6)
            self._expect(
                bool(apart <= self.tolerance),
                f"the gradient of {name} in three micro-batches differs from that of one batch by "
                f"{apart:.2g} (relative): count in units of the step, and change gradients in "
                "after_backward, once per step",
            )

    def test_gradient_is_left_alone_after_the_update(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        """It does not change gradients after the update, where this has no effect."""
        probe = GradientProbePlugin()
        engine = self._engine(settings, tmp_path, first=[probe])
        for at in self._steps(engine):
            now = gradients(engine.model)
            lines = differences(probe.seen, now)
            what = f"in step {at}, gradients were changed after the update, which has no effect"
            self._expect(not lines, f"{what} (use after_backward): {some(lines)}")

    def test_operations_are_within_budget(self, settings: Settings, tmp_path: Path) -> None:
        """It adds no more tensor operations to a step than `budget`, and no growing number."""
        self._skip_makers("make_model", "make_data")
        *_, plain = self._counted(self._plain_engine(tmp_path / "without", log_every=self.horizon))
        early, middle, late = self._counted(
            self._engine(settings, tmp_path / "with", log_every=self.horizon)
        )
        added, base = (late - plain).total(), plain.total()
        self._expect(
            added <= self.budget * base,
            f"it adds {added} tensor operations to the {base} of a step, more than the budget of "
            f"{self.budget:g} times as many: {_most(late - plain)}. torch._foreach_* processes "
            "many tensors at once",
        )
        self._expect(
            not early.total() < middle.total() < late.total(),
            f"the number of operations grows with every step: {_most(late - early)}",
        )

    def test_time_is_within_budget(self, settings: Settings, tmp_path: Path) -> None:
        """The fastest step is at most `seconds` slower than the fastest without it.

        On a busy machine, twice the time of a step without it is allowed.
        """
        self._skip_makers("make_model", "make_data")
        quickest = {"with": float("inf"), "without": float("inf")}
        for sample in range(SAMPLES):
            for kind, best in quickest.items():
                folder = tmp_path / f"{kind}-{sample}"
                plain = kind == "without"
                engine = self._plain_engine(folder) if plain else self._engine(settings, folder)
                quickest[kind] = min(best, self._quickest_step(engine))
            added = quickest["with"] - quickest["without"]
            if added <= max(self.seconds, PATIENCE * quickest["without"]):
                return
        slow, quick = (1e3 * quickest[kind] for kind in ("with", "without"))
        self._fail(f"the fastest step takes {slow:.1f} ms with it, and {quick:.1f} ms without")

    def test_engines_share_no_state(self, settings: Settings, tmp_path: Path) -> None:
        """Two interleaved runs in one process end as they do separately."""
        seeds = (5, 6)
        alone = [
            self._run(self._engine(settings, tmp_path / f"alone-{seed}", seed=seed))
            for seed in seeds
        ]
        plugin_class = self.plugin_class()
        before, process_before = shared_containers(plugin_class), of_torch()
        together = self._side_by_side(settings, seeds, tmp_path)
        for seed, one, other in zip(seeds, alone, together, strict=True):
            what = f"interleaved with another engine, the run with seed {seed} differs"
            self._same(of_training(one), of_training(other), what)
        lines = differences(before, shared_containers(plugin_class))
        self._expect(not lines, f"engines share state of a class or module: {some(lines)}")
        left = changed(process_before, of_torch())
        self._expect(not left, f"two interleaved runs do not restore global settings: {some(left)}")

    def test_off_is_absent(self, tmp_path: Path) -> None:
        """With the settings `off`, training ends bitwise equal to training without the plugin."""
        if self.off is None:
            raise SkipTest("it declares no settings (off) that leave training unchanged")
        plain = self._run(self._plain_engine(tmp_path / "without"))
        off = self._run(self._engine(self.off, tmp_path / "off"))
        for part in ("model", "optimizer", "random"):
            what = f"with {dict(self.off)} training differs from training without the plugin"
            self._same({part: plain[part]}, {part: off[part]}, what)

    def test_leaves_no_trace(self, settings: Settings, tmp_path: Path) -> None:
        """It leaves model, optimizer and torch as they were; later runs are unaffected."""
        plain = self._run(self._plain_engine(tmp_path / "before"))
        engine = self._checked_for_traces(settings, tmp_path / "with")
        again = self._run(self._plain_engine(tmp_path / "after"))
        what = "a run without the plugin differs after a run with it"
        self._same(of_training(plain), of_training(again), what)
        if "make_model" in answered(self._made(settings)):
            return
        copied = self._plain_engine(tmp_path / "copied").model
        copied.load_state_dict(engine.model.state_dict())
        used, fresh = (
            self._run(self._plain_engine(tmp_path / name, model=model))
            for name, model in (("used", engine.model), ("fresh", copied))
        )
        what = "the model it was used on trains differently from a copy"
        self._same({"model": fresh["model"]}, {"model": used["model"]}, what)

    def test_leaves_no_trace_after_a_failure(self, settings: Settings, tmp_path: Path) -> None:
        """The same if the run fails: in its third step, or before the plugin has started."""
        for failing in (FailingPlugin(3), FailingPlugin(0)):
            self._checked_for_traces(settings, tmp_path / f"failing-{failing.at}", failing)

    def test_leaks_nothing(self, settings: Settings, tmp_path: Path) -> None:
        """It closes its threads, processes and files, and restores signal handlers and streams."""
        self._checked_for_leaks(settings, tmp_path)

    def test_leaks_nothing_after_a_failure(self, settings: Settings, tmp_path: Path) -> None:
        """The same if the run fails: in its third step, or before the plugin has started."""
        for failing in (FailingPlugin(3), FailingPlugin(0)):
            self._checked_for_leaks(settings, tmp_path / f"failing-{failing.at}", failing)

    @classmethod
    def checks(cls) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every check by name, with the arguments of each case (except `tmp_path`)."""
        arguments = {"settings": cls.cases(), "accumulate": ACCUMULATIONS}
        for name in dict.fromkeys(name for base in cls.__mro__[::-1] for name in vars(base)):
            if name.startswith("test_") and callable(getattr(cls, name)):
                cases: list[dict[str, Any]] = [{}]
                wanted = inspect.signature(getattr(cls, name)).parameters
                for key, values in arguments.items():
                    if key in wanted:
                        cases = [{**case, key: value} for case in cases for value in values]
                yield from ((name, case) for case in cases)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize each check with its cases."""
        if "settings" in metafunc.fixturenames:
            cases = self.cases()
            metafunc.parametrize("settings", cases, ids=[str(i) for i in range(len(cases))])
        if "accumulate" in metafunc.fixturenames:
            metafunc.parametrize("accumulate", ACCUMULATIONS, ids="accumulate-{}".format)

    def _checked_for_traces(
        self, settings: Settings, out: Path, failing: FailingPlugin | None = None
    ) -> Engine:
        torch_before = of_torch()
        engine = self._engine(settings, out, first=[failing] if failing else [])
        before = of_engine(engine)
        self._ended(engine, failing)
        left = changed(before, of_engine(engine)) + changed(torch_before, of_torch())
        self._expect(not left, f"after on_close it has left behind: {some(left)}")
        return engine

    def _checked_for_leaks(
        self, settings: Settings, out: Path, failing: FailingPlugin | None = None
    ) -> None:
        self._run(self._plain_engine(out / "plain"))  # opens what torch and the engine keep open
        before = of_process()
        engine = self._engine(settings, out / "with", first=[failing] if failing else [])
        made = of_process()
        self._ended(engine, failing)
        left = changed(made, of_process(made))
        self._expect(not left, f"after on_close it has left behind: {some(left)}")
        del engine  # frees what its construction opened, such as data
        if changed(before, of_process(before)):
            gc.collect()
        left = changed(before, of_process(before))
        self._expect(not left, f"after the engine is freed, this remains: {some(left)}")

    def _needed(self, plugin: Plugin[Any]) -> list[Plugin[Any]]:
        """The plugins it requires, if they can be loaded."""
        return [other for other in self.beside() if other.name in plugin.requires]

    def _companions(self, plugin: Plugin[Any]) -> list[Plugin[Any]]:
        """The installed plugins that it orders itself by, one per slot."""
        found: dict[str, Plugin[Any]] = {}
        for name in (*plugin.before, *plugin.after):
            try:
                other = make(load(name))
            except PluginError:  # not installed, or a package it needs is missing
                continue
            taken = {p.slot for p in found.values()} | {plugin.slot}
            if other.slot is None or other.slot not in taken:
                found[name] = other
        names = {plugin.name, *found}
        return [p for p in found.values() if {*p.requires} <= names and not {*p.conflicts} & names]

    def _check_checkpoint(self, settings: Settings, folder: Path) -> None:
        whole = self._run(self._engine(settings, folder / "whole", last=self._keeper()))
        saved: Snapshot | None = None
        for step in (*RESUMED_AT, STEPS):
            probe = SnapshotProbePlugin()
            engine = self._engine(settings, folder / "cut", first=[probe], last=self._keeper())
            if saved is not None:
                seed_everything(1234)  # generators are elsewhere, as in a new process
                engine.resume("auto")
                lines = differences(saved, probe.loaded, types=True)
                self._expect(not lines, f"the saved state is not restored: {some(lines)}")
            end = self._run(engine, end=step)
            saved = probe.saved
        what = f"resumed from files at the steps {RESUMED_AT}, step {STEPS} differs from the "
        self._same(of_training(whole), of_training(end), f"{what}uninterrupted run")

    def _check_order(self, plugin: Plugin[Any], plan: Plan) -> None:
        """Each hook that both plugins implement is called in the declared order."""
        rules = [(plugin.name, other) for other in plugin.before]
        rules += [(other, plugin.name) for other in plugin.after]
        for earlier, later in rules:
            acts, against = False, ""
            for hook in HOOK_NAMES:
                found = {impl.plugin: impl for impl in implementations(plan, hook, Defaults())}
                one, other = found.get(earlier), found.get(later)
                if one is None or other is None or one.wrapper is not other.wrapper:
                    continue
                if (one.rank, one.stage) == (other.rank, other.stage):
                    acts = True
                elif hook not in IN_REVERSE and _place(one) > _place(other):
                    own = one if earlier == plugin.name else other
                    self._expect(
                        not own.rank,
                        f"'{later}' is called before '{earlier}' in {hook}, against its declared "
                        "order: tryfirst and trylast override before and after",
                    )
                    if one.rank == other.rank:  # else the other plugin's mark decides
                        against = (
                            f"'{later}' is called before '{earlier}' in {hook}, as its stage "
                            f"'{other.stage[1]}' comes before '{one.stage[1]}'"
                        )
            self._expect(
                acts or not against,
                f"{against}, so before and after have no effect; declare a stage instead: "
                "@hookimpl(stage=...)",
            )


def _place(impl: Impl) -> tuple[int, tuple[int, str]]:
    return impl.rank, impl.stage


def _most(counts: Counter[str]) -> str:
    """The most frequent operations, with their counts."""
    return ", ".join(f"{name} {count}x" for name, count in counts.most_common(5))
