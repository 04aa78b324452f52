"""The simulated accelerator reproduces what can only go wrong on a GPU."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import _device_constructors

from nexus_core import ConfigError
from nexus_core.meter import Meter
from nexus_core.processes import Ranks
from nexus_core.testing import HostAccelerator, host_accelerator


@pytest.fixture
def accelerator() -> Iterator[HostAccelerator]:
    with host_accelerator() as found:
        yield found


def net(device: torch.device | str = "cpu") -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 11))
    return nn.Sequential(*layers).to(device)


IDS = torch.arange(12).remainder(11).reshape(3, 4)


def trained(device: torch.device | str, steps: int = 3, **settings: bool) -> nn.Module:
    model = net(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **settings)
    ids = IDS.to(device)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
        optimizer.step()
    return model


def test_it_is_there_for_its_block_alone() -> None:
    """Fails if other tests in this process would use it, or torch stays patched."""
    generator, synchronize = torch.Generator, torch.accelerator.synchronize
    with host_accelerator() as accelerator:
        before = accelerator.allocated
        assert torch.accelerator.current_accelerator(check_available=True).type == "fakegpu"
        assert torch.accelerator.device_count() == 1
        with pytest.raises(ConfigError, match="cannot be nested"), host_accelerator():
            pass
        kept = torch.ones(3, device=accelerator.device)
    assert not torch.accelerator.is_available()
    assert (torch.Generator, torch.accelerator.synchronize) == (generator, synchronize)
    del kept
    assert accelerator.allocated == before


def test_device_contexts_act_within_it_and_afterwards() -> None:
    """Fails if PyTorch caches replacements: weights created on `meta` would never be filled."""
    _device_constructors.cache_clear()  # as in a fresh process
    with host_accelerator(), torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert nn.Linear(2, 2).weight.device.type == "meta"


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_training_on_it_gives_the_bits_of_the_host(
    accelerator: HostAccelerator, settings: dict[str, bool]
) -> None:
    """Fails if an operation accesses memory outside its arguments."""
    found, expected = trained(accelerator.device, **settings), trained("cpu", **settings)
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert mine.device == accelerator.device
        assert torch.equal(mine.cpu(), theirs)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "LSTM": (nn.LSTM(3, 4, 2), (5, 2, 3)),
    "GRU": (nn.GRU(3, 4, bias=False), (5, 2, 3)),
    "convolution": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 6, 6)),
    "batch norm": (nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)), (4, 3, 5)),
    "convolution without a bias": (nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 6)),
    "pooling": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)), (2, 1, 8, 8)),
    "attention": (nn.MultiheadAttention(4, 2), (5, 2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_what_they_do_on_the_host(name: str, accelerator: HostAccelerator) -> None:
    """Fails if a layer that PyTorch computes differently on accelerators is missing."""
    layer, shape = LAYERS[name]
    x, there = torch.randn(shape), copy.deepcopy(layer).to(accelerator.device)
    many = 3 if name == "attention" else 1
    outputs = [m(*[v] * many) for m, v in ((layer, x), (there, x.to(accelerator.device)))]
    for output in outputs:
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    for mine, theirs in zip(there.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad)


def test_views_write_to_what_they_are_views_of(accelerator: HostAccelerator) -> None:
    """Fails if a view is a copy: by shape, stride or dtype, or of another view."""
    x = torch.arange(12.0, device=accelerator.device)
    x[2:8:2].mul_(10)
    x.view(3, 4).T[1].add_(0.5)
    x[5:].view(torch.int32)[1:].view(torch.float32)[0] = -1
    torch.view_as_complex(x[8:].view(2, 2)).real.fill_(7)
    x.resize_(3)
    expected = torch.arange(12.0)
    expected[2:8:2].mul_(10)
    expected.view(3, 4).T[1].add_(0.5)
    expected[6], expected[8], expected[10] = -1, 7, 7
    assert torch.equal(x.resize_(12).cpu(), expected)
    assert torch.equal(copy.deepcopy(x).cpu(), expected)
    assert x.resize_(20).cpu()[12:].isnan().all(), "new memory holds garbage"


def test_lazy_conjugates_and_signs_count(accelerator: HostAccelerator) -> None:
    """Fails if a view that is conjugated or negated only when it is read loses that."""
    z, other = torch.randn(2, 3, 4, dtype=torch.complex64).unbind()

    def results(z: Tensor, other: Tensor) -> list[Tensor]:
        changed = other.clone()
        changed.conj().mul_(z)
        return [
            z.conj(), z.conj() * other, z.mT.conj() @ other, z.conj().imag, z.conj()[1:].clone(),
            z.clone().mul_(other.conj()), torch.mul(z, other.conj(), out=torch.empty_like(z)),
            changed,
        ]  # fmt: skip

    there = results(z.to(accelerator.device), other.to(accelerator.device))
    for mine, theirs in zip(there, results(z, other), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs)


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a sum": lambda here, there: here + there,
    "a product of matrices": lambda here, there: here @ there,
    "a list": lambda here, there: torch.cat([here, there]),
    "in place": lambda here, there: here.mul_(there),
    "the host's": lambda here, there: there.mul_(here),
    "a mask": lambda here, there: here.masked_fill(there > 0, 0.0),
    "out": lambda here, there: torch.add(here, here, out=there),
}


@pytest.mark.parametrize("name", MIXED)
def test_planted_mixed_devices_are_an_error(name: str, accelerator: HostAccelerator) -> None:
    with pytest.raises(RuntimeError, match="same device, but found at least two devices, fakegpu"):
        MIXED[name](torch.ones(2, 2, device=accelerator.device), torch.ones(2, 2))


def test_numbers_and_indices_of_the_host_mix(accelerator: HostAccelerator) -> None:
    """Fails if it rejects what CUDA accepts."""
    x = torch.arange(6.0, device=accelerator.device)
    assert (x * torch.tensor(2.0))[torch.tensor([1, 3])].tolist() == [2, 6]
    x.fill_(torch.tensor(4.0)).copy_(torch.ones(6))
    assert torch.where(x > 0, torch.tensor(5.0), x).tolist() == [5] * 6


X, MASK = "torch.arange(6., device='fakegpu')", "torch.arange(6, device='fakegpu') > 2"
WAITS = {
    "float(x[0])": "the value of a tensor",
    "x[0].item()": "the value of a tensor",
    "bool(mask[0])": "the value of a tensor",
    "x.tolist()": "a copy to the host",
    "x.cpu()": "a copy to the host",
    "repr(x)": "",
    "torch.empty(6).copy_(x, non_blocking=True)": "a copy to the host, as its memory is not pinned",
    "torch.tensor([1., 2.], device=x.device)": "a copy to the device",
    "x.copy_(torch.ones(6))": "a copy to the device",
    "x[torch.tensor([1, 2])]": "a copy to the device",
    "x[mask]": "nonzero",
    "x.__setitem__(mask, x[:3].clone())": "the number of entries of a mask",
    "x.masked_select(mask)": "masked_select",
    "mask.nonzero()": "nonzero",
    "torch.where(mask)": "nonzero",
    "x.unique()": "unique",
    "x.equal(x)": "equal",
    "torch.allclose(x, x)": "the value of a tensor",
    "mask.long().bincount()": "bincount",
    "x.repeat_interleave(mask.long())": "the lengths of repeat_interleave",
    "torch.multinomial(x, 1)": "multinomial",
    "torch.accelerator.synchronize()": "synchronize",
    "torch.fakegpu.Event().synchronize()": "synchronize",
}
FREE = [
    "x.__setitem__(mask, 0.)", "torch.where(mask, x, -x)", "x.masked_fill(mask, 0.)", "x[2:].sum()",
    "x.to('cpu', non_blocking=True)", "torch.ones(3).to(x.device, non_blocking=True)",
    "x.repeat_interleave(mask.long() + 1, output_size=9)", "torch.zeros(3, device=x.device)",
    "torch.full((), 3., device=x.device)", "x.norm().clamp(max=1.)", "x * torch.tensor(2.)",
    "torch.rand(3, device=x.device)", "x[x.long()]", "F.dropout(x)", "x.sort()", "x.cumsum(0)",
    "F.one_hot(x.long(), 6)", "x.shape", "torch.fakegpu.Event().record()",
]  # fmt: skip


def waits_in(expression: str, accelerator: HostAccelerator) -> list[str]:
    names = {"x": eval(X), "mask": eval(MASK), "torch": torch, "F": F}
    accelerator.waits.clear()
    eval(expression, names)
    return [wait.what for wait in accelerator.waits]


@pytest.mark.parametrize("expression", WAITS)
def test_planted_wait_is_seen(expression: str, accelerator: HostAccelerator) -> None:
    found = waits_in(expression, accelerator)
    assert found, "nothing is seen"
    assert found[0].startswith(WAITS[expression])


@pytest.mark.parametrize("expression", FREE)
def test_what_does_not_wait_is_let_through(expression: str, accelerator: HostAccelerator) -> None:
    assert waits_in(expression, accelerator) == []


class Peeking(torch.autograd.Function):
    """Reads the gradient on the host."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float(gradient.sum())


