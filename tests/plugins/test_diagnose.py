"""The diagnosis: it reports real problems once, in words, and nothing on healthy runs."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from nexus_core import ConfigError, Engine, Loss, LossConfig, Plugin, PluginConfig, hookimpl
from nexus_core.plan import load
from nexus_core.processes import Ranks
from nexus_plugins.amp import AmpPlugin
from nexus_plugins.checkpoint import CheckpointPlugin
from nexus_plugins.clip import ClipPlugin
from nexus_plugins.diagnose import DiagnosePlugin, sensors
from nexus_plugins.diagnose.history import History, Memory, Probe, TermProbe, Wait, reading_of
from nexus_plugins.diagnose.rules import RULES, Finding, examine, loss_explosion
from nexus_plugins.diagnose.sensors import host_limit
from nexus_plugins.jsonl import JsonlPlugin
from nexus_plugins.lr_constant import LrConstantPlugin
from nexus_plugins.lr_cosine import LrCosinePlugin
from nexus_plugins.lr_torch import LrTorchPlugin
from nexus_plugins.tensorboard import TensorboardPlugin

Batch = tuple[Tensor, Tensor]


def data_of(seed: int, size: int = 32, labels: str = "learnable") -> list[Batch]:
    """40 batches of 8 inputs and 1 output."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(8, 1, generator=generator)
    inputs = torch.randn(40, size, 8, generator=generator)
    if labels == "noise":
        outputs = torch.randn(40, size, 1, generator=generator)
    else:
        outputs = torch.tanh(inputs @ truth) + 0.05 * torch.randn(40, size, 1, generator=generator)
    return list(zip(inputs, outputs, strict=True))


