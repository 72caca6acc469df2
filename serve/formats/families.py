"""How open models write thinking and tool calls: a table of formats, the choice among them, and turns as text.

Pure data and pure functions; no tokens, no HTTP, no templates beyond their text. What is written here `parse` reads.
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
    """How a family of models writes an assistant turn. A mark may be one token, special or not, or several."""

    name: str
    think: tuple[str, str] | None = ("<think>\n", "\n</think>\n\n")  # around thinking, as written
    call: Callable[[ToolUseBlock], str] | None = None  # one call as text; None: the model knows no calls
    read: Reader | None = None  # a call, or all that belong together, from the opening mark on
    openers: tuple[str, ...] = ()  # the marks that may begin a call
    bare: bool = False  # a call may also begin without one, by a `{` where a block begins
    within: bool = True  # marks count within text too, not only where a block begins
    inner: tuple[str, ...] = ()  # further marks, within calls and behind them
    before: str = ""  # written ahead of the first of consecutive calls,
    between: str = "\n"  # between two of them,
    after: str = ""  # behind the last,
    gap: str = "\n"  # and between text and a call
    hints: tuple[str, ...] = ()  # a chat template with all of these is for this format

    @property
    def think_marks(self) -> tuple[str, str] | None:
        """The marks that open and close thinking, without the whitespace that belongs to them."""
        return (self.think[0].strip(SPACE), self.think[1].strip(SPACE)) if self.think else None

    @property
    def marks(self) -> tuple[str, ...]:
        """Every mark; a special token that spells one of them must not vanish when text is decoded."""
        return (*(self.think_marks or ()), *self.openers, *self.inner)


def to_json(value: Any) -> str:
    r"""JSON as models write it: keys in the order given, `, ` and `: `, no \u escapes."""
    return json.dumps(value, ensure_ascii=False)


def hermes_call(call: ToolUseBlock) -> str:
    """A JSON object between tags, on lines of their own: Hermes, Qwen2.5, Qwen3."""
    return f"<tool_call>\n{json_call(call)}\n</tool_call>"


def json_call(call: ToolUseBlock, arguments: str = "arguments") -> str:
    """The call as a JSON object of its name and arguments."""
    return f'{{"name": {to_json(call.name)}, "{arguments}": {to_json(call.input)}}}'


def xml_call(call: ToolUseBlock) -> str:
    """Qwen3-Coder's tags; text as it is, other values as JSON."""
    values = ((key, value if isinstance(value, str) else to_json(value)) for key, value in call.input.items())
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>"


def llama_call(call: ToolUseBlock) -> str:
    """Llama 3.1 and later: a bare JSON object."""
    return json_call(call, "parameters")


def mistral_id(id: str) -> str:
    """A call's id as Mistral's templates want it, nine letters and digits: the last ones of ours."""
    return re.sub(r"[^A-Za-z0-9]", "", id)[-9:].rjust(9, "0")


def mistral_call(call: ToolUseBlock) -> str:
    """One element of the array behind `[TOOL_CALLS]`."""
    return f'{json_call(call)[:-1]}, "id": {to_json(mistral_id(call.id))}}}'


def mistral_args_call(call: ToolUseBlock) -> str:
    """The form of Mistral's models since 2025: the name, a mark, the arguments."""
    return f"[TOOL_CALLS]{call.name}[ARGS]{to_json(call.input)}"


def deepseek_call(call: ToolUseBlock) -> str:
    """DeepSeek V3 and R1: a kind, the name, fenced JSON."""
    return f"{CALL_BEGIN}function{SEP}{call.name}\n```json\n{to_json(call.input)}\n```{CALL_END}"


def deepseek_v31_call(call: ToolUseBlock) -> str:
    """DeepSeek V3.1: the name and JSON."""
    return f"{CALL_BEGIN}{call.name}{SEP}{to_json(call.input)}{CALL_END}"


