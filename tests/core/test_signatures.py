"""How type checkers, editors and `help()` show a plugin's settings."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from nexus_core import IntervalField, Plugin, PluginConfig, PluginError
from nexus_core.cli.new import package_files
from nexus_core.errors import ConfigError
from nexus_core.plan import AnyPlugin, installed, load
from tiny import tiny_engine

ROOT = Path(__file__).parents[2]
WRONG = '''
ClipPlugin(max_nrom=1.0)
ClipPlugin(max_norm="1.0")
ClipPlugin(by="length")
ClipPlugin(1.0)
ClipPlugin(EmaPlugin().config)
ClipPlugin(spare=3)
ClipPlugin.labelled("late")(max_nrom=1.0)
CheckpointPlugin(every="50 steps", keep_lats=3)
CheckpointPlugin(keep_last="all")
CheckpointPlugin(mode="maximum")
CheckpointPlugin(best=1)
EmaPlugin(decay=None)
EmaPlugin(evaluate="never")
LrCosinePlugin(min_lr="1e-5")
LrCosinePlugin(warm_up="10%")
ModelPlugin()
LossLmPlugin(label_smoothing=[0.1])
OptimAdamwPlugin(weight_decay=(0.1,))
SparklePlugin(size="big")
SparklePlugin(sise=1.0)
'''.strip()  # fmt: skip
RIGHT = '''
ClipPlugin(ClipConfig(max_norm=1))
ClipPlugin(spare=["head.*"])
ClipPlugin.labelled("late")(max_norm=0.5).config.max_norm + 1.0
CheckpointPlugin(every=Interval(5, "steps"), keep_every=timedelta(minutes=5))
CheckpointPlugin(every=500, best=None)
LrCosinePlugin(warmup="10%", min_lr=0)
LrTorchPlugin(scheduler="StepLR", settings={"step_size": 3})
FreezePlugin(rules=[{"match": "head.*"}])
DataTextPlugin(train=[{"path": "a.txt", "weight": 2.0}], cache_dir=Path("x"))
LossPlugin(call="cross_entropy", metrics={"accuracy": "./net.py:accuracy"}, units="./x.py:y")
OptimAdamwPlugin(betas=(0.9, 0.95), groups=[{"match": "a", "lr_factor": 1.0}])
SparklePlugin(size=2, every="10 steps")
SparklePlugin(SparkleConfig(size=2))
SparklePlugin().config.size + 1.0
'''.strip()  # fmt: skip
HEAD = """
from datetime import timedelta
from pathlib import Path
from typing import Any

