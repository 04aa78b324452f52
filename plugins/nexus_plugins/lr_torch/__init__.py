"""The learning rate by any scheduler of PyTorch's kind: `plugin.py` is where it begins."""

from nexus_plugins.lr_torch.plugin import LrTorchConfig, LrTorchPlugin

__all__ = ["LrTorchConfig", "LrTorchPlugin"]
