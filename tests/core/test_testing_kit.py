"""The rest of the kit: fake distributions, tiny runs, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, files, version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from nexus_core import PluginError
from nexus_core.cli.plugins import main as nexus_plugins
from nexus_core.plan import installed, load
from nexus_core.testing import fake_distribution, tiny_data, tiny_engine, tiny_model
from nexus_plugins.ema import EmaPlugin
from nexus_plugins.loss_lm import LossLmPlugin

SPARKLE = """
from pydantic import Field
from nexus_core import Plugin, PluginConfig, hookimpl

class SparkleConfig(PluginConfig):
    '''Settings.'''
    strength: float = Field(0.5, gt=0, description="factor of the loss")
    stops: bool = Field(False, description="whether it fails in the first step")

class SparklePlugin(Plugin[SparkleConfig]):
    '''Does nothing, quickly.'''
    @hookimpl
    def on_step(self):
        if self.config.stops:
            raise OSError("planted")
"""


@pytest.fixture
def sparkle() -> Iterator[Path]:
    """A third-party plugin, installed for one test."""
    plugins = {"sparkle": "sparkle_of_the_test:SparklePlugin"}
    modules = {"sparkle_of_the_test": SPARKLE}
    with fake_distribution("nexus-sparkle", plugins, modules=modules, version="1.2") as folder:
        yield folder


def test_a_fake_distribution_is_found_by_metadata_and_gone_after() -> None:
    """Fails if metadata differs from a real installation, or the distribution stays behind."""
    extra = {"nexus.commands": {"shine": "twinkle:main"}}
    before = list(sys.path)
    with fake_distribution(
        "nexus-sparkle", {"sparkle": "twinkle:SparklePlugin"},
        modules={"twinkle": SPARKLE}, version="1.2", entry_points=extra,
    ) as folder:  # fmt: skip
        entry = installed()["sparkle"]
        assert entry.dist is not None
        assert (entry.dist.name, version("nexus-sparkle")) == ("nexus-sparkle", "1.2")
        assert folder / "twinkle.py" in [path.locate() for path in files("nexus-sparkle") or []]
        assert [e.value for e in entry_points(group="nexus.commands", name="shine")]
        assert load("sparkle").name == "sparkle"
    assert sys.path == before
    assert "twinkle" not in sys.modules
    assert not folder.exists()
    with pytest.raises(PackageNotFoundError):
        version("nexus-sparkle")
    with pytest.raises(PluginError, match="no plugin named 'sparkle'"):
        load("sparkle")


def test_a_fake_distribution_goes_when_the_test_fails_and_gives_modules_back() -> None:
    """Fails if one failing test makes others fail after it."""
    modules = {"json": "x = 1"}
    failing = fake_distribution("nexus-sparkle", {"sparkle": "json:Sparkle"}, modules=modules)
    with failing, pytest.raises(AttributeError, match="loads"):
        import_module("json").loads("[1]")
    assert import_module("json").loads("[1]") == [1]
    assert "sparkle" not in installed()


def test_a_tiny_engine_trains_at_once_and_the_same_each_time() -> None:
    """Fails if the tiny run learns nothing, or depends on earlier tests."""
    engine = tiny_engine()
    early = engine.fit(until="3 epochs").metrics["train/total_loss"]
    assert engine.fit(until="30 epochs").metrics["train/total_loss"] < 0.9 * early
    weights = []
    for _ in range(2):
        torch.rand(3)
        engine = tiny_engine()
        engine.fit(until="4 steps", eval_every="2 steps")
        weights.append(list(engine.model.parameters()))
    assert all(map(torch.equal, *weights))
    assert {"val/loss", "val/tiny_next_loss", "val/tiny_size_loss"} <= engine.metrics.keys()


def test_a_tiny_engine_takes_parts_of_others() -> None:
    """Fails if a plugin's own model, data, loss or average cannot be used in it."""
    torch.manual_seed(0)
    model = tiny_model(vocabulary=50, dropout=0.0)
    ema = EmaPlugin()
    engine = tiny_engine(ema, LossLmPlugin(), model=model)
    result = engine.fit(tiny_data(rows=8, batch_size=2, vocabulary=50, length=6), until="1 epoch")
    assert engine.model is model
    assert (result.step, result.tokens) == (4, 8 * 6)
    assert ema.weights().keys() == dict(model.named_parameters()).keys()
    assert "train/lm_loss" in result.metrics


def check(*arguments: str) -> Result:
    return CliRunner().invoke(nexus_plugins, ["check", *arguments])


