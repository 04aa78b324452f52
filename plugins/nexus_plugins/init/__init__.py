"""Start from the weights of a checkpoint, an export or a Hugging Face folder.

| module | content |
|---|---|
| `plugin` | loads weights at the start, and reports it |
| `source` | finds and safely reads checkpoints and safetensors |
| `match` | matches tensors to the model's, after renaming and filtering |
"""

from nexus_plugins.init.plugin import InitConfig, InitPlugin

__all__ = ["InitConfig", "InitPlugin"]
