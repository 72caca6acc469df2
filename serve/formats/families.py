"""How open models write thinking and tool calls: a table of formats, the choice among them, and turns as text.

Pure data and pure functions, without tokens and HTTP. `stream.AnswerStream` parses what `write_turn` writes. Each
format is that of its models' chat templates and model cards:

- Hermes, also Qwen2.5 and Qwen3: https://github.com/NousResearch/Hermes-Function-Calling
- Qwen3-Coder: https://huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct
- Mistral: https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3
- Llama 3.1: https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct
- DeepSeek: https://huggingface.co/deepseek-ai/DeepSeek-R1 and https://huggingface.co/deepseek-ai/DeepSeek-V3.1
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from serve.api.messages import Block, TextBlock, ThinkingBlock, ToolUseBlock
from serve.formats.readers import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEP,
    SPACE,
    Reader,
    Source,
    read_deepseek,
    read_hermes,
    read_llama,
    read_mistral,
    read_xml,
)


@dataclass(frozen=True)
class Format:
    """How a family of models writes an assistant turn. A delimiter may be one token, special or not, or several."""

    name: str
    think: tuple[str, str] | None = ("<think>\n", "\n</think>\n\n")  # around thinking, as written
    call: Callable[[ToolUseBlock], str] | None = None  # writes one call; None if the models cannot call tools
    read: Reader | None = None  # reads a call, or a group of calls, from its opening delimiter on
    call_openers: tuple[str, ...] = ()  # the delimiters that may begin a call
    call_without_marker: bool = False  # at the start of a block, a `{` may begin a call as well
    delimiters_inside_text: bool = True  # delimiters count inside text, not only at the start of a block
    extra_delimiters: tuple[str, ...] = ()  # inside calls and after them
    before: str = ""  # written before the first of consecutive calls
    between: str = "\n"  # between two of them
    after: str = ""  # after the last of them
    text_call_separator: str = "\n"  # between text and a call
    hints: tuple[str, ...] = ()  # a chat template that contains all of these has this format

    @property
    def think_delimiters(self) -> tuple[str, str] | None:
        """The delimiters that open and close thinking, without the whitespace around them."""
        return (self.think[0].strip(SPACE), self.think[1].strip(SPACE)) if self.think else None

    @property
    def delimiters(self) -> tuple[str, ...]:
        """All delimiters. Special tokens with these texts must be kept when an answer is decoded."""
        return (*(self.think_delimiters or ()), *self.call_openers, *self.extra_delimiters)


def to_json(value: Any) -> str:
    r"""JSON as models write it: keys in their order, `, ` and `: ` as separators, no \u escapes."""
    return json.dumps(value, ensure_ascii=False)


def hermes_call(call: ToolUseBlock) -> str:
    """A call in the form of Hermes, Qwen2.5 and Qwen3: a JSON object between tags, each on its own line."""
    return f"<tool_call>\n{json_call(call)}\n</tool_call>"


def json_call(call: ToolUseBlock, arguments: str = "arguments") -> str:
    """A call as a JSON object with its name and arguments."""
    return f'{{"name": {to_json(call.name)}, "{arguments}": {to_json(call.input)}}}'


def xml_call(call: ToolUseBlock) -> str:
    """A call in the form of Qwen3-Coder: tags, with strings as they are and other values as JSON."""
    values = ((key, value if isinstance(value, str) else to_json(value)) for key, value in call.input.items())
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>"


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
    read=read_xml,
    call_openers=("<tool_call>", "<function="),
    extra_delimiters=("</tool_call>",),
    text_call_separator="\n\n",
    hints=("<function=", "<parameter="),
)
HERMES = Format(
    "hermes",
    call=hermes_call,
    read=read_hermes,
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
    call_openers=(CALLS_BEGIN, CALL_BEGIN),
    extra_delimiters=(SEP, CALL_END, CALLS_END),
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
    call_openers=("<|python_tag|>",),
    call_without_marker=True,
    between="; ",
    text_call_separator="<|python_tag|>",
    hints=("<|start_header_id|>", '"parameters'),
)
THINKING = Format("thinking", hints=("<think>",))
NONE = Format("none", think=None)

# In the order in which `choose_format` tries them: specific hints before general ones.
FORMATS = (QWEN3_CODER, HERMES, MISTRAL_ARGS, MISTRAL, DEEPSEEK, DEEPSEEK_V31, LLAMA3, THINKING, NONE)
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


def format_for_json(format: Format) -> Format:
    """The format for answers that are JSON, or calls instead. Delimiters inside JSON are text."""
    return replace(format, delimiters_inside_text=False)


def within_thinking(format: Format, written: str) -> bool:
    """Whether an answer that begins with the text `written` continues inside thinking."""
    delimiters = format.think_delimiters
    return delimiters is not None and written.rfind(delimiters[0]) > written.rfind(delimiters[1])


def write_turn(format: Format, blocks: Iterable[Block]) -> str:
    """An assistant turn as the model would have written it, without the generation prompt and the end of the turn.

    Redacted thinking and empty texts add nothing, nor do calls in a format without calls. `AnswerStream` reads the same
    blocks back, with these exceptions:

    - Texts and thinking that contain delimiters, or whitespace next to one.
    - Neighbouring texts, which become one.
    - Ids, which most formats do not write.
    - In `qwen3_coder`, values that have another type by their schema.
    - In `llama3`, text that looks like a call at the start of a block.
    """
    kept = [b for b in blocks if is_written(format, b)]
    parts: list[str] = []
    for before, block, after in zip([None, *kept], kept, [*kept[1:], None], strict=False):
        parts.append(separator(format, before, block))
        if isinstance(block, ThinkingBlock):
            assert format.think
            parts += [format.think[0], block.thinking, format.think[1]]
        elif isinstance(block, TextBlock):
            parts.append(block.text)
        elif isinstance(block, ToolUseBlock):
            assert format.call
            first, last = not isinstance(before, ToolUseBlock), not isinstance(after, ToolUseBlock)
            parts += [format.before * first, format.call(block), format.after * last]
    return "".join(parts)


def text_after_call(format: Format) -> str:
    """The text between a complete last call and the end of the turn."""
    assert format.read
    source = Source()
    source.add(write_turn(format, [ToolUseBlock("any", "any", {})]))
    next(filter(None, format.read(source, {})))
    return source.text[source.at :]


def is_written(format: Format, block: Block) -> bool:
    """Whether a block adds any text to a turn in this format."""
    match block:
        case TextBlock():
            return bool(block.text)
        case ThinkingBlock():
            return bool(block.thinking) and format.think is not None
        case ToolUseBlock():
            return format.call is not None
    return False


def separator(format: Format, before: Block | None, block: Block) -> str:
    """The text between two blocks. Thinking has its own whitespace."""
    if before is None or isinstance(before, ThinkingBlock):
        return ""
    if isinstance(block, ToolUseBlock):
        return format.between if isinstance(before, ToolUseBlock) else format.text_call_separator
    return "\n" if isinstance(before, ToolUseBlock) else ""
