"""Learning rates from any scheduler with PyTorch's interface; start with `plugin.py`."""

from nexus_plugins.lr_torch.plugin import LrTorchConfig, LrTorchPlugin

__all__ = ["LrTorchConfig", "LrTorchPlugin"]
