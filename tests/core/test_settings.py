"""Settings: one that is misread or silently ignored could ruin a long run."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, SecretStr, model_validator

from benchmarks.fuzz_config import Case, cases, try_case
from nexus_core import ConfigError, Interval, Plugin, PluginConfig
from nexus_core.cli import yaml12
from nexus_core.cli.build import Build, build_plugins
from nexus_core.cli.fit import fitted
from nexus_core.cli.settings import read_settings
from nexus_core.paths import expanded
from nexus_plugins.clip import ClipPlugin

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
        ({"sets": ("until=soon",)}, "until: cannot read the interval 'soon'"),
        ({"sets": ("clip.max_norm.x=1",)}, "'max_norm' of 'clip.max_norm.x' is a value"),
        ({"plugins": "no:clipp"}, "'clipp' is not in this run. Did you mean 'clip'"),
        ({"environment": {"NEXUS_SEED": "x"}}, "seed: got 'x'; .*from NEXUS_SEED"),
    ],
)
def test_mistake_is_one_clear_error(config: str, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(**{"source": config, **arguments})


def test_a_value_is_worded_as_it_was_given(config: str) -> None:
    """Fails if an error on the command line has a value or a hint in Python's syntax."""
    with pytest.raises(ConfigError) as caught:
        read_settings(config, sets=("until=", "seed="))
    said = caught.value.on_command_line().splitlines()
    assert said[0] == "seed: got nothing; input should be a valid integer"
    assert said[1].startswith("until: the length of the run (until) is nothing; expected")
    assert "None" not in said[1]
    assert "fit(" not in said[1]
    assert "is None" in str(caught.value)
    assert "fit(batches, '500 steps'" in str(caught.value)


def test_a_config_file_that_is_missing_is_suggested_by_its_neighbours(config: str) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory\. Did you mean 'mine\.yaml'"):
        read_settings(config.replace("mine.yaml", "mine.yml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing"),
        ("- a\n", "holds list"),
        ("until: [", "is not valid yaml"),
        ("plugins: [clip]\n", "'plugins' must map names to settings"),
        ("plugins: {clip: 3}\n", "plugins.clip must be a block of settings, such as"),
        ("untill: 3\n", "unknown key 'untill'. Did you mean 'until'"),
        ("preset: nowhere\n", "no preset or config file named 'nowhere'"),
    ],
)
def test_bad_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(str(path))


# -- values are read as written


