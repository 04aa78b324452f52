"""Start from the weights of a checkpoint, an export or a Hugging Face folder.

| module | what it knows |
|---|---|
| `plugin` | when weights are taken, and what is said of it |
| `source` | where weights are: checkpoints and safetensors, read safely |
| `match` | which tensor belongs to which of the model, after renaming and choosing |
"""

from nexus_plugins.init.plugin import InitConfig, InitPlugin

__all__ = ["InitConfig", "InitPlugin"]
