"""The rules of the code base: names, size limits, documentation, and what every plugin must do."""

from __future__ import annotations

import ast
import copy
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor

import nexus_core
from nexus_core import ConfigError, Engine, Plugin, PluginError
from nexus_core.events import Hooks
from nexus_core.plan import HOOK_NAMES, installed, load

ROOT = Path(__file__).parents[1]
PLUGINS = (ROOT / "plugins/nexus_plugins", ROOT / "nexus_plugins_contrib")
PACKAGES = (ROOT / "nexus_core", *PLUGINS)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VENDORS = {
    "optim_schedulefree": "schedulefree",
    "optim_adamw8bit": "bitsandbytes",
    "metrics": "torchmetrics",
    "model_hf": "transformers",
    "data_chat": "datasets",
    "data_hf": "datasets",
    "eval_harness": "lm_eval",
    "kernels": "torch",  # it runs without any of its packages
    "sweep": "optuna",
}
DECLARED: dict[str, str] = PYPROJECT["project"]["entry-points"]["nexus.plugins"]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*/test_*.py"))


def is_prose(node: ast.AST) -> bool:
    """Whether it is a docstring of a module, class, function or name."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def statements(path: Path) -> int:
    """The number of statements in a file. Docstrings are free, and dense lines gain nothing."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return sum(isinstance(node, ast.stmt) and not is_prose(node) for node in nodes)


def beyond(paths: Iterator[Path], budget: int) -> dict[str, int]:
    """The files that exceed a limit, except those that may."""
    found = {str(path.relative_to(ROOT)): statements(path) for path in paths}
    return {name: n for name, n in found.items() if n > LARGER.get(name, budget)}


# -- size and names

ENGINE = 230
"""Statements of engine.py, which should be readable in one sitting: the loop and nothing else."""
CORE = 2697
"""Statements of the core without commands, kit, bases and views: all that defines a run."""
FILE = 170
"""Statements per file. If you exceed it, split the file."""
FLAT = 115
"""Statements of a single-file plugin; a larger one becomes a folder."""
OWN_CODE = {"places.py": 133, "sources.py": 115, "images.py": 105, "signatures.py": 90}
"""Files that load user code, encode images as PNG, and show settings in editors and `help()`,
counted separately, since no step of the loop uses them."""
BASES = 703
"""Statements of the base classes for authors."""
VIEWS = 360
"""Statements of what displays a run, without affecting it."""
LARGER = {
    "nexus_core/bases/background.py": 200,
    "nexus_core/bases/loader.py": 172,
    "nexus_core/cli/profile.py": 300,
    "nexus_core/cli/verify_resume.py": 200,
    "nexus_core/engine.py": ENGINE,
    "nexus_core/testing/contract.py": 315,
    "plugins/nexus_plugins/_shared/checkpoints/folder.py": 200,
    "plugins/nexus_plugins/checkpoint/optimizer.py": 270,
    "plugins/nexus_plugins/checkpoint/plugin.py": 345,
    "plugins/nexus_plugins/data_text/dataset.py": 240,
    "plugins/nexus_plugins/data_text/formats.py": 310,
    "plugins/nexus_plugins/data_text/index.py": 180,
    "plugins/nexus_plugins/data_text/prepare.py": 255,
    "plugins/nexus_plugins/data_text/rows.py": 195,
    "plugins/nexus_plugins/data_text/stream.py": 210,
    "plugins/nexus_plugins/guard/plugin.py": 228,
    "plugins/nexus_plugins/model_nexus/operations.py": 242,
}
"""Limits of larger files, slightly above their size: they may shrink, but must not grow."""


def test_the_core_stays_small() -> None:
    core = ROOT / "nexus_core"
    beside = {"cli", "testing", "bases", "views"}
    own = [p for p in core.rglob("*.py") if not beside & set(p.parts)]
    assert statements(core / "engine.py") <= ENGINE
    assert sum(statements(p) for p in own if p.name not in OWN_CODE) <= CORE
    assert all(statements(core / name) <= most for name, most in OWN_CODE.items())
    assert sum(map(statements, (core / "bases").glob("*.py"))) <= BASES
    assert sum(map(statements, (core / "views").glob("*.py"))) <= VIEWS


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_file_stays_small(package: Path) -> None:
    assert beyond(package.rglob("*.py"), FILE) == {}
    if package in PLUGINS:
        assert beyond(package.glob("*.py"), FLAT) == {}


