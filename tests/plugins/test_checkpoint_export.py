"""`nexus-run export`: other programs read exactly what was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from benchmarks.mutations import resign
from nexus_core import Engine, ResumableLoader
from nexus_core.cli.run import main as nexus_run
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.ema import EmaPlugin
from tiny import Net, Regression, SquaredPlugin


class Tied(Net):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(5, 8)
        self.again.weight = self.hidden.weight


def trained(out: Path, ema: type[EmaPlugin] = EmaPlugin) -> Engine:
    """Train six steps with an average, and save the final checkpoint."""
    torch.manual_seed(3)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plugins = [SquaredPlugin(), ema(decay=0.5), CheckpointPlugin(every=3)]
    settings = {"plugins": {"model_tied": {"width": 8}}}
    engine = Engine(model, optimizer, plugins=plugins, out=out, config=settings)
    engine.fit(ResumableLoader(Regression(), 4), until=6)
    return engine


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(nexus_run, ["export", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.parametrize("source", ["", "checkpoints/final", "checkpoints/step-00000006"])
def test_export_holds_every_name_with_the_trained_values(source: str, tmp_path: Path) -> None:
    """Fails if a weight is lost, tied ones have only one name, or it is another checkpoint."""
    engine = trained(tmp_path / "run")
    (tmp_path / "run/tokenizer.json").write_text("{}")
    code, output = command(tmp_path / "run" / source, "--out", tmp_path / "model")
    assert code == 0, output
    weights = load_file(tmp_path / "model/model.safetensors")
    expected = engine.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    facts = json.loads((tmp_path / "model/config.json").read_text())
    assert (facts["model_plugin"], facts["width"], facts["trained_steps"]) == ("model_tied", 8, 6)
    assert facts["parameters"] == sum(p.numel() for p in engine.model.parameters()), (
        "ties count once"
    )
    assert (tmp_path / "model/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("ema", [EmaPlugin, EmaPlugin.labelled("slow")], ids=lambda ema: ema.name)
def test_export_gives_the_average_on_request(ema: type[EmaPlugin], tmp_path: Path) -> None:
    """Fails if --ema writes raw weights, even under one name of a tied weight."""
    engine = trained(tmp_path / "run", ema)
    average = engine.plugins[ema.name].weights()
    code, output = command(tmp_path / "run", "--out", tmp_path / "model", "--ema")
    assert code == 0, output
    weights = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(weights[name], average[name]) for name in average)
    assert not torch.equal(weights["head.weight"], engine.model.head.weight)
    model = Tied()
    model.load_state_dict(weights)
    assert torch.equal(model.hidden.weight, average["hidden.weight"])


def test_export_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    """Fails if a folder is overwritten, or a damaged or missing checkpoint ends in a traceback."""
    trained(tmp_path / "run")
    code, output = command(tmp_path / "run", "--out", tmp_path / "run")
    assert (code, "--out FOLDER" in output) == (2, True)
    code, output = command(tmp_path / "nothing", "--out", tmp_path / "model")
    assert (code, "no checkpoint" in output) == (2, True)
    file = tmp_path / "run/checkpoints/step-00000006/model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    code, output = command(tmp_path / "run", "--out", tmp_path / "model")
    assert (code, "SHA-256" in output) == (2, True)
    assert not (tmp_path / "model").exists()


def test_export_says_what_the_model_is(tmp_path: Path) -> None:
    """Fails if the folder does not say which programs can read it."""
    trained(tmp_path / "run")
    code, output = command(tmp_path / "run", "--out", tmp_path / "model")
    assert (code, "README.md" in output) == (0, True)
    card = (tmp_path / "model/README.md").read_text()
    assert "`model_tied`" in card
    assert "library_name: nexus-trainer" in card
    assert "AutoConfig" in card


BOMB = "plugins:\n  model_tied: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("name", "edit", "fault"),
    [
        ("config.yaml", lambda text: BOMB, "more than 40,000 values"),
        ("config.yaml", lambda text: "[" * 10_000, "nested deeper"),
        ("config.yaml", lambda text: "a: " + "x" * (2 << 20), "at most 1,048,576 are allowed"),
        ("config.yaml", lambda text: "\x00", "special characters"),
        ("config.yaml", lambda text: "plugins: {model_tied: [1, 2]}", None),
        ("config.yaml", lambda text: "plugins: {model_tied: {day: 2024-01-01}}", None),
        ("config.yaml", lambda text: "- 1", None),
        ("state.json", lambda text: text.replace('"plugins": {', '"plugins": {"model_tied": 5, '),
         None),
        ("state.json", lambda text: json.dumps(json.loads(text) | {"model": [1]}), "no model"),
        ("state.json", lambda text: "[]", "no model"),
        ("state.json", lambda text: json.dumps(json.loads(text) | {
            "model": {f"n{n}": {"$tensor": "head.weight"} for n in range(5000)}}), "add up to"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:checkpoint.best")
def test_export_trusts_nothing_that_somebody_has_signed(
    name: str, edit: Callable[[str], str], fault: str | None, tmp_path: Path
) -> None:
    """Fails if a forged checkpoint causes a traceback, exhausts memory, or leaves a folder."""
    trained(tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step-00000006"
    (folder / name).write_text(edit((folder / name).read_text()))
    resign(folder)
    code, output = command(tmp_path / "run", "--out", tmp_path / "model")
    if fault is None:
        assert code == 0, output
        return
    assert code == 2, output
    assert output.startswith("error: ")
    assert re.search(fault, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_export_follows_no_link_beside_a_checkpoint(tmp_path: Path) -> None:
    """Fails if the target of a link is exported, and could be published."""
    trained(tmp_path / "run")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "run/tokenizer.json").symlink_to(tmp_path / "secret")
    code, output = command(tmp_path / "run", "--out", tmp_path / "model")
    assert (code, "tokenizer.json" in output) == (2, True), output
    assert not (tmp_path / "model").exists()
