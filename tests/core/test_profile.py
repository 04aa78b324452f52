"""`nexus-run --profile`: costs are attributed correctly, numbers add up, training is unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from torch import Tensor

from nexus_core import Engine, Plugin, PluginConfig, ResumableLoader, RunData, hookimpl
from nexus_core.cli.profile import Profiler
from nexus_core.cli.run import main as nexus_run
from nexus_core.plan import arrange
from tiny import Regression, SquaredPlugin, tiny_engine, weights

MIB = 2**20


class HoarderPlugin(Plugin[PluginConfig]):
    """Allocates 3 MiB of tensors per step, and keeps 1 MiB."""

    kept: Tensor

    @hookimpl
    def on_step(self) -> None:
        self.kept = torch.zeros(MIB // 4)
        _ = torch.ones(MIB // 4) + 1


class PeekerPlugin(Plugin[PluginConfig]):
    """Reads a tensor's value three times per step."""

    @hookimpl
    def after_backward(self, engine: Engine) -> None:
        norm = next(engine.model.parameters()).norm()
        if norm > 0:  # the first place
            norm.item()
        norm.view(1).tolist()


class WrapperPlugin(Plugin[PluginConfig]):
    """Wraps two seams, and passes on their answers."""

    @hookimpl(wrapper=True)
    def forward(self) -> Generator[None, Any, Any]:
        return (yield)

    @hookimpl(wrapper=True)
    def loss_terms(self) -> Generator[None, Any, Any]:
        answers = yield
        return answers


class RowsPlugin(Plugin[PluginConfig]):
    """Provides the data."""

    @hookimpl
    def make_data(self) -> RunData:
        data = ResumableLoader(Regression(), batch_size=4)
        return RunData(data, {"val": data})


def profiled(*plugins: Plugin[Any], until: str = "4 steps", trace: Path | None = None) -> Any:
    """A profiled run of the tiny problem: the engine and the profiler."""
    profiler = Profiler(trace)
    everyone = [SquaredPlugin(), RowsPlugin(), *plugins]
    profiler.watch(arrange(everyone))
    torch.manual_seed(3)
    plain = tiny_engine()
    engine = Engine(plain.model, plain.optimizer, plugins=everyone, seed=5, log_every=3)
    profiler.attach(engine)
    engine.fit(until=until)
    profiler.stop()
    return engine, profiler


def test_who_takes_memory_is_named() -> None:
    """Fails if a plugin's tensors are not counted, counted twice, or charged to another."""
    _, profiler = profiled(HoarderPlugin())
    row = profiler.rows["hoarder", "on_step"]
    assert row.calls == 4
    assert row.allocated == 4 * 3 * MIB
    assert row.kept == 4 * MIB
    assert profiler.rows["squared", "loss_terms"].allocated < MIB
    assert re.search(r"on_step +hoarder .* 3\.000 +1\.000 +0\n", profiler.report())


def test_who_waits_for_the_device_is_named_with_the_place() -> None:
    """Fails if a hidden sync is missed, counted twice, or its line is not the plugin's."""
    _, profiler = profiled(PeekerPlugin())
    sync = profiler.syncs["peeker", "after_backward"]
    assert (sync.count, sync.function) == (4 * 3, "bool")
    path, _, line = sync.place.rpartition(":")
    assert Path(path) == Path(__file__)
    assert "the first place" in Path(__file__).read_text().splitlines()[int(line) - 1]
    assert list(profiler.syncs) == [("peeker", "after_backward")]
    assert "peeker, after_backward: 12, first bool at" in profiler.report()


def test_a_loop_that_looks_at_nothing_has_no_syncs() -> None:
    """Fails if the table reports syncs that did not happen."""
    _, profiler = profiled(HoarderPlugin())
    assert dict(profiler.syncs) == {}
    assert "No plugin was seen reading" in profiler.report()


def test_the_numbers_add_up_to_the_whole() -> None:
    """Fails if time is lost or counted twice: rows, phases and overhead must add up."""
    _, profiler = profiled(HoarderPlugin(), PeekerPlugin(), WrapperPlugin(), until="30 steps")
    for parts in ([row.seconds for row in profiler.rows.values()], profiler.phases.values()):
        assert sum(parts) + profiler.cost == pytest.approx(profiler.whole, rel=0.01)
        assert min(parts) >= 0
    assert 0 < profiler.cost < profiler.whole
    wanted = {"data wait", "forward", "losses", "backward", "optimizer", "evaluation", "the loop"}
    assert wanted <= profiler.phases.keys()


