"""Conversations as the data of a run, through the tokenizer's own chat template."""

from nexus_plugins_contrib.data_chat.plugin import DataChatConfig, DataChatPlugin

__all__ = ["DataChatConfig", "DataChatPlugin"]