QWEN3_CODER = Format(
    "qwen3_coder",
    call=xml_call,
    read=read_xml,
    openers=("<tool_call>", "<function="),
    inner=("</tool_call>",),
    gap="\n\n",
    hints=("<function=", "<parameter="),
)
HERMES = Format(
    "hermes",
    call=hermes_call,
    read=read_hermes,
    openers=("<tool_call>",),
    inner=("</tool_call>",),
    hints=("<tool_call>", '"arguments'),
)
MISTRAL = Format(
    "mistral",
    call=mistral_call,
    read=read_mistral,
    openers=("[TOOL_CALLS]",),
    inner=("[CALL_ID]", "[ARGS]"),
    before="[TOOL_CALLS] [",
    between=", ",
    after="]",
    gap="",
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
    openers=(CALLS_BEGIN, CALL_BEGIN),
    inner=(SEP, CALL_END, CALLS_END),
    before=CALLS_BEGIN,
    after=CALLS_END,
    gap="",
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
    openers=("<|python_tag|>",),
    bare=True,
    between="; ",
    gap="<|python_tag|>",
    hints=("<|start_header_id|>", '"parameters'),
)
THINKING = Format("thinking", hints=("<think>",))
NONE = Format("none", think=None)

# In the order in which `choose` tries them: particular hints before general ones.
FORMATS = (QWEN3_CODER, HERMES, MISTRAL_ARGS, MISTRAL, DEEPSEEK, DEEPSEEK_V31, LLAMA3, THINKING, NONE)
BY_NAME = {format.name: format for format in FORMATS}


def choose(chat_template: str, name: str | None = None) -> Format:
    """The format of that name, else the first of FORMATS whose hints the chat template holds, at last `none`.

    `thinking` is for templates that know thinking and no calls. Templates with `[THINK]` (Magistral) think between
    those marks. Raises ValueError, with the known names, for a name that is not one of them.
    """
    if name is not None and name not in BY_NAME:
        raise ValueError(f"tool parser: expected one of {', '.join(BY_NAME)}, got {name!r}")
    found = BY_NAME[name] if name else next(f for f in FORMATS if all(hint in chat_template for hint in f.hints))
    return replace(found, think=("[THINK]", "[/THINK]")) if found.think and "[THINK]" in chat_template else found


def of_json(format: Format) -> Format:
    """The format of answers that are JSON, or calls in its place: strings of JSON may hold any mark."""
    return replace(format, within=False)


def within_thinking(format: Format, written: str) -> bool:
    """Whether an answer of which this is written already goes on inside thinking."""
    marks = format.think_marks
    return marks is not None and written.rfind(marks[0]) > written.rfind(marks[1])


def write_turn(format: Format, blocks: Iterable[Block]) -> str:
    """An assistant turn as the model would have written it, blocks in their order; `AnswerStream` reads it back.

    Without the generation prompt and the end of the turn. Redacted thinking and empty texts add nothing. Not to be read
    back as they were: texts and thinking that hold marks, or that have whitespace where they meet a mark; neighbouring
    texts, which become one; ids, which most formats do not write; in `qwen3_coder` values that their schema takes for
    another type; in `llama3` text that looks like a call where a block begins. A format without calls writes none.
    """
    kept = [b for b in blocks if written(format, b)]
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


def behind_call(format: Format) -> str:
    """What a format writes between a call that is complete, the only one or the last, and the end of the turn."""
    assert format.read
    source = Source()
    source.add(write_turn(format, [ToolUseBlock("any", "any", {})]))
    next(filter(None, format.read(source, {})))
    return source.text[source.at :]


def written(format: Format, block: Block) -> bool:
    """Whether a block adds anything to a turn of this format."""
    match block:
        case TextBlock():
            return bool(block.text)
        case ThinkingBlock():
            return bool(block.thinking) and format.think is not None
        case ToolUseBlock():
            return format.call is not None
    return False


def separator(format: Format, before: Block | None, block: Block) -> str:
    """What stands between two blocks; thinking brings its own whitespace."""
    if before is None or isinstance(before, ThinkingBlock):
        return ""
    if isinstance(block, ToolUseBlock):
        return format.between if isinstance(before, ToolUseBlock) else format.gap
    return "\n" if isinstance(before, ToolUseBlock) else ""