def planned(source: str | None = None, *sets: str, **environment: str) -> Build:
    return build_plugins(read_settings(source, "", sets, environment))


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("seed=010", 10),
        ("seed=008", 8),
        ("until=010", "10 steps"),
        ("data_text.batch_size=016", 16),
        ("data_text.train=corpus #1.txt", "corpus #1.txt"),
        ("data_text.eos_token=#EOS", "#EOS"),
        ("data_text.eos_token=[SEP]", "[SEP]"),
        ("data_text.eos_token={eos}", "{eos}"),
        ("data_text.eos_token=1.0", "1.0"),
        ("data_text.eos_token=null", None),
        ("data_text.text_key=yes", "yes"),
        ("data_text.text_key=true", "true"),
        ("jsonl.file=2024", "2024"),
        ("out=007", "007"),
        ("clip.max_norm=.inf", "inf"),
        ("clip.max_norm=1e400", "inf"),
        ("optim_muon.lr=1e-3", 0.001),
    ],
)
def test_a_value_arrives_as_it_was_written_by_option_file_and_environment(
    tmp_path: Path, assignment: str, value: object
) -> None:
    key, _, text = assignment.partition("=")
    plugin, dot, name = key.rpartition(".")
    shown = f"'{text}'" if "#" in text else text  # in a file, `#` starts a comment
    path = tmp_path / "mine.yaml"
    block = f"plugins: {{{plugin}: {{{name}: {shown}}}}}" if dot else f"{name}: {shown}"
    path.write_text(f"preset: quickstart\n{block}\n")
    variable = f"NEXUS_{key.upper().replace('.', '__')}"
    builds = planned(None, assignment), planned(str(path)), planned(None, **{variable: text})
    for build in builds:
        resolved = build.resolved(build.run.out or Path("x"))
        assert (resolved["plugins"][plugin][name] if dot else resolved[name]) == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("until=1:30:00", "until: cannot read the interval '1:30:00'"),
        ("data_text.batch_size=yes", "batch_size: got 'yes'; input should be a valid integer"),
        ("data_text.batch_size=true", "batch_size: got true; expected a number"),
        ("seed=true", "seed: got true; expected a number"),
        ("optim_muon.weight_decay=.inf", "weight_decay: got inf; input should be a finite number"),
        ("clip.max_norm=.nan", "clip.max_norm: got nan"),
        (f"seed={10**30}", "seed: got 1000.*; expected an integer of up to 64 bits"),
        (f"data_text.batch_size={10**30}", "batch_size: got 1000.*up to 64 bits"),
        (f"seed={'9' * 5000}", "seed: got '9999"),
        ("clip." + "a." * 3000 + "b=1", "nested deeper than 50 levels"),
        ("out=a$NEXUS_NOT_SET/b", r"out: got .*; the variable \$NEXUS_NOT_SET is not set"),
        ('jsonl.file="a\\0b"', "jsonl.file: got .*; .*NUL character"),
        ('out=""', "out: got ''; a path must not be empty"),
    ],
)
def test_a_value_that_would_be_misread_is_refused_at_once(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        planned(None, assignment)
    assert len(str(caught.value)) < 500


class Strange(PluginConfig):
    text: str = ""
    texts: str | tuple[str, ...] = ""
    by_name: dict[str, str] = {}
    choice: Literal["1.0", "2"] | None = None
    path: Path | None = None
    number: float = 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("text: 1e5", {"text": "1e5"}),
        ("text: {a: 1}", {"text": "{a: 1}"}),
        ("texts: [1, 02]", {"texts": ("1", "02")}),
        ("by_name: {a: 007, b: x}", {"by_name": {"a": "007", "b": "x"}}),
        ("choice: 1.0", {"choice": "1.0"}),
        ("path: 2024", {"path": Path("2024")}),
        ("number: 010", {"number": 10.0}),
    ],
)
def test_text_is_found_where_a_model_wants_it(text: str, expected: dict[str, object]) -> None:
    document = yaml12.parse(text)
    made = Strange.model_validate(fitted(Strange, document.value, document.written))
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
@pytest.mark.parametrize("suffix", ["yaml", "json", "YML"])
def test_a_file_is_read_in_the_encoding_that_it_says(
    tmp_path: Path, suffix: str, encoding: str
) -> None:
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes('{"until": "5 steps", "out": "läufe"}\r\n'.encode(encoding))
    assert str(read_settings(str(path)).run.out) == "läufe"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"seed: 1\nuntil: 2\nseed: 2\n", "duplicate key 'seed', in lines 1 and 3"),
        ("a.json", b'{"seed": 1, "seed": 2}', "duplicate key 'seed'"),
        ("a.toml", b"seed = 1\nseed = 2\n", "Cannot overwrite a value"),
        ("a.json", b"[" * 5000, "is not valid json"),
        ("a.json", b'{"a": ' * 60 + b"1" + b"}" * 60, "nested deeper than 50 levels"),
        ("a.toml", b"a = " + b"[" * 5000, "is not valid toml"),
        ("a.yaml", b"seed: 1\nuntil: \xff\n", "line 2 is not UTF-8 text"),
        ("a.yaml", b"x" * (2**20 + 1), "larger than 1,048,576 bytes"),
        ("a.yaml", b"preset: [quickstart]\n", "no preset or config file named"),
    ],
)
def test_a_file_that_is_no_config_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_settings(str(path))


def test_a_date_of_toml_is_text_as_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('preset = "quickstart"\nout = 2024-01-31\n')
    assert read_settings(str(path)).run.out == Path("2024-01-31")


