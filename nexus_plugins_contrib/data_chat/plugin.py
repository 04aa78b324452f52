"""Chat data: trains only on the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from nexus_core import ConfigError
from nexus_core.paths import PathField
from nexus_plugins._shared.cache import fingerprint
from nexus_plugins._shared.paths import reason
from nexus_plugins_contrib._shared.examples import Encoder, Example, Fault
from nexus_plugins_contrib._shared.reading import RowsPlugin
from nexus_plugins_contrib._shared.records import Record
from nexus_plugins_contrib._shared.rows import Batching
from nexus_plugins_contrib._shared.settings import RowsConfig
from nexus_plugins_contrib._shared.tokenizer import HubTokenizer
from nexus_plugins_contrib.data_chat.conversations import Conversation, conversations
from nexus_plugins_contrib.data_chat.template import ChatTemplate, Masks

__all__ = ["DataChatConfig", "DataChatPlugin"]

_LOCKED: dict[str, Any] = {"resume": "locked"}


class DataChatConfig(RowsConfig):
    """Which conversations to train and evaluate on, and which tokens are learned."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"train": "chats.jsonl", "tokenizer": "models/mine"}]}
    )

    batching: Literal["pack", "pad"] | None = Field(
        default=None,
        description="pack: whole conversations packed into rows of seq_len; pad: one per row; "
        "null: pack, but pad for pairs",
        json_schema_extra=_LOCKED,
    )
    pairs: bool = Field(
        default=False,
        description="records are preference pairs, with a chosen and a rejected answer",
        json_schema_extra=_LOCKED,
    )
    columns: dict[str, str] = Field(
        default={},
        description="column names, if they differ from the defaults, such as {messages: dialog}",
    )
    chat_template: PathField | None = Field(
        default=None,
        description="file of a chat template (.jinja) that replaces the tokenizer's own",
    )
    template_args: dict[str, Any] = Field(
        default={}, description="variables of the chat template, such as {enable_thinking: false}"
    )
    turns: Literal["all", "last", "each"] = Field(
        default="all",
        description="assistant turns to train on: all; only the last; each, in its own row with "
        "the conversation before it, as the model is prompted",
        json_schema_extra=_LOCKED,
    )
    masks: Masks = Field(
        default="auto",
        description="how to find turns: by the template's {% generation %} markers, or by the "
        "prefix before each turn; auto: markers if the template has any",
        json_schema_extra=_LOCKED,
    )
    on_bad_rows: Literal["error", "skip"] = Field(
        default="error", description="handling of unusable conversations; skip: leave out and count"
    )  # fmt: skip

    @model_validator(mode="after")
    def _pairs_are_padded(self) -> DataChatConfig:
        if self.pairs and self.batching == "pack":
            raise ValueError("pairs are padded; remove batching, or set it to pad")
        return self


class DataChatPlugin(RowsPlugin[DataChatConfig]):
    """Trains only on the assistant's turns in conversations.

    Conversations are rendered with the tokenizer's chat template. A token is learned if the model
    would have to generate it: the text of a turn, its tool calls, and the token that ends it. A
    conversation that cannot be split exactly is an error with its file, row and turn.
    """

    config_class = DataChatConfig

    def encoder(self, tokenizer: HubTokenizer) -> Encoder:
        """The encoder of conversations."""
        return ChatEncoder(self.config, tokenizer)

    def batching(self) -> Batching:
        """Whole conversations, packed or one per row."""
        return self.config.batching or ("pad" if self.config.pairs else "pack")

    def skips(self) -> bool:
        """Whether unusable conversations are skipped."""
        return self.config.on_bad_rows == "skip"


class ChatEncoder:
    """Makes examples from conversations.

    Args:
        config: the settings.
        tokenizer: the tokenizer; its chat template is replaced by that of the settings, if set.

    Raises:
        ConfigError: there is no chat template, or it cannot be read.
    """

    def __init__(self, config: DataChatConfig, tokenizer: HubTokenizer) -> None:
        self._config = config
        if config.chat_template is not None:
            tokenizer.inner.chat_template = _read(config.chat_template)
        self.template = ChatTemplate(tokenizer, config.template_args, config.masks)
        self.sequences = 2 if config.pairs else 1
        self.key = fingerprint(
            *("chat", 1, tokenizer.hash, config.turns, config.masks, config.pairs),
            *(config.columns, config.template_args, config.seq_len),
        )

    def encode(self, records: Sequence[Record]) -> list[list[Example] | Fault]:
        """The examples of each record, or why it has none."""
        return [self._examples(record) for record in records]

    def _examples(self, record: Record) -> list[Example] | Fault:
        found = conversations(record, self._config.columns, self._config.pairs)
        if isinstance(found, Fault):
            return found
        examples: list[Example] = []
        for sides in self._parts(found):
            tokens = [self.template.tokens(one, turns) for one, turns in sides]
            for made in tokens:
                if isinstance(made, Fault):
                    return made
                if not made.learnt[1 : self._config.seq_len].any():
                    return Fault(
                        "too long",
                        f"none of the trained tokens among its {len(made.ids):,} are within the "
                        f"first {self._config.seq_len}; raise data_chat.seq_len",
                    )
            examples.append(tuple(made for made in tokens if not isinstance(made, Fault)))
        return examples or Fault("no assistant turn", "no assistant turn to train on")

    def _parts(self, found: tuple[Conversation, ...]) -> list[list[tuple[Conversation, list[int]]]]:
        """The examples of a record: conversations, each with its learned turns."""
        wish = "last" if self._config.pairs and self._config.turns == "each" else self._config.turns
        turns = [conversation.turns() for conversation in found]
        if not all(turns):
            return []
        if wish == "each":
            (whole,), (own,) = found, turns
            return [[(_until(whole, turn), [turn])] for turn in own]
        chosen = [some[-1:] for some in turns] if wish == "last" else turns
        cut = [_until(one, some[-1]) for one, some in zip(found, turns, strict=True)]
        return [list(zip(cut, chosen, strict=True))]


def _until(conversation: Conversation, turn: int) -> Conversation:
    """The conversation up to a turn, since nothing after the last learned turn matters."""
    messages = conversation.messages[: turn + 1]
    return Conversation(messages, conversation.tools, conversation.learnt_from)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data_chat.chat_template: cannot read {path}: {reason(error)}; expected a file of a "
            "chat template (.jinja)"
        ) from error
