"""Load a causal language model from a folder or the Hub, without executing its code."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from safetensors import SafetensorError

from nexus_core.errors import ConfigError, Hint, hint_set
from nexus_core.paths import expanded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["DTYPES", "Origin", "Quantized", "build", "load", "origin_of", "pinned", "read_config"]

Quantized: TypeAlias = Literal["nf4", "fp4"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FAULTS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError)
_NAMED = 3


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Args:
        place: a folder, or a Hub id.
        revision: revision of the id; None: its main branch.
        is_folder: whether it is a folder.
    """

    place: str
    revision: str | None
    is_folder: bool


def origin_of(path: str, revision: str | None) -> Origin:
    """Resolve a setting: a folder if it exists, else a Hub id.

    Raises:
        ConfigError: the folder is missing, or has a revision.
    """
    place = expanded(path)
    if Path(place).is_dir():
        if revision is not None:
            raise ConfigError(
                f"model_hf.revision: got '{revision}', but {place} is a folder, which has no "
                "revisions; remove it"
            )
        return Origin(place, None, True)
    looks_like_path = place.startswith((".", "/", "~")) or place.count("/") > 1
    if looks_like_path or Path(place).exists():
        raise ConfigError(
            f"model_hf.path: no folder '{place}'; give a folder with config.json and "
            "*.safetensors, or an id of the hub such as Qwen/Qwen3-0.6B"
        )
    return Origin(place, revision, False)


def pinned(origin: Origin) -> Origin:
    """Pin the origin to the current commit of its revision.

    Raises:
        ConfigError: the Hub cannot be reached, its cache does not have it, or the id does not
            exist.
    """
    if origin.is_folder:
        return origin
    from transformers.utils.hub import cached_file, extract_commit_hash

    find: Any = cached_file
    try:
        found = find(origin.place, "config.json", revision=origin.revision)
    except _FAULTS as error:
        raise _unreadable(origin, error) from error
    return replace(origin, revision=extract_commit_hash(found, None) or origin.revision)


def read_config(origin: Origin, changes: dict[str, Any]) -> PretrainedConfig:
    """The model's configuration, with the changes from the settings.

    Raises:
        ConfigError: it is missing, needs custom code, or lacks a changed entry.
    """
    from transformers import AutoConfig

    _refuse_foreign_code(origin)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            origin.place, revision=origin.revision, trust_remote_code=False
        )
    except _FAULTS as error:
        raise _unreadable(origin, error) from error
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ConfigError(
                f"model_hf.config.{name}: the {type(config).__name__} of '{origin.place}' has no "
                f"'{name}'; it has: {', '.join(sorted(config.to_diff_dict()))}"
            )
        setattr(config, name, value)
    return config


def build(config: PretrainedConfig, dtype: str, attention: str | None) -> PreTrainedModel:
    """A model with random weights.

    Raises:
        ConfigError: it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    try:
        model = make.from_config(config, dtype=_dtype(dtype, config), attn_implementation=attention)
    except _FAULTS as error:
        raise _no_causal(config, error) from error
    return cast("PreTrainedModel", model)


def load(
    origin: Origin,
    config: PretrainedConfig,
    dtype: str,
    attention: str | None,
    quantized: Quantized | None,
    device: torch.device,
) -> PreTrainedModel:
    """A model with its pretrained weights, from safetensors only.

    Raises:
        ConfigError: they cannot be read, are incomplete, or do not fit.
    """
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM
    extra: dict[str, Any] = {}
    if quantized is not None:
        extra = {"quantization_config": _quantization(quantized, dtype), "device_map": str(device)}
    try:
        model, facts = read.from_pretrained(
            origin.place,
            revision=origin.revision,
            config=config,
            dtype=_dtype(dtype, config),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **extra,
        )
    except _FAULTS as error:
        raise _unreadable(origin, error) from error
    _check_whole(origin, facts)
    return cast("PreTrainedModel", model)


def _dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    if name == "auto":
        return getattr(config, "dtype", None) or torch.float32
    return DTYPES[name]


def _quantization(kind: Quantized, dtype: str) -> Any:
    """How bitsandbytes stores the weights of linear layers.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig as Configure
    except ImportError as error:
        raise ConfigError(
            f"model_hf.quantize: needs bitsandbytes, which cannot be imported ({error}); install "
            "it: pip install 'nexus-trainer[adamw8bit]', or remove quantize"
        ) from error
    make: Any = Configure
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES.get(dtype, torch.bfloat16),
    )


def _check_whole(origin: Origin, facts: dict[str, Any]) -> None:
    missing = sorted(facts.get("missing_keys", ()))
    odd = sorted(str(key) for key in facts.get("mismatched_keys", ()))
    if missing or odd:
        which = f"lacks {_some(missing)}" if missing else f"has different shapes for {_some(odd)}"
        raise ConfigError(
            f"model_hf.path: '{origin.place}' {which}, which would stay random; give the "
            "folder of a complete causal language model, or start from random weights: ",
            hint_set("model_hf.weights", "random"),
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _refuse_foreign_code(origin: Origin) -> None:
    """Reject models with code in their folder, before transformers asks whether to run it."""
    path = Path(origin.place) / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8")) if origin.is_folder else {}
    except FileNotFoundError:
        raise ConfigError(
            f"model_hf.path: {origin.place} has no config.json; give the folder of a Hugging Face "
            "model"
        ) from None
    except ValueError as error:
        raise ConfigError(f"model_hf.path: {path} is not JSON: {error}") from error
    if isinstance(written, dict) and "auto_map" in written and not _is_known(written):
        raise _foreign_code(origin)


def _is_known(written: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return written.get("model_type") in CONFIG_MAPPING


def _foreign_code(origin: Origin) -> ConfigError:
    return ConfigError(
        f"model_hf.path: '{origin.place}' ships its own modelling code (trust_remote_code), "
        "which model_hf never runs; use an architecture that transformers includes, or name a "
        "function that builds it with the plugin model: ",
        Hint("--set model.call=./net.py:build", "ModelPlugin(call=build)"),
    )


def _no_causal(config: PretrainedConfig, error: BaseException) -> ConfigError:
    return ConfigError(
        f"model_hf.path: transformers cannot build a causal language model from a "
        f"{type(config).__name__}: {_line(error)}"
    )


def _unreadable(origin: Origin, error: BaseException) -> ConfigError:
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return _foreign_code(origin)
    if "safetensors" in text and origin.is_folder and not list(Path(origin.place).glob("*.safet*")):
        return ConfigError(
            f"model_hf.path: {origin.place} has no *.safetensors, and other weight files "
            "are not read, as pickles can run code; convert them: model.save_pretrained(FOLDER), "
            "or start from random weights: ",
            hint_set("model_hf.weights", "random"),
        )
    where = "" if origin.is_folder else " from the hub, or from its cache where there is no network"
    return ConfigError(f"model_hf.path: cannot load '{origin.place}'{where}: {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
