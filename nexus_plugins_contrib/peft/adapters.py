"""Insert adapters of the package peft into any model, in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nexus_core.errors import ConfigError, hint_set, suggestion
from nexus_plugins._shared.calls import Arguments, check_arguments
from nexus_plugins._shared.parameters import matching

if TYPE_CHECKING:
    from peft import PeftConfig as Settings
    from peft.tuners.tuners_utils import BaseTuner

__all__ = [
    "begin_with",
    "frozen_names",
    "hide_quantization",
    "inject",
    "settings_in",
    "settings_of",
    "targets_of",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
START = "start"  # name of the initial adapters
_INPUTS = "feedforward_modules"


def settings_of(
    method: str, own: dict[str, float | int | None], args: Arguments, targets: Sequence[str]
) -> Settings:
    """The settings of peft for a method.

    Args:
        method: its name in peft, in lower case.
        own: rank, scale and dropout; None: the method's default.
        args: further arguments of the method's class.
        targets: names of the modules to adapt.

    Raises:
        ConfigError: the method does not exist, or lacks a setting.
    """
    kind = _kind(method)
    known = inspect.signature(kind).parameters
    given: dict[str, Any] = {}
    for name, value in own.items():
        if value is None:
            continue
        found = next((n for n in (f"{method}_{name}", name) if n in known), None)
        if found is None:
            raise ConfigError(f"peft.{name}: '{method}' has no such setting; remove it")
        given[found] = value
    checked = check_arguments(kind, f"peft's {kind.__name__}", args, "peft.args", whole=False)
    if patterns := checked.get(_INPUTS):  # IA3 requires names that are among the targets
        checked[_INPUTS] = [
            n for p in patterns for n in matching(targets, p, f"peft.args.{_INPUTS}")
        ]
    return kind(target_modules=list(targets), **given, **checked)


def _kind(method: str) -> Callable[..., Settings]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kinds: dict[str, Any] = {t.value.lower(): c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    tuners = {t.value.lower(): tuner for t, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    because = {name: _unusable_because(kind, tuners.get(name)) for name, kind in kinds.items()}
    usable = sorted(name for name, reason in because.items() if reason is None)
    if method not in usable:
        said = f" {reason}." if (reason := because.get(method)) else suggestion(method, usable)
        raise ConfigError(
            f"peft.method: got '{method}'.{said} Methods that adapt modules in place: "
            f"{', '.join(usable)}"
        )
    return cast("Callable[..., Settings]", kinds[method])


def _unusable_because(kind: Any, tuner: object) -> str | None:
    """Why a peft method cannot be used here; None: it can."""
    from peft import PromptLearningConfig

    if issubclass(kind, PromptLearningConfig):
        return "It trains prompt inputs instead of modules, for which peft runs the model"
    if "target_modules" not in inspect.signature(kind).parameters:
        return "It does not adapt named modules"
    if hasattr(tuner, "update_and_allocate"):
        return "It changes its ranks during training, which peft checkpoints do not store"
    if getattr(tuner, "uses_shared_state", False):
        return "Its layers share a state that checkpoints do not store"
    return None


def settings_in(folder: Path) -> Settings:
    """The settings of adapters saved by peft.

    Raises:
        ConfigError: there are none, or their kind cannot be trained here.
    """
    from peft import PeftConfig as Saved

    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"peft.adapter: {folder} has no {CONFIG} and {WEIGHTS}; name a folder of "
            "adapters saved by peft; from a run: nexus-run export RUN --to hf --adapters alone "
            "--out FOLDER"
        )
    read: Any = Saved.from_pretrained
    try:
        found = read(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"peft.adapter: {folder / CONFIG}: {_line(error)}") from error
    _kind(found.peft_type.value.lower())
    if getattr(found, "modules_to_save", None):
        raise ConfigError(
            f"peft.adapter: {folder} has whole modules besides the adapters (modules_to_save: "
            f"{', '.join(found.modules_to_save)}), which are not supported; merge it into the "
            "model, and start new adapters"
        )
    found.inference_mode = False
    return cast("Settings", found)


def begin_with(tuner: BaseTuner, model: nn.Module, folder: Path) -> None:
    """Load saved adapter weights, and keep a frozen copy of them.

    When adapters are disabled, the saved ones are enabled: the model without what it has learned is
    the one that the run started with.

    Args:
        tuner: its adapters have the settings in the folder.
        model: the model with the adapters; on the meta device nothing is loaded.
        folder: as for `settings_in`.

    Raises:
        ConfigError: they do not fit the model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tuner.peft_config[START] = tuner.peft_config["default"]
    tuner.inject_adapter(model, START)
    if not any(parameter.is_meta for parameter in model.parameters()):
        try:
            saved = load_file(folder / WEIGHTS)
            tensors = {name.removeprefix("base_model.model."): t for name, t in saved.items()}
            own: Any = get_peft_model_state_dict
            if odd := sorted(own(model).keys() ^ tensors.keys()):
                raise ValueError(f"either it or the model has no {odd[0]}")
            give: Any = set_peft_model_state_dict
            for name in ("default", START):
                give(model, dict(tensors), adapter_name=name)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"peft.adapter: {folder} does not fit the model: {_line(error)}; use the model "
                "that the adapters were trained on"
            ) from error
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "adapter_layer_names"):
            layer.set_adapter("default")
            vars(layer)["enable_adapters"] = partial(_enable, layer)


