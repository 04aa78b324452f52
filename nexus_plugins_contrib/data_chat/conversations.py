"""Conversations from records: messages, ShareGPT, Alpaca, prompts with completions, and pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nexus_plugins_contrib._shared.examples import Fault
from nexus_plugins_contrib._shared.records import Record

__all__ = ["Conversation", "Message", "conversations"]

Message: TypeAlias = dict[str, Any]

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "ipython", "observation", "function", "function_response"), "tool"),
}
_COLUMNS = "messages; conversations; instruction and output; prompt and completion"


@dataclass(frozen=True)
class Conversation:
    """Messages in order, with `role` and `content`, as chat templates expect them.

    Args:
        messages: messages of system, user, assistant and tool.
        tools: the assistant's tools, as JSON schemas; None: no tools.
        learnt_from: assistant turns before this message are not learned.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    learnt_from: int = 0

    def turns(self) -> list[int]:
        """The indices of the assistant's messages that are learned."""
        return [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant"
            and number >= self.learnt_from
            and message.get("weight", 1) != 0
        ]


def conversations(
    record: Record, columns: Mapping[str, str], pairs: bool
) -> tuple[Conversation, ...] | Fault:
    """The conversation of a record, or both of a preference, the chosen one first.

    Args:
        record: a record in any known format, which is detected from its columns.
        columns: the record's names for known columns.
        pairs: whether it is a preference.
    """
    known = {**record, **{name: record.get(given) for name, given in columns.items()}}
    tools = _tools(known.get("tools"))
    if isinstance(tools, Fault):
        return tools
    if pairs:
        return _pair(known, tools)
    messages = _messages(known)
    return messages if isinstance(messages, Fault) else (Conversation(tuple(messages), tools),)


def _pair(record: Record, tools: tuple[Any, ...] | None) -> tuple[Conversation, ...] | Fault:
    if not (record.get("chosen") and record.get("rejected")):
        return Fault(
            "no pair", f"no columns 'chosen' and 'rejected'; the record has {', '.join(record)}"
        )
    before: Any = next(
        (record[k] for k in ("prompt", "messages", "conversations") if record.get(k)), []
    )
    prompt = _listed(before, "user")
    sides: list[list[Message]] = []
    for name in ("chosen", "rejected"):
        side = _listed(record[name], "assistant")
        for messages in (prompt, side):
            if isinstance(messages, Fault):
                return messages
        assert not isinstance(prompt, Fault)
        assert not isinstance(side, Fault)
        starts = side[: len(prompt)] == prompt
        sides.append(side if starts else [*prompt, *side])
    chosen, rejected = sides
    same = 0
    while same < min(map(len, sides)) and chosen[same] == rejected[same]:
        same += 1
    if same in map(len, sides):
        return Fault("an identical pair", "its chosen and rejected answers are the same")
    return tuple(Conversation(tuple(side), tools, same) for side in sides)


def _messages(record: Record) -> list[Message] | Fault:
    if record.get("messages") is not None:
        return _listed(record["messages"], "user")
    if record.get("conversations") is not None:
        found = _listed(record["conversations"], "user")
        return found if isinstance(found, Fault) else [*_system(record), *found]
    if record.get("output") is not None and record.get("instruction") is not None:
        return _of_alpaca(record)
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt, answer = (
            _listed(record["prompt"], "user"),
            _listed(record["completion"], "assistant"),
        )
        if isinstance(prompt, Fault):
            return prompt
        return answer if isinstance(answer, Fault) else [*prompt, *answer]
    if record.get("chosen") is not None:
        return Fault("a pair", "it is a preference (chosen, rejected); set data_chat.pairs=true")
    return Fault(
        "no conversation",
        f"no conversation column ({_COLUMNS}); the record has {', '.join(record) or 'none'}: "
        "set data_chat.columns, such as {messages: dialog}",
    )


def _of_alpaca(record: Record) -> list[Message]:
    asked = str(record["instruction"])
    if record.get("input"):
        asked = f"{asked}\n\n{record['input']}"
    messages = _system(record)
    for question, answer in record.get("history") or []:
        messages += [_plain("user", question), _plain("assistant", answer)]
    return [*messages, _plain("user", asked), _plain("assistant", record["output"])]


def _system(record: Record) -> list[Message]:
    return [_plain("system", record["system"])] if record.get("system") else []


def _plain(role: str, content: Any) -> Message:
    return {"role": role, "content": str(content)}


def _listed(value: Any, role: str) -> list[Message] | Fault:
    """Messages in a uniform format; text becomes one message of a role."""
    if isinstance(value, str):
        return [_plain(role, value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return Fault("no messages", f"its messages are {type(value).__name__}; expected a list")
    found: list[Message] = []
    for turn, one in enumerate(value, 1):
        message = _message(one, turn)
        if isinstance(message, Fault):
            return message
        found.append(message)
    return found


def _message(one: Any, turn: int) -> Message | Fault:
    if not isinstance(one, dict):
        return Fault(
            "no message", f"turn {turn} is {type(one).__name__}; expected role and content"
        )
    given = one.get("role", one.get("from"))
    role = _ROLES.get(str(given).lower())
    if role is None:
        return Fault(
            "an unknown role",
            f"turn {turn} has the role {given!r}; expected system, user, assistant or tool",
        )
    content = one["content"] if "content" in one else one.get("value")
    kept = {k: v for k, v in one.items() if k not in ("role", "from", "value", "content")}
    if given == "function_call":
        return _called({"role": role, **kept}, content, turn)
    message = {"role": role, **kept}
    if content is not None:
        message["content"] = content
    elif not kept.get("tool_calls"):
        return Fault("a turn without content", f"turn {turn} ({role}) has no content")
    return message


def _called(message: Message, content: Any, turn: int) -> Message | Fault:
    """ShareGPT's function_call: the call as JSON text."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        return Fault("a call that is not JSON", f"turn {turn} is a call, but not JSON: {error}")
    listed = calls if isinstance(calls, list) else [calls]
    return {**message, "tool_calls": [{"type": "function", "function": call} for call in listed]}


def _tools(value: Any) -> tuple[Any, ...] | Fault | None:
    """Tools as JSON schemas; text is parsed as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            return Fault("tools that are not JSON", f"its tools are not JSON: {error}")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        return Fault("tools that are not a list", "its tools are not a list of JSON schemas")
    return tuple(t if "function" in t else {"type": "function", "function": t} for t in value)


def parsed_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages, with call arguments in JSON text parsed to objects."""
    return [_with_arguments(m, _object) if m.get("tool_calls") else m for m in messages]


def written_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages, with call arguments as JSON text."""
    return [_with_arguments(m, _text) if m.get("tool_calls") else m for m in messages]


def _with_arguments(message: Message, change: Any) -> Message:
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call)
        inner = {**inner, "arguments": change(inner.get("arguments", {}))}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return {**message, "tool_calls": calls}


def _object(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
