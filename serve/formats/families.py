"""How open models write thinking and tool calls: the table of formats, and the choice among them.

Each format is that of its models' chat templates and model cards. GLM, gpt-oss, Kimi, MiniMax and Nemotron have modules
of their own; the others are here:

- Hermes, also Qwen2.5 and Qwen3: https://github.com/NousResearch/Hermes-Function-Calling
- Qwen3-Coder: https://huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct
- Mistral: https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3
- Llama 3.1: https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct
- DeepSeek: https://huggingface.co/deepseek-ai/DeepSeek-R1 and https://huggingface.co/deepseek-ai/DeepSeek-V3.1
"""

from __future__ import annotations

import re
from dataclasses import replace

from serve.api.messages import ToolUseBlock
from serve.formats.format import Format, json_call, tagged_arguments, to_json
from serve.formats.glm import GLM45, GLM47
from serve.formats.harmony import HARMONY
from serve.formats.json_calls import read_deepseek, read_mistral, spellings
from serve.formats.kimi import KIMI_K2
from serve.formats.minimax import MINIMAX_M2
from serve.formats.nemotron import NEMOTRON
from serve.formats.readers import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEP,
)
from serve.formats.tagged import read_llama, read_tagged

XML_PARAMETER = ("<parameter={}>\n", "\n</parameter>\n")


def hermes_call(call: ToolUseBlock) -> str:
    """A call in the form of Hermes, Qwen2.5 and Qwen3: a JSON object between tags, each on its own line."""
    return f"<tool_call>\n{json_call(call)}\n</tool_call>"


def xml_call(call: ToolUseBlock) -> str:
    """A call in the form of Qwen3-Coder: tags, with strings as they are and other values as JSON."""
    return (
        f"<tool_call>\n<function={call.name}>\n{tagged_arguments(call.input, XML_PARAMETER)}</function>\n</tool_call>"
    )


def llama_call(call: ToolUseBlock) -> str:
    """A call in the form of Llama 3.1 and later: a JSON object without delimiters."""
    return json_call(call, "parameters")


def mistral_id(id: str) -> str:
    """The id of a call for Mistral's templates: the last nine letters and digits of ours."""
    return re.sub(r"[^A-Za-z0-9]", "", id)[-9:].rjust(9, "0")


def mistral_call(call: ToolUseBlock) -> str:
    """A call in the form of Mistral: one element of the array after `[TOOL_CALLS]`."""
    return f'{json_call(call)[:-1]}, "id": {to_json(mistral_id(call.id))}}}'


def mistral_args_call(call: ToolUseBlock) -> str:
    """A call in the form of Mistral's models since 2025: the name, a delimiter, the arguments."""
    return f"[TOOL_CALLS]{call.name}[ARGS]{to_json(call.input)}"


def deepseek_call(call: ToolUseBlock) -> str:
    """A call in the form of DeepSeek V3 and R1: its kind, its name, and JSON in a code block."""
    return f"{CALL_BEGIN}function{SEP}{call.name}\n```json\n{to_json(call.input)}\n```{CALL_END}"


def deepseek_v31_call(call: ToolUseBlock) -> str:
    """A call in the form of DeepSeek V3.1: its name and JSON."""
    return f"{CALL_BEGIN}{call.name}{SEP}{to_json(call.input)}{CALL_END}"


QWEN3_CODER = Format(
    "qwen3_coder",
    call=xml_call,
    read=read_tagged,
    call_openers=("<tool_call>", "<function="),
    extra_delimiters=("</tool_call>",),
    text_call_separator="\n\n",
    parameter=XML_PARAMETER,
    hints=("<function=", "<parameter="),
)
HERMES = Format(
    "hermes",
    call=hermes_call,
    read=read_tagged,
    call_openers=("<tool_call>",),
    extra_delimiters=("</tool_call>",),
    hints=("<tool_call>", '"arguments'),
)
MISTRAL = Format(
    "mistral",
    call=mistral_call,
    read=read_mistral,
    call_openers=("[TOOL_CALLS]",),
    extra_delimiters=("[CALL_ID]", "[ARGS]"),
    before="[TOOL_CALLS] [",
    between=", ",
    after="]",
    text_call_separator="",
    hints=("[TOOL_CALLS]",),
)
MISTRAL_ARGS = replace(
    MISTRAL,
    name="mistral_args",
    call=mistral_args_call,
    before="",
    between="",
    after="",
    hints=("[TOOL_CALLS]", "[ARGS]"),
)
DEEPSEEK = Format(
    "deepseek",
    call=deepseek_call,
    read=read_deepseek,
    call_openers=(*spellings(CALLS_BEGIN), *spellings(CALL_BEGIN)),
    extra_delimiters=(*spellings(SEP), *spellings(CALL_END), *spellings(CALLS_END)),
    before=CALLS_BEGIN,
    after=CALLS_END,
    text_call_separator="",
    hints=(CALLS_BEGIN, "```json"),
)
DEEPSEEK_V31 = replace(
    DEEPSEEK,
    name="deepseek_v31",
    think=("<think>", "</think>"),
    call=deepseek_v31_call,
    between="",
    hints=(CALLS_BEGIN,),
)
LLAMA3 = Format(
    "llama3",
    call=llama_call,
    read=read_llama,
    call_openers=("<|python_tag|>", "<function="),
    call_without_marker=True,
    between="; ",
    text_call_separator="<|python_tag|>",
    hints=("<|start_header_id|>", '"parameters'),
)
THINKING = Format("thinking", hints=("<think>",))
NONE = Format("none", think=None)

# In the order in which `choose_format` tries them: specific hints before general ones.
FORMATS = (
    QWEN3_CODER,
    GLM47,
    GLM45,
    KIMI_K2,
    MINIMAX_M2,
    NEMOTRON,
    HARMONY,
    HERMES,
    MISTRAL_ARGS,
    MISTRAL,
    DEEPSEEK,
    DEEPSEEK_V31,
    LLAMA3,
    THINKING,
    NONE,
)
BY_NAME = {format.name: format for format in FORMATS}


def choose_format(chat_template: str, name: str | None = None) -> Format:
    """The format of that name; without a name, the first of FORMATS whose hints the chat template contains.

    `none` has no hints, so there is always one. `thinking` is for templates with thinking but without calls. Templates
    with `[THINK]` (Magistral) use it as their thinking delimiters. Raises ValueError, which lists the names, for an
    unknown name.
    """
    if name is not None and name not in BY_NAME:
        raise ValueError(f"tool parser: expected one of {', '.join(BY_NAME)}, got {name!r}")
    chosen = BY_NAME[name] if name else next(f for f in FORMATS if all(hint in chat_template for hint in f.hints))
    return replace(chosen, think=("[THINK]", "[/THINK]")) if chosen.think and "[THINK]" in chat_template else chosen