def test_files_beyond_the_line_are_there_and_beyond_it() -> None:
    """Fails if a file has shrunk: remove it from the list, so that it does not grow again."""
    assert [name for name in LARGER if statements(ROOT / name) <= FILE] == []


def test_plugins_folder_is_not_a_package() -> None:
    assert not (ROOT / "plugins/__init__.py").exists()


def test_entry_points_are_installed_as_declared() -> None:
    """Fails if pyproject.toml was edited and the package was not installed again."""
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


# -- who may modify and name what


def trees() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def is_engine(node: ast.AST) -> bool:
    """`engine`, `self.engine`, `self._engine`, ..."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return name.lstrip("_") == "engine"


def assigned(tree: ast.Module) -> Iterator[str]:
    """The attributes of an engine that a module assigns, deletes or sets by name."""
    for node in ast.walk(tree):
        stored = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
        by_name = isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr")
        owner = node.value if stored else node.args[0] if by_name else None
        if owner is not None and is_engine(owner):
            yield ast.unparse(node)


def test_the_engine_alone_assigns_its_attributes() -> None:
    """Fails if state of the engine is changed outside it, invisible to readers of the loop."""
    found = {path: list(assigned(tree)) for path, tree in trees()}
    assert {path: names for path, names in found.items() if names} == {}


def untyped(tree: ast.Module) -> Iterator[str]:
    """Plugins whose settings mypy does not see, and defaults that type checkers ignore."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Plugin"):
            bases = [ast.unparse(base) for base in node.bases]
            own = any(re.search(r"\[(?!Plugin)\w*Config\]", base) for base in bases)
            if own and "config_class = " not in "\n".join(map(ast.unparse, node.body)):
                yield node.name
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field" and node.args:
            yield ast.unparse(node)


def test_settings_are_seen_by_type_checkers() -> None:
    """Fails if `config_class = ...` is missing, or a default has no `default=`."""
    found = {path: list(untyped(tree)) for path, tree in trees()}
    assert {path: names for path, names in found.items() if names} == {}
    wrong = "class APlugin(Plugin[AConfig]): a: int = Field(1)"
    assert len(list(untyped(ast.parse(wrong)))) == 2


def test_assignments_to_an_engine_are_seen() -> None:
    wrong = (
        "engine.a = 1; engine.b += 1; self._engine.c, x = 1, 2; setattr(engine, 'd', 1)\n"
        "engine.e: int = 1\nfor engine.f in x: del engine.g\nengine.model.fine = engine.fine\n"
    )
    assert len(list(assigned(ast.parse(wrong)))) == 7


WORDS = {
    *("checkpoint", "clip", "compile", "console", "curriculum", "data", "diagnose", "freeze"),
    *("guard", "init", "loss", "metrics", "model", "offload", "optim", "recompute", "schedule"),
    "sample",
    "worth",
    *("checkpoint", "clip", "compile", "console", "curriculum", "data", "deterministic"),
    *(
        "diagnose",
        "freeze",
        "kernels",
        "guard",
        "init",
        "loss",
        "metrics",
        "model",
        "offload",
        "optim",
        "recompute",
        "schedule",
    ),
    "throughput",
}
"""Plugin names that are also ordinary words: they only count where used as names."""
PARTS = {"data", "loss", "model", "sample"}
"""Those that the core uses for parts of a run: a slot, an entry, a term, a unit."""
KINDS = {
    **{"nexus_core/events.py": {"compile"}, "nexus_core/cli/new.py": {"schedule"}},
    **{f"nexus_core/{name}.py": {"metrics"} for name in ("engine", "snapshot", "cli/session")},
    "nexus_core/testing/states.py": {"metrics"},
    **{f"nexus_core/cli/{n}.py": {"metrics"} for n in ("records", "runs", "compare/command")},
}
"""Other uses of these words: a stage, a kind of plugin, a part of snapshots."""


