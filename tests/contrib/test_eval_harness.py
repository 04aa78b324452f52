"""eval_harness: local tasks, scored like a handwritten loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra of bench alone")

from nexus_core import ConfigError, Engine, Plugin, PluginConfig, RunData, hookimpl
from nexus_core.testing.tiny import TinyNextPlugin, tiny_data, tiny_optimizer
from nexus_plugins_contrib.eval_harness import EvalHarnessPlugin

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
QUESTIONS = [("bcd", 0), ("kk", 1), ("la", 0), ("ci", 1), ("fgh", 0)]
CHOICES = ["bb", "cd"]
TASKS = {
    "tiny_choice": {"output_type": "multiple_choice", "doc_to_choice": CHOICES,
                    "metric_list": [{"metric": "acc"}]},
    "tiny_words": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target":
                   "{{question}}", "metric_list": [{"metric": "byte_perplexity"}]},
    "tiny_written": {"output_type": "generate_until", "doc_to_target": "{{'e'}}",
                     "generation_kwargs": {"until": ["e"], "max_gen_toks": 3, "do_sample": False},
                     "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


class Letters:
    """One token for each of the first letters; 0 ends a text."""

    size, eos = 13, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text if letter.isalpha()]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + int(one)) for one in ids)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(13, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 13)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(self.embedding(input_ids))[0])
        return logits


class DataPlugin(Plugin[PluginConfig]):
    name = "data_of_a_test"

    @hookimpl
    def make_data(self) -> RunData:
        return RunData(tiny_data(), {"val": tiny_data(8)}, Letters())


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"question": text, "label": label} for text, label in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        whole = {
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "doc_to_text": "{{question}}", "doc_to_target": "{{label}}", "target_delimiter": "",
            **task,
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(whole))
    return tmp_path


def trained(**settings: Any) -> tuple[Engine, dict[str, float]]:
    torch.manual_seed(0)
    model = Recurrent()
    plugins = [TinyNextPlugin(), DataPlugin(), EvalHarnessPlugin(**settings)]
    engine = Engine(model, tiny_optimizer(model), plugins=plugins, seed=3)
    result = engine.fit(until="4 steps", eval_every="2 steps")
    return engine, {k: v for k, v in result.metrics.items() if k.startswith("harness/")}


def nats(model: nn.Module, context: list[int], ending: list[int]) -> float:
    with torch.no_grad():
        shares = model(torch.tensor([[*context, *ending]]))[0].log_softmax(-1)
    first = len(context) - 1
    return sum(float(shares[first + n, token]) for n, token in enumerate(ending))


def test_tasks_of_this_machine_are_scored_as_by_hand(tasks: Path) -> None:
    engine, found = trained(tasks=[*TASKS], include=tasks, batch_size=3)
    codec, model = Letters(), engine.model.eval()
    right = 0
    for text, label in QUESTIONS:
        scores = [nats(model, codec.encode(text), codec.encode(choice)) for choice in CHOICES]
        right += scores.index(max(scores)) == label
    assert found["harness/tiny_choice/acc"] == pytest.approx(right / len(QUESTIONS))
    total = sum(nats(model, [0], codec.encode(text)) for text, _ in QUESTIONS)
    letters = sum(len(text) for text, _ in QUESTIONS)
    expected = torch.tensor(-total / letters).exp().item()
    assert found["harness/tiny_words/byte_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["harness/tiny_written/exact_match"] in (0, 0.2, 0.4, 0.6, 0.8, 1)


def test_an_unknown_task_is_refused(tasks: Path) -> None:
    with pytest.raises(ConfigError, match="no task 'nowhere'"):
        trained(tasks=["nowhere"], include=tasks)
