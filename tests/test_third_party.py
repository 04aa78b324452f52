"""A third-party plugin package, built, installed and removed with pip."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from fresh_venv import FreshVenv

PACKAGE = Path(__file__).parents[1] / "examples/third_party_plugin"
CONFIG = {
    "until": "4 steps",
    "log_every": "1 step",
    "seed": 3,
    "plugins": {
        "data_text": {"train": "corpus.txt", "seq_len": 32, "batch_size": 4},
        "model_nexus": {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16},
        "loss_lm": {},
        "optim_adamw": {"lr": 1e-3},
        "clip": {},
        "checkpoint": {"every": "2 steps"},
        "jsonl": {},
    },
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built without changing the checkout."""
    before = sorted(PACKAGE.rglob("*"))
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps",
               "--quiet", "--wheel-dir", str(folder), str(PACKAGE)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(PACKAGE.rglob("*")) == before
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> FreshVenv:
    """A new environment with the wheel installed."""
    made = FreshVenv(tmp_path_factory.mktemp("third") / "venv")
    made.pip("install", "--no-deps", "--no-index", str(wheel))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus and a config."""
    lines = [f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)]
    (tmp_path / "corpus.txt").write_text("".join(lines))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return tmp_path


def weights(folder: Path, out: str) -> bytes:
    path = folder / out / "checkpoints/step-00000004/model.safetensors"
    return path.read_bytes()


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    assert names == {f"gradient_noise/{file}" for file in ("__init__.py", "plugin.py", "py.typed")}


@pytest.mark.slow
def test_its_own_tests_pass_where_it_is_installed(fresh: FreshVenv, tmp_path: Path) -> None:
    copied = tmp_path / "test_gradient_noise.py"
    copied.write_text((PACKAGE / "tests/test_gradient_noise.py").read_text())
    done = fresh.run("pytest", "-q", "-p", "no:cacheprovider", str(copied), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.slow
def test_it_is_active_where_it_is_named_and_resumes_to_the_same_bits(
    fresh: FreshVenv, folder: Path
) -> None:
    """Fails if an installed plugin changes runs by itself, or does not resume exactly."""

    def run(*arguments: str) -> None:
        done = fresh.run("nexus-run", "tiny.yaml", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr

    noisy = ("--plugins", "gradient_noise")
    run("--out", "plain")
    run("--out", "noisy", *noisy)
    run("--out", "parts", *noisy, "-s", "until=2 steps")
    run("--out", "parts", *noisy, "--resume", "auto")
    assert weights(folder, "plain") != weights(folder, "noisy")
    assert weights(folder, "parts") == weights(folder, "noisy")
    logged = [
        json.loads(line) for line in (folder / "noisy/metrics.jsonl").read_text().splitlines()
    ]
    first = next(line for line in logged if "train/gradient_noise" in line)
    assert first["train/gradient_noise"] == pytest.approx(0.1)
    assert "train/gradient_noise" not in (folder / "plain/metrics.jsonl").read_text()


@pytest.mark.slow
def test_it_is_shown_comes_after_clipping_and_says_what_it_waits_for(
    fresh: FreshVenv, folder: Path
) -> None:
    shown = fresh.run("nexus-plugins", "show", "gradient_noise", cwd=folder).stdout
    assert "from       gradient-noise 0.1.0, gradient_noise:GradientNoisePlugin" in shown
    assert "eta: float >= 0, default 0.01" in shown
    plan = fresh.run(
        "nexus-run", "tiny.yaml", "--plugins", "gradient_noise", "--json", cwd=folder
    )  # fmt: skip
    events = {event["hook"]: event["calls"] for event in json.loads(plan.stdout)["events"]}
    assert [call["plugin"] for call in events["after_backward"]] == ["clip", "gradient_noise"]
    assert events["after_backward"][1]["reasons"] == ["after clip, as it declares"]
    only = "runs_on_an_accelerator,device_is_not_waited_for"
    checked = fresh.run("nexus-plugins", "check", "gradient_noise", "--only", only, cwd=folder)
    assert "2 passed, 0 failed" in checked.stdout
    said = "runs on an accelerator: yes; device syncs: never"
    assert said in checked.stdout
    assert said in (PACKAGE / "README.md").read_text()


@pytest.mark.slow
def test_it_is_gone_once_uninstalled(wheel: Path, tmp_path: Path) -> None:
    fresh = FreshVenv(tmp_path / "venv")
    fresh.pip("install", "--no-deps", "--no-index", str(wheel))
    assert "gradient_noise " in fresh.run("nexus-plugins", "list", "--no-load", cwd=tmp_path).stdout
    fresh.pip("uninstall", "-y", "gradient-noise")
    listed = fresh.run("nexus-plugins", "list", "--no-load", cwd=tmp_path)
    assert "gradient_noise" not in listed.stdout
    assert "clip" in listed.stdout