def mlp(seed: int, activation: type[nn.Module] = nn.ReLU, width: int = 32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, 1),
    )


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def engine_of(
    model: nn.Module,
    *plugins: Plugin[Any],
    lr: float = 1e-3,
    loss: Callable[[Any, Any], Tensor] | None = squared,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> Engine:
    trained = optimizer(model.parameters(), lr=lr)
    return Engine(model, trained, loss=loss, plugins=plugins, **{"seed": 0, **options})


def findings_of(engine: Engine) -> tuple[Finding, ...]:
    plugin = engine.plugins["diagnose"]
    assert isinstance(plugin, DiagnosePlugin)
    return plugin.findings


def found_in(
    engine: Engine,
    data: Any = None,
    steps: int = 200,
    until: str | None = None,
    known: Engine | None = None,
) -> dict[str, str]:
    """Train, and return the findings by rule; each must cause one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for state in engine.steps(data, until=until or f"{steps} steps"):
            if state.step == steps:
                break
    findings = findings_of(engine)
    said = [str(w.message) for w in caught if w.category is RuntimeWarning]
    before = findings_of(known) if known else ()
    assert said == [f"step {f.step}: {f.text}" for f in findings[len(before) :]]
    return {finding.rule: finding.text for finding in findings}


# -- planted problems


def exploding(seed: int) -> dict[str, str]:
    """SGD with far too large steps: the loss soon becomes nan."""
    engine = engine_of(mlp(seed, nn.GELU), DiagnosePlugin(), lr=10.0, optimizer=torch.optim.SGD)
    return found_in(engine, data_of(seed), 30)


def exploding_adam(seed: int) -> dict[str, str]:
    """Adam keeps a transformer finite, but far above where it started."""
    torch.manual_seed(seed)
    engine = engine_of(Gpt(), DiagnosePlugin(), lr=0.5, loss=next_token)
    return found_in(engine, walks_of(seed), 60)


def late_explosion(seed: int) -> dict[str, str]:
    """The learning rate rises a thousandfold in a healthy run."""
    schedule = LrTorchPlugin(scheduler="ExponentialLR", settings={"gamma": 1.06})
    engine = engine_of(mlp(seed), DiagnosePlugin(), schedule, lr=2e-3)
    return found_in(engine, data_of(seed))


def unlearnable(seed: int) -> dict[str, str]:
    return found_in(
        engine_of(
            mlp(seed, width=8), DiagnosePlugin(), LrConstantPlugin(warmup="20 steps"), lr=1e-2
        ),
        data_of(seed, 256, "noise"),
    )


def stuck_in_warmup(seed: int) -> dict[str, str]:
    schedule = LrConstantPlugin(warmup="100000 steps")
    return found_in(
        engine_of(mlp(seed), DiagnosePlugin(), schedule, optimizer=torch.optim.SGD),
        data_of(seed, 256),
        until="100000 steps",
    )


def at_floor(seed: int) -> dict[str, str]:
    """The learning rate falls to a tenth after 40 steps, long before the run has learned."""
    schedule = LrTorchPlugin(scheduler="MultiStepLR", settings={"milestones": [40], "gamma": 0.1})
    engine = engine_of(
        mlp(seed, nn.Tanh), DiagnosePlugin(), schedule, lr=0.02, optimizer=torch.optim.SGD
    )
    return found_in(engine, data_of(seed, 256))


def dead_relu(seed: int) -> dict[str, str]:
    model = mlp(seed)
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
    return found_in(engine_of(model, DiagnosePlugin()), data_of(seed))


class BusyLoader:
    """Batches that take as long as several steps: it computes for that time."""

    def __init__(self, data: list[Batch], seconds: float) -> None:
        self.data, self.seconds = data, seconds

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data:
            until = time.perf_counter() + self.seconds
            while time.perf_counter() < until:
                batch[0].sum()
            yield batch


def starved(seed: int) -> dict[str, str]:
    engine = engine_of(mlp(seed), DiagnosePlugin())
    return found_in(engine, BusyLoader(data_of(seed), 0.006), 60)


class TwoHeads(nn.Module):
    """A trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.first, self.second = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(inputs)
        return self.first(hidden), self.second(hidden)


class FirstPlugin(Loss[LossConfig]):
    """The main task: a squared error of about 1."""

    def units(self, batch: Batch) -> float:
        return float(len(batch[0]))

    def loss(self, batch: Batch, output: tuple[Tensor, Tensor]) -> Tensor:
        return (output[0] - batch[1]).square().sum()


class SecondPlugin(FirstPlugin):
    """Another task, a tenth as large, unrelated to the first."""

    def loss(self, batch: Batch, output: tuple[Tensor, Tensor]) -> Tensor:
        return 0.1 * (output[1] - torch.sin(3 * batch[0][:, :1])).square().sum()


def dominated(seed: int, weight: float = 1000.0) -> dict[str, str]:
    torch.manual_seed(seed)
    plugins = [FirstPlugin(), SecondPlugin(weight=weight), DiagnosePlugin()]
    return found_in(engine_of(TwoHeads(), *plugins, loss=None), data_of(seed))


class JointEmbedding(nn.Module):
    """Two views of a row should have equal latents; nothing prevents them from collapsing."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, batch: Batch) -> Tensor:
        noise = torch.randn_like(batch[0])
        return F.mse_loss(self.encoder(batch[0]), self.encoder(batch[0] + noise))


def collapsed(seed: int) -> dict[str, str]:
    torch.manual_seed(seed)
    engine = engine_of(
        JointEmbedding(), DiagnosePlugin(), loss=lambda model, batch: model(batch), lr=1e-2
    )
    return found_in(engine, data_of(seed))


# -- healthy runs


def healthy_nexus(seed: int, folder: Path) -> dict[str, str]:
    """A small model with the losses of text and modules, schedule, guard and clipping."""
    chosen: dict[str, dict[str, Any]] = {
        "data_text": {"train": "stdlib", "seq_len": 64, "batch_size": 8},
        "model_nexus": {"d_model": 32, "ssm_n_layers": 2, "ssm_head_dim": 32, "reason": True},
        "loss_lm": {"label_smoothing": 0.0},
        "loss_world": {},
        "loss_reason": {},
        "loss_energy": {},
        "optim_adamw": {"lr": 6e-3, "weight_decay": 0.1},
        "lr_cosine": {"warmup": "15 steps", "min_lr": 3e-4},
        "guard": {},
        "clip": {},
        "diagnose": {},
    }
    plugins = [load(name)(**keys) for name, keys in chosen.items()]
    return found_in(Engine(plugins=plugins, seed=seed, out=folder), steps=150)


def healthy_mlp(seed: int) -> dict[str, str]:
    """A regression that has learned all there is after a third of the run."""
    return found_in(engine_of(mlp(seed), DiagnosePlugin(), lr=3e-3), data_of(seed))


def healthy_cnn(seed: int) -> dict[str, str]:
    """Classify the bright quarter of a picture; with biases before norms, which never learn."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(30, 16, 1, 8, 8, generator=generator)
    quarters = torch.randint(4, (30, 16), generator=generator)
    for batch, row in torch.cartesian_prod(torch.arange(30), torch.arange(16)).tolist():
        across, down = divmod(int(quarters[batch, row]), 2)
        pictures[batch, row, 0, 4 * across : 4 * across + 4, 4 * down : 4 * down + 4] += 0.7
    engine = engine_of(
        model,
        DiagnosePlugin(),
        lr=0.05,
        optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    return found_in(engine, list(zip(pictures, quarters, strict=True)))


class Gpt(nn.Module):
    """A causal transformer of torch's layers, with a separate key projection."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, 32), nn.Embedding(16, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, norm_first=True, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


def walks_of(seed: int) -> list[Tensor]:
    """Walks on a ring: the next token is one more, or sometimes five more."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.where(torch.rand(50, 16, 17, generator=generator) < 0.9, 1, 5)
    return list(steps.cumsum(-1) % 16)


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def healthy_gpt(seed: int) -> dict[str, str]:
    torch.manual_seed(seed)
    schedule = LrCosinePlugin(warmup="20 steps", min_lr=1e-4)
    engine = engine_of(Gpt(), DiagnosePlugin(), schedule, ClipPlugin(), lr=3e-3, loss=next_token)
    return found_in(engine, walks_of(seed))


# -- findings and false alarms

ILLNESSES: dict[str, tuple[str, Callable[[int], dict[str, str]]]] = {
    "steps too long": ("loss_explosion", exploding),
    "adam too quick": ("loss_explosion", exploding_adam),
    "rate that grows": ("loss_explosion", late_explosion),
    "labels of noise": ("slow_convergence", unlearnable),
    "endless warm-up": ("slow_convergence", stuck_in_warmup),
    "a weight of 1000": ("module_collapse", dominated),
    "one latent for all": ("module_collapse", collapsed),
    "a dead ReLU": ("dead_layers", dead_relu),
    "an early floor": ("lr_at_floor", at_floor),
    "a slow loader": ("data_starvation", starved),
}
HEALTHY = {"mlp": healthy_mlp, "cnn": healthy_cnn, "gpt": healthy_gpt}


@pytest.mark.parametrize("illness", ILLNESSES)
def test_a_planted_illness_is_named_within_200_steps(illness: str) -> None:
    """Fails if a run with this problem gets no finding, or the wrong one."""
    rule, run = ILLNESSES[illness]
    assert rule in run(0)


@pytest.mark.slow
@pytest.mark.parametrize("illness", ILLNESSES)
def test_an_illness_is_named_whatever_the_seed(illness: str) -> None:
    """Fails if a threshold only fits one run."""
    rule, run = ILLNESSES[illness]
    assert [rule in run(seed) for seed in range(1, 4)] == [True] * 3


@pytest.mark.parametrize("run", ["mlp", "cnn"])
def test_a_healthy_run_hears_nothing(run: str) -> None:
    """Fails if a run that learns well, with a plateau at its end, gets a finding."""
    assert HEALTHY[run](0) == {}


@pytest.mark.slow
@pytest.mark.parametrize("run", HEALTHY)
def test_a_healthy_run_hears_nothing_whatever_the_seed(run: str) -> None:
    """Fails if false alarms depend on the seed."""
    assert [HEALTHY[run](seed) for seed in range(3)] == [{}] * 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_healthy_nexus_hears_nothing(seed: int, tmp_path: Path) -> None:
    """Fails if small auxiliary losses, or a cosine at its floor, are reported."""
    assert healthy_nexus(seed, tmp_path) == {}


def test_overflows_of_a_loss_scale_are_no_explosion() -> None:
    """Fails if the skipped steps of fp16's scale search are reported as an explosion."""
    amp = AmpPlugin(dtype="fp16", initial_scale=2.0**40)
    engine = engine_of(mlp(0), amp, DiagnosePlugin(), lr=3e-3)
    assert found_in(engine, data_of(0), 100) == {}
    assert engine.metrics["amp/skipped_steps"] > 10


# -- the rules, on numbers


def history_of(*losses: float, spread: float = 0.0, lr: float = 1.0, lrs: Any = ()) -> History:
    """Readings of ten steps each around these means, half of them higher and half lower."""
    history = History()
    for number, loss in enumerate(losses, start=1):
        steps = [loss - spread, loss + spread] * 5
        rate = lrs[number - 1] if lrs else lr
        history = history.with_reading(reading_of(steps, 10 * number, rate), steps[0])
    return history


def found(history: History) -> list[str]:
    return [finding.rule for finding in examine(history)]


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([1, 4, 32]), st.floats(0.01, 100))
def test_noise_alone_is_no_explosion(seed: int, rows: int, scale: float) -> None:
    """Fails if the heavy tail of a squared error in a small batch is mistaken for divergence."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(20, 10, rows, generator=generator, dtype=torch.float64)
    history = History()
    for number, steps in enumerate((scale * noise.square().mean(-1)).tolist(), start=1):
        history = history.with_reading(reading_of(steps, 10 * number, 1.0), steps[0])
        assert loss_explosion(history) is None


@given(st.floats(1e-3, 1e3), st.floats(0.51, 100))
def test_a_loss_half_its_start_above_its_level_is_an_explosion(start: float, rise: float) -> None:
    """Fails if the rule depends on the unit of the loss, or misses it."""
    falling = [start * share for share in (1.0, 0.8, 0.6, 0.5)]
    assert found(history_of(*falling)) == []
    high = start * (0.5 + rise)
    assert found(history_of(*falling, high, high)) == ["loss_explosion"]
    assert found(history_of(*falling, start * 0.9, start * 0.9)) == []


def test_only_gradients_that_stay_infinite_are_an_explosion() -> None:
    """Fails if a single overflow counts, or none ever does."""
    history = history_of(1.0, 0.9, 0.8)
    bad = [replace(reading, gradient_finite=False) for reading in history.readings]
    assert found(replace(history, readings=(*history.readings[:2], bad[2]))) == []
    (finding,) = examine(replace(history, readings=tuple(bad)))
    assert "the gradient was not finite in each of the last 3 checks" in finding.text


def test_a_plateau_counts_early_and_high_up_alone() -> None:
    """Fails if a run that has learned, or one long past its warm-up, is reported as slow."""
    assert found(history_of(*[1.0] * 12)) == ["slow_convergence"]
    assert found(history_of(*[1.0] * 11)) == []
    assert found(history_of(1.0, *[0.4] * 12)) == []
    assert found(history_of(*[1 - 0.02 * i for i in range(12)])) == []
    late = history_of(*[1 - 0.01 * i for i in range(25)], *[0.76] * 12)
    assert found(late) == []
    assert found(history_of(*[1.0] * 12, spread=0.5)) == []


def test_a_floor_is_low_and_flat_and_the_loss_falls() -> None:
    """Fails if the tail of a cosine, a high constant rate, or a constant loss is reported."""
    falling = [1 - 0.02 * i for i in range(12)]
    assert found(history_of(*falling, lrs=[1.0] * 4 + [0.1] * 8)) == ["lr_at_floor"]
    assert found(history_of(*falling, lrs=[1.0] * 4 + [0.3] * 8)) == []
    assert found(history_of(*falling, lrs=[1.0] * 5 + [0.1] * 7)) == []
    assert found(history_of(*falling, lrs=[1.0] * 4 + [0.1 - 0.005 * i for i in range(8)])) == []
    assert found(history_of(*falling[:4], *[0.5] * 8, lrs=[1.0] * 4 + [0.1] * 8)) == []


@given(st.floats(0.0, 1.0))
def test_memory_counts_from_nine_tenths(share: float) -> None:
    """Fails if the share is wrong, or the numbers are not reported."""
    history = history_of(1.0)
    memory = Memory(share * 8 * 2**30, 8 * 2**30, "of cuda:0")
    full = replace(history, readings=(replace(history.readings[0], memory=memory),))
    findings = examine(full)
    assert [finding.rule for finding in findings] == ["memory_near_limit"] * (share >= 0.9)
    assert all("of 8.00 GiB of cuda:0" in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("share", "milliseconds", "expected"),
    [(0.5, 50.0, ["data_starvation"]), (0.2, 50.0, []), (0.5, 0.5, [])],
)
def test_waiting_counts_where_workers_can_help(
    share: float, milliseconds: float, expected: list[str]
) -> None:
    """Fails if a toy run with steps of microseconds is told to use workers."""
    history = history_of(1.0, 0.9, 0.8)
    waiting = [replace(r, wait=Wait(share, milliseconds)) for r in history.readings]
    assert found(replace(history, readings=tuple(waiting))) == expected
    assert found(replace(history, readings=(*history.readings[:1], *waiting[1:]))) == []


def probed(weak: TermProbe, strong: TermProbe, fallen: float = 0.0) -> History:
    history = history_of(1.0)
    first = replace(weak, loss=weak.loss + fallen)
    history = history.with_probe(Probe(1, {"weak": first, "strong": strong}))
    for step in (51, 101, 151):
        history = history.with_probe(Probe(step, {"weak": weak, "strong": strong}))
    return history


@pytest.mark.parametrize(
    ("weak", "strong", "fallen", "expected"),
    [
        (TermProbe(1.0, 5.0, 1.0), TermProbe(1000.0, 0.1, 20.0), 0.0, ["module_collapse"]),
        (TermProbe(1.0, 5.0, 1.0), TermProbe(1000.0, 0.1, 9.0), 0.0, []),  # not ten times
        (TermProbe(0.1, 0.3, 0.01), TermProbe(1.0, 5.0, 1.0), 0.0, []),  # weighted down on purpose
        (TermProbe(1.0, 0.3, 0.01), TermProbe(1.0, 5.0, 1.0), 0.3, []),  # small, and learned
        (TermProbe(1.0, 0.3, 0.01), TermProbe(1.0, 5.0, 1.0), 0.0, ["module_collapse"]),
    ],
)
def test_a_term_drowns_another_that_is_meant_to_count(
    weak: TermProbe, strong: TermProbe, fallen: float, expected: list[str]
) -> None:
    """Fails if a main loss next to small auxiliary ones is reported."""
    assert found(probed(weak, strong, fallen)) == expected


def test_every_rule_is_documented_in_order() -> None:
    """Fails if the page and the table of rules differ."""
    page = (Path(__file__).parents[2] / "docs/plugins/diagnose.md").read_text()
    headings = [line[4:] for line in page.splitlines() if line.startswith("### ")]
    assert headings == [f"`{rule.name}`" for rule in RULES]


def test_the_limit_is_the_smallest_of_machine_and_groups(tmp_path: Path) -> None:
    """Fails if a container's limit, at any level, is ignored."""
    machine = host_limit(tmp_path / "none", tmp_path / "none")
    assert machine > 2**28
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/memory.max").write_text(f"{2**28}\n")
    (tmp_path / "a/b/memory.max").write_text("max\n")
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    assert host_limit(tmp_path, membership) == 2**28


# -- reports, state and settings


def test_memory_of_this_process_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the value read is not this process's memory."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    monkeypatch.setattr(sensors, "host_limit", lambda: 1.05 * resident)
    assert "memory_near_limit" in found_in(engine_of(mlp(0), DiagnosePlugin()), data_of(0), 10)
    monkeypatch.setattr(sensors, "host_limit", lambda: 3.0 * resident)
    assert found_in(engine_of(mlp(0), DiagnosePlugin()), data_of(0), 10) == {}


class Clock:
    """Stands in for `time.perf_counter`; moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SpendPlugin(Plugin[PluginConfig]):
    """Spends 30 ms in a step, and much more where a log, evaluation or save would be."""

    clock: Clock

    @hookimpl
    def after_backward(self) -> None:
        self.clock.now += 0.03

    @hookimpl
    def on_log(self) -> None:
        self.clock.now += 5.0

    @hookimpl
    def on_step_end(self) -> None:
        self.clock.now += 7.0


@pytest.mark.parametrize(("wait", "expected"), [(0.03, "50% of its time"), (0.01, None)])
def test_only_the_wait_for_batches_counts(
    monkeypatch: pytest.MonkeyPatch, wait: float, expected: str | None
) -> None:
    """Fails if logging or saving counts as waiting, or each micro-batch counts."""
    clock, spend = Clock(), SpendPlugin()
    spend.clock = clock
    monkeypatch.setattr(time, "perf_counter", clock)

    def batches() -> Iterator[Batch]:
        for batch in data_of(0, 4) * 4:
            clock.now += wait / 2
            yield batch

    engine = engine_of(mlp(0), DiagnosePlugin(), spend, accumulate=2)
    findings = found_in(engine, batches(), 40)
    assert expected is None or expected in findings["data_starvation"]
    assert (expected is None) is (findings == {})


def test_a_finding_reaches_every_logger_and_the_summary(tmp_path: Path) -> None:
    """Fails if a finding is only a warning."""
    plugins = [DiagnosePlugin(), JsonlPlugin(), TensorboardPlugin()]
    engine = engine_of(mlp(0), *plugins, lr=10.0, optimizer=torch.optim.SGD, out=tmp_path)
    findings = found_in(engine, data_of(0), 30)
    assert list(findings) == ["loss_explosion"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["diagnose/loss_explosion"] == 10
    assert lines[-1]["diagnose/findings"] == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("diagnose/loss_explosion")[-1].value == 10
    (note,) = events.Tensors("diagnose/loss_explosion/text_summary")
    assert note.step == 10
    shown = note.tensor_proto.string_val[0].decode()
    assert shown == findings["loss_explosion"]
    assert "(learning rate 10)" in shown, "the numbers that led to it"
    said = [(line["step"], line["note"], line["text"]) for line in lines if "note" in line]
    assert said == [(10, "diagnose/loss_explosion", findings["loss_explosion"])]
    assert plugins[0].summarize() == {"diagnose": f"step 10: {findings['loss_explosion']}"}
    assert DiagnosePlugin().summarize() == {"diagnose": "nothing found"}


def test_of_several_processes_the_first_alone_speaks() -> None:
    """Fails if every process reports a finding, or the others do not record it."""
    engine = engine_of(mlp(0), DiagnosePlugin(), lr=10.0, optimizer=torch.optim.SGD)
    engine.ranks = Ranks(rank=1)
    said: list[str] = []
    engine.hook.on_note = lambda **note: said.append(note["text"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.fit(data_of(0), until="30 steps")
    assert [finding.rule for finding in findings_of(engine)] == ["loss_explosion"]
    assert said == []
    assert [w for w in caught if w.category is RuntimeWarning] == []


def test_a_rule_can_be_left_out() -> None:
    """Fails if a rule cannot be disabled, or a misspelt rule is accepted."""
    plugin = DiagnosePlugin(ignore=["dead_layers", "slow_convergence"])
    model = mlp(0)
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
    assert found_in(engine_of(model, plugin), data_of(0)) == {}
    with pytest.raises(ConfigError, match="diagnose.ignore"):
        DiagnosePlugin(ignore=["dead_layer"])


@pytest.mark.parametrize("stop", [55, 60, 77])
def test_a_resumed_run_knows_what_the_first_one_knew(stop: int, tmp_path: Path) -> None:
    """Fails if a stop within a period, or during a finding, changes the findings."""

    def made(folder: str) -> Engine:
        torch.manual_seed(0)
        plugins = [FirstPlugin(), SecondPlugin(weight=1000.0), DiagnosePlugin()]
        keeper = CheckpointPlugin(every=f"{stop} steps")
        return engine_of(TwoHeads(), *plugins, keeper, loss=None, out=tmp_path / folder)

    whole, first, second = made("whole"), made("parts"), made("parts")
    findings = found_in(whole, data_of(0), 120)
    assert "module_collapse" in findings
    found_in(first, data_of(0), stop, until="120 steps")
    second.resume()
    assert second.state.step == stop
    said: list[str] = []
    second.hook.on_note = lambda **note: said.append(note["text"])
    found_again = found_in(second, data_of(0), 120, known=first)
    assert found_again == findings
    assert said == [finding.text for finding in findings_of(second)[len(findings_of(first)) :]]
    one, other = (engine.plugins["diagnose"].state_dict() for engine in (whole, second))
    assert json.dumps(one, default=str) == json.dumps(other, default=str)


@pytest.mark.parametrize("rows", [1, 3])
def test_training_is_the_same_to_the_bit(rows: int) -> None:
    """Fails if observing changes gradients, dropout or data."""
    ends = []
    for plugins in ([], [DiagnosePlugin(every=2, probe_every=3, ignore=["module_collapse"])]):
        torch.manual_seed(0)
        model = nn.Sequential(TwoHeads(), nn.Identity())
        model[0].trunk.append(nn.Dropout(0.3))
        terms = [FirstPlugin(), SecondPlugin()]
        engine = engine_of(model, *terms, *plugins, loss=None, accumulate=rows)
        engine.fit(data_of(0), until="12 steps")
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