def test_of_very_many_faults_the_first_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        ClipPlugin(**{f"key{number}": 1 for number in range(1000)})
    assert str(caught.value).count("\n") == 10
    assert str(caught.value).endswith("and 990 more")


# -- the source makes no difference


SETTINGS = {
    "loss_lm.label_smoothing": 0.1,
    "jsonl.file": "m.jsonl",
    "clip.max_norm": 0.5,
    "console.quiet": True,
    "data_text.eos_token": "[SEP]",
    "optim_muon.betas": [0.8, 0.9],
    "seed": 7,
    "until": "20 steps",
}


@given(
    st.lists(st.sampled_from(sorted(SETTINGS)), unique=True, min_size=1).flatmap(st.permutations)
)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_option_file_and_environment_give_the_same_plan(tmp_path: Path, keys: list[str]) -> None:
    """Fails if naming a preset's plugin in a file moves it in the plan."""
    text = {key: json.dumps(value).strip('"') for key, value in SETTINGS.items()}
    content: dict[str, Any] = {"preset": "quickstart", "plugins": {}}
    for key in keys:
        plugin, dot, name = key.rpartition(".")
        block = content["plugins"].setdefault(plugin, {}) if dot else content
        block[name] = SETTINGS[key]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml12.dump(content))
    builds = (
        planned(None, *(f"{key}={text[key]}" for key in keys)),
        planned(str(path)),
        planned(None, **{f"NEXUS_{key.upper().replace('.', '__')}": text[key] for key in keys}),
    )
    plain = [plugin.name for plugin in planned().plan.plugins]
    for build in builds:
        assert [plugin.name for plugin in build.plan.plugins] == plain
        assert build.resolved(Path("x")) == builds[0].resolved(Path("x"))


def test_a_new_plugin_follows_those_of_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: quickstart\nplugins: {grad_stats: {}, clip: {max_norm: 2}, ema: {}}\n")
    found = read_settings(str(path))
    assert found.named == ("grad_stats", "clip", "ema")
    assert "clip" in found.defaults
    names = [plugin.name for plugin in build_plugins(found).plan.plugins]
    plus = build_plugins(read_settings(None, "grad_stats,ema"))
    assert names == [plugin.name for plugin in plus.plan.plugins]


# -- the environment


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NEXUS_URL": "https://x", "NEXUS_PORT": "tcp://10.0.0.7:8081", "NEXUS_HOST": "x"}, []),
        ({"NEXUS_SERVICE_HOST": "x", "NEXUS_PORT_80_TCP": "x", "NEXUS_": "x", "NEXUS___": "x"}, []),
        ({"NEXUS_USERNAME": "x", "NEXUS_DATA__URL": "x", "NEXUS_SEED": ""}, []),
        ({"NEXUS_WANDB__PROJECT": "x"}, []),
        ({"NEXUS_SEDE": "1"}, ["NEXUS_SEDE is not a setting.* did you mean NEXUS_SEED"]),
        ({"NEXUS_CLPI__MAX_NORM": "1"}, ["did you mean NEXUS_CLIP__MAX_NORM"]),
    ],
)
def test_variables_of_others_are_passed_over_and_misspelt_ones_said(
    variables: dict[str, str], said: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_settings("quickstart", environment=variables)
    assert found.run == read_settings("quickstart").run
    assert len(caught) == len(said)
    for warning, pattern in zip(caught, said, strict=True):
        assert re.search(pattern, str(warning.message))


def test_a_wrong_value_names_the_variable_that_it_is_from() -> None:
    with pytest.raises(
        ConfigError, match=r"clip.max_norm: got -1; .* \(from NEXUS_CLIP__MAX_NORM\)"
    ):
        planned(None, NEXUS_CLIP__MAX_NORM="-1")
    with pytest.raises(ConfigError, match=r"clip.max_norm: got -2; [^(]*$"):
        planned(None, "clip.max_norm=-2", NEXUS_CLIP__MAX_NORM="-1")


# -- paths


def test_paths_expand_home_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/fast")
    assert expanded("~/a") == "/home/me/a"
    assert expanded("$SCRATCH/${SCRATCH}x/~") == "/fast//fastx/~"
    assert expanded("a$b~") == "a$b~"
    assert expanded("~nobody-has-this-name/x") == "~nobody-has-this-name/x"
    build = planned(None, "out=~/runs/a", "jsonl.file=$SCRATCH/m")
    assert build.run.out == Path("/home/me/runs/a")
    assert build.resolved(Path("x"))["plugins"]["jsonl"]["file"] == "/fast/m"
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ConfigError, match="no home folder"):
        expanded("~/a")