def _enable(layer: Any, enabled: bool) -> None:
    layer.set_adapter("default" if enabled else START, inference_mode=not enabled)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def targets_of(model: nn.Module, patterns: Sequence[str], rank: int) -> list[str]:
    """The names of the modules to adapt.

    Args:
        model: the model, not adapted yet.
        patterns: as for parameters; empty: every linear layer except the output layer, frozen ones,
            and those with fewer than `rank` inputs or outputs, which an adapter would outweigh.
        rank: rank of the adapters.

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
            "the model has no linear layer to adapt; name modules, with glob patterns: ",
            hint_set("peft.target", ["*.q_proj", "*.v_proj"]),
        )
    return found


def _is_wide(module: nn.Module, rank: int) -> bool:
    weight = getattr(module, "weight", None)
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if None in sizes and isinstance(weight, Tensor) and weight.ndim == 2:
        sizes = weight.shape[0], weight.shape[1]  # Conv1D, GPT-2's kind of linear layer
    return linear and all(isinstance(size, int) and size >= rank for size in sizes)


def _is_trained(module: nn.Module) -> bool:
    """Whether it is not frozen; integer weights are quantized, and not trained."""
    weight = module.weight
    return not (isinstance(weight, Tensor) and weight.is_floating_point()) or weight.requires_grad


def _head(model: nn.Module) -> nn.Module | None:
    """The output layer: as reported by the model, or a layer with a usual name."""
    say = getattr(model, "get_output_embeddings", None)
    found = say() if callable(say) else getattr(model, "lm_head", getattr(model, "head", None))
    return found if isinstance(found, nn.Module) else None


def inject(model: nn.Module, settings: Settings) -> BaseTuner:
    """Freeze a model and insert adapters in place, drawn from torch's generator.

    Raises:
        ConfigError: peft cannot adapt a module.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind: Any = PEFT_TYPE_TO_TUNER_MAPPING[cast(Any, settings.peft_type)]
    try:
        return cast("BaseTuner", kind(model, settings, adapter_name="default"))
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"peft: {_line(error)}") from error


def frozen_names(model: nn.Module) -> set[str]:
    """The names of all parameters that are not trained; tied ones under each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def hide_quantization(model: nn.Module) -> None:
    """Exclude quantization details, which cannot be loaded, from a model's state."""
    whole = {n for n, p in model.named_parameters() if not p.is_floating_point()}
    if not whole:
        return

    def drop(_: nn.Module, state: dict[str, object], prefix: str, __: object) -> None:
        for name in [name for name in state if name.removeprefix(prefix).count(".weight.")]:
            owner = name.removeprefix(prefix).partition(".weight.")[0]
            if f"{owner}.weight" in whole:
                del state[name]

    model.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
