"""Every pair of first-party plugins trains together and resumes bitwise, or is rejected.

A run is a tiny model on a little text with two losses, and a group of plugins instead of the
defaults in their slots; all pairs that may meet do so in one of the groups. If a plugin belongs to
NEXUS, the model is a tiny NEXUS with all five losses. A run trains five steps of two micro-batches,
with evaluations and logs, and again from its third step with a new engine and new plugins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cache, cached_property
from itertools import combinations, islice
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from nexus_core import ConfigError, Engine, Plugin
from nexus_core.errors import PluginError
from nexus_core.plan import arrange, installed, load
from nexus_core.testing import tiny_losses
from tests.plugins.covering import covering

pytestmark = pytest.mark.slow

OF_A_USER = {"data", "init", "loss", "loss_distill", "loss_dpo", "model"}
"""Plugins that depend on user code and files, and so does what they can be combined with."""
NAMES = sorted(
    name
    for name, entry in installed().items()
    if entry.dist
    and entry.dist.name == "nexus-trainer"
    and not entry.value.startswith("nexus_plugins_contrib.")
    and name not in OF_A_USER
)
LENGTH, SAVED_AT, LAST = 16, 3, 5
BASIS: dict[str, dict[str, Any]] = {
    "data_text": {"seq_len": LENGTH, "batch_size": 2, "valid_limit": 2 * LENGTH},
    "model_nexus": {
        "d_model": 8, "ssm_n_layers": 1, "ssm_head_dim": 8, "ssm_expand": 1, "ssm_d_state": 4,
        "dropout": 0.1, "d_latent": 4, "n_rules": 2, "reasoning_steps": 1,
        "d_code": 4, "n_memories": 2, "max_energy_iters": 2, "n_variables": 2,
        "reason": True, "causal": True,
    },
    "loss_lm": {}, "loss_world": {}, "loss_reason": {}, "loss_energy": {}, "loss_causal": {},
    "optim_adamw": {"lr": 1e-2},
    "model": {"call": "nexus_core.testing:tiny_model", "args": {"vocabulary": 300}},
}  # fmt: skip
OF_NEXUS = {"model_nexus", "loss_world", "loss_reason", "loss_energy", "loss_causal", "worth"}
"""Plugins that need NEXUS modules; the others are tested with a smaller model."""
LIVELY: dict[str, dict[str, Any]] = {  # whose defaults would have no effect in so short a run
    "auto_accumulate": {"rows": 1},
    "checkpoint": {"every": f"{SAVED_AT} steps", "sync": True, "best": None},
    "clip": {"max_norm": 0.1},
    "curriculum": {"start_length": 4, "end_length": LENGTH, "warmup": "4 steps", "round_to": 4},
    "mfu": {"peak": 1e12},  # measuring it takes half a second
    "offload": {"without_cuda": "copy", "min_kib": 0},
    "sample": {"tokens": 2, "rows": 1},
    "weigh_gradnorm": {"every": 2},
}
NOT_OF_TRAINING = (
    "system/",  # seconds and bytes of this machine
    "compile/",  # counted over the whole process
)
WHAT_MAY_BE_MISSING = ("CUDA", "torchrun")

Run: TypeAlias = frozenset[str]


class Trials:
    """The outcome of each run, which is made once, and the groups in which all pairs meet.

    Args:
        corpus: the text to train on.
        folder: folder for the runs.
    """

    def __init__(self, corpus: Path, folder: Path) -> None:
        self._corpus, self._folder = corpus, folder
        self._faults: dict[Run, str | None] = {}

    def fault(self, run: Run) -> str | None:
        """The fault of the run; None if there is none."""
        if run not in self._faults:
            self._faults[run] = self._try(run)
        return self._faults[run]

    def fault_together(self, *pair: str) -> str | None:
        """The fault of the group in which two plugins meet, or of them alone if they have one."""
        group = self.groups[frozenset(pair)]
        for run in (run_of(*pair), group) if self._is_new(group) else ():
            if self._is_new(run):
                return f"{self.fault(run)} ({', '.join(sorted(run))})"
        return None

    def _is_new(self, run: Run) -> bool:
        """Whether the run has a fault that none of its plugins has alone."""
        return self.fault(run) not in {None, *(self.fault(run_of(name)) for name in run)}

    @cached_property
    def groups(self) -> dict[frozenset[str], Run]:
        """For each pair without a conflict, a run of a group in which it meets.

        Pairs of which this machine refuses one have groups of their own, as have those of NEXUS.
        """
        kinds: dict[tuple[bool, bool], list[frozenset[str]]] = {}
        for pair in map(frozenset, combinations(NAMES, 2)):
            refused = any(self.fault(run_of(name)) for name in pair)
            kinds.setdefault((refused, bool(OF_NEXUS & run_of(*pair))), []).append(pair)
        return {
            pair: run_of(*group)
            for pairs in kinds.values()
            for group in covering(pairs, lambda names: not enemies(run_of(*names)))
            for pair in pairs
            if pair <= group
        }

    def _try(self, run: Run) -> str | None:
        try:
            return trained_and_resumed(run, self._corpus, self._folder / str(len(self._faults)))
        except Exception as error:
            return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    folder = tmp_path_factory.mktemp("pairs")
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(60)))
    return Trials(corpus, folder)


@pytest.mark.parametrize("first", NAMES)
def test_every_pair_trains_and_resumes_to_the_same_bits(first: str, trials: Trials) -> None:
    """Fails if two plugins break each other, by an error or by lost state."""
    faults = {}
    for second in NAMES[NAMES.index(first) + 1 :]:
        if enemies(run_of(first, second)):
            continue
        if fault := trials.fault_together(first, second):
            faults[f"{first} and {second}"] = fault
    assert not faults, "\n".join(f"{pair}: {fault}" for pair, fault in faults.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_alone_runs_or_says_what_this_machine_lacks(name: str, trials: Trials) -> None:
    """Fails if a plugin would be skipped in all pairs for an unrelated reason."""
    fault = trials.fault(run_of(name))
    lacks = fault and any(word in fault for word in WHAT_MAY_BE_MISSING)
    assert fault is None or (lacks and fault.startswith(ConfigError.__name__)), fault


def test_every_pair_that_declares_a_conflict_is_refused_by_name(tmp_path: Path) -> None:
    """Fails if a declared conflict is accepted, or its message does not name both sides."""
    refused = 0
    for first, second in combinations(NAMES, 2):
        run = run_of(first, second)
        if not (conflicts := enemies(run)):
            continue
        with pytest.raises(PluginError) as caught:
            arrange(plugins_of(run, tmp_path))
        message = str(caught.value)
        assert "\n" not in message
        assert any(f"'{one}'" in message and f"'{other}'" in message for one, other in conflicts)
        refused += 1
    assert refused >= 3, "schedules, optimizers and weighings have one place each"


def trained_and_resumed(run: Run, corpus: Path, out: Path) -> str | None:
    """Train, and again from the third step; returns the first difference between the results."""
    whole = engine_of(run, corpus, out)
    snapshot = None
    for step in steps(whole):
        if step == SAVED_AT:
            snapshot = copy.deepcopy(whole.state_dict())
    expected = outcome(whole)
    again = engine_of(run, corpus, out)
    torch.rand(17)  # other generator states, as in a new process
    if "checkpoint" in run:
        again.resume()  # through its files
    else:
        again.load_state_dict(snapshot)
    done = list(steps(again))
    assert done == [4, LAST], f"resumed to do the steps {done}"
    return difference(expected, outcome(again))


def steps(engine: Engine) -> Iterator[int]:
    """Train up to the last step of the test, far from the horizon of the schedules."""
    with closing(engine.steps(until="100000 steps", eval_every="2 steps")) as loop:
        for state in islice(loop, LAST - engine.state.step):
            yield state.step


def outcome(engine: Engine) -> dict[str, Any]:
    """Everything that later steps depend on, and the metrics."""
    snapshot: dict[str, Any] = copy.deepcopy(engine.state_dict())
    snapshot["train"].pop("seconds")
    snapshot["metrics"] = {
        name: value
        for name, value in snapshot["metrics"].items()
        if not name.startswith(NOT_OF_TRAINING)
    }
    return snapshot


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first difference of two nested states, in words; None if there is none."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        parts = [(f"{where}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        parts = [(f"{where}.{i}", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        equal = one.dtype == other.dtype and torch.equal(one, other)
        return None if equal else f"{where.lstrip('.')} differs"
    else:
        equal = one == other or (one != one and other != other)  # nan equals nan
        return None if equal else f"{where.lstrip('.')} is {other!r:.80}, not {one!r:.80}"
    found = (difference(mine, theirs, at) for at, mine, theirs in parts)
    return next(filter(None, found), None)


def engine_of(run: Run, corpus: Path, out: Path) -> Engine:
    """A new engine of the run."""
    more = [] if OF_NEXUS & run else tiny_losses()[1:]  # so that there are terms to weigh
    plugins = [*plugins_of(run, corpus), *more]
    return Engine(plugins=plugins, seed=1, out=out, log_every=2, accumulate=2)


def plugins_of(run: Run, corpus: Path) -> list[Plugin[Any]]:
    """New plugins of the run: the basis first, then the others by name."""
    text = {"train": str(corpus), "cache_dir": str(corpus.parent / "cache")}
    return [
        kind(name)(**settings_of(name), **(text if name == "data_text" else {}))
        for name in sorted(run, key=lambda name: (name not in BASIS, name))
    ]


@cache
def settings_of(name: str) -> dict[str, Any]:
    """Settings with which the plugin has an effect within five steps."""
    schema = kind(name).config_class.model_json_schema()
    example: dict[str, Any] = schema.get("examples", [{}])[0]
    return example | BASIS.get(name, {}) | LIVELY.get(name, {})


def run_of(*wanted: str) -> Run:
    """The plugins with their requirements, and the compatible part of the basis."""
    names = list(wanted)
    for name in names:
        names += [needed for needed in kind(name).requires if needed not in names]
    left_out = {"model"} if OF_NEXUS & {*names} else OF_NEXUS
    basis = {
        name
        for name in BASIS.keys() - left_out
        if not any(are_enemies(name, other) for other in names)
    }
    return frozenset(basis | {*names})


def enemies(run: Run) -> list[tuple[str, str]]:
    """The pairs of the run that declare a conflict."""
    return [pair for pair in combinations(sorted(run), 2) if are_enemies(*pair)]


def are_enemies(one: str, other: str) -> bool:
    """Whether two plugins share a slot, or one declares the other as a conflict."""
    if one == other:
        return False
    mine, theirs = kind(one), kind(other)
    shared = mine.slot is not None and mine.slot == theirs.slot
    return shared or other in mine.conflicts or one in theirs.conflicts


@cache
def kind(name: str) -> type[Plugin[Any]]:
    """The plugin's class, cached, as the lookup takes longer than training."""
    return load(name)
