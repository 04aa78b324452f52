"""The NEXUS backbone: what it computes, and which inputs may not affect which outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from nexus_core.errors import ConfigError, DataError
from nexus_plugins.model_nexus import (
    ModelNexusPlugin,
    NEXUSConfig,
    NEXUSCore,
    NEXUSOutput,
    norms,
    operations,
)

VOCAB = 23
BACKBONE_ALONE = dict.fromkeys(("world", "reason", "energy", "causal"), False)
few = settings(max_examples=15)


def small_model(seed: int = 0, **changes: object) -> NEXUSCore:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "ssm_n_layers": 2,
        "ssm_head_dim": 8,
        "ssm_d_state": 4,
        "ssm_chunk_length": 4,
        "reason": True,
        "reason_window": 3,
        "causal": True,
    }
    model = NEXUSCore(**{**sizes, **changes}).eval()
    for parameter in model.parameters():  # large weights make every dependency visible
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def stepped(model: NEXUSCore, input_ids: Tensor) -> Tensor:
    states, logits = model.initial_state(len(input_ids)), []
    for token in input_ids.unbind(1):
        step_logits, states = model.step(token, states)
        logits.append(step_logits)
    return torch.stack(logits, 1)


def scan_inputs(time: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt, log_decay = normal(2, time, 3).exp(), -normal(2, time, 3).exp()
    inputs = [normal(2, time, 3, 2), dt, log_decay, normal(2, time, 4), normal(2, time, 4)]
    return [value.requires_grad_() for value in [*inputs, normal(3)]]


def scan_token_by_token(inputs: list[Tensor], document: Tensor | None) -> Tensor:
    """The recurrence by definition, token by token."""
    x, dt, log_decay, b, c, skip = inputs
    state = x.new_zeros(*x[:, 0].shape, b.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        if document is not None and t > 0:
            state = state * (document[:, t] == document[:, t - 1]).view(-1, 1, 1, 1)
        written = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], b[:, t])
        state = state * log_decay[:, t].exp()[..., None, None] + written
        outputs.append(torch.einsum("bhpn,bn->bhp", state, c[:, t]) + skip[:, None] * x[:, t])
    return torch.stack(outputs, 1)


def documents(time: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, time, generator=generator) < 0.3).long().cumsum(1)


@few
@given(
    time=st.integers(1, 17),
    chunk=st.integers(1, 20),
    in_cache=st.sampled_from([1, 5, 16, 512]),
    isolated=st.booleans(),
    seed=st.integers(0, 999),
)
def test_scan_is_the_recurrence_for_every_length_chunk_and_block(
    time: int, chunk: int, in_cache: int, isolated: bool, seed: int
) -> None:
    """Fails if the chunked form differs from the recurrence."""
    inputs = scan_inputs(time, seed)
    document = documents(time, seed) if isolated else None
    expected = scan_token_by_token(inputs, document)
    weights = torch.randn_like(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "TOKENS_IN_CACHE", in_cache)
        actual = operations.chunked_scan(*inputs, document, chunk)
        gradients = torch.autograd.grad((actual * weights).sum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        # With one token the decay has no effect, and autograd returns no gradient.
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-8)


@few
@given(
    time=st.integers(1, 9),
    in_cache=st.sampled_from([1, 2, 4, 512]),
    isolated=st.booleans(),
    seed=st.integers(0, 999),
)
def test_convolution_is_the_sum_over_earlier_tokens(
    time: int, in_cache: int, isolated: bool, seed: int
) -> None:
    """Fails if the convolution sees the future, another document, or the wrong neighbours."""
    torch.manual_seed(seed)
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, time, 3), (4, 3), (3,)))
    document = documents(time, seed) if isolated else torch.zeros(2, time, dtype=torch.long)
    expected = torch.zeros_like(x) + bias
    for row in range(2):
        for t in range(time):
            for s in range(max(0, t - 3), t + 1):
                if document[row, s] == document[row, t]:
                    expected[row, t] += weight[t - s] * x[row, s]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "TOKENS_IN_CACHE", in_cache)
        given_document = document if isolated else None
        actual = operations.causal_conv_silu(x, weight, bias, given_document)
    torch.testing.assert_close(actual, expected * expected.sigmoid())


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("in_cache", [1, 4, 512])
def test_convolution_has_the_gradient_of_finite_differences(
    isolated: bool, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the handwritten backward pass of the convolution is wrong."""
    monkeypatch.setattr(operations, "TOKENS_IN_CACHE", in_cache)
    document = documents(5, seed=0) if isolated else None
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 5, 2), (4, 2), (2,))]
    assert torch.autograd.gradcheck(
        lambda *values: operations.causal_conv_silu(*values, document),
        [value.requires_grad_() for value in inputs],
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("in_cache", "compiling"), [(2, False), (512, True)])
def test_norm_gives_unit_mean_square_and_its_gradient(
    gated: bool, in_cache: int, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the norm or its handwritten gradient, in one kernel or several, is wrong."""
    monkeypatch.setattr(operations, "TOKENS_IN_CACHE", in_cache)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) if gated else None
    norm = norms.rms_norm if gate is None else norms.gated_rms_norm
    inputs = (x,) if gate is None else (x, gate)
    y = norm(*inputs, 1e-12)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 3, dtype=torch.float64))
    value = x if gate is None else x * torch.nn.functional.silu(gate)
    torch.testing.assert_close(torch.sign(y), torch.sign(value))
    assert torch.autograd.gradcheck(norm, (*inputs, 1e-5))


def test_the_norm_of_no_rows_has_a_gradient() -> None:
    """Fails if an empty batch reaches the kernel, which divides by the number of rows."""
    x = torch.ones(0, 3, 5, requires_grad=True)
    assert torch.autograd.grad(norms.rms_norm(x, 1e-5).sum(), x)[0].shape == x.shape


@few
@given(time=st.integers(1, 21), chunk=st.integers(1, 24), seed=st.integers(0, 999))
def test_logits_do_not_depend_on_the_chunk_length(time: int, chunk: int, seed: int) -> None:
    """Fails if a setting that should only change speed changes the model."""
    input_ids = tokens(2, time, seed)
    reference = small_model(ssm_chunk_length=4)(input_ids)
    torch.testing.assert_close(
        small_model(ssm_chunk_length=chunk)(input_ids), reference, rtol=1e-4, atol=1e-4
    )


@few
@given(time=st.integers(1, 21), seed=st.integers(0, 999))
def test_step_by_step_equals_the_whole_sequence(time: int, seed: int) -> None:
    """Fails if generation differs from training."""
    model, input_ids = small_model(), tokens(2, time, seed)
    torch.testing.assert_close(stepped(model, input_ids), model(input_ids), rtol=1e-4, atol=1e-4)


@few
@given(time=st.integers(2, 21), data=st.data())
def test_later_tokens_change_no_earlier_logit(time: int, data: st.DataObject) -> None:
    """Fails if the model can see the answer, which makes its training loss meaningless."""
    model, input_ids = small_model(), tokens(2, time)
    position = data.draw(st.integers(1, time - 1))
    changed = input_ids.clone()
    changed[:, position:] = tokens(2, time - position, seed=1)
    assert torch.equal(model(changed)[:, :position], model(input_ids)[:, :position])


@few
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_packed_documents_have_the_logits_of_documents_alone(lengths: list[int], seed: int) -> None:
    """Fails if documents in a row affect one another."""
    model, input_ids = small_model(), tokens(1, sum(lengths), seed)
    # An id that recurs is a new document: 0, 1, 0, 1.
    ids = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)
    packed = model(input_ids, segment_ids=ids).split(lengths, 1)
    for document, logits in zip(input_ids.split(lengths, 1), packed, strict=True):
        torch.testing.assert_close(logits, model(document), rtol=1e-5, atol=1e-5)


def test_neighbours_in_the_batch_do_not_matter() -> None:
    """Fails if a sequence's result depends on the rest of the batch."""
    model, input_ids = small_model(), tokens(3, 11)
    changed = input_ids.clone()
    changed[1:] = tokens(2, 11, seed=1)
    assert torch.equal(model(changed)[0], model(input_ids)[0])


def test_every_parameter_gets_a_finite_gradient_that_is_not_zero() -> None:
    """Fails if part of the model does not train."""
    model = small_model(tie_embeddings=False, **BACKBONE_ALONE)
    model(tokens(2, 11)).logsumexp(-1).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_bfloat16_autocast_stays_near_float32() -> None:
    """Fails if mixed precision changes results or gradients beyond rounding."""
    model, input_ids = NEXUSCore(vocab_size=VOCAB, d_model=64, ssm_n_layers=2), tokens(2, 150)

    def run(autocast: bool) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids)
        logits.float().logsumexp(-1).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return logits.float(), torch.cat(gradients)

    for narrow, wide in zip(run(True), run(False), strict=True):
        assert (narrow - wide).norm() < 0.03 * wide.norm()


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_autocast_keeps_the_gradient_of_each_parameter(seed: int) -> None:
    """Fails if decays or step sizes, too small to matter in a global norm, learn from rounding."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "d_model": 64, "ssm_n_layers": 2, "ssm_head_dim": 8}
    model = NEXUSCore(**{**sizes, **BACKBONE_ALONE})
    input_ids = tokens(4, 256, seed)

    def gradients(autocast: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids)[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), input_ids[:, 1:].flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    narrow, wide = gradients(autocast=True), gradients(autocast=False)
    errors = {
        name: ((narrow[name] - wide[name]).norm() / wide[name].norm()).item() for name in wide
    }
    assert {name: error for name, error in errors.items() if not error < 0.1} == {}


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rate", "step"), [(16.0, 0.01), (8.0, 0.5)])
def test_scan_in_half_precision_keeps_the_gradient_of_strong_decays(
    rate: float, step: float, narrow: torch.dtype, isolated: bool
) -> None:
    """Fails if decays and step sizes learn from rounding when little of the state remains."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 200, 3, 16), (2, 200, 8), (2, 200, 8), (2, 200, 3, 16))
    values = [torch.randn(shape, generator=generator).to(narrow) for shape in shapes]
    dt = step * (1 + torch.rand(2, 200, 3, generator=generator))
    document = documents(200, seed=0) // 9 if isolated else None

    def gradients(exact: bool) -> list[Tensor]:
        wide = torch.float64 if exact else torch.float32
        x, b, c, grad_y = (value.to(wide if exact else narrow) for value in values)
        steps = dt.to(wide, copy=True).requires_grad_()
        log_rate = torch.full((3,), rate, dtype=wide).log().requires_grad_()
        inputs = [x, steps, -steps * log_rate.exp(), b, c, torch.ones(3, dtype=wide)]
        if exact:
            y = scan_token_by_token(inputs, document)
        else:
            y = operations.chunked_scan(*inputs, document, 64)
        return list(torch.autograd.grad(y, (steps, log_rate), grad_y))

    for actual, expected in zip(gradients(exact=False), gradients(exact=True), strict=True):
        assert (actual - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_of_generation_keeps_its_size_and_type(dtype: torch.dtype) -> None:
    """Fails if generation slows down and fills the memory as it continues."""
    model = small_model(layers=["ssm", "delta", "window", "mlp"], ssm_n_layers=4).to(dtype)
    first = model.initial_state(2)
    _, states = model.step(tokens(2, 1)[:, 0], first)

    def kinds(of: list[tuple[Tensor, ...]]) -> list[list[tuple[torch.Size, torch.dtype]]]:
        return [[(part.shape, part.dtype) for part in state] for state in of]

    assert kinds(states) == kinds(first)


def test_generation_takes_the_likeliest_tokens_at_temperature_zero() -> None:
    """Fails if the generated text is not what the model predicts."""
    model, sequence = small_model(), tokens(2, 3)
    generated = model.generate(sequence, 4, temperature=0)
    for _ in range(4):
        sequence = torch.cat([sequence, model(sequence)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, sequence)


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 3, "top_p": 1e-9}])
def test_the_narrowest_limits_leave_the_likeliest_token(limit: dict[str, float]) -> None:
    """Fails if top_k or top_p lets unlikely tokens through, or keeps likely ones out."""
    model, prompt = small_model(), tokens(2, 3)
    expected = model.generate(prompt, 5, temperature=0)
    assert torch.equal(model.generate(prompt, 5, **limit), expected)


