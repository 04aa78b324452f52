"""Adapters of the package peft, put into any model in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from nexus_core.errors import ConfigError, suggestion
from nexus_plugins._shared.calls import Arguments, check_arguments
from nexus_plugins._shared.parameters import matching

if TYPE_CHECKING:
    from peft import PeftConfig as Settings
    from peft.tuners.tuners_utils import BaseTuner

__all__ = ["frozen_names", "hide_quantization", "inject", "settings_of", "targets_of"]

_INPUTS = "feedforward_modules"


def settings_of(
    method: str, own: dict[str, float | int | None], args: Arguments, targets: Sequence[str]
) -> Settings:
    """The settings of peft for a method.

    Args:
        method: its name there, in small letters.
        own: the rank, scale and dropout; None: as the method has it.
        args: further arguments of the method's class.
        targets: names of the modules that are adapted.

    Raises:
        ConfigError: there is no such method, or it has no such setting.
    """
    kind = _kind(method)
    known = inspect.signature(kind).parameters
    given: dict[str, Any] = {}
    for name, value in own.items():
        if value is None:
            continue
        found = next((n for n in (f"{method}_{name}", name) if n in known), None)
        if found is None:
            raise ConfigError(f"peft.{name}: '{method}' has no such setting; leave it out")
        given[found] = value
    checked = check_arguments(kind, f"peft's {kind.__name__}", args, "peft.args", whole=False)
    if patterns := checked.get(_INPUTS):  # of IA3, which wants names that are among the targets
        checked[_INPUTS] = [
            n for p in patterns for n in matching(targets, p, f"peft.args.{_INPUTS}")
        ]
    return kind(target_modules=list(targets), **given, **checked)


def _kind(method: str) -> Callable[..., Settings]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kinds: dict[str, Any] = {t.value.lower(): c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    usable = [
        kind.value.lower()
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if "target_modules" in inspect.signature(kinds[kind.value.lower()]).parameters
        and not getattr(tuner, "uses_shared_state", False)
        and not hasattr(tuner, "update_and_allocate")  # ranks that change as training goes
    ]
    if method not in usable:
        raise ConfigError(
            f"peft.method: got '{method}'.{suggestion(method, usable)} Methods that adapt modules "
            f"in place: {', '.join(sorted(usable))}"
        )
    return cast("Callable[..., Settings]", kinds[method])


def targets_of(model: nn.Module, patterns: Sequence[str], rank: int) -> list[str]:
    """The names of the modules to adapt.

    Args:
        model: not adapted yet.
        patterns: as for parameters; none: every linear layer but the output layer, frozen ones,
            and those of fewer than `rank` inputs or outputs, which an adapter would outweigh.
        rank: of the adapters.

    Raises:
        ConfigError: a pattern matches no module, or there is no linear layer.
    """
    named = {name: module for name, module in model.named_modules() if name}
    if patterns:
        chosen = {
            n for pattern in patterns for n in matching(named, pattern, "peft.target", "module")
        }
        found = [n for n in named if n in chosen and not list(named[n].children())]
    else:
        head = _head(model)
        wide = [n for n, m in named.items() if m is not head and _is_wide(m, rank)]
        found = [n for n in wide if _is_trained(named[n])]
    if not found:
        raise ConfigError(
            "peft.target: the model has no linear layer to adapt; name modules, with patterns as "
            "of files: peft.target=['*.q_proj', '*.v_proj']"
        )
    return found


def _is_wide(module: nn.Module, rank: int) -> bool:
    weight = getattr(module, "weight", None)
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if None in sizes and isinstance(weight, Tensor) and weight.ndim == 2:
        sizes = weight.shape[0], weight.shape[1]  # GPT-2's own kind of linear layer
    return linear and all(isinstance(size, int) and size >= rank for size in sizes)


def _is_trained(module: nn.Module) -> bool:
    """Whether nobody has frozen it; weights of whole numbers are quantized, and not trained."""
    weight = module.weight
    return not (isinstance(weight, Tensor) and weight.is_floating_point()) or weight.requires_grad


def _head(model: nn.Module) -> nn.Module | None:
    """The output layer: what the model says it is, or a layer that is called so."""
    say = getattr(model, "get_output_embeddings", None)
    found = say() if callable(say) else getattr(model, "lm_head", getattr(model, "head", None))
    return found if isinstance(found, nn.Module) else None


def inject(model: nn.Module, settings: Settings) -> BaseTuner:
    """Freeze a model and put adapters into it, in place; their random numbers are torch's own.

    Raises:
        ConfigError: peft cannot adapt a module.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind: Any = PEFT_TYPE_TO_TUNER_MAPPING[cast(Any, settings.peft_type)]
    try:
        return cast("BaseTuner", kind(model, settings, adapter_name="default"))
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"peft: {' '.join(str(error).split())[:300]}") from error


def frozen_names(model: nn.Module) -> set[str]:
    """The names of all parameters that are not trained, tied ones under each of theirs."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def hide_quantization(model: nn.Module) -> None:
    """Leave out of a model's state what quantized weights are stored with, and do not load."""
    whole = {n for n, p in model.named_parameters() if not p.is_floating_point()}
    if not whole:
        return

    def drop(_: nn.Module, state: dict[str, object], prefix: str, __: object) -> None:
        for name in [name for name in state if name.removeprefix(prefix).count(".weight.")]:
            owner = name.removeprefix(prefix).partition(".weight.")[0]
            if f"{owner}.weight" in whole:
                del state[name]

    model.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
