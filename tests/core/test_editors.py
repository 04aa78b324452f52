"""The schema for editors: it accepts what a run accepts, and rejects mistakes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_core.cli import yaml12
from nexus_core.cli.build import build_plugins
from nexus_core.cli.editors import json_schema
from nexus_core.cli.run import main
from nexus_core.cli.settings import presets, read_settings
from nexus_core.errors import NexusError

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
CHANGED = "preset: quickstart\n"
MISTAKES = """
sed: 1
seed: one
seed: 1.5
seed: true
seed: null
until: 50 stepz
until: 10%
until: soon
until: [50 steps]
until: -5
accumulate: 0
accumulate: some
cells: 0
log_every: null
log_every: 5 lightyears
eval_every: {steps: 5}
step_at_epoch_end: 5 steps
preset: quickstrat
preset: null
plugins: [clip]
plugins: {clipp: {}}
plugins: {clip: 0.5}
plugins: {clip: {max_nrom: 1.0}}
plugins: {clip: {max_norm: 0}}
plugins: {clip: {max_norm: large}}
plugins: {clip: {by: length}}
plugins: {clip: {spare: head}}
plugins: {"clip@late": {max_nrom: 1.0}}
plugins: {"clip@too late": {}}
plugins: {checkpoint: {every: 5 parsecs}}
plugins: {checkpoint: {keep_last: 0}}
plugins: {checkpoint: {final: perhaps}}
plugins: {early_stop: {mode: maximal}}
plugins: {optim_adamw: {betas: [0.9]}}
plugins: {optim_adamw: {groups: [{math: "*.bias"}]}}
plugins: {data_text: {train: [{path: a.txt, weigth: 2}]}}
""".strip().splitlines()
"""Mistakes, each added to the quickstart's config."""
TAKEN = """
seed: "7"
until: 1e3
until: 1_000 STEPS
until: 1.5 Epochs
until: 10 M tokens
until: .5 h
accumulate: auto
out: 007
device: cpu
step_at_epoch_end: "yes"
eval_every: 12.5 percent
plugins: null
plugins: {clip: null, ema: true, tensorboard: false}
plugins: {clip: {max_norm: .inf}}
plugins: {clip: {max_norm: "1e-3"}}
plugins: {"ema@slow": {decay: 0.9999}}
plugins: {lr_cosine: {warmup: 0}}
plugins: {data_text: {text_key: 7, eos_token: [SEP]}}
""".strip().splitlines()


@pytest.fixture(scope="module")
def schema() -> Any:
    shown = CliRunner().invoke(main, ["--schema"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


@pytest.fixture(scope="module")
def validator(schema: Any) -> Any:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def is_taken(text: str, folder: Path) -> bool:
    """Whether a run accepts such a file."""
    path = folder / "given.yaml"
    path.write_text(text)
    try:
        build_plugins(read_settings(str(path)))
    except NexusError:
        return False
    return True


def documents() -> Iterator[tuple[str, Any]]:
    """Every config of presets, examples and pages, including partial ones in pages."""
    for name, package in presets().items():
        yield name, yaml12.parse(files(package).joinpath(f"{name}.yaml").read_text()).value
    for path in (*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("benchmarks/**/*.yaml")):
        yield str(path), yaml12.parse(path.read_text()).value
    for page in (*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), ROOT / "README.md"):
        for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S):
            value = yaml12.parse(text).value
            if isinstance(value, dict) and value.keys() & {"preset", "until", "plugins", "seed"}:
                yield f"{page.name}: {text}", value


def test_every_documented_config_is_valid(validator: Any) -> None:
    found = dict(documents())
    assert len(found) > 15
    faults = {
        name: [error.message for error in validator.iter_errors(value)]
        for name, value in found.items()
    }
    assert {name: said for name, said in faults.items() if said} == {}


def test_every_default_is_valid_by_itself(schema: Any, validator: Any) -> None:
    def nodes(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            yield node
        held = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        for item in held:
            yield from nodes(item)

    given = [node for node in nodes(schema) if "default" in node and "description" in node]
    assert len(given) > 300
    wrong = [n for n in given if not validator.evolve(schema=n).is_valid(n["default"])]
    assert wrong == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_by_schema_and_run(
    mistake: str, validator: Any, tmp_path: Path
) -> None:
    text = mistake if mistake.startswith("preset") else CHANGED + mistake
    assert not validator.is_valid(yaml12.parse(text).value)
    assert not is_taken(text, tmp_path)


@pytest.mark.parametrize("line", TAKEN)
def test_what_a_run_takes_is_valid(line: str, validator: Any, tmp_path: Path) -> None:
    assert is_taken(CHANGED + line, tmp_path)
    assert validator.is_valid(yaml12.parse(CHANGED + line).value)


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 0.5, 1.0, 1e30, "", "7", "0.5", "x", "true", "off", "auto"),
    *("10%", "5 steps", "3 epochs", "1 h", "none", "val/loss", "./net.py:build", "1e-3", "cpu"),
    *([], [1], ["a"], [0.9, 0.95], [[0.5, 8]], {}, {"a": 1}, {"match": "*"}, {"call": "a:b"}),
]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_what_the_schema_refuses_a_run_refuses(
    data: st.DataObject, schema: Any, validator: Any, tmp_path: Path
) -> None:
    """Any setting of any plugin or of the engine, with any value."""
    blocks = schema["properties"]["plugins"]["properties"]
    name = data.draw(st.sampled_from(["", *sorted(blocks)]))
    known = schema["properties"] if not name else blocks[name].get("properties", {})
    key = data.draw(st.sampled_from([*sorted(known.keys() - {"plugins", "preset"}), "unknown"]))
    value = data.draw(st.sampled_from(VALUES))
    document = {key: value} if not name else {"plugins": {name: {key: value}}}
    text = yaml12.dump({"preset": "quickstart", **document})
    if not validator.is_valid(yaml12.parse(text).value):
        assert not is_taken(text, tmp_path), text


def test_a_plugin_that_lacks_its_package_may_have_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    for name in [name for name in sys.modules if name.startswith("nexus_plugins_contrib.trackio")]:
        monkeypatch.delitem(sys.modules, name)
    validator = jsonschema.Draft202012Validator(json_schema())
    for name in ("trackio", "trackio@late"):
        assert validator.is_valid({"plugins": {name: {"project": "mine"}}})
    assert not validator.is_valid({"plugins": {"trackoi": {}}})
