"""data_chat: which tokens of a conversation are learned, compared with markings by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from nexus_core import ConfigError, DataError
from nexus_core.processes import Ranks
from nexus_plugins_contrib._shared.examples import Fault
from nexus_plugins_contrib._shared.tokenizer import HubTokenizer
from nexus_plugins_contrib.data_chat import DataChatConfig, DataChatPlugin
from nexus_plugins_contrib.data_chat.plugin import ChatEncoder
from tests.contrib import chat_templates as published
from tests.contrib import tokens
from tests.contrib.chat_templates import Published

CHATS = Path(__file__).parents[1] / "core/tiny_chats"


def tokenizer(of: Published) -> Any:
    given = {"eos_token": of.eos, **({"bos_token": of.bos} if of.bos else {})}
    inner = tokens.byte_level([*of.special], **given)
    inner.chat_template = of.source
    return inner


def encoder(of: Published, **settings: Any) -> ChatEncoder:
    config = DataChatConfig(train="-", tokenizer="-", **settings)
    return ChatEncoder(config, HubTokenizer(tokenizer(of), "tiny"))


def marks(of: Published, record: dict[str, Any], **settings: Any) -> list[str]:
    """The text of each example with learned parts in brackets, or its fault."""
    made = encoder(of, **settings)
    (found,) = made.encode([record])
    if isinstance(found, Fault):
        return [f"{found.kind}: {found.what}"]
    inner, texts = tokenizer(of), []
    for example in found:
        for sequence in example:
            text, on = "", False
            for token, learnt in zip(sequence.ids.tolist(), sequence.learnt.tolist(), strict=True):
                text += ("⟦" if learnt else "⟧") if learnt != on else ""
                text, on = text + inner.decode([token]), learnt
            texts.append(text + ("⟧" if on else ""))
    return texts


def said(*turns: str) -> dict[str, Any]:
    """Alternating messages of user and assistant; a first one with a star is the system's."""
    first = [{"role": "system", "content": turns[0][1:]}] if turns[0].startswith("*") else []
    roles = ("user", "assistant")
    rest = turns[len(first) :]
    return {"messages": first + [
        {"role": roles[n % 2], "content": text} for n, text in enumerate(rest)
    ]}  # fmt: skip


CHAT = ("*Be brief.", "hello", "hello there.", "the sum?", "It is 4.")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED: dict[str, Any] = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is 4."},
    ],
}

