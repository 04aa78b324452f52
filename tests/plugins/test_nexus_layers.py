"""The layer types and the n-grams: what they compute, and laws that hold for all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nexus_core import Engine
from nexus_core.plan import load
from nexus_plugins.model_nexus import NEXUSConfig, NEXUSCore
from nexus_plugins.model_nexus.delta import delta_scan
from nexus_plugins.model_nexus.mlp import Mlp
from nexus_plugins.model_nexus.residual import in_turn
from nexus_plugins.model_nexus.window import WindowAttention

ROOT = Path(__file__).parents[2]
VOCAB = 7
KINDS: dict[str, dict[str, object]] = {
    "delta": {"layers": ["delta"]},
    "products": {"layers": ["delta"], "delta_products": 2},
    "window": {"layers": ["window"], "window": 5, "window_head_dim": 4},
    "wide window": {
        "layers": ["window", "mlp"],
        "window": 64,
        "window_head_dim": 4,
        "window_kv_heads": 2,
    },
    "ngrams": {"ngrams": [2, 3], "ngram_buckets": 50, "recall": [1, 3]},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
few = settings(max_examples=5)


def small_model(kind: str, **changes: object) -> NEXUSCore:
    torch.manual_seed(0)
    alone = dict.fromkeys(("world", "reason", "energy", "causal"), False)
    sizes = {"ssm_n_layers": 2, "ssm_head_dim": 8, "ssm_d_state": 4, "ssm_chunk_length": 4}
    settings = {"vocab_size": VOCAB, "d_model": 16, **sizes, **alone, **KINDS[kind], **changes}
    model = NEXUSCore(**settings).eval()
    for parameter in model.parameters():  # large weights make every dependency visible
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


@each_kind
@few
@given(time=st.integers(1, 21), seed=st.integers(0, 999))
def test_step_by_step_equals_the_whole_sequence(kind: str, time: int, seed: int) -> None:
    """Fails if generation differs from training, or its state grows."""
    model, input_ids = small_model(kind), tokens(2, time, seed)
    states, logits = model.initial_state(2), []
    shapes = [[part.shape for part in state] for state in states]
    for token in input_ids.unbind(1):
        step_logits, states = model.step(token, states)
        logits.append(step_logits)
    assert [[part.shape for part in state] for state in states] == shapes
    whole = model(input_ids)
    torch.testing.assert_close(torch.stack(logits, 1), whole, rtol=1e-4, atol=1e-4)
    chunks = small_model(kind, ssm_chunk_length=9)(input_ids)
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-4)


@each_kind
@few
@given(time=st.integers(2, 21), data=st.data())
def test_neither_later_tokens_nor_neighbours_change_a_logit(
    kind: str, time: int, data: st.DataObject
) -> None:
    """Fails if the model can see the answer, or a result depends on the rest of the batch."""
    model, input_ids = small_model(kind), tokens(2, time)
    position = data.draw(st.integers(1, time - 1))
    changed = input_ids.clone()
    changed[:, position:] = tokens(2, time - position, seed=1)
    changed[1] = tokens(1, time, seed=2)
    assert torch.equal(model(changed)[0, :position], model(input_ids)[0, :position])


@each_kind
@few
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_packed_documents_have_the_logits_of_documents_alone(
    kind: str, lengths: list[int], seed: int
) -> None:
    """Fails if documents in a row affect one another."""
    model, input_ids = small_model(kind), tokens(1, sum(lengths), seed)
    ids = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)
    packed = model(input_ids, segment_ids=ids).split(lengths, 1)
    for document, logits in zip(input_ids.split(lengths, 1), packed, strict=True):
        torch.testing.assert_close(logits, model(document), rtol=1e-4, atol=1e-4)


@each_kind
def test_every_parameter_learns_in_bfloat16_as_in_float32(kind: str) -> None:
    """Fails if part of the model does not train, or learns from rounding."""
    torch.manual_seed(0)
    alone = dict.fromkeys(("world", "reason", "energy", "causal"), False)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "ssm_n_layers": 2, "ssm_head_dim": 8}
    model, input_ids = NEXUSCore(**{**sizes, **alone, **KINDS[kind]}), tokens(4, 128)

    def gradients(autocast: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids)[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), input_ids[:, 1:].flatten()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    narrow, wide = gradients(autocast=True), gradients(autocast=False)
    assert set(wide) == {name for name, _ in model.named_parameters()}
    errors = {n: ((narrow[n] - g).norm() / g.norm()).item() for n, g in wide.items()}
    assert {name: error for name, error in errors.items() if not error < 0.1} == {}


@few
@given(
    time=st.integers(1, 13),
    chunk=st.integers(1, 16),
    isolated=st.booleans(),
    seed=st.integers(0, 999),
)
def test_delta_scan_is_the_recurrence_with_its_gradient(
    time: int, chunk: int, isolated: bool, seed: int
) -> None:
    """Fails if the chunked form differs from the delta rule."""
    torch.manual_seed(seed)
    shapes = [(2, time, 3, 4), (2, time, 3, 4), (2, time, 3, 2), (2, time, 3), (2, time, 3)]
    query, key, value, beta, log_decay = (torch.randn(s, dtype=torch.float64) for s in shapes)
    key, beta = torch.nn.functional.normalize(key, dim=-1), 2 * beta.sigmoid()
    inputs = [v.requires_grad_() for v in (query, key, value, beta, -log_decay.exp())]
    document = (torch.rand(2, time) < 0.3).long().cumsum(1) if isolated else None

    memory, outputs = torch.zeros(2, 3, 4, 2, dtype=torch.float64), []
    for t in range(time):
        if document is not None and t > 0:
            memory = memory * (document[:, t] == document[:, t - 1]).view(2, 1, 1, 1)
        q, k, v, b, g = (part[:, t] for part in inputs)
        turned = torch.eye(4) - b[..., None, None] * k.unsqueeze(-1) * k.unsqueeze(-2)
        memory = turned @ (g.exp()[..., None, None] * memory)
        memory = memory + b[..., None, None] * k.unsqueeze(-1) * v.unsqueeze(-2)
        outputs.append((q.unsqueeze(-2) @ memory).squeeze(-2))
    expected, actual = torch.stack(outputs, 1), delta_scan(*inputs, document, chunk)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    found, wanted = (
        torch.autograd.grad((y * weights).sum(), inputs, materialize_grads=True)
        for y in (actual, expected)
    )
    torch.testing.assert_close(found, wanted)


@few
@given(time=st.integers(1, 30), split=st.integers(0, 30), seed=st.integers(0, 999))
def test_recall_finds_what_followed_the_last_such_tokens_in_the_document(
    time: int, split: int, seed: int
) -> None:
    """Fails if the recalled token is not the one that followed the same tokens."""
    model = small_model("ngrams", ngrams=[], recall=[2], d_model=16)
    assert model.ngrams is not None
    table = torch.arange(VOCAB + 1.0).unsqueeze(1).expand(-1, 16)
    with torch.no_grad():
        model.ngrams.recalled[0].weight.copy_(table)
    input_ids = tokens(1, time, seed)
    document = (torch.arange(time) >= split).long().unsqueeze(0)
    seen: dict[tuple[int, ...], int] = {}
    row, expected = input_ids[0].tolist(), []
    for t in range(time):
        start = split if t >= split else 0
        if t > start:
            seen[start, *row[max(start, t - 2) : t]] = row[t] + 1
        expected.append(seen.get((start, *row[max(start, t - 1) : t + 1]), 0))
    assert model.ngrams(input_ids, document)[0, :, 0].tolist() == expected


def test_layers_repeat_in_their_order_until_there_are_enough() -> None:
    """Fails if the model has other layers than configured."""
    model = small_model("wide window", layers=["ssm", "mlp"], ssm_n_layers=3)
    assert [block.kind for block in model.blocks] == ["ssm", "mlp", "ssm"]
    assert isinstance(model.blocks[1].mlp, Mlp)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": ["window"], "d_model": 33}, "d_model=33 is odd"),
        ({"layers": ["window"], "window_kv_heads": 3}, "does not divide the"),
        ({"layers": ["attention"]}, "'ssm', 'delta', 'window' or 'mlp'"),
        ({"ngrams": [1]}, "greater than or equal to 2"),
    ],
)
def test_config_refuses_layers_that_do_not_fit(settings: dict[str, object], words: str) -> None:
    """Fails if an impossible size fails deep inside the model."""
    with pytest.raises(ValidationError, match=words):
        NEXUSConfig(**settings)


def moved(optimizer: str, base_width: int | None, width: int, tied: bool) -> Tensor:
    """The RMS change of each layer's output and the logits after some steps."""
    torch.manual_seed(0)
    alone = dict.fromkeys(("world", "reason", "energy", "causal"), False)
    sizes = {"d_model": width, "ssm_n_layers": 2, "ssm_head_dim": 8, "ssm_d_state": 8}
    settings = {"vocab_size": VOCAB, "layers": ["ssm", "mlp"], "base_width": base_width,
                "tie_embeddings": tied, **sizes}  # fmt: skip
    model, seen = NEXUSCore(**settings, **alone), list[Tensor]()
    ids = tokens(4, 17)

    def look() -> list[Tensor]:
        seen.clear()
        hooks = [b.register_forward_hook(lambda _m, _i, y: seen.append(y)) for b in model.blocks]
        with torch.no_grad():
            seen.append(model(ids))
        for hook in hooks:
            hook.remove()
        return list(seen)

    def loss(model: NEXUSCore, ids: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])

    before = look()
    plugin = load(optimizer)(lr=0.02, weight_decay=0.0, base_width=base_width)
    Engine(model, loss=loss, plugins=[plugin]).fit([ids], until="6 steps")
    changes = [(y - x).square().mean().sqrt() for x, y in zip(before, look(), strict=True)]
    return torch.stack(changes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["optim_adamw", "optim_muon"])