def test_a_wait_has_the_line_of_the_users_code(accelerator: HostAccelerator) -> None:
    """Fails if it names a line of torch or of the accelerator, also in a backward pass."""
    x = torch.ones(3, device=accelerator.device, requires_grad=True)
    Peeking.apply(x).sum().backward()
    (wait,) = accelerator.waits
    line = inspect.getsourcelines(Peeking.backward)[1] + 2
    assert (wait.file, wait.line, wait.function) == (__file__, line, "backward")
    assert str(wait).endswith(f"{__file__}:{line} in backward: {wait.text}")
    assert wait.text == "return gradient * float(gradient.sum())"
    with accelerator.told(lambda what, frame: heard.append((what, frame.f_code.co_name))):
        heard: list[tuple[str, str]] = []
        x.detach().cpu()
    x.detach().cpu()
    assert heard == [("a copy to the host", "test_a_wait_has_the_line_of_the_users_code")]


def test_planted_early_read_gives_garbage(accelerator: HostAccelerator) -> None:
    """Fails if a program that reads before its copy has completed looks correct."""
    x = torch.arange(3.0, device=accelerator.device)
    early, pinned = x.to("cpu", non_blocking=True), torch.empty(3, pin_memory=True)
    pinned.copy_(x * 2, non_blocking=True)
    whole = x.long().to("cpu", non_blocking=True)
    x.add_(1)  # after the copies in the queue
    assert early.isnan().all()
    assert pinned.isnan().all()
    assert whole.tolist() != [0, 1, 2]
    torch.accelerator.synchronize()
    assert (early.tolist(), pinned.tolist()) == ([0, 1, 2], [0, 2, 4])
    assert whole.tolist() == [0, 1, 2]
    assert torch.empty(4, device=accelerator.device).cpu().isnan().all()


