"""The rules of the house: names, budgets, documentation, and what every plugin must do."""

from __future__ import annotations

import copy
import re
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nexus_core
from nexus_core import ConfigError, Engine, Plugin
from nexus_core.events import Hooks
from nexus_core.plan import HOOK_NAMES, installed, load

ROOT = Path(__file__).parents[1]
PLUGINS = (ROOT / "plugins/nexus_plugins", ROOT / "nexus_plugins_contrib")
PACKAGES = (ROOT / "nexus_core", *PLUGINS)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VENDORS = {"optim_schedulefree": "schedulefree", "optim_adamw8bit": "bitsandbytes"}
DECLARED: dict[str, str] = PYPROJECT["project"]["entry-points"]["nexus.plugins"]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*/test_*.py"))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


# -- size and names


def test_engine_and_core_stay_small() -> None:
    core = [
        path
        for path in (ROOT / "nexus_core").rglob("*.py")
        if not {"cli", "testing", "bases"} & set(path.parts)
    ]
    assert lines(ROOT / "nexus_core/engine.py") <= 250
    assert sum(map(lines, core)) <= 1800


@pytest.mark.parametrize("package", PLUGINS, ids=lambda path: path.name)
def test_flat_plugin_stays_small(package: Path) -> None:
    assert {path.name: lines(path) for path in package.glob("*.py") if lines(path) > 150} == {}


def test_plugins_folder_is_not_a_package() -> None:
    assert not (ROOT / "plugins/__init__.py").exists()


def test_entry_points_are_installed_as_declared() -> None:
    """Red when pyproject.toml was edited and the package was not installed again."""
    found = {e.name: e.value for e in entry_points(group="nexus.plugins") if e.dist
             and e.dist.name == "nexus-trainer"}  # fmt: skip
    assert found == DECLARED


@pytest.mark.parametrize("name", DECLARED)
def test_plugin_goes_by_one_name_everywhere(name: str) -> None:
    camel = "".join(word.title() for word in name.split("_"))
    module, _, attribute = DECLARED[name].partition(":")
    assert module.split(".")[1] == name, "file"
    assert attribute == f"{camel}Plugin", "class"
    assert any((ROOT / "tests").glob(f"*/test_{name}*.py")), "test"
    plugin = loaded(name)
    assert plugin.name == name, "config and state key"
    assert plugin.config_class.__name__ in (f"{camel}Config", "PluginConfig"), "config class"


# -- documentation


@pytest.mark.parametrize("hook", HOOK_NAMES)
def test_hook_is_documented_and_tested(hook: str) -> None:
    text = getattr(Hooks, hook).__doc__ or ""
    assert re.match(r"(Event|Seam)\b", text), "says what it is"
    loop = import_module("nexus_core.events").__doc__ or ""
    assert hook.upper() in loop, "has its place in the loop"
    assert re.search(rf"def {hook}\(|\b{hook}\b", TESTS), "is tested"


def modules() -> list[str]:
    found = []
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found.append(".".join(part for part in parts if part != "__init__"))
    return sorted(found)


@pytest.mark.parametrize("module", modules())
def test_public_names_exist_and_are_documented(module: str) -> None:
    if module.startswith("nexus_plugins_contrib."):
        name = module.rpartition(".")[2]
        pytest.importorskip(VENDORS.get(name, name))
    found = import_module(module)
    assert found.__doc__
    for name in getattr(found, "__all__", ()):
        value = getattr(found, name)
        if callable(value) and value.__module__ == module:
            assert value.__doc__, f"{module}.{name} needs a docstring"


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    stub = (ROOT / "nexus_core/__init__.pyi").read_text()
    assert sorted(re.findall(r"import \w+ as (\w+)", stub)) == sorted(nexus_core.__all__)
    assert all(hasattr(nexus_core, name) for name in nexus_core.__all__)


# -- what every installed plugin must be able to do


def loaded(name: str) -> type[Plugin[Any]]:
    """The plugin's class; skipped where its vendor's package is not installed."""
    module = installed()[name].value.partition(":")[0]
    if module.startswith("nexus_plugins_contrib."):
        pytest.importorskip(VENDORS.get(name, name))
    return load(name)


def settings_of(name: str) -> dict[str, Any]:
    """The first example of a plugin whose config has required keys; nothing for the others."""
    examples: list[dict[str, Any]] = (
        loaded(name).config_class.model_json_schema().get("examples", [{}])
    )
    return examples[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(400)))
    return path


def engine_with(name: str, corpus: Path, out: Path) -> Engine:
    """A tiny text run with the plugin in it, beside what it requires."""
    basis: dict[str, dict[str, Any]] = {
        "data_text": {"train": str(corpus), "seq_len": 32, "batch_size": 2},
        "model_nexus": {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16, "dropout": 0.1},
        "loss_lm": {},
        "optim_adamw": {},
    }
    wanted = [name]
    for needed in wanted:
        wanted += [other for other in loaded(needed).requires if other not in wanted]
    classes = {key: load(key) for key in (*basis, *wanted)}
    slots = {classes[key].slot for key in wanted} - {None}
    kept = [key for key in basis if key in wanted or classes[key].slot not in slots]
    names = dict.fromkeys([*kept, *wanted])
    plugins = [classes[key](**(basis.get(key) or settings_of(key))) for key in names]
    return Engine(plugins=plugins, seed=1, out=out, log_every=1, accumulate=2)


def train(engine: Engine, steps: int) -> None:
    for state in engine.steps(until="100000 steps", eval_every="3 steps", eval_data={}):
        if state.step == steps:
            break


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of a nested state, in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


LONG = {"compile", "mlflow", "trackio", "wandb"}  # seconds to compile, or to make a database


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in installed()]
)
def test_plugin_trains_two_steps_and_resumes_to_the_same_bits(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Four steps at once, and two and two with a snapshot between, end in the same state."""
    whole = engine_with(name, corpus, tmp_path / "whole")
    train(whole, 4)
    first = engine_with(name, corpus, tmp_path / "first")
    train(first, 2)
    snapshot = copy.deepcopy(first.state_dict())
    second = engine_with(name, corpus, tmp_path / "second")
    second.load_state_dict(snapshot)
    train(second, 4)
    one, other = whole.state_dict(), second.state_dict()
    for part in ("model", "optimizer", "plugins"):
        pairs = list(zip(tensors(one[part]), tensors(other[part]), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), f"{part} differs"
    assert one["metrics"].get("train/total_loss") == other["metrics"].get("train/total_loss")


@pytest.mark.parametrize("name", installed())
def test_plugin_refuses_unknown_keys_and_describes_its_own(name: str) -> None:
    plugin = loaded(name)
    with pytest.raises(ConfigError, match="unknown key"):
        plugin(**settings_of(name), no_such_key=1)
    undescribed = [k for k, f in plugin.config_class.model_fields.items() if not f.description]
    assert undescribed == []
    assert (plugin.__doc__ or "").strip()