def naming() -> re.Pattern[str]:
    """Matches text that names an installed plugin: its name, class, a setting or an option."""
    classes = {}
    for name in DECLARED:
        try:
            classes[name] = load(name)
        except PluginError:  # its vendor's package is missing: only the name is known
            continue
    some, names = "|".join(DECLARED.keys() - WORDS), "|".join(DECLARED)
    settings = [f"{n}\\.{key}" for n, c in classes.items() for key in c.config_class.model_fields]
    ways = [
        rf"(?<![\w.])(?:{some})(?!\w)",
        rf"(?:no:|--plugins[ =])(?:{names})\b",
        rf"\b(?:{'|'.join(c.__name__ for c in classes.values())})\b",
        rf"NEXUS_(?:{names.upper()})__",
        rf"(?<![\w.])(?:{'|'.join(settings)})\b",
    ]
    return re.compile("|".join(ways))


def test_the_core_names_no_plugin() -> None:
    """Fails if the core, its commands or templates know a plugin: ask for a hook or a slot."""
    pattern, found = naming(), []
    for path, tree in trees():
        if not path.startswith("nexus_core/"):
            continue
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        for text in (text for text in texts if isinstance(text, str)):
            same = text in DECLARED.keys() - PARTS - KINDS.get(path, set())
            found += [f"{path}: {match[0]}" for match in pattern.finditer(text)] + [path] * same
    for template in (ROOT / "nexus_core/cli/templates").glob("*"):
        found += [
            f"{template.name}: {match[0]}" for match in pattern.finditer(template.read_text())
        ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["add --plugins clip", "no:guard", "set checkpoint.every=5", "NEXUS_CONSOLE__QUIET=1",
     "the plugin auto_accumulate", "ClipPlugin(max_norm=1)", "ema"],
)  # fmt: skip
def test_a_name_of_a_plugin_is_seen(text: str) -> None:
    assert naming().search(text)


def test_plugins_hardly_name_their_neighbours() -> None:
    """Fails if order depends on plugin names again: use stages (nexus_core.events.STAGES)."""
    places = [load(name) for name in DECLARED if not is_missing(name)]
    named = [(p.name, other) for p in places for other in (*p.before, *p.after)]
    assert len(named) < 5, named


PUBLIC = ("docs", "examples", "benchmarks", ".github")
PROSE = (*ROOT.glob("*.md"), *(p for name in PUBLIC for p in (ROOT / name).rglob("*.[mp][dy]")))
BANNED = re.compile(
    r"\bh[au]ngs? on\b|(?<!there )\bis none\b|\bat hand\b|\bof yours\b|\b[Mm]end(s|ed|ing)?\b"
    r"|\bin vain\b"
    r"|\b[Ww]ithout a word\b|\bthe way;|\b(go|goes|went) on\b(?! the command line)"
    r"|\bheld against\b|\bcomes? apart\b|\b(has|have) a hand in\b|\bin other bits\b|\bas ever\b"
    r"|\bis got\b|\bthaw(s|ed)?\b|\bwould do nothing\b|\bin one run with\b|\bin silence\b"
    r"|\btold apart\b|\bfor ever\b|(?<!mis)\btaken for\b|\bbehind the other\b"
)
"""Phrases that readers stumble over; use the field's words."""


def prose(path: Path) -> Iterator[str]:
    """The prose of a file: whole pages; of code the comments, docstrings and other texts."""
    text = path.read_text()
    if path.suffix != ".py":
        yield text
        return
    yield re.sub(r"\n *# ", " ", "\n".join(re.findall(r"#.*", text)))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_prose_is_plain() -> None:
    paths = [p for package in PACKAGES for p in package.rglob("*.py")] + list(PROSE)
    found = [
        f"{path.relative_to(ROOT)}: ...{text[max(0, match.start() - 30) : match.end() + 20]}..."
        for path in paths
        for text in (re.sub(r"\s+", " ", text) for text in prose(path))
        for match in BANNED.finditer(text)
    ]
    assert found == []


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
        name = module.split(".")[1]
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


# -- requirements for every installed plugin


