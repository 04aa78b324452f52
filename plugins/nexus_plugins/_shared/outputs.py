"""Read a model's output: logits or hidden states, and the reports of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nexus_core.errors import ConfigError

__all__ = ["MODULE_OUTPUTS", "described", "module_outputs", "rows_of"]

MODULE_OUTPUTS = "module_outputs"
_SHOWN = 8  # keys of a dict in a message


def rows_of(output: Any) -> tuple[Tensor, Tensor | None]:
    """The states and the head's weight of a model's output, or its logits and None.

    Args:
        output: logits `(B, T, V)`; a dict or an object with `logits`, or with `hidden` `(B, T, D)`
            and `head_weight` `(V, D)`; or a tuple or list that starts with one of these.

    Raises:
        ConfigError: the output has none of these forms.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(first, Tensor):
        return first, None
    hidden, head = _named(first, "hidden"), _named(first, "head_weight")
    if isinstance(hidden, Tensor) and isinstance(head, Tensor):
        return hidden, head
    logits = _named(first, "logits")  # read last, since it may be computed lazily
    if isinstance(logits, Tensor):
        return logits, None
    raise ConfigError(
        f"the model returned {described(output)}, and the loss needs logits (batch, time, "
        "vocabulary): return them, a dict or object with 'logits', or with 'hidden' and "
        "'head_weight', or a tuple that starts with one of these"
    )


def module_outputs(output: Any) -> Mapping[str, Any]:
    """What the modules of a model report, by their names; empty if nothing.

    Args:
        output: an object or dict with `module_outputs`, or a tuple or list that contains one.
    """
    for one in output if isinstance(output, tuple | list) else (output,):
        found = _named(one, MODULE_OUTPUTS)
        if isinstance(found, Mapping):
            return found
    return {}


def described(output: Any) -> str:
    """A model's output in a few words: its type, and its keys or shapes."""
    kind = type(output).__name__
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {kind} of {_listed(map(str, output))}"
    if isinstance(output, tuple | list):
        return f"a {kind} of ({', '.join(described(one) for one in output[:_SHOWN])})"
    names = vars(output) if hasattr(output, "__dict__") else ()
    return f"a {kind}" + (f" with {_listed(names)}" if names else "")


def _named(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _listed(names: Any) -> str:
    found = [repr(name) for name in names]
    rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + rest if found else "nothing"