def test_samples_repeat_with_the_seed_and_stay_within_top_k() -> None:
    """Fails if a sample cannot be reproduced, or top_k is violated."""
    model, prompt = small_model(), tokens(1, 3).expand(50, -1)

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 1, temperature=3.0, top_k=4, generator=generator)[:, -1]

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    likeliest = model(prompt)[0, -1].topk(4).indices
    assert set(sample(0).tolist()) == set(likeliest.tolist())


def test_generation_leaves_the_training_mode_of_every_part_as_it_was() -> None:
    """Fails if sampling changes the mode of any module."""
    model = small_model(dropout=0.5).train()
    model.blocks[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    prompt = tokens(1, 3)[0]
    assert model.generate(prompt, 2, temperature=0).shape == (5,)
    assert {name: part.training for name, part in model.named_modules()} == before


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-30])
def test_the_coldest_temperatures_take_the_likeliest_tokens(temperature: float) -> None:
    """Fails if logits divided by a tiny temperature overflow, and sampling fails."""
    model, prompt = small_model(), tokens(2, 3)
    expected = model.generate(prompt, 4, temperature=0)
    assert torch.equal(model.generate(prompt, 4, temperature=temperature), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(tokens(1, 3)[0]), "expected \\(batch, time\\)"),
        (lambda model: model(tokens(1, 3), tokens(1, 2)), "one document number per token"),
        (lambda model: model.generate(tokens(1, 0), 1), "at least one token"),
        (lambda model: model.generate(tokens(1, 1), -1), "max_new_tokens is -1"),
        (lambda model: model.generate(tokens(1, 1), 1, temperature=-1.0), "temperature is -1"),
        (lambda model: model.generate(tokens(1, 1), 1, temperature=math.nan), "temperature is nan"),
        (lambda model: model.generate(tokens(1, 1), 1, temperature=math.inf), "temperature is inf"),
        (lambda model: model.generate(tokens(1, 1), 1, top_k=0), "top_k is 0"),
        (lambda model: model.generate(tokens(1, 1), 1, top_p=1.5), "top_p is 1.5"),
    ],
)
def test_bad_arguments_say_what_was_expected(
    call: Callable[[NEXUSCore], object], words: str
) -> None:
    """Fails if a wrong shape or range ends in an unhelpful error."""
    with pytest.raises(ValueError, match=words):
        call(small_model())