def test_planted_write_to_memory_that_is_being_copied_is_named(
    accelerator: HostAccelerator,
) -> None:
    pinned = torch.ones(3).pin_memory()
    assert (pinned.is_pinned(), torch.ones(3).is_pinned()) == (True, False)
    pinned.to(accelerator.device, non_blocking=True)
    pinned.add_(1)
    with pytest.raises(
        RuntimeError, match=r"overwritten before .*/test_accelerator.py:\d+: pinned"
    ):
        torch.accelerator.synchronize()
    pinned.to(accelerator.device, non_blocking=True)
    torch.accelerator.synchronize()
    pinned.add_(1)
    torch.accelerator.synchronize()


def test_planted_out_of_memory_is_torchs_own_error(accelerator: HostAccelerator) -> None:
    """Fails if memory is not counted, not freed, or exceeds the limit."""
    gc.collect()  # earlier failures may still hold memory
    torch.accelerator.reset_peak_memory_stats()
    before = accelerator.allocated
    x = torch.zeros(1000, device=accelerator.device)
    part = x[10:]
    assert accelerator.allocated - before == 4000 == torch.accelerator.memory_allocated() - before
    accelerator.limit = before + 10_000
    y = x + 1
    with pytest.raises(torch.OutOfMemoryError, match="fakegpu out of memory. Tried to allocate 4"):
        y.exp()
    del x, y
    gc.collect()
    assert accelerator.allocated - before == 4000, "a view holds all"
    assert torch.accelerator.max_memory_allocated() - before == 8000
    del part
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.max_memory_allocated() == before


def test_generators_are_apart(accelerator: HostAccelerator) -> None:
    """Fails if an unsaved generator state has no effect, or the host's generator changes."""
    torch.manual_seed(1)
    host = torch.get_rng_state()
    module = torch.get_device_module("fakegpu")
    state = module.get_rng_state()
    first = F.dropout(torch.ones(50, device=accelerator.device)).cpu()
    second = F.dropout(torch.ones(50, device=accelerator.device)).cpu()
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), host), "the host's is as it was"
    torch.set_rng_state(host)
    module.set_rng_state(state)
    assert torch.equal(F.dropout(torch.ones(50, device=accelerator.device)).cpu(), first)
    torch.manual_seed(1)
    assert torch.equal(module.get_rng_state(), state), "it is seeded with the others"


def test_planted_generator_of_the_host_is_refused(accelerator: HostAccelerator) -> None:
    own = torch.Generator(accelerator.device).manual_seed(4)
    assert own.device == accelerator.device
    assert isinstance(own, torch.Generator)
    drawn = torch.randn(3, generator=own, device=accelerator.device)
    assert drawn.tolist() == torch.randn(3, generator=torch.Generator().manual_seed(4)).tolist()
    with pytest.raises(RuntimeError, match="Expected a 'fakegpu' device type for generator"):
        torch.randn(3, generator=torch.Generator(), device=accelerator.device)


