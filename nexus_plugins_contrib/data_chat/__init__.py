"""Conversations as training data, through the tokenizer's chat template."""

from nexus_plugins_contrib.data_chat.plugin import DataChatConfig, DataChatPlugin

__all__ = ["DataChatConfig", "DataChatPlugin"]
