"""The benchmarks run, and write the documented results."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OURS = {"bare", "tutorial", "nexus"}
PEERS = {"lightning", "ignite", "accelerate", "transformers"}


@pytest.mark.slow
def test_overhead_times_every_case_that_can_run_and_names_the_others(tmp_path: Path) -> None:
    """Fails if a case no longer trains, ends with other weights than the loop, or is missing."""
    path = tmp_path / "overhead.json"
    command = [sys.executable, "-m", "benchmarks.overhead", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text(encoding="utf-8"))
    timed, skipped = results["cases"], results["skipped"]
    assert timed.keys() >= OURS
    assert timed.keys() | skipped.keys() == OURS | PEERS
    assert not timed.keys() & skipped.keys()
    assert all("pip install" in reason for reason in skipped.values())
    for name, row in timed.items():
        spread = row["microseconds"]
        assert 0 < spread["least"] <= spread["median"] <= spread["most"], name
        by_round = results["microseconds_by_round"]
        assert len(by_round[name]) == results["rounds"], name
        over = [mine - base for mine, base in zip(by_round[name], by_round["bare"], strict=True)]
        assert math.isclose(row["over_bare"]["most"], max(over)), name
        assert name in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("model", "trainer"), [("nexus", "bare"), ("backbone", "engine")])
def test_the_benchmark_of_accelerators_runs_on_the_cpu(
    model: str, trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a case no longer trains, so that it would fail on the first machine with a GPU."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu

    case = gpu.Case(model, trainer)
    assert case.missing == ""
    found = gpu.figures(case, gpu.SIZES["tiny"], torch.device("cpu"), tmp_path)
    assert found.tokens_per_second == pytest.approx(1000 * 2 * 32 / found.milliseconds)
    assert 0 < found.mfu < 1
    assert found.parameters > 10_000
    assert found.waits_per_step is None, "counted on CUDA alone"
    assert gpu.Case("gpt2", "lightning") in gpu.CASES


NANOGPT = """
from dataclasses import dataclass
from torch import nn

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: ...")
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def forward(self, idx, targets=None):
        logits = self.head(self.embedding(idx))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_the_benchmark_of_nanogpt_times_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a model no longer trains, or the checkout is used in another way than nanoGPT is."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import nanogpt

    monkeypatch.setattr(nanogpt, "TOKENS", 64)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests
    (tmp_path / "model.py").write_text(NANOGPT)
    path = tmp_path / "speed.json"
    words = [str(tmp_path), "--lengths", "32", "--rounds", "1", "--json", str(path)]
    nanogpt.main(words)
    rows = json.loads(path.read_text())
    assert [row["layers"] for row in rows] == ["nanoGPT", *nanogpt.LAYERS]
    assert rows[0]["speed"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "number of parameters" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        nanogpt.main([str(tmp_path / "absent")])


def test_the_best_that_denoising_allows_is_that_of_bayes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the oracle reads a later token, or weighs tokens wrongly."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.tasks.denoising import Denoising
    from benchmarks.tasks.task import generator
    from nexus_plugins.modules.puzzles import Rule

    task, rule = Denoising(symbols=2, length=4, rows=1), Rule.drawn(generator(0), 2)

    sums, first, second = rule.sums.tolist(), rule.first.tolist(), rule.second.tolist()
    sequences = [[*start] for start in itertools.product((0, 1), repeat=2)]
    for tokens in sequences:
        for _ in range(2):
            tokens.append(sums[(first[tokens[-1]] + second[tokens[-2]]) % 2])

    def chance(seen: int, clean: int, level: float) -> float:
        return (1 - level) * (seen == clean) + level * (0.5 if seen == 2 else 0.25)

    nats = []
    rows = [
        row
        for batch in task.held_out(0)
        for row in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    for ids, labels in rows:
        for now, label in enumerate(labels.tolist()):
            weight = [0.0, 0.0]
            for tokens, part in itertools.product(sequences, range(64)):
                level = 0.7 * (part + 0.5) / 64
                read = zip(ids.tolist()[: now + 1], tokens, strict=False)
                weight[tokens[now]] += math.prod(chance(*pair, level) for pair in read)
            nats.append(-math.log(weight[label] / sum(weight)))
    assert task.oracle(0) == pytest.approx(statistics.mean(nats), rel=1e-6)


@pytest.mark.parametrize("name", ["ponder_net", "act"])
def test_published_ways_to_halt_train_and_skip_only_tokens_that_have_stopped(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one no longer trains, or computes something else when it skips stopped tokens."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.modules import Contender
    from benchmarks.tasks.denoising import Denoising
    from benchmarks.tasks.task import Sizes, trained

    task = Denoising(rows=2, length=6, d_code=4, n_memories=4, window=3, iterations=4)
    of = {variant.name: variant for variant in task.variants()}
    sizes = Sizes(8, 1, 4)
    contender = Contender(task, of[name], sizes, 0, (0, 0))
    before = [weight.clone() for weight in contender.model.parameters()]
    contender.step()
    contender.step()
    after = list(contender.model.parameters())
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert trained(contender.model) == trained(of["energy"].build(task, sizes, 0, 0))

    part = contender.model.parts["in_place"]
    h = torch.randn(2, 6, 8)
    with torch.no_grad():
        part.values.bias[-1] = 9.0  # stop at once
        assert part.eval()(h)[1]["energy"]["refinements"].tolist() == [[1.0] * 6] * 2
        part.values.bias[-1] = 0.0
        if name == "act":
            whole, reports = part.train()(h)
            skipping, again = part.eval()(h)
            assert torch.allclose(skipping, whole, atol=1e-6)
            assert torch.equal(
                reports["energy"]["ponder"].ceil() - 1, again["energy"]["refinements"]
            )
        else:
            chances = part.train()(h)[1]["energy"]["stops"]
            assert torch.allclose(chances.sum(0), torch.ones(2, 6))


def test_answers_in_steps_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an answer is wrong, or takes another number of steps than it should."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.tasks.horn import Horn
    from benchmarks.tasks.modular import Modular

    def documents(task: Modular | Horn, further: bool, size: int) -> Iterator[list[list[int]]]:
        batch = task.drawn(0, torch.Generator().manual_seed(1), further)
        segments = batch["segment_ids"].view(task.rows, -1, size)
        assert (segments == torch.arange(segments.shape[1])[:, None]).all()
        columns = (batch[key].view(-1, size).tolist() for key in ("input_ids", "labels"))
        yield from map(list, zip(*columns, strict=True))

    horn = Horn(rows=200)
    rules = horn.drawn_rules(0).tolist()
    for further, counting in ((False, {1, 2, 3}), (True, {4})):
        for ids, labels in documents(Modular(rows=2), further, 5 if further else 4):
            value, expected = ids[0], [-100]
            for step, token in enumerate(ids[1:], 1):
                kind, number = divmod(token, 5)
                value = (value * number if kind == 2 else value + number) % 5
                expected.append(value if step in counting else -100)
            assert labels == expected
        answers = []
        for ids, labels in documents(horn, further, 20):
            known, rounds = set(ids[:4]), dict.fromkeys(ids[:4], 0)
            while new := {c for a, b, c in rules if {a, b} <= known} - known:
                rounds |= dict.fromkeys(new, max(rounds.values()) + 1)
                known |= new
            assert labels[:4] == [-100] * 4
            assert sorted(ids[4:]) == [*range(16, 32)]
            for asked, label in zip(ids[4:], labels[4:], strict=True):
                depth = rounds.get(asked - 16)
                assert label in (
                    {33} if depth in counting else {-100, 32} if depth is None else {-100}
                )
                answers += [label] * (label != -100)
        assert 0.35 < answers.count(33) / len(answers) < 0.65


@pytest.mark.parametrize("name", ["hops", "modular", "horn"])
def test_the_reasoner_and_its_rivals_have_one_size_and_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a network no longer trains, or is much larger or smaller than the reasoner."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.modules import compete
    from benchmarks.tasks.task import Sizes

    kind = importlib.import_module(f"benchmarks.tasks.{name}").TASK
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    runs = compete(0, kind(rows=2, length=20, steps=1), Sizes(), frozenset())
    loops = {"reason", "deep_thinking"}
    for run in runs:
        iterates = "one step further, one more iteration: nats" in run.equal_steps
        assert iterates == (run.variant in loops)
        assert 0 < run.equal_steps["one step further: nats"] < 10
    own, *others = (run.parameters for run in runs if run.variant != "deeper")
    assert all(0.99 * own < size < 1.2 * own for size in others)


def test_the_progressive_loss_mixes_the_end_with_part_of_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if the published rival is trained without the loss that makes it think further."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.deep_thinking import ProgressiveLoss
    from nexus_plugins.model_nexus import NEXUSOutput

    draw = torch.Generator().manual_seed(0)
    end, part, head = (torch.randn(size, generator=draw) for size in ((1, 3, 4), (1, 3, 4), (5, 4)))
    labels = torch.tensor([[2, -100, 4]])

    def nats(hidden: torch.Tensor) -> float:
        chances = (hidden[0] @ head.T).softmax(-1)
        return -math.log(chances[0, 2]) - math.log(chances[2, 4])

    output = NEXUSOutput(end, head, {"deep_thinking": {"hidden": part}})
    for share in (0.0, 0.3):
        loss = ProgressiveLoss(share=share).loss({"labels": labels}, output)
        assert loss == pytest.approx((1 - share) * nats(end) + share * nats(part), rel=1e-5)


@pytest.mark.slow
def test_overhead_refuses_a_case_that_does_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a case could win by skipping clipping, the schedule or steps."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import overhead

    def idle(run: overhead.Run) -> None:
        run.losses.extend(0.0 for _ in run.feed)

    with pytest.raises(SystemExit, match="idle ended .* not the same work"):
        overhead.measure({"bare": overhead.bare(), "idle": idle}, rounds=1, steps=10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fine_tuning_agrees_with_a_loop_by_hand(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if a side no longer trains, or differs (or agrees) where the docs say otherwise."""
    pytest.importorskip("transformers", reason="the benchmark trains a model of transformers")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    from benchmarks import agreement

    found = [f for layout in agreement.LAYOUTS for f in agreement.differences(kind, layout, 3, 2)]
    differing = {f.side for f in found if max(f.loss, f.weight) > 2e-6}
    known = {"SFTTrainer, wrapped", *(("Trainer", "SFTTrainer") if kind == "gpt2" else ())}
    assert {"by hand in float32", "ours"} <= {f.side for f in found} - differing
    assert differing == {side for side in known if agreement.installed(side)}
