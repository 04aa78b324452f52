"""Repeat a recorded step, watching every module, and say where the bad number came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from nexus_core import Batch, CheckpointError, NexusError
from nexus_core.batches import batch_size
from nexus_core.data import Micro
from nexus_core.device import set_random_state
from nexus_core.step import Step
from nexus_core.update import accumulate_gradient, count_units
from nexus_plugins._shared.files import opened, read_small
from nexus_plugins._shared.generators import check_generators

if TYPE_CHECKING:
    from nexus_core.engine import Engine

__all__ = ["replay"]

_FACTS_LIMIT = 64 << 20


def replay(engine: Engine, record: Path) -> str:
    """Repeat a recorded step, without an update.

    Args:
        engine: built from the config of the run that wrote the record, not trained.
        record: the folder `OUT/guard/step-00000123`.

    Returns:
        What was found, in lines of text: the first module whose output was not finite, the loss
        terms that were not, and the first module with a non-finite gradient.

    Raises:
        CheckpointError: the record cannot be read, or belongs to another model.
    """
    facts, batches = _read(engine, record)
    findings: list[str] = []
    engine.model.train()
    with _watched(engine.model, findings), _blamed(record):
        step = Step(facts["step"], tuple(map(Micro, batches)), facts["turn"])
        if engine.cells:
            cells = [Micro(b, float(batch_size(b)[0]), cell=c) for c, b in enumerate(batches)]
            step = Step(facts["step"], tuple(cells), facts["turn"], cells=(len(cells),))
        count_units(engine, step)
        accumulate_gradient(engine, step)
    losses = {name: float(loss) for name, loss in step.losses.items()}
    return "\n".join([f"step {facts['step']}: {facts['verdict']}", *_report(losses, findings)])


def _report(losses: Mapping[str, float], findings: list[str]) -> Iterator[str]:
    for name, loss in losses.items():
        fault = "" if _finite(torch.tensor(loss)) else "  <- not finite"
        yield f"  loss {name}: {loss:.6g}{fault}"
    for kind in ("output", "gradient"):
        first = next((found for found in findings if found.startswith(kind)), None)
        if first is not None:
            yield f"  first bad {first}"
    if not findings and all(_finite(torch.tensor(loss)) for loss in losses.values()):
        yield "  every output, loss and gradient was finite this time: it may have been a spike, "
        yield "  the weights may be from a later step, or the hardware made an error"


@contextmanager
def _blamed(record: Path) -> Iterator[None]:
    """Turn a failure to repeat the step into an error that blames record or config."""
    try:
        yield
    except NexusError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"cannot replay the step of '{record}': {type(error).__name__}: {said}; the "
            "record or the run's config.yaml may have changed"
        ) from error


@contextmanager
def _watched(model: nn.Module, findings: list[str]) -> Iterator[None]:
    """Record non-finite outputs and gradients of modules in the order in which they appear."""

    def watch(name: str) -> Callable[..., None]:
        def after_forward(module: nn.Module, _: object, output: object) -> None:
            for tensor in _outputs(output):
                if not _finite(tensor):
                    findings.append(f"output: {name} ({type(module).__name__})")
                if tensor.requires_grad:
                    tensor.register_hook(after_backward(module))  # type: ignore[no-untyped-call]

        def after_backward(module: nn.Module) -> Callable[[Tensor], None]:
            def look(gradient: Tensor) -> None:
                if not _finite(gradient):
                    findings.append(f"gradient: at the output of {name} ({type(module).__name__})")

            return look

        return after_forward

    handles = [m.register_forward_hook(watch(n or "(the model)")) for n, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(engine: Engine, record: Path) -> tuple[dict[str, Any], list[Batch]]:
    """Load the weights and set the generators; returns the facts and the micro-batches."""
    try:
        facts = json.loads(read_small(record / "record.json", _FACTS_LIMIT))
        for name in ("step.safetensors", "model.safetensors"):
            opened(record / name).close()  # rejects links and pipes
        tensors = load_file(record / "step.safetensors")
        generators = {
            "python": facts["python"],
            "numpy": facts["numpy"],
            "torch": tensors["torch"].clone(),
            "devices": [t for name, t in sorted(tensors.items()) if name.startswith("device.")],
        }
        check_generators(generators)
        turn = facts.get("turn")
        known = {"step": int(facts["step"]), "verdict": str(facts["verdict"])}
        facts = {**facts, **known, "turn": None if turn is None else str(turn)}
        load_model(engine.model, record / "model.safetensors", device=str(engine.device))
        set_random_state(generators)
        batches = [
            _batch({name: tensors[f"batch.{number}.{name}"] for name in names})
            for number, names in facts["batches"].items()
        ]
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError,
        SafetensorError, CheckpointError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"cannot replay '{record}': {error}; expected a folder such as "
            "runs/x/guard/step-00000123, and the config of its run"
        ) from error
    return facts, batches


def _batch(tensors: dict[str, Tensor]) -> Batch:
    """Rebuild a batch from tensors by path: nested dicts, or a tuple if all keys are numbers."""
    if "" in tensors:
        return tensors[""]
    branches: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        head, _, rest = path.partition(".")
        branches.setdefault(head, {})[rest] = tensor
    made = {head: _batch(branch) for head, branch in branches.items()}
    if all(head.isdigit() for head in made):
        return tuple(made[head] for head in sorted(made, key=int))
    return made


def _outputs(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _outputs(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _outputs(value)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())
