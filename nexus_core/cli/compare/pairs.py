"""Pair up runs, and check that both were trained on the same data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from nexus_core.cli.lineage import changes
from nexus_core.cli.records import Point, Run
from nexus_core.errors import ConfigError, PluginError
from nexus_core.plan import load

__all__ = ["Pair", "Paired", "pair_up"]


@dataclass(frozen=True)
class Pair:
    """A run of the base and one of a variant, from the same seed and branch point."""

    base: Run
    variant: Run

    def difference(self, metric: str) -> float | None:
        """Variant minus base, of the last values; None where a run has none."""
        one, other = self.base.last_metrics.get(metric), self.variant.last_metrics.get(metric)
        return None if one is None or other is None else other - one

    def differences(self, metric: str) -> dict[int, float]:
        """Variant minus base by step, wherever both have a value."""
        base = _by_step(self.base, metric)
        return {
            step: point.value - base[step].value
            for step, point in _by_step(self.variant, metric).items()
            if step in base
        }

    def faults(self) -> list[str]:
        """Why this is not a valid pair: data, batches or tokens that differ, in words."""
        base, variant = self.base, self.variant
        found = []
        ours, theirs = base.data, variant.data
        if _differ(ours.fingerprint, theirs.fingerprint):
            found.append(
                f"different data (fingerprint {theirs.fingerprint}, base {ours.fingerprint})"
            )
        if _differ(ours.batch_size, theirs.batch_size):
            found.append(f"batches of {theirs.batch_size} rows, the base has {ours.batch_size}")
        found += [
            f"{key} is {json.dumps(there)}, the base has {json.dumps(here)}"
            for key, (here, there) in changes(base.settings, variant.settings).items()
            if key == "accumulate" or _is_locked(key)
        ]
        if (tokens := self._other_tokens()) is not None:
            found.append("different tokens: " + tokens)
        return found

    def remarks(self) -> list[str]:
        """Caveats: runs that have not ended, or ended at different steps."""
        found = []
        for side, run in (("the base", self.base), ("the variant", self.variant)):
            if run.status != "finished":
                found.append(f"{side} is {run.status} at step {run.step:,}")
        if self.base.step != self.variant.step:
            found.append(f"ends at step {self.variant.step:,}, the base at {self.base.step:,}")
        return found

    def _other_tokens(self) -> str | None:
        base, variant = _tokens(self.base), _tokens(self.variant)
        for step in sorted(base.keys() & variant.keys()):
            if base[step] != variant[step]:
                return f"{variant[step]:,} by step {step:,}, the base has {base[step]:,}"
        return None


@dataclass(frozen=True)
class Paired:
    """All pairs of a variant.

    Args:
        name: of the variant.
        pairs: by seed.
        alone: runs of the variant without a partner in the base.
    """

    name: str
    pairs: tuple[Pair, ...]
    alone: tuple[Run, ...] = field(default=())

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from the base in some pair, with both values."""
        found: dict[str, tuple[Any, Any]] = {}
        for pair in self.pairs:
            found |= changes(pair.base.settings, pair.variant.settings)
        found.pop("seed", None)
        return found

    def faults(self) -> list[str]:
        """What breaks the pairing, each fault once, with the number of pairs affected."""
        return self._said([pair.faults() for pair in self.pairs])

    def remarks(self) -> list[str]:
        """Other caveats, likewise."""
        said = self._said([pair.remarks() for pair in self.pairs])
        said += [f"{run.name} has no partner in the base (seed {run.seed})" for run in self.alone]
        if self.pairs and all(
            p.base.data.fingerprint is None or p.variant.data.fingerprint is None
            for p in self.pairs
        ):
            said.append("cannot tell whether the data was the same: no checkpoint was kept")
        return said

    def _said(self, each: Sequence[Sequence[str]]) -> list[str]:
        counts: dict[str, int] = {}
        for text in (text for texts in each for text in texts):
            counts[text] = counts.get(text, 0) + 1
        whole = len(self.pairs)
        return [
            text if n == whole else f"{text} (in {n} of {whole} pairs)"
            for text, n in counts.items()
        ]


def pair_up(name: str, base: Sequence[Run], variant: Sequence[Run]) -> Paired:
    """Find each variant run's partner: same seed and branch point, or its parent run.

    Raises:
        ConfigError: several runs could be the partner.
    """
    pairs, alone = [], []
    for run in sorted(variant, key=lambda run: (run.seed, _origin(run))):
        found = [other for other in base if (other.seed, _origin(other)) == _key(run)]
        found = found or [other for other in base if _is_parent(other, run)]
        if len(found) > 1 or [_key(other) for other in variant].count(_key(run)) > 1:
            twice = found if len(found) > 1 else [r for r in variant if _key(r) == _key(run)]
            raise ConfigError(
                f"several runs have the seed {run.seed}: {', '.join(r.name for r in twice)}; "
                "name the folder of the one you mean"
            )
        if found:
            pairs.append(Pair(found[0], run))
        else:
            alone.append(run)
    return Paired(name, tuple(pairs), tuple(alone))


def _key(run: Run) -> tuple[int, str]:
    return run.seed, _origin(run)


def _origin(run: Run) -> str:
    parent = run.lineage.parent
    return f"{Path(parent.run).resolve()}@{parent.step}" if parent is not None else ""


def _is_parent(run: Run, branch: Run) -> bool:
    parent = branch.lineage.parent
    return parent is not None and Path(parent.run).resolve() == run.path.resolve()


def _differ(one: object, other: object) -> bool:
    """Whether both are known and differ."""
    return one is not None and other is not None and one != other


def _by_step(run: Run, metric: str) -> dict[int, Point]:
    return {point.step: point for point in run.series.get(metric, ())}


def _tokens(run: Run) -> dict[int, int]:
    """Tokens by step as logged in training: an evaluation may come late."""
    return {p.step: p.tokens for points in run.series.values() for p in points if p.tokens}


@cache
def _locked_keys(plugin: str) -> frozenset[str]:
    """A plugin's settings that a resumed run must not change, as they determine the batches."""
    try:
        fields = load(plugin).config_class.model_fields
    except PluginError:  # not installed here
        return frozenset()
    return frozenset(_locked(fields))


def _locked(fields: dict[str, Any]) -> Iterator[str]:
    for name, info in fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("resume") == "locked":
            yield name


def _is_locked(key: str) -> bool:
    plugin, dot, setting = key.partition(".")
    return bool(dot) and setting in _locked_keys(plugin.partition("@")[0])
