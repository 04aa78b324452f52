"""Render conversations with a tokenizer's chat template, and find the learned tokens.

For each turn the template is rendered three times: for the whole conversation, for the part before
the turn with the generation prompt, and for the part including the turn. A turn is exact if the ids
of the second are a prefix of those of the first: training then predicts exactly what the model
generates after that prompt. If a template marks generated text (`{% generation %}`), its markers
are used instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

from nexus_core import ConfigError
from nexus_plugins_contrib._shared.examples import Fault, Tokens
from nexus_plugins_contrib._shared.tokenizer import HubTokenizer
from nexus_plugins_contrib.data_chat.conversations import (
    Conversation,
    Message,
    parsed_calls,
    written_calls,
)

__all__ = ["ChatTemplate"]

Masks = Literal["auto", "markers", "prefix"]
Learnt = NDArray[np.bool_]
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "tool_calls": [
            {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {}}}
        ],
    },
]


@dataclass(frozen=True)
class _Text:
    """A rendered conversation as ids, with the text offsets of each."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


class ChatTemplate:
    """Turns conversations into ids, and determines which of them are learned.

    Args:
        tokenizer: a tokenizer with a chat template.
        arguments: further variables of the template, such as `enable_thinking`.
        masks: "markers" uses those of the template, "prefix" finds turns by the text before them;
            "auto": markers if there are any.

    Raises:
        ConfigError: there is no template, or it lacks requested markers.
    """

    def __init__(
        self, tokenizer: HubTokenizer, arguments: dict[str, Any], masks: Masks = "auto"
    ) -> None:
        self._tokenizer, self._inner = tokenizer, tokenizer.inner
        self._arguments = arguments
        try:
            self.source = str(self._inner.get_chat_template())
        except ValueError as error:
            raise ConfigError(
                f"the tokenizer {tokenizer.where} has no chat template; set "
                "data_chat.chat_template to a file of one (.jinja)"
            ) from error
        marked = bool(_MARKER.search(self.source))
        if masks == "markers" and not marked:
            raise ConfigError(
                "data_chat.masks=markers: the chat template has no {% generation %}; set it to "
                "'auto' or 'prefix', or set data_chat.chat_template to one that has"
            )
        self.marked = marked and masks != "prefix"
        self._calls = written_calls if self._wants_text() else parsed_calls
        self._special = {
            number for number, token in self._inner.added_tokens_decoder.items() if token.special
        }

    def tokens(self, conversation: Conversation, turns: Sequence[int]) -> Tokens | Fault:
        """The whole conversation as tokens, with the given turns learned."""
        try:
            whole = self._tokenized(self._render(conversation, len(conversation.messages)))
            learnt = np.zeros(len(whole.ids), np.bool_)
            if self.marked:
                fault = self._mark_generated(conversation, whole, turns, learnt)
            else:
                fault = self._mark_turns(conversation, whole, turns, learnt)
        except Exception as error:  # any error of a template concerns this conversation
            said = " ".join(str(error).split()) or type(error).__name__
            return Fault("the template refuses it", f"the chat template refuses it: {said[:300]}")
        if fault is not None:
            return fault
        if not learnt.any():
            return Fault("nothing to train on", "none of its tokens would be trained on")
        return Tokens(np.array(whole.ids, np.int64), learnt)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The prompt for the model's next answer."""
        conversation = Conversation(tuple(messages), None if tools is None else tuple(tools))
        return self._render(conversation, len(messages), asks=True)

    # -- by the text before each turn

    def _mark_turns(
        self, conversation: Conversation, whole: _Text, turns: Sequence[int], learnt: Learnt
    ) -> Fault | None:
        for turn in turns:
            before = self._tokenized(self._render(conversation, turn, asks=True))
            through = self._tokenized(self._render(conversation, turn + 1))
            first, last = len(before.ids), _common(through.ids, whole.ids)
            if not whole.text.startswith(before.text) or not self._is_glue(through.ids[last:]):
                return self._broken(turn, before, through, whole)
            if whole.ids[:first] != before.ids:
                return Fault(
                    "a token across a turn boundary",
                    f"turn {turn + 1}: the prompt's ids change once the answer is appended "
                    f"({self._inner.decode(before.ids[-4:])!r}), so the model would be prompted "
                    "with ids that differ from training; use a chat template that has a special "
                    "token there",
                )
            last = self._end_of_turn(whole.ids, first, last)
            text = whole.text[_begin(whole, first) : _end(whole, last)]
            if fault := _dropped(conversation.messages[turn], turn, text):
                return fault
            learnt[first:last] = True
        return None

    def _broken(self, turn: int, before: _Text, through: _Text, whole: _Text) -> Fault:
        if not through.text.startswith(before.text):
            place = _common_text(before.text, through.text)
            return Fault(
                "a template whose prompt and answer disagree",
                f"turn {turn + 1}: the chat template's generation prompt is "
                f"{before.text[max(0, place - 20) :][-60:]!r}, but it writes the answer as "
                f"{through.text[max(0, place - 20) :][:60]!r}, so the model would be trained on "
                "text it is never prompted for; set data_chat.chat_template to a consistent one",
            )
        shown = before if not whole.text.startswith(before.text) else through
        place = _common_text(shown.text, whole.text)
        return Fault(
            "a template that breaks prefixes",
            f"turn {turn + 1}: the chat template writes the text up to the end of this turn "
            f"differently once more follows ({shown.text[place : place + 40]!r} becomes "
            f"{whole.text[place : place + 40]!r}), so the conversation cannot be split exactly; "
            "set data_chat.turns=each (one row per turn, as the model is prompted), or "
            "data_chat.chat_template to one that keeps earlier turns",
        )

    def _end_of_turn(self, ids: list[int], first: int, last: int) -> int:
        """The end of the generated text: the first stop token after the turn's content.

        What templates add after it, such as a line break, is never generated.
        """
        end = last
        while end > first and self._is_glue(ids[end - 1 : end]):
            end -= 1
        stop = end
        while stop < last and ids[stop] not in self._special:
            stop += 1
        if stop == last:
            return last
        while stop < last and ids[stop] in self._special:
            stop += 1
        return stop

    def _is_glue(self, ids: Sequence[int]) -> bool:
        """Whether there are only special tokens and spaces."""
        words = [one for one in ids if one not in self._special]
        return not words or not self._inner.decode(words).strip()

    # -- by the template's own markers

    def _mark_generated(
        self, conversation: Conversation, whole: _Text, turns: Sequence[int], learnt: Learnt
    ) -> Fault | None:
        rendered: Any = render_jinja_template(
            conversations=[self._messages(conversation, len(conversation.messages))],
            tools=self._tools(conversation),
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **{**self._inner.special_tokens_map, **self._arguments},
        )
        texts, marked = rendered
        if texts != [whole.text]:
            raise ValueError("its markers change the text")
        spans = [span for span in marked[0] if span[0] < span[1]]
        spoken = [n for n, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if [*turns] != spoken and len(spans) != len(spoken):
            return Fault(
                "markers that do not match the turns",
                f"the chat template marks {len(spans)} passages in {len(spoken)} turns of the "
                "assistant, so single turns cannot be excluded; set data_chat.turns=each or "
                "data_chat.masks=prefix",
            )
        if [*turns] != spoken:
            spans = [span for span, turn in zip(spans, spoken, strict=True) if turn in turns]
        for begin, end in spans:
            for place, (first, last) in enumerate(whole.offsets):
                if first < end and last > begin and first < last:
                    if first < begin or last > end:
                        return Fault(
                            "a token across a turn boundary",
                            f"a token crosses the boundary of the marked passage "
                            f"{whole.text[begin:end][:40]!r}, so no exact mask exists",
                        )
                    learnt[place] = True
        return None

    # -- the template

    def _render(self, conversation: Conversation, count: int, asks: bool = False) -> str:
        if not count:
            raise ValueError("it starts with the assistant, with nothing before")
        return str(
            self._inner.apply_chat_template(
                self._messages(conversation, count),
                tools=self._tools(conversation),
                tokenize=False,
                add_generation_prompt=asks,
                **self._arguments,
            )
        )

    def _messages(self, conversation: Conversation, count: int) -> list[Message]:
        kept = [
            {k: v for k, v in message.items() if k != "weight"}
            for message in conversation.messages[:count]
        ]
        return self._calls(kept)

    def _tools(self, conversation: Conversation) -> list[Any] | None:
        return None if conversation.tools is None else [*conversation.tools]

    def _tokenized(self, text: str) -> _Text:
        found = self._inner(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return _Text(text, found["input_ids"], found["offset_mapping"])

    def _wants_text(self) -> bool:
        """Whether the template only accepts call arguments as text."""
        try:
            self._inner.apply_chat_template(_PROBE, tokenize=False, **self._arguments)
        except TypeError:
            return True
        except (TemplateError, AttributeError, LookupError, ValueError):
            # It accepts no calls at all, which is reported if there are any.
            return False
        return False


def _dropped(message: Message, turn: int, text: str) -> Fault | None:
    """The fault if the template drops text of the assistant."""
    said = [message.get(name) for name in ("content", "reasoning_content", "reasoning")]
    for words in said:
        if isinstance(words, str) and _dense(words) not in _dense(text):
            return Fault(
                "a template that drops words",
                f"turn {turn + 1}: the chat template drops part of the assistant's text "
                f"({' '.join(words.split())[:60]!r} becomes {' '.join(text.split())[:60]!r}); set "
                "data_chat.chat_template to one that keeps it",
            )
    return None


def _dense(text: str) -> str:
    return "".join(text.split())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _common_text(one: str, other: str) -> int:
    return _common([*map(ord, one)], [*map(ord, other)])


def _begin(text: _Text, place: int) -> int:
    return text.offsets[place][0] if place < len(text.offsets) else len(text.text)


def _end(text: _Text, place: int) -> int:
    return text.offsets[place - 1][1] if place else 0
