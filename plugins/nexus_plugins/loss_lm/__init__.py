"""The language-model loss: `plugin` is the term, `linear_cross_entropy` its chunked kernel."""

from nexus_plugins.loss_lm.plugin import LossLmConfig, LossLmPlugin

__all__ = ["LossLmConfig", "LossLmPlugin"]