def test_config_refuses_heads_that_do_not_fit() -> None:
    """Fails if an impossible size fails deep inside the model."""
    with pytest.raises(ValidationError, match="does not divide"):
        NEXUSConfig(d_model=100, ssm_head_dim=64)


def test_what_does_not_pay_is_on_where_it_is_asked_for() -> None:
    """Fails if the probe is on by default, off in a classic model, or its settings are ignored."""
    assert NEXUSConfig().causal is NEXUSConfig(classic=True, causal=False).causal is False
    assert NEXUSConfig().reason is False
    assert NEXUSConfig(classic=True).causal is NEXUSConfig(classic=True).reason is True
    with pytest.raises(ValidationError, match="without the causal module; set causal to true"):
        NEXUSConfig(variable_names=("rain", "wet"), n_variables=2)


def test_all_outputs_come_with_the_modules_reports() -> None:
    """Fails if `return_all_outputs` lacks the modules' outputs."""
    model, input_ids = small_model(), tokens(2, 5)
    logits, info = model(input_ids, return_all_outputs=True)
    assert torch.equal(logits, model(input_ids))
    assert set(info["module_outputs"]) >= {"world", "reason", "energy", "causal"}


def test_hidden_and_head_weight_give_the_logits() -> None:
    """Fails if the loss uses other logits than the model returns."""
    model, input_ids = small_model(), tokens(2, 5)
    output = model.hidden(input_ids)
    torch.testing.assert_close(output.hidden @ output.head_weight.T, model(input_ids))