def test_weights_are_the_same_with_and_without() -> None:
    """Fails if measuring changes the training."""
    engine, _ = profiled(HoarderPlugin(), PeekerPlugin(), WrapperPlugin())
    plain = tiny_engine(HoarderPlugin(), PeekerPlugin(), WrapperPlugin())
    data = ResumableLoader(Regression(), batch_size=4)
    plain.fit(data, until="4 steps", eval_data=data)
    assert all(torch.equal(*pair) for pair in zip(weights(engine), weights(plain), strict=True))
    assert engine.metrics == plain.metrics


def test_a_wrapper_sees_answers_and_errors_as_before() -> None:
    """Fails if an error of the model does not pass through a measured wrapper."""

    class FaultPlugin(Plugin[PluginConfig]):
        """Fails in the forward pass."""

        @hookimpl
        def forward(self) -> None:
            raise ZeroDivisionError("planted")

    class RescuePlugin(Plugin[PluginConfig]):
        """Reports the error it saw."""

        seen = ""

        @hookimpl(wrapper=True)
        def forward(self) -> Generator[None, Any, Any]:
            try:
                return (yield)
            except ZeroDivisionError as error:
                self.seen = str(error)
                raise

    rescue = RescuePlugin()
    with pytest.raises(ZeroDivisionError) as raised:
        profiled(rescue, FaultPlugin())
    assert rescue.seen == "planted"
    assert "plugin 'fault', forward, step 0" in raised.value.__notes__


def test_the_trace_holds_our_events(tmp_path: Path) -> None:
    """Fails if the trace is not JSON, or only has torch's operators."""
    path = tmp_path / "trace.json"
    profiled(HoarderPlugin(), trace=path)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    wanted = {"on_step/hoarder", "backward/the core", "loss_terms/squared", "data wait/the core"}
    assert wanted <= names


# -- the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small corpus and a config for it."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
    config = {
        "until": "4 steps",
        "plugins": {
            "data_text": {
                "train": "corpus.txt",
                "seq_len": 32,
                "batch_size": 4,
                "valid_limit": 256,
            },
            "model_nexus": {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16, "dropout": 0.1},
            "loss_lm": {},
            "optim_adamw": {"lr": 1e-3},
            "amp": {},
            "clip": {},
            "checkpoint": {"every": "2 steps"},
        },
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(nexus_run, ["tiny.yaml", *arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_the_command_prints_the_table_and_trains_the_same() -> None:
    """Fails if --profile shows nothing, or changes the run."""
    assert run("--out", "plain").exit_code == 0
    result = run("--out", "measured", "--profile", "--profile-trace", "trace.json")
    assert result.exit_code == 0, result.output
    assert "profile of 4 steps" in result.output
    for line in ("forward +model_nexus", "backward +the core", "data wait +[0-9]"):
        assert re.search(line, result.output), line
    assert "Profiling overhead" in result.output
    files = [f"{name}/checkpoints/final/model.safetensors" for name in ("plain", "measured")]
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()
    assert json.loads(Path("trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile-trace", "t.json"], "--profile-trace requires --profile"),
        (["--profile", "--dry-run"], "--profile needs a run, and --dry-run does not train"),
        (["--profile", "--explain"], "--profile needs a run, and --explain does not train"),
        (["--profile", "--schema"], "--profile needs a run, and --schema does not train"),
        (
            ["--profile", "--profile-trace", "t.txt"],
            "got 't.txt', expected a file name ending in .json",
        ),
        (["--profile", "--profile-trace", "no/t.json"], "no folder 'no'"),
    ],
)
def test_what_does_not_go_together_is_one_message(
    folder: Path, arguments: list[str], message: str
) -> None:
    """Fails if a mistake is found after the run, or becomes a traceback."""
    before = sorted(folder.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("error:") == 1
    assert sorted(folder.rglob("*")) == before