from nexus_core import Interval
from nexus_plugins.clip import ClipConfig
from mine import SparkleConfig, SparklePlugin
"""
MINE = '''
from nexus_core import IntervalField, Plugin, PluginConfig
from pydantic import Field

class SparkleConfig(PluginConfig):
    """Settings of sparkle."""

    size: float = Field(default=1.0, gt=0, description="how large, in pixels")
    every: IntervalField | None = Field(default=None, description="how often")

class SparklePlugin(Plugin[SparkleConfig]):
    """Sparkles."""

    config_class = SparkleConfig
'''
MYPY = f"""
[mypy]
strict = true
follow_imports = silent
mypy_path = {ROOT}:{ROOT / "plugins"}
namespace_packages = true
explicit_package_bases = true
[mypy-torch.*,numpy.*,transformers.*,datasets.*,tokenizers.*,peft.*,wandb.*,mlflow.*,tensorboard.*]
follow_imports = skip
"""
"""A user's configuration, without pydantic's plugin; large unrelated packages are skipped."""


def first_party() -> dict[str, type[AnyPlugin]]:
    """The plugins of this distribution that can be loaded, by class name."""
    found = {}
    for name in installed():
        try:
            plugin = load(name)
        except PluginError:  # without its vendor's package
            continue
        found[plugin.__name__] = plugin
    return found


def of_defaults(plugin: type[AnyPlugin]) -> str:
    """A call that passes every setting in its config-file form."""
    fields = plugin.config_class.model_fields
    examples = plugin.config_class.model_json_schema().get("examples", [{}])
    if any(field.is_required() for field in fields.values()) and not examples[0]:
        pytest.fail(f"{plugin.__name__} has required settings, and its config no example")
    settings = examples[0]
    if plugin.__init__ is Plugin.__init__ and plugin.__post_init__ is Plugin.__post_init__:
        settings = plugin(**examples[0]).config.model_dump(mode="json")
    return f"{plugin.__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def in_docs(names: set[str]) -> Iterator[str]:
    """Every call of a first-party plugin class in pages and examples."""
    texts = [path.read_text() for path in ROOT.glob("examples/*.py")]
    for page in (*ROOT.glob("docs/**/*.md"), ROOT / "README.md"):
        texts += re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    for text in texts:
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a fragment with an ellipsis
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names:
                yield ast.unparse(node)


def program(calls: str, imports: str) -> str:
    """The calls as a program; other names are of type Any."""
    used = {node.id for node in ast.walk(ast.parse(calls)) if isinstance(node, ast.Name)}
    known = set(re.findall(r"\w+", imports + HEAD)) | set(dir(builtins))
    return f"{imports}{HEAD}\n" + "".join(f"{name}: Any = None\n" for name in used - known) + calls


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with right.py, wrong.py, third-party plugins, and checker settings."""
    folder, plugins = tmp_path_factory.mktemp("typed"), first_party()
    imports = "from glimmer import GlimmerPlugin\n"
    imports += "".join(f"from {c.__module__} import {n}\n" for n, c in plugins.items())
    calls = [*in_docs(set(plugins)), *map(of_defaults, plugins.values()), RIGHT]
    made = package_files("glimmer")["src/glimmer/plugin.py"]
    (folder / "glimmer.py").write_text(made)
    (folder / "mine.py").write_text(MINE)
    right = "\n".join([*dict.fromkeys(calls), "GlimmerPlugin(decay=0.5)"])
    (folder / "right.py").write_text(program(right, imports))
    wrong = f"{WRONG}\nGlimmerPlugin(dekay=0.5)\n"
    (folder / "wrong.py").write_text(program(wrong, imports))
    (folder / "mypy.ini").write_text(MYPY)
    settings = {"extraPaths": [str(ROOT), str(ROOT / "plugins")], "reportUnusedExpression": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    return folder


def check(told: str, folder: Path) -> None:
    """Check that every wrong call is reported once, and nothing else."""
    faults = re.findall(r"(\w+)\.py:(\d+)(?::\d+)*(?: -|:) error: (.*)", told)
    assert [fault for fault in faults if fault[0] != "wrong"] == [], told
    lines = (folder / "wrong.py").read_text().splitlines()
    wrong = [*WRONG.splitlines(), "GlimmerPlugin(dekay=0.5)"]
    assert sorted({lines[int(line) - 1] for _, line, _ in faults}) == sorted(wrong), told
    assert any("max_nrom" in said for _, _, said in faults)


@pytest.mark.slow
def test_mypy_tells_wrong_settings_and_no_others(programs: Path) -> None:
    pytest.importorskip("mypy")
    cache = ROOT / ".mypy_cache/of_settings"
    command = ["-m", "mypy", "--cache-dir", str(cache), "right.py", "wrong.py"]
    done = subprocess.run([sys.executable, *command], cwd=programs, capture_output=True, text=True)
    check(done.stdout + done.stderr, programs)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_tells_wrong_settings_and_no_others(programs: Path) -> None:
    command = [sys.executable, "-m", "pyright", "-p", "pyrightconfig.json", "--pythonpath"]
    done = subprocess.run([*command, sys.executable], cwd=programs, capture_output=True, text=True)
    check(done.stdout, programs)


class TwinkleConfig(PluginConfig):
    """Settings of a third-party plugin."""

    size: float = Field(default=1.5, gt=0, description="how large, in pixels")
    place: str = Field(description="where")
    every: IntervalField | None = Field(default="10 steps", description="how often")


class TwinklePlugin(Plugin[TwinkleConfig]):
    """Twinkles."""

    def __post_init__(self) -> None:
        self.area = self.config.size**2


def test_help_tells_the_settings() -> None:
    told = pydoc.render_doc(TwinklePlugin, renderer=pydoc.plaintext)
    head = "TwinklePlugin(*, size: float = 1.5, place: str, every: Interval | None = '10 steps')"
    joined = re.sub(
        r"\n \| +|\s", "", told
    )  # from Python 3.14 on, a long signature takes several lines
    assert re.sub(r"\s", "", head) in joined
    assert "size: float > 0, default 1.5\n |          how large, in pixels" in told
    assert "place: str, required\n |          where" in told
    late = TwinklePlugin.labelled("late")
    assert late.__doc__ == TwinklePlugin.__doc__
    assert inspect.signature(late) == inspect.signature(TwinklePlugin)
    assert Plugin.__doc__ is not None
    assert "Settings:" not in Plugin.__doc__


def test_preparation_sees_the_settings_however_they_were_given() -> None:
    assert TwinklePlugin(size=2.0, place="a").area == 4
    assert TwinklePlugin(TwinkleConfig(size=3.0, place="a")).area == 9
    with pytest.raises(ConfigError, match=r"twinkle\.place"):
        TwinklePlugin(size=2.0)
    with pytest.raises(ConfigError, match="by name.*or a TwinkleConfig, not both"):
        TwinklePlugin(TwinkleConfig(place="a"), size=2.0)


class Tree(BaseModel):
    """Settings that contain settings of the same kind."""

    branches: list[Tree] = []


class TreeConfig(PluginConfig):
    """Settings that are hard to display."""

    tree: Tree = Tree()
    width: int = 3
    area: int = Field(default_factory=lambda given: given["width"] ** 2)


class TreePlugin(Plugin[TreeConfig]):
    """Has them."""


def test_settings_that_hold_themselves_or_follow_from_others_are_shown() -> None:
    """Fails if valid settings cause an error in help(), `nexus-plugins show` or an engine."""
    told = pydoc.render_doc(TreePlugin, renderer=pydoc.plaintext)
    assert told.count("branches: list[Tree]") == 1
    assert "area: int, default computed" in told
    assert tiny_engine(TreePlugin(width=5)).plugins["tree"].config.area == 25


def test_an_own_constructor_shows_its_own_signature() -> None:
    class OwnPlugin(TwinklePlugin):
        def __init__(self, thing: int, /, **settings: object) -> None:
            super().__init__(**settings)

    assert "thing" in inspect.signature(OwnPlugin).parameters
    assert OwnPlugin(3, place="a").config.place == "a"
