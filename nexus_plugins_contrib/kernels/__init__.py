"""Third-party kernels for PyTorch's operations: `plugin` swaps, `swaps` lists the packages."""

from nexus_plugins_contrib.kernels.plugin import KernelsConfig, KernelsPlugin
from nexus_plugins_contrib.kernels.swaps import available

__all__ = ["KernelsConfig", "KernelsPlugin", "available"]
