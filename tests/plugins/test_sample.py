"""sample: text generated at each evaluation, for loggers, without side effects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_core import (
    ConfigError,
    Engine,
    Logger,
    LoggerConfig,
    Plugin,
    PluginConfig,
    RunData,
    hookimpl,
)
from nexus_core.testing.tiny import TinyNextPlugin, tiny_data, tiny_optimizer
from nexus_plugins.jsonl import JsonlPlugin
from nexus_plugins.sample import SamplePlugin
from nexus_plugins.tensorboard import TensorboardPlugin


class NotesPlugin(Logger[LoggerConfig]):
    """Records notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[int, str, str]] = []

    def write(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def write_note(self, engine: Engine, title: str, text: str) -> None:
        self.notes.append((engine.state.step, title, text))


class Letters:
    """One token for each of the first letters; 0 ends a text."""

    size, eos = 13, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + int(one)) for one in ids)


class Recurrent(nn.Module):
    """A causal model with dropout; each position sees all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(13, 8), nn.GRU(8, 8, batch_first=True)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(8, 13)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.gru(self.embedding(input_ids))[0]))
        return logits


class DataPlugin(Plugin[PluginConfig]):
    """The tiny data, with a tokenizer."""

    name = "data_of_a_test"

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self._codec = codec

    @hookimpl
    def make_data(self) -> RunData:
        return RunData(tiny_data(), {"val": tiny_data(8)}, self._codec)


def run(codec: Any, *plugins: Any, out: Path | None = None) -> Engine:
    """A tiny run of four steps with two evaluations."""
    torch.manual_seed(0)
    model = Recurrent()
    company = [TinyNextPlugin(), DataPlugin(codec), *plugins]
    engine = Engine(model, tiny_optimizer(model), plugins=company, out=out, seed=3)
    engine.fit(until="4 steps", eval_every="2 steps")
    return engine


def continued(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation, by a simple loop over growing rows."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            output = model(input_ids=torch.tensor([ids]))
            logits: Tensor = getattr(output, "logits", output)
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == Letters.eos:
                return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def test_the_model_continues_prompts_at_each_evaluation_for_every_logger_with_text(
    tmp_path: Path,
) -> None:
    notes = NotesPlugin()
    sample = SamplePlugin(prompts=["bcd", "l"], tokens=6, temperature=0)
    engine = run(Letters(), sample, notes, JsonlPlugin(), TensorboardPlugin(), out=tmp_path)
    engine.model.eval()
    codec = Letters()
    last = "\n\n".join(
        f"{prompt}\n-> {codec.decode(continued(engine.model, codec.encode(prompt), 6))}"
        for prompt in ("bcd", "l")
    )
    assert [(step, title) for step, title, _ in notes.notes] == [
        (2, "sample/val"), (4, "sample/val"),
    ]  # fmt: skip
    assert notes.notes[-1][2] == last
    assert "sample/val" in (tmp_path / "metrics.jsonl").read_text()
    events = next((tmp_path / "tensorboard").rglob("*tfevents*")).read_bytes()
    assert last.split("\n")[0].encode() in events


def test_training_is_the_same_to_the_bit_and_samples_with_a_seed_are_repeated() -> None:
    said = []
    for _ in range(2):
        notes = NotesPlugin()
        with_samples = run(None, SamplePlugin(tokens=5, rows=1, top_k=4), notes)
        said.append(notes.notes)
    without = run(None)
    assert said[0] == said[1]
    assert said[0][0][2].count("\n-> ") == 1
    pairs = zip(with_samples.model.parameters(), without.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("settings", "codec", "said"),
    [
        ({"prompts": ["a"]}, None, "has no tokenizer"),
        ({"prompts": ["a"], "chat": True}, Letters(), "has no chat template"),
        ({"chat": True}, Letters(), "needs prompts"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(
    settings: dict[str, Any], codec: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(codec, SamplePlugin(**settings))
