"""Hugging Face causal language models: `loading` reads them, `passes` runs them on batches."""

from nexus_plugins_contrib.model_hf.plugin import ModelHfConfig, ModelHfPlugin

__all__ = ["ModelHfConfig", "ModelHfPlugin"]