def loaded(name: str) -> type[Plugin[Any]]:
    """The plugin's class; skipped where its vendor's package is not installed."""
    module = installed()[name].value.partition(":")[0]
    if module.startswith("nexus_plugins_contrib."):
        pytest.importorskip(VENDORS.get(name, name))
    return load(name)


def is_missing(name: str) -> bool:
    """Whether the plugin's vendor's package is not installed."""
    try:
        load(name)
    except PluginError:
        return True
    return False


CHATS = ROOT / "tests/core/tiny_chats"
STREAMED = {"train": str(CHATS / "chats.jsonl"), "tokenizer": str(CHATS), "seq_len": 48,
            "batch_size": 2, "valid_share": 0.0, "streaming": True}  # fmt: skip
PLACED: dict[str, dict[str, Any]] = {
    "data": {"call": "called:text", "batch_size": 2},
    "loss": {"call": "called:next_id", "units": "called:labels"},
    "data_chat": STREAMED,
    "data_hf": STREAMED,
    "loss_distill": {
        "teacher": {
            "call": "nexus_plugins.model_nexus:NEXUSCore",
            "args": {"vocab_size": 300, "d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16},
        }
    },
    "mfu": {"peak": 1e12},
    "model": {"call": "nexus_core.testing:tiny_model", "args": {"vocabulary": 300}},
    "peft": {"dropout": 0.1},
    "model_hf": {"path": str(ROOT / "tests/core/tiny_llama"), "weights": "random"},
}
"""Settings for plugins whose examples name user code or files, or are slow."""


ON_PAIRS: dict[str, Any] = {"data": {"call": "called:pairs", "batch_size": 2}}
"""Data for losses of pairs of answers, instead of text."""


@cache
def settings_of(name: str) -> dict[str, Any]:
    """The first example of a plugin's config; empty if it has none."""
    if name in PLACED:
        return PLACED[name]
    examples: list[dict[str, Any]] = (
        loaded(name).config_class.model_json_schema().get("examples", [{}])
    )
    return examples[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(400)))
    return path


OF_NEXUS = {"loss_causal", "loss_energy", "loss_reason", "loss_world", "model_nexus", "worth"}
"""Plugins that need NEXUS modules; a smaller model is enough for the others."""
SMALL_NEXUS = {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16, "dropout": 0.1,
               "reason": True, "causal": True}  # fmt: skip


def engine_with(name: str, corpus: Path, out: Path) -> Engine:
    """A tiny text run with the plugin and its requirements."""
    model = {"model_nexus": SMALL_NEXUS} if name in OF_NEXUS else {"model": PLACED["model"]}
    basis: dict[str, dict[str, Any]] = {
        "data_text": {"train": str(corpus), "seq_len": 32, "batch_size": 2},
        **model,
        "loss_lm": {},
        "optim_adamw": {},
    }
    wanted = [name, *(ON_PAIRS if name == "loss_dpo" else ())]
    if name == "loss_dpo":
        basis = {**basis, **ON_PAIRS}
        del basis["loss_lm"]
    for needed in wanted:
        wanted += [other for other in loaded(needed).requires if other not in wanted]
    classes = {key: load(key) for key in (*basis, *wanted)}
    slots = {classes[key].slot for key in wanted} - {None}
    kept = [key for key in basis if key in wanted or classes[key].slot not in slots]
    names = dict.fromkeys([*kept, *wanted])
    own = settings_of(name)
    if "source" in own:  # weights to start from
        begun = [classes[key](**basis[key]) for key in kept if key != name]
        own = {"source": str(out / "begun.safetensors")}
        out.mkdir()
        save_model(Engine(plugins=begun, seed=2).model, own["source"])
    given = {**basis, name: own | basis.get(name, {})}  # small sizes, whatever its example has
    plugins = [classes[key](**(given.get(key) or settings_of(key))) for key in names]
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


LONG = {"compile", "mlflow", "trackio", "wandb"}  # seconds to compile, or to create a database


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in installed()]
)
def test_plugin_trains_two_steps_and_resumes_to_the_same_bits(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Four steps, and two and two with a snapshot in between, end in the same state."""
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
