"""Several optimizers as one, and helpers for any optimizer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from nexus_core.errors import ConfigError, hint_value

__all__ = [
    "Optimizers",
    "Untrained",
    "check_optimizer",
    "clear_gradients",
    "members",
    "needs_closure",
    "set_rates",
    "trained",
    "update",
]

Group = dict[str, Any]
_WRAPPER = Optimizer.profile_hook_step(len).__code__  # PyTorch's wrapper around every `step`


class Optimizers(Optimizer):
    """Several named optimizers that act as one.

    `step` steps all of them, or those of one turn (see the hook `take_turns`); groups and states
    are those of all, in order; the state dict is nested by name.

    Args:
        named: the optimizers. In a list they are named by index: "0", "1", ...
    """

    def __init__(self, named: Mapping[str, Optimizer]) -> None:
        self.named = dict(named)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The groups of all of them: the same dict objects, so changes take effect."""
        return [group for optimizer in self.named.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The states of all parameters."""
        return {p: s for optimizer in self.named.values() for p, s in optimizer.state.items()}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights."""
        for optimizer in self.named.values():
            optimizer.step(closure)

    def add_param_group(self, param_group: Group) -> None:
        """Reject a group, since it is unclear which optimizer should train it."""
        names = ", ".join(f".named[{name!r}]" for name in self.named)
        raise ConfigError(f"add the group to one of the optimizers: engine.optimizer{names}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for optimizer in self.named.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of each, by its name."""
        return {"optimizers": {name: opt.state_dict() for name, opt in self.named.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state belongs to other optimizers.
        """
        saved = state_dict.get("optimizers", {})
        if list(saved) != list(self.named):
            raise ValueError(
                f"the state belongs to the optimizers {list(saved)}, not {list(self.named)}"
            )
        for name, optimizer in self.named.items():
            optimizer.load_state_dict(saved[name])

    def __getstate__(self) -> dict[str, Any]:
        return {"named": self.named, "defaults": self.defaults}

    def __repr__(self) -> str:
        return f"Optimizers({self.named})"


def members(optimizer: Optimizer, turn: str | None = None) -> dict[str, Optimizer]:
    """The optimizers of a turn by name; all of them if there are no turns.

    Raises:
        ConfigError: no optimizer has this turn's name.
    """
    named = optimizer.named if isinstance(optimizer, Optimizers) else {"": optimizer}
    if turn is None:
        return named
    if turn not in named:
        raise ConfigError(
            f"no optimizer for the turn '{turn}', only {', '.join(map(repr, named))}; "
            "pass the Engine a dict of optimizers by turn name"
        )
    return {turn: named[turn]}


def trained(optimizer: Optimizer, turn: str | None = None) -> list[nn.Parameter]:
    """The parameters that a turn currently updates, each once."""
    found: list[nn.Parameter] = []
    member = optimizer if turn is None else members(optimizer, turn)[turn]
    for group in member.param_groups:
        found += group["params"]
    if len(set(map(id, found))) == len(found):
        return found
    return list({id(parameter): parameter for parameter in found}.values())


def set_rates(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to its base times a factor; a tensor keeps its identity."""
    for group in optimizer.param_groups:
        rate = base_rate(group) * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def base_rate(group: Group) -> float:
    """The base learning rate of a group, recorded on first use."""
    if "initial_lr" not in group:
        group["initial_lr"] = float(group["lr"])
    return float(group["initial_lr"])


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` requires a closure that recomputes the gradient (LBFGS)."""
    return _needs_closure(type(optimizer).step)


@cache
def _needs_closure(step: Callable[..., object]) -> bool:
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def check_optimizer(optimizer: object, model: nn.Module) -> Optimizer:
    """A single optimizer for an engine, from what was given.

    Args:
        optimizer: an optimizer, a list of them, or a dict by the names of their turns.
        model: the model it should train.

    Raises:
        ConfigError: it is something else, or trains no parameter of the model.
    """
    made = _one(optimizer)
    own = {id(parameter) for parameter in model.parameters()}
    for name, member in members(made).items():
        if not any(id(parameter) in own for parameter in trained(member)):
            which = f"the optimizer '{name}'" if name else "the optimizer"
            raise ConfigError(
                f"{which} trains no parameter of the model; make it from model.parameters() after "
                "the last change to the model (moving, resizing or wrapping creates new parameters)"
            )
    _say_replaced(made, model)
    for group in made.param_groups:
        base_rate(group)
    return made


def _say_replaced(optimizer: Optimizer, model: nn.Module) -> None:
    """Warn about model parameters that replaced ones still held by the optimizer."""
    inside, known = set(model.parameters()), set(trained(optimizer))
    shapes = [p.shape for p in known - inside if not is_lazy(p)]
    for name, parameter in model.named_parameters():
        new = parameter.requires_grad and parameter not in known and not is_lazy(parameter)
        if new and parameter.shape in shapes:
            warnings.warn(
                f"'{name}' is not trained, and the optimizer holds a parameter of its shape that "
                "is not the model's: create the optimizer after the last change to the model",
                RuntimeWarning,
                stacklevel=2,
            )


def _one(optimizer: object) -> Optimizer:
    if isinstance(optimizer, list | tuple):
        optimizer = {str(place): each for place, each in enumerate(optimizer)}
    if isinstance(optimizer, Mapping):
        if not optimizer or not all(map(_steps, optimizer.values())):
            raise ConfigError(
                "expected optimizers, got "
                f"{', '.join(type(each).__name__ for each in optimizer.values()) or 'none'}; "
                "schedules are plugins"
            )
        return Optimizers(optimizer)
    if _steps(optimizer):
        return cast(Optimizer, optimizer)
    name = optimizer.__name__ if isinstance(optimizer, type) else "torch.optim.AdamW"
    raise ConfigError(
        "optimizer must be an optimizer, a list or a dict of them, got ",
        hint_value(optimizer),
        f"; create it from the model's parameters: {name}(model.parameters(), lr=...)",
    )


def _steps(optimizer: object) -> bool:
    return not isinstance(optimizer, type) and hasattr(optimizer, "param_groups")


def clear_gradients(optimizer: Optimizer, others: Iterable[nn.Parameter]) -> None:
    """Clear the gradients of trained parameters and of `others`.

    Avoids the profiling overhead of torch's `zero_grad`, unless it is overridden.
    """
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad()
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
    for parameter in others:
        parameter.grad = None


def update(optimizer: Optimizer) -> None:
    """Call `optimizer.step()`, bypassing PyTorch's wrapper if it has nothing to do.

    The wrapper calls the optimizer's hooks and labels the step for a profiler, which takes an
    eighth of a small model's step time.
    """
    wrapper = type(optimizer).step
    idle = getattr(wrapper, "__code__", None) is _WRAPPER and "step" not in vars(optimizer)
    if idle and not (_profiler_enabled() or any(_hooks_around(optimizer))):
        wrapper.__wrapped__(optimizer)  # type: ignore[attr-defined]
    else:
        optimizer.step()


def _hooks_around(optimizer: Optimizer) -> tuple[Mapping[int, Any], ...]:
    return (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )


class Untrained:
    """The model's other parameters, looked up again when the optimizer's groups change.

    A change is a different number of parameters; one added only to the model is not noticed.
    """

    def __init__(self) -> None:
        self._size, self._found = -1, list[nn.Parameter]()

    def of(self, optimizer: Optimizer, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of a model that its optimizer does not update."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._size != size:
            known = {id(parameter) for parameter in trained(optimizer)}
            self._size, self._found = size, [p for p in model.parameters() if id(p) not in known]
        return self._found