def test_plugin_takes_the_vocabulary_from_the_data_unless_told() -> None:
    """Fails if the model's vocabulary does not fit the tokenizer."""
    engine = SimpleNamespace(data=SimpleNamespace(codec=SimpleNamespace(size=VOCAB)))
    sizes = {"d_model": 16, "ssm_n_layers": 1, "ssm_head_dim": 8}
    from_data = ModelNexusPlugin(**sizes).make_model(engine)
    told = ModelNexusPlugin(vocab_size=99, **sizes).make_model(engine)
    assert isinstance(from_data, NEXUSCore)
    assert from_data.config.vocab_size == VOCAB
    assert isinstance(told, NEXUSCore)
    assert told.config.vocab_size == 99


def test_plugin_asks_for_the_vocabulary_where_nothing_tells_it() -> None:
    """Fails if a run without a tokenizer ends in a traceback instead of the key to set."""
    with pytest.raises(ConfigError, match=r"model_nexus\.vocab_size"):
        ModelNexusPlugin().make_model(SimpleNamespace(data=None))


def test_ids_beyond_the_vocabulary_are_named() -> None:
    """Fails if an id outside the vocabulary ends in "index out of range in self"."""
    plugin = ModelNexusPlugin(vocab_size=256, d_model=16, ssm_n_layers=1, ssm_head_dim=8)
    bytes_and_more = SimpleNamespace(data=SimpleNamespace(codec=SimpleNamespace(size=259)))
    with pytest.raises(ConfigError, match=r"has 259 ids .*data_text\.tokenizer=bytes256"):
        plugin.make_model(bytes_and_more)
    model = plugin.make_model(SimpleNamespace(data=None))
    with pytest.raises(DataError, match=r"from 7 to 256, but the model has ids 0 to 255"):
        plugin.forward(SimpleNamespace(model=model), {"input_ids": torch.tensor([[7, 256]])})


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "the weights are not finite"), (3e38, "none: sampling failed: prob")],
)
def test_a_sample_that_cannot_be_written_says_why(value: float, said: str) -> None:
    """Fails if the summary of a diverged run raises an error."""
    model = small_model()
    torch.nn.init.constant_(model.final_norm.weight, value)
    data = SimpleNamespace(
        codec=SimpleNamespace(decode=str), valid={"val": [{"input_ids": tokens(1, 6)}]}
    )
    engine = SimpleNamespace(model=model, data=data, device="cpu", seed=0)
    answer = ModelNexusPlugin().summarize(engine)
    assert answer.keys() == {"sample"}
    assert said in answer["sample"]


def test_plugin_isolates_documents_where_the_batch_has_segments() -> None:
    """Fails if packed documents affect one another although the batch marks them."""
    model, input_ids = small_model(), tokens(1, 6)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    engine = SimpleNamespace(model=model)
    output = ModelNexusPlugin().forward(engine, {"input_ids": input_ids, "segment_ids": segments})
    assert isinstance(output, NEXUSOutput)
    assert torch.equal(output.logits, model(input_ids, segments))