def test_autocast_and_scaler_work(accelerator: HostAccelerator) -> None:
    """Fails if a matmul is not in low precision, a sum is, or an overflow skips no step."""
    model, ids = net(accelerator.device), IDS.to(accelerator.device)
    with torch.autocast("fakegpu", torch.float16):
        hidden = model(ids)
        loss = F.cross_entropy(hidden.flatten(0, 1), ids.flatten())
    assert (hidden.dtype, loss.dtype) == (torch.float16, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("fakegpu", init_scale=8.0)
    scaler.scale(loss).backward()
    accelerator.waits.clear()
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    after = [p.detach().clone() for p in model.parameters()]
    next(model.parameters()).grad[0, 0] = torch.inf
    accelerator.waits.clear()
    scaler.step(optimizer)
    scaler.update()
    assert accelerator.waits == [], "found_inf stays on the device"
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), after, strict=True))
    assert scaler.get_scale() == 4.0


def test_metrics_cost_one_wait(accelerator: HostAccelerator) -> None:
    """Fails if each number is transferred separately, or host numbers are copied to the device."""
    meter = Meter()
    for value in (3.0, 5.0):
        on_device = torch.tensor(value, device=accelerator.device)
        meter.add("train/loss", on_device, torch.tensor(2**25 + 1, dtype=torch.int64))
        meter.add("train/plain", value)
        meter.add("train/norm", on_device, on_device)
    accelerator.waits.clear()
    found = meter.read(Ranks(0, 1))
    assert [wait.what for wait in accelerator.waits] == ["a copy to the host"]
    assert found == {"train/loss": 8 / (2**26 + 2), "train/plain": 4.0, "train/norm": 1.0}


# -- graphs


def captured(accelerator: HostAccelerator) -> tuple[Callable[[], None], Tensor, Tensor]:
    """A replay function, its input, and the tensor to which it adds noise."""
    module = torch.get_device_module(accelerator.device)
    source, target = torch.ones(3, device=accelerator.device), torch.zeros(3).to(accelerator.device)
    graph = module.CUDAGraph()
    with module.graph(graph):
        target.add_(torch.rand_like(source) * source)
    return graph.replay, source, target


def test_capturing_computes_nothing_and_a_replay_reads_what_is_there_then(
    accelerator: HostAccelerator,
) -> None:
    """Fails if a capture changes memory or generators, or a replay ignores new inputs."""
    torch.manual_seed(5)
    replay, source, target = captured(accelerator)
    assert target.tolist() == [0.0] * 3
    source.fill_(2.0)
    replay()
    source.fill_(3.0)
    replay()
    torch.manual_seed(5)
    first, second = (torch.rand(3, device=accelerator.device) for _ in range(2))
    assert torch.equal(target, first * 2.0 + second * 3.0)


def test_what_a_capture_made_is_garbage_until_it_is_replayed(accelerator: HostAccelerator) -> None:
    module = torch.get_device_module(accelerator.device)
    source = torch.ones(3, device=accelerator.device)
    graph = module.CUDAGraph()
    with module.graph(graph):
        double = source * 2.0
    assert double.isnan().all()
    graph.replay()
    assert double.tolist() == [2.0] * 3


PLANTED_IN_A_CAPTURE: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "a wait": (lambda x: x.sum().item(), "value of a tensor .*not permitted when stream is capt"),
    "a copy": (lambda x: x.copy_(torch.ones(3), non_blocking=True), "not pinned.*not permitted"),
    "a generator": (
        lambda x: x.uniform_(generator=torch.Generator(x.device)), "register_generator_state"
    ),
    "a capture": (
        lambda x: torch.get_device_module(x.device).CUDAGraph().capture_begin(), "another graph"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED_IN_A_CAPTURE)
def test_planted_fault_in_a_capture_is_an_error(name: str, accelerator: HostAccelerator) -> None:
    """Fails if a capture that CUDA rejects is allowed, or the device is unusable afterwards."""
    module, x = torch.get_device_module(accelerator.device), torch.ones(3).to(accelerator.device)
    fault, words = PLANTED_IN_A_CAPTURE[name]
    with pytest.raises(RuntimeError, match=words), module.graph(module.CUDAGraph()):
        fault(x)
    assert x.tolist() == [1.0] * 3


def test_waits_can_be_warned_of_and_forbidden(accelerator: HostAccelerator) -> None:
    """Fails if code that uses CUDA's sync debug mode behaves differently here."""
    module, x = torch.get_device_module(accelerator.device), torch.ones(1).to(accelerator.device)
    module.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing operation: the value") as said:
        x.item()
    assert said[0].filename == __file__
    module.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing operation"):
        x.item()
    assert module.get_sync_debug_mode() == 2
    module.set_sync_debug_mode(0)
    assert x.item() == 1.0
