"""The format of Kimi-K2: calls between control tokens, each with an id that holds its name and its number.

https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/docs/tool_call_guidance.md
"""

from __future__ import annotations

import re
from dataclasses import replace

from serve.api.messages import ToolUseBlock
from serve.formats.format import Format, to_json
from serve.formats.json_calls import read_arguments
from serve.formats.readers import (
    WHITESPACE,
    Call,
    Calls,
    Cut,
    Malformed,
    Source,
    Tools,
    cut_call,
    make_call,
    read_any,
    read_closing,
    read_exactly,
    read_if,
    read_match,
    read_name,
    read_one_of,
)

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
# Models write these as well.
SECTION, SECTION_CLOSED = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
CALL_BEGIN, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
ENDS = (CALL_END, SECTION_END, SECTION_CLOSED, CALL_BEGIN)  # after the arguments
# An id as the models write it: the name and the number. A longer text in the place of the number is an id of ours.
NUMBERED = re.compile(r"(?:functions\.)?(.+?)(?::(\d{1,8}|[\w-]{9,}))?")
OURS = re.compile(r"toolu_[0-9a-f]{24}_(\d{1,8})")  # an id of ours that ends with the number the model wrote


def kimi_id(name: str, id: str, number: int) -> str:
    """The id of a call in the model's form. `number` is that of the call in the conversation, for ids without one."""
    own = OURS.fullmatch(id) or re.fullmatch(rf"functions\.{re.escape(name)}:(\d{{1,8}})", id)
    return f"functions.{name}:{own[1] if own else number}"


def kimi_call(call: ToolUseBlock) -> str:
    """A call in the form of Kimi-K2. The number is the end of an id in the model's form; another id stands for it."""
    number = re.sub(r"[^\w-]", "", call.id.rpartition(":")[2])
    return f"{CALL_BEGIN}functions.{call.name}:{number}{ARGUMENTS}{to_json(call.input)}{CALL_END}"


def read_kimi(source: Source, tools: Tools) -> Calls:
    """Read calls with or without the tokens around all of them. Each is complete at the end of its object."""
    section = yield from read_any(source, SECTION_BEGIN, SECTION)
    yield from read_match(source, WHITESPACE)
    if section and (yield from read_any(source, SECTION_END, SECTION_CLOSED)):
        return
    yield from read_exactly(source, CALL_BEGIN)
    another = True
    while another:
        yield from read_match(source, WHITESPACE)
        named = NUMBERED.fullmatch((yield from read_name(source)))
        if not named:
            raise Malformed
        yield from read_match(source, WHITESPACE)
        try:
            yield from read_exactly(source, ARGUMENTS)
        except Cut:
            raise Cut(cut_call(named[1], {})) from None
        yield from read_match(source, WHITESPACE)
        yield numbered(make_call(named[1], (yield from read_arguments(source, named[1], *ENDS))), named[2])
        yield from read_closing(source, CALL_END)
        another = yield from read_if(source, CALL_BEGIN)
    yield from read_one_of(source, SECTION_END, SECTION_CLOSED)
    yield from read_closing(source)


def numbered(call: Call, number: str | None) -> Call:
    """The call with an id that ends with the number of the model's id, so that its result is named as the call was."""
    return replace(call, id=f"{call.id}_{number}") if number and number.isdigit() else call


KIMI_K2 = Format(
    "kimi_k2",
    think=("<think>", "</think>"),
    call=kimi_call,
    read=read_kimi,
    call_openers=(SECTION_BEGIN, SECTION, CALL_BEGIN),
    extra_delimiters=(ARGUMENTS, CALL_END, SECTION_END, SECTION_CLOSED),
    before=SECTION_BEGIN,
    between="",
    after=SECTION_END,
    text_call_separator="",
    call_id="[0-9]{1,4}",
    history_id=kimi_id,
    hints=(CALL_BEGIN, ARGUMENTS),
)
