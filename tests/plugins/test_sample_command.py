"""`nexus-run generate`, `chat` and `resume`: the output is that of the run's model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from nexus_core.cli.run import main
from nexus_plugins._shared.sampling import Sampling
from nexus_plugins.model_nexus import NEXUSCore
from nexus_plugins.sample.writing import pieces

MODEL = {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 16}
CONFIG = f"""
until: 6 steps
seed: 5
plugins:
  data_text: {{train: corpus.txt, seq_len: 32, batch_size: 4}}
  model_nexus: {json.dumps(MODEL)}
  loss_lm: {{}}
  optim_adamw: {{lr: 1.0e-2}}
  ema: {{decay: 0.5}}
  checkpoint: {{every: 3 steps}}
  jsonl: {{}}
"""


def nexus(*words: str, **options: Any) -> Result:
    return CliRunner().invoke(main, words, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data no longer exists."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        corpus = folder / "corpus.txt"
        corpus.write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
        (folder / "tiny.yaml").write_text(CONFIG)
        done = nexus("tiny.yaml", "--out", "mine")
        assert done.exit_code == 0, done.output
        assert "nexus-run generate mine --prompt TEXT" in done.output
        corpus.unlink()
    return folder / "mine"


def by_hand(run: Path, step: str, prompt: str, count: int) -> str:
    """The greedy continuation of a model with the averaged weights."""
    saved = run / f"checkpoints/{step}"
    model = NEXUSCore(vocab_size=259, **MODEL)
    model.load_state_dict(load_file(saved / "model.safetensors"), strict=False)  # the head is tied
    state = load_file(saved / "state.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # the world model's target is not averaged
                parameter.copy_(state[f"plugins.ema.state.average.{name}"])
        ids = list(prompt.encode())
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return bytes(ids[len(prompt) :]).decode(errors="replace")


def test_the_likeliest_text_is_that_of_the_averaged_weights(run: Path) -> None:
    """Fails if other weights are used, or the data must exist."""
    for place, step in ((str(run), "step-00000006"), (f"{run}@3", "step-00000003")):
        options = ["--prompt", "line 1", "--max-new-tokens", "12", "--temperature", "0"]
        said = nexus("generate", place, *options)
        assert said.exit_code == 0, said.output
        expected = by_hand(run, step, "line 1", 12)
        assert said.stdout == f"line 1{expected}\n"


def test_a_seed_is_a_text_and_samples_have_one_each(run: Path) -> None:
    options = ["generate", str(run), "--max-new-tokens", "20", "--top-p", "0.9", "--json"]
    two = json.loads(nexus(*options, "--samples", "2").stdout)
    again = json.loads(nexus(*options, "--seed", "1").stdout)
    one, other = (sample["text"] for sample in two["samples"])
    assert one != other == again["samples"][0]["text"]
    assert two["checkpoint_step"] == 6
    asked = ["generate", str(run), "--prompt", "-", "--max-new-tokens", "3"]
    assert "not UTF-8 at byte 1" in nexus(*asked, input=b"a\xff").output
    told = nexus(*asked, input="abc")
    assert told.stdout.startswith("abc"), told.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "nowhere"], "there is no run in 'nowhere'"),
        (["generate", "RUN@5"], "has no checkpoint of step 5"),
        (["chat", "RUN"], "has no chat template; use: nexus-run generate"),
        (["generate", "RUN", "--temperature", "-1"], "temperature"),
        (["resume", "RUN/nothing"], "nothing"),
        (["resume", "--set", "no.such=1"], "no run below runs/ has a checkpoint"),
        (["compare", "RUN@3", "quickstart"], "does not branch off"),
    ],
)
def test_what_cannot_write_is_one_clear_error(run: Path, words: list[str], said: str) -> None:
    result = nexus(*(word.replace("RUN", str(run)) for word in words))
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.filterwarnings("ignore:resuming. until is")
def test_resume_is_the_short_form(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    Path("corpus.txt").write_text("".join(f"line {i}: {'ab' * (i % 17)}\n" for i in range(600)))
    assert nexus("tiny.yaml", "--out", "cut", "--set", "until=3 steps").exit_code == 0
    result = nexus("resume", "cut", "--set", "until=6 steps")
    Path("corpus.txt").unlink()
    assert result.exit_code == 0, result.output
    one, other = (
        load_file(f"{name}/checkpoints/step-00000006/model.safetensors") for name in ("mine", "cut")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@given(st.text(max_size=12), st.text(max_size=12))
def test_pieces_add_up_to_the_text(prompt: str, written: str) -> None:
    """For any characters, of any number of bytes."""

    def decode(ids: Any) -> str:
        return bytes(ids).decode(errors="replace")

    found = pieces(decode, list(prompt.encode()), iter(written.encode()))
    assert "".join(found) == written


@given(
    logits=st.lists(st.floats(-5, 5, width=16), min_size=2, max_size=6, unique=True),
    top_k=st.none() | st.integers(1, 6),
    top_p=st.none() | st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 3.0),
)
def test_shares_are_those_of_the_definition(
    logits: list[float], top_k: int | None, top_p: float | None, temperature: float
) -> None:
    """Compared with sorting and summing in plain Python."""
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in kept]
    shares = [weight / sum(weights) for weight in weights]
    edge = abs(min((abs(sum(shares[:n]) - (top_p or 2)) for n in range(1, len(shares))), default=1))
    if edge < 1e-5:
        return  # too close to the limit: rounding decides
    wanted = [s if n == 0 or sum(shares[:n]) < (top_p or 2) else 0.0 for n, s in enumerate(shares)]
    found, order = Sampling(temperature, top_k, top_p).shares(torch.tensor([logits]))
    expected = torch.tensor(wanted + [0.0] * (len(logits) - len(kept)))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)
    assert order[0, : len(kept)].tolist() == kept