def test_a_learning_rate_moves_every_width_alike(optimizer: str, tied: bool) -> None:
    """Fails if a rate tuned at one width is too high for a wider model."""
    narrow, middle, wide = (moved(optimizer, 16, width, tied) for width in (16, 32, 64))
    for other in (middle, wide):
        assert (other / narrow).log2().abs().max() < 0.5
    assert (moved(optimizer, None, 64, tied) / moved(optimizer, None, 16, tied)).log2().max() > 1


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), [("parity", "delta"), ("s3", "delta, 3 corrections")])
def test_a_delta_layer_tracks_states_beyond_the_length_it_was_trained_on(
    task: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the delta layer cannot count modulo two, or multiply permutations."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import states

    torch.manual_seed(0)
    load = replace(states.QUICK, steps=100) if task == "parity" else states.QUICK
    assert states.learn(task, states.build(states.MODELS[name]), load, seed=0) > 0.95


@pytest.mark.parametrize(("divided", "kv_heads"), [(False, 2), (True, 1), (False, 1)])
@pytest.mark.parametrize("length", [1, 5, 8, 20])
def test_windows_have_the_same_gradients_with_any_attention_kernel_and_token_by_token(
    length: int, divided: bool, kv_heads: int
) -> None:
    """Fails if a layer relies on the memory layout of a kernel's gradients, or its own are wrong.

    Token by token, they are autograd's.
    """
    torch.manual_seed(0)
    layer, x = WindowAttention(16, 8, 8, kv_heads), torch.randn(2, length, 16, requires_grad=True)
    document = (torch.arange(length) >= length // 2).expand(2, -1).long() if divided else None

    def gradients(outputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs.square().sum(), [x, *layer.parameters()])

    found = []
    for kernels in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        with sdpa_kernel(kernels):
            found.append(gradients(layer(x, document)))
    torch.testing.assert_close(*found)
    if not divided:
        outputs, _ = in_turn(layer.step, x, layer.initial_state(2))
        torch.testing.assert_close(found[0], gradients(outputs))


def test_a_compiled_window_computes_the_same() -> None:
    """Fails if the operations for the compiler differ from the manual ones."""
    torch.manual_seed(0)
    layer, x = WindowAttention(16, 8, 8, 1), torch.randn(2, 20, 16, requires_grad=True)
    found = []
    for run in (layer, torch.compile(layer, backend="eager")):
        outputs = run(x)
        found.append([outputs, *torch.autograd.grad(outputs.square().sum(), [x])])
    torch.testing.assert_close(*found)