@pytest.mark.usefixtures("sparkle")
def test_check_prints_a_line_for_each_check(tmp_path: Path) -> None:
    """Fails if the output does not show which checks ran, with which settings."""
    settings = tmp_path / "sparkle.yaml"
    settings.write_text("strength: 2.0\n")
    only = "config_is_strict,device_is_not_waited_for,off_is_absent"
    result = check("sparkle", "--config", str(settings), "--config", "{}", "--only", only)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "sparkle (nexus-sparkle 1.2, sparkle_of_the_test:SparklePlugin)",
        "pass  device is not waited for (config 0)",
        "      runs on an accelerator: yes; device syncs: never",
        "pass  device is not waited for (config 1)",
        "      runs on an accelerator: yes; device syncs: never",
        "pass  config is strict (config 0)",
        "pass  config is strict (config 1)",
        "skip  off is absent",
        "      it declares no settings (off) that leave training unchanged",
        "4 passed, 0 failed, 1 skipped",
    ]


@pytest.mark.usefixtures("sparkle")
def test_check_says_why_a_check_fails() -> None:
    """Fails if a failing plugin passes in CI, or the output has no reason."""
    result = check("sparkle", "--config", '{"stops": true}', "--only", "trains")
    assert result.exit_code == 1
    assert "FAIL  trains (accumulate 1)" in result.output
    assert "OSError: planted [plugin 'sparkle', on_step, step 1]" in result.output
    assert "Traceback" not in result.output
    assert "0 passed, 2 failed, 0 skipped" in result.output


def test_check_puts_a_plugin_beside_what_it_needs() -> None:
    """Fails if a loss of a module cannot be checked without a test file."""
    alone = check("loss_causal", "--only", "trains")
    assert (alone.exit_code, "needs a model whose output has" in alone.output) == (1, True)
    sizes = (
        '{"vocab_size": 13, "d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16, "causal": true}'
    )
    beside = check("loss_causal", "--only", "trains", "--beside", f'{{"model_nexus": {sizes}}}')
    assert (beside.exit_code, "2 passed" in beside.output) == (0, True), beside.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparkel"], "no plugin named 'sparkel'. Did you mean 'sparkle'"),
        (["sparkle", "--config", "gone.yaml"], "'gone.yaml' is neither a file nor JSON"),
        (["sparkle", "--config", "{not json"], "cannot be read"),
        (["sparkle", "--config", '{"strenght": 1}'], "Did you mean 'strength'"),
        (["sparkle", "--beside", '{"clpi": {}}'], "no plugin named 'clpi'"),
        (["sparkle", "--only", "train"], "unknown check 'train'. Did you mean 'trains'"),
    ],
)
@pytest.mark.usefixtures("sparkle")
def test_a_wrong_command_is_one_message(arguments: list[str], message: str) -> None:
    """Fails if a mistyped command looks like a plugin's fault, or shows a traceback."""
    result = check(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert "pass" not in result.output


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("@hookimpl\n    def on_stepp(self): 0", "Did you mean 'on_step'?"),
        ("@hookimpl\n    def on_step(self, stp): 0", "Did you mean 'step'?"),
        ("def on_step(self): 0", "mark it @hookimpl"),
    ],
)
def test_a_wrong_hook_is_reported_once(method: str, message: str, tmp_path: Path) -> None:
    """Fails if every check repeats it."""
    file = tmp_path / "odd.py"
    head = "from nexus_core import Plugin, PluginConfig, hookimpl"
    file.write_text(f"{head}\nclass OddPlugin(Plugin[PluginConfig]):\n    {method}\n")
    result = check(str(file))
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert result.output.startswith("error: plugin 'odd'")
    assert message in result.output


@pytest.mark.slow
def test_pytest_finds_the_checks_of_a_subclass(sparkle: Path, tmp_path: Path) -> None:
    """Fails if the class in an author's test file is not collected, or failures are lost."""
    (tmp_path / "test_sparkle.py").write_text(
        "from nexus_core.testing import PluginContract\n"
        "class TestSparkle(PluginContract):\n"
        "    plugin = 'sparkle'\n"
        "    configs = ({}, {'stops': True})\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v",
               "-k", "trains or strict or described or off", str(tmp_path)]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(sparkle)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("test_sparkle.py::")]
    found = {line.split("::")[-1].split()[0]: line.split()[1] for line in told}
    assert found == {
        "test_trains[0-accumulate-1]": "PASSED",
        "test_trains[0-accumulate-3]": "PASSED",
        "test_trains[1-accumulate-1]": "FAILED",
        "test_trains[1-accumulate-3]": "FAILED",
        "test_config_is_strict[0]": "PASSED",
        "test_config_is_strict[1]": "PASSED",
        "test_config_is_described": "PASSED",
        "test_off_is_absent": "SKIPPED",
    }
