"""A setting that is misread or silently ignored would spoil a run of weeks."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexus_core import ConfigError, Interval
from nexus_core.cli.settings import read_settings

FILE: dict[str, Any] = {
    "until": "50 steps",
    "seed": 3,
    "plugins": {"clip": {"max_norm": 0.5}, "lr_linear": {"warmup": "5 steps"}},
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(FILE, sort_keys=False))
    return str(path)


def test_precedence_is_preset_file_environment_set(config: str, tmp_path: Path) -> None:
    path = tmp_path / "over.yaml"
    path.write_text("preset: quickstart\nseed: 1\nplugins: {clip: {max_norm: 0.1}}\n")
    preset = read_settings("quickstart")
    over = read_settings(str(path))
    assert over.run.until == preset.run.until
    assert over.run.seed == 1
    environment = {"NEXUS_SEED": "2", "NEXUS_CLIP__MAX_NORM": "0.2", "NEXUS_WANDB__PROJECT": "x"}
    changed = read_settings(str(path), environment=environment)
    assert (changed.run.seed, changed.run.plugins["clip"]["max_norm"]) == (2, 0.2)
    final = read_settings(str(path), sets=("seed=4", "clip.max_norm=0.4"), environment=environment)
    assert (final.run.seed, final.run.plugins["clip"]["max_norm"]) == (4, 0.4)


@pytest.mark.parametrize("suffix", ["yaml", "json", "toml"])
def test_every_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine.{suffix}"
    text = {"yaml": yaml.safe_dump(FILE), "json": json.dumps(FILE)}.get(
        suffix,
        'until = "50 steps"\nseed = 3\n[plugins.clip]\nmax_norm = 0.5\n'
        '[plugins.lr_linear]\nwarmup = "5 steps"\n',
    )
    path.write_text(text)
    settings = read_settings(str(path))
    assert settings.run.until == Interval(50, "steps")
    assert settings.run.plugins == FILE["plugins"]
    assert settings.name == "mine"


def test_plugins_are_added_and_left_out(config: str) -> None:
    settings = read_settings(config, plugins="amp, no:clip,wandb")
    assert list(settings.run.plugins) == ["lr_linear", "amp", "wandb"]
    assert settings.named == ("lr_linear", "amp", "wandb")
    preset = read_settings("quickstart", plugins="lr_linear")
    assert "lr_cosine" in preset.defaults
    assert preset.named == ("lr_linear",)


def test_accumulate_auto_leaves_the_batch_whole_and_brings_the_plugin_that_splits_it(
    config: str,
) -> None:
    settings = read_settings(config, sets=("accumulate=auto",))
    assert settings.run.accumulate == 1
    assert settings.named[-1] == "auto_accumulate"
    with pytest.raises(ConfigError, match="accumulate"):
        read_settings(config, sets=("accumulate=automatic",))


def test_set_reads_values_as_yaml_does_and_reaches_into_blocks(config: str) -> None:
    sets = (
        "until=2 epochs",
        "clip.flag=true",
        "clip.names=[a, b]",
        "clip.deep.er=1.5",
        "clip.x=a:b",
    )
    run = read_settings(config, sets=sets).run
    assert run.until == Interval(2, "epochs")
    clip = run.plugins["clip"]
    assert clip == {"max_norm": 0.5, "flag": True, "names": ["a", "b"], "deep": {"er": 1.5},
                    "x": "a:b"}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": "quickstrat"},
            "no preset or config file named 'quickstrat'. Did you mean 'quic",
        ),
        ({"source": "absent.yaml"}, "cannot read the config file 'absent.yaml': No such file"),
        ({"sets": ("sede=1",)}, "unknown key 'sede'. Did you mean 'seed'"),
        ({"sets": ("clipp.max_norm=1",)}, "'clipp' is not in this run. Did you mean 'clip'"),
        ({"sets": ("seed",)}, "expected KEY=VALUE"),
        ({"sets": ("seed=many",)}, "seed: got 'many'; input should be a valid integer"),
        ({"sets": ("until=soon",)}, "until: got 'soon'; cannot read the interval"),
        ({"sets": ("clip.max_norm.x=1",)}, "'max_norm' of 'clip.max_norm.x' is a value"),
        ({"plugins": "no:clipp"}, "'clipp' is not in this run. Did you mean 'clip'"),
        ({"environment": {"NEXUS_SEED": "x"}}, "seed: got 'x'; .*from NEXUS_SEED"),
    ],
)
def test_mistake_is_one_clear_error(config: str, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(**{"source": config, **arguments})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing"),
        ("- a\n", "holds list"),
        ("until: [", "is not valid yaml"),
        ("plugins: [clip]\n", "'plugins' must map names to settings"),
        ("plugins: {clip: 3}\n", "plugins.clip must be a block of settings or false"),
        ("untill: 3\n", "unknown key 'untill'. Did you mean 'until'"),
        ("preset: nowhere\n", "no preset or config file named 'nowhere'"),
    ],
)
def test_bad_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(str(path))