TURNS = {
    "qwen2.5": (published.QWEN25, CHAT, (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n⟦hello there.<|im_end|>⟧\n"
        "<|im_start|>user\nthe sum?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
    )),
    "llama-2": (published.LLAMA2, CHAT, (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhello [/INST]⟦ hello there. </s>⟧"
        "<s>[INST] the sum? [/INST]⟦ It is 4. </s>⟧"
    )),
    "llama-3.1": (published.LLAMA31, CHAT, (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦hello there.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nthe sum?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.<|eot_id|>⟧"
    )),
    "mistral-0.3": (published.MISTRAL03, CHAT[1:], (
        "<s>[INST] hello[/INST]⟦ hello there.</s>⟧[INST] the sum?[/INST]⟦ It is 4.</s>⟧"
    )),
    "gemma-2": (published.GEMMA2, CHAT[1:], (
        "<bos><start_of_turn>user\nhello<end_of_turn>\n"
        "<start_of_turn>model\n⟦hello there.<end_of_turn>⟧\n"
        "<start_of_turn>user\nthe sum?<end_of_turn>\n"
        "<start_of_turn>model\n⟦It is 4.<end_of_turn>⟧\n"
    )),
    "phi-3": (published.PHI3, CHAT, (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nhello<|end|>\n"
        "<|assistant|>\n⟦hello there.<|end|>⟧\n<|user|>\nthe sum?<|end|>\n"
        "<|assistant|>\n⟦It is 4.<|end|>⟧\n<|endoftext|>"
    )),
    "zephyr": (published.ZEPHYR, CHAT, (
        "<|system|>\nBe brief.</s>\n<|user|>\nhello</s>\n<|assistant|>\n⟦hello there.</s>⟧\n"
        "<|user|>\nthe sum?</s>\n<|assistant|>\n⟦It is 4.</s>⟧\n"
    )),
    "vicuna": (published.VICUNA, CHAT, (
        "<s>Be brief. USER: hello ASSISTANT:⟦ hello there.</s>⟧"
        "USER: the sum? ASSISTANT:⟦ It is 4.</s>⟧"
    )),
    "deepseek-v3": (published.DEEPSEEK_V3, CHAT, (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hello"
        "<｜Assistant｜>⟦hello there.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>the sum?<｜Assistant｜>⟦It is 4.<｜end▁of▁sentence｜>⟧"
    )),
    "qwen3": (published.QWEN3, ("hello", "<think>\nthe sum\n</think>\n\nIt is 4."), (
        "<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nthe sum\n</think>\n\nIt is 4.<|im_end|>⟧\n"
    )),
    "marked": (published.MARKED, CHAT, (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n⟦hello there.<|im_end|>⟧\n"
        "<|im_start|>user\nthe sum?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_what_the_assistant_says_is_learned_and_nothing_else(name: str) -> None:
    of, turns, expected = TURNS[name]
    assert marks(of, said(*turns)) == [expected]


def test_marks_of_a_template_and_prefixes_agree() -> None:
    of, turns, expected = TURNS["marked"]
    assert encoder(of).template.marked
    assert marks(of, said(*turns), masks="prefix") == [expected]


CALLS = {
    "qwen2.5": (published.QWEN25, (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        f"\n\n# Tools\n\n<tools>\n{json.dumps(TOOL)}\n</tools><|im_end|>\n"
        "<|im_start|>user\nadd<|im_end|>\n"
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
    )),
    "llama-3.1": (published.LLAMA31, (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond "
        f"with a JSON for a function call.\n\n{json.dumps(TOOL)}\n\nadd<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "add", "parameters": {"a": 1}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.<|eot_id|>⟧"
    )),
    "mistral-0.3": (published.MISTRAL03, (
        f"<s>[AVAILABLE_TOOLS] [{json.dumps(TOOL)}][/AVAILABLE_TOOLS][INST] add[/INST]"
        '⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>⟧'
        '[TOOL_RESULTS] {"content": 4, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ It is 4.</s>⟧'
    )),
    "deepseek-v3": (published.DEEPSEEK_V3, (
        "<｜begin▁of▁sentence｜><｜User｜>add<｜Assistant｜>"
        "⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>4<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "⟦It is 4.<｜end▁of▁sentence｜>⟧"
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("written", [True, False])
def test_calls_of_tools_are_learned_and_their_results_are_not(name: str, written: bool) -> None:
    """Whether their arguments are stored as an object or as JSON text."""
    of, expected = CALLS[name]
    record = json.loads(json.dumps(CALLED))
    if written:
        record["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
        record["tools"] = json.dumps(record["tools"])
    assert marks(of, record) == [expected]


BROKEN = {
    "thoughts that a later turn drops": (
        published.QWEN3, said("hello", "<think>\nthe\n</think>\n\nhello", "the sum?", "4"),
        "a template that breaks prefixes: turn 2",
    ),
    "an empty thought in the last turn alone": (
        published.QWEN3, said("hello", "hello", "the sum?", "4"),
        "a template that breaks prefixes: turn 2",
    ),
    "tools that move to the last question": (
        published.MISTRAL03, {**said("hello", "hello", "the sum?", "4"), "tools": [TOOL]},
        "a template that breaks prefixes: turn 2",
    ),
    "a system message that moves to the last question": (
        published.MISTRAL03, said(*CHAT),
        "a template whose prompt and answer disagree: turn 3",
    ),
    "reasoning that is never written": (
        published.DEEPSEEK_R1, said("hello", "<think>the sum</think>It is 4."),
        "a template that drops words: turn 2",
    ),
    "a question that begins the answer": (
        published.DEEPSEEK_R1_ASKING, said("hello", "It is 4."),
        "a template whose prompt and answer disagree: turn 2",
    ),
    "a role that the template does not know": (
        published.GEMMA2, said(*CHAT), "the template refuses it: the chat template refuses it: "
        "System role not supported",
    ),
    "a call without its id": (
        published.MISTRAL03,
        {"messages": [CALLED["messages"][0], {"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {}}}
        ]}]},
        "the template refuses it: the chat template refuses it: Tool call IDs",
    ),
    "a border within a token": (
        Published("{% for m in messages %}{{ m.content }}{% endfor %}", (), "<eos>"),
        said("he", "llo"), "a token across a turn boundary: turn 2",
    ),
    "marks within a token": (
        Published(
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}", (), "<eos>",
        ),
        said("he", "llo"), "a token across a turn boundary: a token crosses",
    ),
    "marks around nothing": (
        Published("{% for m in messages %}{{ m.content }}{% endfor %}"
                  "{% generation %}{% endgeneration %}", (), "<eos>"),
        said("hello", "hello"), "nothing to train on",
    ),
    "no answer": (published.QWEN25, said("hello"), "no assistant turn"),
    "an answer beyond the row": (
        published.QWEN25, said("hello " * 1200, "4"), "too long: none of the",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_split_exactly_is_caught(what: str) -> None:
    of, record, expected = BROKEN[what]
    (found,) = marks(of, record)
    assert found.startswith(expected)


def test_ids_that_change_once_the_answer_follows_are_caught() -> None:
    """Two line breaks are one token at the end of a text, and two before a word."""
    of = published.LLAMA31
    inner = tokens.byte_level([*of.special], tokens.GPT2, eos_token=of.eos, bos_token=of.bos)
    inner.chat_template = of.source
    made = ChatEncoder(DataChatConfig(train="-", tokenizer="-"), HubTokenizer(inner, "tiny"))
    (found,) = made.encode([said("hello", "hello there.")])
    assert isinstance(found, Fault)
    assert found.kind == "a token across a turn boundary"


def test_each_turn_in_a_row_of_its_own_keeps_its_thoughts() -> None:
    """The prompt of each turn omits earlier thoughts, but has those of the turn."""
    record = said("hello", "<think>\nthe\n</think>\n\nhello", "the sum?", "4")
    assert marks(published.QWEN3, record, turns="each") == [
        "<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nthe\n</think>\n\nhello<|im_end|>⟧\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nthe sum?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\n4<|im_end|>⟧\n",
    ]


def test_turns_are_left_out_by_setting_and_by_their_weight() -> None:
    before = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello there.<|im_end|>\n"
    after = "<|im_start|>user\nthe sum?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
    record = said(*CHAT[1:])
    assert marks(published.MARKED, record, turns="last") == [before + after]
    record["messages"][1]["weight"] = 0
    assert marks(published.MARKED, record) == [before + after]
    assert marks(published.MARKED, record, masks="prefix") == [before + after]


ONE = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n⟦hello there.<|im_end|>⟧\n"
FORMATS = {
    "messages": said("hello", "hello there."),
    "conversations of roles": {"conversations": said("hello", "hello there.")["messages"]},
    "sharegpt": {"conversations": [
        {"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello there."}]},
    "alpaca": {"instruction": "hello", "input": "", "output": "hello there."},
    "prompt": {"prompt": "hello", "completion": "hello there."},
    "prompt of messages": {"prompt": said("hello")["messages"], "completion": [
        {"role": "assistant", "content": "hello there."}]},
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_the_same_conversation(kind: str) -> None:
    assert marks(published.MARKED, FORMATS[kind]) == [ONE]


def test_formats_with_more_in_them() -> None:
    alpaca = {"instruction": "add", "input": "2 and 2", "output": "4", "system": "Be brief.",
              "history": [["hello", "hello there."]]}  # fmt: skip
    sharegpt = {
        "system": "Be brief.",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "add"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ],
    }
    assert marks(published.MARKED, alpaca) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n" + ONE
        + "<|im_start|>user\nadd\n\n2 and 2<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"
    ]  # fmt: skip
    expected = CALLS["qwen2.5"][1].replace(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "Be brief."
    )
    assert marks(published.QWEN25, sharegpt) == [expected]


PAIRS = {
    "messages": {"chosen": said("hello", "hello there.")["messages"],
                 "rejected": said("hello", "No.")["messages"]},
    "prompt and messages": {"prompt": said("hello")["messages"],
                            "chosen": said("hello", "hello there.")["messages"][1:],
                            "rejected": [{"role": "assistant", "content": "No."}]},
    "text": {"prompt": "hello", "chosen": "hello there.", "rejected": "No."},
    "sharegpt": {"conversations": [{"from": "human", "value": "hello"}],
                 "chosen": {"from": "gpt", "value": "hello there."},
                 "rejected": {"from": "gpt", "value": "No."}},
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_learn_where_they_differ(kind: str) -> None:
    assert marks(published.MARKED, PAIRS[kind], pairs=True) == [
        ONE, ONE.replace("hello there.", "No."),
    ]  # fmt: skip


def test_pairs_of_several_turns_learn_the_last_ones_alone() -> None:
    chosen, rejected = said(*CHAT[1:])["messages"], said(*CHAT[1:-1], "No.")["messages"]
    record = {"chosen": chosen, "rejected": rejected}
    found = marks(published.QWEN25, record, pairs=True)
    assert [text.count("⟦") for text in found] == [1, 1]
    assert "⟦It is 4.<|im_end|>⟧" in found[0]
    (same,) = marks(published.QWEN25, {"chosen": chosen, "rejected": chosen}, pairs=True)
    assert same.startswith("an identical pair")


# -- as the data of a run


def opened(folder: Path, records: list[dict[str, Any]], of: Published, **settings: Any) -> Any:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer(of).save_pretrained(folder / "tokenizer")
    chosen = {"seq_len": 160, "batch_size": 4, "valid_share": 0.0, "cache_dir": folder / "cache"}
    plugin = DataChatPlugin(
        **{**chosen, "train": str(path), "tokenizer": str(folder / "tokenizer"), **settings}
    )
    run: Any = SimpleNamespace(ranks=Ranks(), seed=1, device=torch.device("cpu"), out=None)
    return plugin.make_data(run)


def chats(count: int) -> list[dict[str, Any]]:
    return [said("hello", "hello there. " * (n % 3 + 1), "the sum?", f"{n}") for n in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_labels_are_what_follows_where_it_is_learned(
    streaming: bool, batching: str, tmp_path: Path
) -> None:
    """Each conversation occurs once per epoch, complete, in its own row or packed with others."""
    of = published.QWEN25
    wish = {"batching": batching, "streaming": streaming}
    data = opened(tmp_path, chats(17), of, **wish)
    inner, found = tokenizer(of), []
    for batch in data.train:
        documents = batch.get("segment_ids", torch.zeros_like(batch["input_ids"]))
        for ids, labels, numbers in zip(
            batch["input_ids"], batch["labels"], documents, strict=True
        ):
            assert (labels[:-1][labels[:-1] >= 0] == ids[1:][labels[:-1] >= 0]).all()
            for number in numbers.unique():
                mine = labels[numbers == number]
                if (mine >= 0).any():
                    found.append(inner.decode(mine[mine >= 0]))
                    assert mine[-1] == -100
    expected = [
        "".join(m["content"] + "<|im_end|>" for m in record["messages"] if m["role"] == "assistant")
        for record in chats(17)
    ]
    assert sorted(found) == sorted(expected)


def test_pairs_are_batches_of_both_sides(tmp_path: Path) -> None:
    records = [{"prompt": f"{n}", "chosen": "hello there.", "rejected": "No."} for n in range(5)]
    data = opened(tmp_path, records, published.QWEN25, pairs=True, batch_size=5)
    (batch,) = data.train
    names = ("input_ids", "labels", "attention_mask")
    assert batch.keys() == {f"{s}_{n}" for s in ("chosen", "rejected") for n in names} | {
        "sample_ids"
    }
    inner = tokenizer(published.QWEN25)
    for side, answer in (("chosen", "hello there."), ("rejected", "No.")):
        for labels in batch[f"{side}_labels"]:
            assert inner.decode(labels[labels >= 0]) == f"{answer}<|im_end|>"


def test_a_bad_conversation_is_an_error_with_file_row_and_turn(tmp_path: Path) -> None:
    records = [*chats(2), {"messages": [{"role": "user", "content": "a"}, {"role": "judge"}]}]
    with pytest.raises(DataError, match=r"chats.jsonl, row 3: turn 2 has the role 'judge'"):
        opened(tmp_path, records, published.QWEN25)
    with pytest.warns(RuntimeWarning, match=r"1 records of 'chats' skipped: an unknown role"):
        data = opened(tmp_path, records, published.QWEN25, on_bad_rows="skip", batching="pad")
    assert sum(len(batch["input_ids"]) for batch in data.train) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"masks": "markers"}, "has no {% generation %}"),
        ({"chat_template": "nowhere.jinja"}, "cannot read nowhere.jinja"),
        ({"pairs": True, "batching": "pack"}, "pairs are padded"),
    ],
)
def test_settings_that_cannot_act_are_refused(
    change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected.replace("{", r"\{")):
        opened(tmp_path, chats(2), published.QWEN25, **change)


def test_a_template_in_a_file_takes_the_place_of_the_tokenizers_own(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(published.MARKED.source)
    settings = {"chat_template": file, "tokenizer": "-", "train": "-"}
    made = ChatEncoder(DataChatConfig(**settings), HubTokenizer(tokenizer(published.QWEN3), "tiny"))
    assert made.template.source == published.MARKED.source


# -- inspection


def inspected(path: Path, *words: str, **environment: str) -> Any:
    from click.testing import CliRunner

    from nexus_plugins.data_text.cli import _group

    command = ["inspect", str(path), "--as", "chat", "--tokenizer", str(CHATS), *words]
    return CliRunner().invoke(_group, command, env=environment, color=True)


def test_a_conversation_is_shown_with_what_is_learned() -> None:
    found = inspected(CHATS / "chats.jsonl", "--samples", "1")
    assert found.exit_code == 0, found.output
    assert "chats: 24 conversations," in found.output
    assert (
        "<|im_start|>user\n0 and 0?<|im_end|>\n<|im_start|>assistant\n⟦It is 0.<|im_end|>⟧"
        in found.output
    )
    assert "\x1b[" not in found.output


def test_colours_are_shown_unless_nobody_wants_them() -> None:
    found = inspected(CHATS / "chats.jsonl", "--samples", "1", FORCE_COLOR="1")
    assert "\x1b[32m\x1b[1mIt is 0.<|im_end|>\x1b[0m" in found.output
    plain = inspected(CHATS / "chats.jsonl", "--samples", "1", FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b[" not in plain.output
    assert "⟦It is 0.<|im_end|>⟧" in plain.output


def test_what_is_wrong_is_counted_with_the_first_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    bad = {"messages": [{"role": "judge", "content": "a\x1b[31m"}]}
    path.write_text("".join(json.dumps(one) + "\n" for one in [*chats(2), bad, bad]))
    found = inspected(path, "--set", "turns=last")
    assert found.exit_code == 1
    assert f"WRONG: 2 times an unknown role, first at {path}, row 3: turn 1 has" in found.output
    with pytest.raises(ConfigError, match="name its tokenizer"):
        raise inspected(path, "--tokenizer", "auto").exception
    with pytest.raises(ConfigError, match="expected one of chat"):
        raise inspected(path, "--as", "poem").exception
