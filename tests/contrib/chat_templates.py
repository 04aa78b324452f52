"""Ten public chat templates, rewritten from their published formats.

They are tested with handwritten text (`test_data_chat.py`), not compared with the originals.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A template and its tokenizer's special tokens."""

    source: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None


_HERMES_CALLS = (
    "{%- for call in m.tool_calls %}{% set f = call.function or call %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + f.name + \'", "arguments": \' + f.arguments | tojson'
    " + '}\\n</tool_call>' }}{% endfor %}"
)
_HERMES_SYSTEM = (
    "{%- if tools %}{{ '<|im_start|>system\\n' + first + '\\n\\n# Tools\\n\\n<tools>' }}"
    "{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools><|im_end|>\\n' }}"
)
_CHATML = ("<|im_start|>", "<|im_end|>")

QWEN25 = Published(
    "{%- set default = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}"
    "{%- set first = messages[0].content if messages[0].role == 'system' else default %}"
    + _HERMES_SYSTEM
    + "{%- else %}{{ '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first)"
    " or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{%- if m.content %}{{ '\\n' + m.content }}{% endif %}"
    + _HERMES_CALLS
    + "{{ '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}"
    "{%- endif %}{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}"
    "{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    _CHATML,
    "<|im_end|>",
)

QWEN3 = Published(
    "{%- set first = messages[0].content if messages[0].role == 'system' else '' %}"
    + _HERMES_SYSTEM
    + "{%- elif first %}{{ '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}{% endif %}"
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set content = m.content or '' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if not thought and '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}"
    "{%- else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}"
    + _HERMES_CALLS.replace("m.tool_calls", "m.tool_calls or []")
    + "{{ '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    _CHATML,
    "<|im_end|>",
)

LLAMA2 = Published(
    "{%- set has = messages[0].role == 'system' %}"
    "{%- for m in (messages[1:] if has else messages) %}"
    "{%- if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{%- if loop.first and has %}{{ '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' }}"
    "{%- endif %}{{ m.content | trim + ' [/INST]' }}"
    "{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    "<s>",
)

LLAMA31 = Published(
    "{%- set has = messages[0].role == 'system' %}"
    "{%- set rest = messages[1:] if has else messages %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{%- if tools %}{{ 'Environment: ipython\\n' }}{% endif %}"
    "{{ 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}"
    "{%- if has %}{{ messages[0].content | trim }}{% endif %}{{ '<|eot_id|>' }}"
    "{%- if tools %}{{ '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions"
    ", please respond with a JSON for a function call.\\n\\n' }}"
    "{%- for t in tools %}{{ t | tojson + '\\n\\n' }}{% endfor %}"
    "{{ rest[0].content | trim + '<|eot_id|>' }}{%- set rest = rest[1:] %}{% endif %}"
    "{%- for m in rest %}"
    "{%- if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    '{{ \'<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "\' + f.name'
    " + '\", \"parameters\": ' + f.arguments | tojson + '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}"
    "{%- else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|eot_id|>",
    "<|begin_of_text|>",
)

MISTRAL03 = Published(
    "{%- set has = messages[0].role == 'system' %}"
    "{%- set rest = messages[1:] if has else messages %}"
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{{ bos_token }}{%- for m in rest %}"
    "{%- if m.role == 'user' %}"
    "{%- if tools and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{%- if loop.last and has %}{{ '[INST] ' + messages[0].content + '\\n\\n' + m.content"
    " + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{%- for call in m.tool_calls %}"
    "{%- if (call.id or '') | length != 9 %}{{ raise_exception('Tool call IDs should be "
    "alphanumeric strings with length 9!') }}{% endif %}"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \''
    " + call.function.arguments | tojson + ', \"id\": \"' + call.id + '\"}' }}"
    "{%- if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{%- elif m.role == 'tool' %}"
    '{{ \'[TOOL_RESULTS] {"content": \' + m.content + \', "call_id": "\' + m.tool_call_id'
    " + '\"}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}",
    (
        *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
        *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "</s>",
    "<s>",
)

GEMMA2 = Published(
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles "
    "must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n'"
    " + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "<eos>",
    "<bos>",
)

PHI3 = Published(
    "{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    "<|endoftext|>",
)

ZEPHYR = Published(
    "{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    "<s>",
)

VICUNA = Published(
    "{%- set has = messages[0].role == 'system' %}"
    "{{ bos_token }}{{ messages[0].content if has else 'A chat between a curious user and an "
    "artificial intelligence assistant.' }}{{ ' ' }}"
    "{%- for m in (messages[1:] if has else messages) %}"
    "{%- if m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}"
    "{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    "<s>",
)

_DEEPSEEK = (
    "{%- set ns = namespace(system='') %}"
    "{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}"
    "{% endfor %}{{ bos_token + ns.system }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'assistant' and m.tool_calls %}"
    "{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}{% for call in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name"
    " + '\\n```json\\n' + call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"
    "{%- elif m.role == 'assistant' %}{% set content = m.content %}STRIP"
    "{{ ('' if loop.index0 and messages[loop.index0 - 1].role == 'tool' else '<｜Assistant｜>')"
    " + content + '<｜end▁of▁sentence｜>' }}"
    "{%- elif m.role == 'tool' %}{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content"
    " + '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ 'ASK' }}{% endif %}"
)
_DEEPSEEK_SPECIAL = tuple(
    f"<｜{name}｜>"
    for name in (
        *("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "tool▁calls▁begin"),
        *("tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end", "tool▁sep", "tool▁outputs▁begin"),
        *("tool▁outputs▁end", "tool▁output▁begin", "tool▁output▁end"),
    )
)
_STRIPPED = (
    "{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
)
DEEPSEEK_V3 = Published(
    _DEEPSEEK.replace("STRIP", "").replace("ASK", "<｜Assistant｜>"),
    _DEEPSEEK_SPECIAL,
    "<｜end▁of▁sentence｜>",
    "<｜begin▁of▁sentence｜>",
)
DEEPSEEK_R1 = Published(
    _DEEPSEEK.replace("STRIP", _STRIPPED).replace("ASK", "<｜Assistant｜>"),
    _DEEPSEEK_SPECIAL,
    "<｜end▁of▁sentence｜>",
    "<｜begin▁of▁sentence｜>",
)
DEEPSEEK_R1_ASKING = Published(
    _DEEPSEEK.replace("STRIP", _STRIPPED).replace("ASK", "<｜Assistant｜><think>\\n"),
    _DEEPSEEK_SPECIAL,
    "<｜end▁of▁sentence｜>",
    "<｜begin▁of▁sentence｜>",
)

MARKED = Published(
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{%- endgeneration %}{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    _CHATML,
    "<|im_end|>",
)
