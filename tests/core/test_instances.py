"""Several instances of one plugin in a run: `dew`, `dew@late`, with separate settings and state."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nexus_core import ConfigError, PluginError, ResumableLoader, hookimpl
from nexus_core.cli.build import build_plugins
from nexus_core.cli.settings import read_settings
from nexus_core.plan import arrange, load
from nexus_core.plugin import Plugin, PluginConfig
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.early_stop import EarlyStopPlugin
from nexus_plugins.ema import EmaPlugin
from tiny import Regression, tiny_engine


def relation(name: str, **declared: Any) -> Plugin[Any]:
    return type("Any", (Plugin,), {"name": name, **declared})()


def trained(*plugins: Plugin[Any], until: int, resume: bool = False, **options: Any) -> Any:
    engine = tiny_engine(*plugins, dropout=0.3, **options)
    if resume:
        engine.resume("auto")
    held = ResumableLoader(Regression(), 8, shuffle=False)
    loader = ResumableLoader(Regression(), 4, seed=1)
    engine.fit(loader, until=until, eval_data=held, eval_every=2)
    return engine


def test_what_is_declared_of_a_plugin_holds_for_all_its_instances() -> None:
    """Fails if order, requirements and conflicts do not apply to labelled instances."""
    late = EmaPlugin.labelled("late")()
    first = relation("first", before=("ema",))
    own = relation("own", after=("ema@late",))
    order = arrange([own, EmaPlugin(), late, first, relation("needs", requires=("ema",))]).plugins
    assert [plugin.name for plugin in order] == ["first", "ema", "ema@late", "own", "needs"]
    with pytest.raises(PluginError, match="'foe' and 'ema@late' cannot be used together"):
        arrange([late, relation("foe", conflicts=("ema",))])
    with pytest.raises(PluginError, match=r"listed twice; .*EmaPlugin\.labelled\('late'\)\(\)"):
        arrange([EmaPlugin(), EmaPlugin()])
    with pytest.raises(PluginError, match="both fill the slot 'place'"):
        arrange([relation("one", slot="place"), relation("one@b", slot="place")])


@pytest.mark.parametrize("label", ["", "a b", "x.y", "a@b", "../up"])
def test_a_label_that_could_not_be_written_is_refused(label: str) -> None:
    with pytest.raises(PluginError, match="letters, digits and underscores"):
        load(f"ema@{label}")


def test_settings_reach_the_instance_that_they_name(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    blocks = {"early_stop@f1": {"metric": "val/f1", "mode": "max"}, "early_stop": {"patience": 2}}
    path.write_text(json.dumps({"preset": "quickstart", "plugins": blocks}))
    sets = ("early_stop@f1.patience=7", "checkpoint@f1.best=val/f1")
    settings = read_settings(
        str(path), "no:checkpoint,checkpoint@loss,checkpoint@f1", sets,
        values={"checkpoint.resume_policy": "force"},
    )  # fmt: skip
    built = build_plugins(settings)
    assert built.configs["early_stop"].model_dump()["patience"] == 2
    assert built.configs["early_stop@f1"].model_dump()["patience"] == 7
    assert built.configs["checkpoint@loss"].model_dump()["best"] == "val/loss"
    assert built.configs["checkpoint@f1"].model_dump()["best"] == "val/f1"
    policies = [
        built.configs[f"checkpoint@{n}"].model_dump()["resume_policy"] for n in ("f1", "loss")
    ]
    assert policies == ["force", "force"], "what is meant for the plugin reaches all its instances"
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(built.resolved(tmp_path)))
    assert build_plugins(read_settings(str(again))).configs.keys() == built.configs.keys()
    with pytest.raises(ConfigError, match=r"unknown key 'early_stop@f1\.patients'"):
        build_plugins(read_settings(str(path), sets=("early_stop@f1.patients=1",)))
    with pytest.raises(ConfigError, match="'early_stop@f2' is not in this run.*early_stop@f1"):
        read_settings(str(path), sets=("early_stop@f2.patience=1",))


def test_each_instance_has_its_own_state() -> None:
    """Fails if two averages of a run are mixed up on resume."""

    def averages() -> tuple[EmaPlugin, EmaPlugin]:
        return EmaPlugin.labelled("slow")(decay=0.99, ramp=False), EmaPlugin(decay=0.5, ramp=False)

    whole, first, second = averages(), averages(), averages()
    trained(*whole, until=6)
    snapshot = copy.deepcopy(trained(*first, until=3).state_dict())
    assert {"ema", "ema@slow"} <= snapshot["plugins"].keys()
    engine = tiny_engine(*second, dropout=0.3)
    engine.load_state_dict(snapshot)
    held = ResumableLoader(Regression(), 8, shuffle=False)
    engine.fit(ResumableLoader(Regression(), 4, seed=1), until=6, eval_data=held, eval_every=2)
    for one, other in zip(whole, second, strict=True):
        assert all((one.weights()[n] == other.weights()[n]).all() for n in one.weights())
    slow, fast = (plugin.weights()["head.bias"] for plugin in whole)
    assert (slow != fast).any()


class TidePlugin(Plugin[PluginConfig]):
    """Logs a metric that is best early, while the loss is best late."""

    @hookimpl
    def measure(self, engine: Any, split: str) -> dict[str, float]:
        return {f"{split}/tide": -float(engine.state.step)}


def savers() -> list[Plugin[Any]]:
    return [
        CheckpointPlugin.labelled("loss")(every="3 steps"),
        CheckpointPlugin.labelled("tide")(best="val/tide", mode="max", every="4 steps"),
        TidePlugin(),
    ]


def test_two_checkpoints_keep_two_best_ones_and_the_newest_of_both_is_resumed(
    tmp_path: Path,
) -> None:
    """Fails if instances share a folder, or one resumes from an outdated checkpoint."""
    whole = trained(*savers(), until=10, out=tmp_path / "whole")
    out = tmp_path / "cut"
    trained(*savers(), until=8, out=out)
    best = {n: (out / f"checkpoints@{n}/best").readlink().name for n in ("loss", "tide")}
    assert best == {"loss": "step-00000008", "tide": "step-00000002"}
    for path in (out / "checkpoints@loss").glob("*"):
        if path.name.endswith("8") or path.name in ("best", "final"):
            path.rename(out / f"away-{path.name}")
    resumed = trained(*savers(), until=10, resume=True, out=out)
    assert resumed.state.step == 10
    saved = sorted(path.name for path in (out / "checkpoints@loss").glob("step-*"))
    assert "step-00000008" not in saved, "the run continued from step 8 of the other"
    one, other = whole.state_dict(), resumed.state_dict()
    assert all((one["model"][name] == other["model"][name]).all() for name in one["model"])
    assert one["plugins"]["checkpoint@tide"] == other["plugins"]["checkpoint@tide"]


def test_an_error_names_the_instance(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^early_stop@f1\.metric is 'val/f1', which"):
        trained(EarlyStopPlugin.labelled("f1")(metric="val/f1"), until=4)