# -- stored settings


class Service(PluginConfig):
    user: str = "me"
    token: SecretStr = SecretStr("")
    limit: float = Field(math.inf, allow_inf_nan=True)

    @model_validator(mode="after")
    def _somebody(self) -> Service:
        if not self.user:
            raise ValueError("a service needs a user")
        return self


class ServicePlugin(Plugin[Service]):
    """Connects to a service."""


def test_a_secret_is_neither_stored_nor_shown() -> None:
    stored = ServicePlugin(token="hunter2", user="you").config.model_dump(mode="json")
    assert stored == {"user": "you", "limit": "inf"}
    assert ServicePlugin(**stored).config.limit == math.inf
    for wrong in ({"token": ["hunter2"]}, {"token": "hunter2", "user": ""}):
        with pytest.raises(ConfigError, match="service") as caught:
            ServicePlugin(**wrong)
        assert "hunter2" not in str(caught.value)


def test_an_infinite_setting_survives_what_is_stored_and_read_again(tmp_path: Path) -> None:
    build = planned(None, "clip.max_norm=.inf")
    resolved = json.loads(json.dumps(build.resolved(Path("x")), allow_nan=False))
    path = tmp_path / "config.yaml"
    path.write_text(yaml12.dump(resolved))
    again = next(p for p in planned(str(path)).plan.plugins if isinstance(p, ClipPlugin))
    assert again.config.max_norm == math.inf


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path_factory.mktemp("fuzz")


@pytest.mark.slow
@given(cases())
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
def test_a_config_as_nobody_would_write_it_is_a_plan_or_one_clear_error(
    scratch: Path, case: Case
) -> None:
    """Fails if a user gets a traceback, or a config that reads differently the second time."""
    try_case(case, scratch)


@pytest.mark.parametrize(
    ("sets", "place", "value"),
    [
        ("lr=3e-4", ("optim_muon", "lr"), 3e-4),
        ("batch_size=8", ("data_text", "batch_size"), 8),
        ("d_model=32", ("model_nexus", "d_model"), 32),
        ("max_norm=.inf", ("clip", "max_norm"), math.inf),
    ],
)
def test_a_key_that_one_plugin_has_needs_no_name(
    sets: str, place: tuple[str, str], value: object
) -> None:
    block, key = place
    assert read_settings("quickstart", sets=(sets,)).run.plugins[block][key] == value


def test_a_key_without_a_name_means_the_plugins_that_are_in_the_run(config: str) -> None:
    """Fails if a plugin that lost its slot, or was removed, is matched or causes ambiguity."""
    found = read_settings("quickstart", "optim_adamw", ("lr=0.1",)).run.plugins
    assert found["optim_adamw"]["lr"] == 0.1
    assert found["optim_muon"]["lr"] != 0.1
    assert read_settings(config, "ema", ("warmup=3 steps", "seed=7")).run.seed == 7
    with pytest.raises(ConfigError, match="--set lr=1: unknown key 'lr'"):
        read_settings(config, sets=("lr=1",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sets": ("weight=2",), "plugins": "loss_causal"},
         r"--set weight=2: 'weight' is a setting of \d plugins of this run: .*loss_causal.weight; "
         "prefix it with one"),
        ({"sets": ("batch_siz=2",)}, "unknown key 'batch_siz'. Did you mean 'batch_size'"),
        ({"sets": ("untill=2",)}, "unknown key 'untill'. Did you mean 'until'"),
    ],
)  # fmt: skip
def test_a_key_that_no_plugin_or_several_have_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings("quickstart", **arguments)
