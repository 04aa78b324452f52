"""Exports a checkpoint as a Hugging Face folder, checked against the trained model first."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor, nn

from nexus_core.errors import ConfigError
from nexus_plugins.checkpoint.export import Options
from nexus_plugins_contrib.export_hf import nexus_files
from nexus_plugins_contrib.export_hf.parity import (
    Receipt,
    compare,
    fixed_batch,
    logits_of,
    logits_of_fresh_process,
)
from nexus_plugins_contrib.export_hf.rebuilt import Trained, rebuild
from nexus_plugins_contrib.model_hf.plugin import FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["export"]

_OWN_TOKENIZER = "tokenizer"  # in the run folder: the tokenizer saved by the data
_SMALL = 256 << 20  # maximum bytes of a tokenizer file


def export(source: Path, out: Path, options: Options) -> list[Path]:
    """Write a run's model so that `AutoModelForCausalLM.from_pretrained(out)` loads it.

    The folder appears once its model has been reloaded and reproduces the trained model's logits;
    the result of that check is in `parity.json`.

    Args:
        source: a checkpoint folder, or a run folder, which means its newest checkpoint.
        out: a new folder.
        options: averaged weights, merged adapters, and maximum file size.

    Returns:
        The files written.

    Raises:
        CheckpointError: there is no complete checkpoint, or the exported model computes different
            logits.
        ConfigError: the folder exists, or the run's model cannot be exported.
    """
    if out.exists():
        raise ConfigError(f"'{out}' already exists; export needs a new folder: --out FOLDER")
    trained = rebuild(source, ema=options.ema)
    if options.adapters == "alone" and trained.tuner is None:
        raise ConfigError("--adapters alone: the run trained the whole model, not adapters")
    ids = fixed_batch(*_sizes(trained.model))
    expected = logits_of(trained.model, ids)
    dtypes = {parameter.dtype for parameter in trained.model.parameters()}
    is_precise = dtypes <= {torch.float32, torch.float64}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        draft = Path(beside) / out.name
        draft.mkdir()
        found = _write(trained, draft, options, ids)
        receipt = compare(expected, found, is_precise, trained.checkpoint, trained.step)
        _finish(trained, draft, receipt)
        written = sorted(path.name for path in draft.iterdir())
        draft.rename(out)
    return [out / name for name in written]


def _sizes(model: nn.Module) -> tuple[int, int | None]:
    config: Any = model.config
    return config.vocab_size, getattr(config, "max_position_embeddings", None)


def _write(trained: Trained, draft: Path, options: Options, ids: Tensor) -> Tensor:
    """Write the model, reload it, and return its logits."""
    if options.adapters == "alone":
        return _adapters_alone(trained, draft, ids)
    model = _merged(trained)
    if trained.kind == "model_nexus":
        nexus_files.write_code(draft)
        weights = nexus_files.write_config(model, draft)
        save_torch_state_dict(weights, draft, max_shard_size=options.shard)
        return logits_of_fresh_process(draft, ids)
    saved = cast("PreTrainedModel", model)
    saved.save_pretrained(draft, max_shard_size=options.shard)
    return logits_of(_loaded(draft), ids)


def _merged(trained: Trained) -> nn.Module:
    if trained.tuner is None:
        return trained.model
    if getattr(trained.model, "is_quantized", False):
        raise ConfigError(
            "the base weights are quantized, so a merged model would be rounded "
            "again; export the adapters: --adapters alone"
        )
    model: nn.Module = trained.tuner.merge_and_unload(safe_merge=True)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(model):
            delattr(model, name)
    return model


def _adapters_alone(trained: Trained, draft: Path, ids: Tensor) -> Tensor:
    """Write the adapters in peft's format, and load them on the base weights."""
    if trained.origin is None or trained.tuner is None:
        raise ConfigError(
            "--adapters alone needs a Hugging Face model; export NEXUS merged: --adapters merged"
        )
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    settings: Any = trained.tuner.peft_config["default"]
    settings.base_model_name_or_path, settings.task_type = trained.origin, "CAUSAL_LM"
    settings.inference_mode = True
    settings.save_pretrained(str(draft))
    take: Any = get_peft_model_state_dict
    tensors = take(trained.model)
    whole = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, draft / "adapter_model.safetensors", metadata={"format": "pt"})
    if getattr(trained.model, "is_quantized", False):
        below: Any = trained.tuner.unload()
    else:
        below = _loaded(Path(trained.origin) if Path(trained.origin).is_dir() else trained.origin)
    load: Any = PeftModel.from_pretrained
    return logits_of(load(below, str(draft)), ids)


def _loaded(place: Path | str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM
    model: nn.Module = read.from_pretrained(place, use_safetensors=True)
    return model


def _finish(trained: Trained, draft: Path, receipt: Receipt) -> None:
    """Add the run's tokenizer, chat template and generation settings, and the receipt."""
    places = (trained.run / _OWN_TOKENIZER, trained.run / FOLDER, trained.run)
    for place in places:
        for name in _TOKENIZER if place == trained.run else _BESIDE:
            file = place / name
            is_plain = file.is_file() and not file.is_symlink() and file.stat().st_size < _SMALL
            if is_plain and not (draft / name).exists():
                (draft / name).write_bytes(file.read_bytes())
    _describe_tokenizer(draft)
    receipt.write(draft / "parity.json")


_TOKENIZER = ("tokenizer.json",)
_BESIDE = (
    *_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
)  # fmt: skip


def _describe_tokenizer(draft: Path) -> None:
    """Declare the class that reads a bare tokenizer.json; another kind of tokenizer is omitted."""
    file, described = draft / "tokenizer.json", draft / "tokenizer_config.json"
    if not file.exists() or described.exists():
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception:  # the package raises nothing narrower
        file.unlink()
        return
    described.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', encoding="utf-8")
