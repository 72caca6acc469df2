"""The formats of GLM-4.5 to 5: arguments in pairs of tags, on lines of their own up to 4.6 and without lines after it.

- GLM-4.5 and 4.6: https://huggingface.co/zai-org/GLM-4.6
- GLM-4.7 and later: https://huggingface.co/zai-org/GLM-4.7-Flash
"""

from __future__ import annotations

from dataclasses import replace

from serve.api.messages import ToolUseBlock
from serve.formats.format import Format, tagged_arguments
from serve.formats.readers import (
    KEY,
    WHITESPACE,
    Calls,
    Source,
    Tools,
    make_call,
    read_exactly,
    read_match,
    read_name,
)
from serve.formats.tags import Tags, read_arguments

LINES = ("<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n")
JOINED = ("<arg_key>{}</arg_key><arg_value>", "</arg_value>")
TAGS = Tags("<arg_key>", KEY, ("</arg_key>", "<arg_value>"), "</arg_value>", ("</tool_call>",))


def glm45_call(call: ToolUseBlock) -> str:
    """A call in the form of GLM-4.5 and 4.6."""
    return f"<tool_call>{call.name}\n{tagged_arguments(call.input, LINES)}</tool_call>"


def glm47_call(call: ToolUseBlock) -> str:
    """A call in the form of GLM-4.7 and later."""
    return f"<tool_call>{call.name}{tagged_arguments(call.input, JOINED)}</tool_call>"


def read_glm(source: Source, tools: Tools) -> Calls:
    """Read one call of either form. It is complete at `</tool_call>`."""
    yield from read_exactly(source, "<tool_call>")
    yield from read_match(source, WHITESPACE)
    name = yield from read_name(source)
    yield from read_match(source, WHITESPACE)
    given, _ = yield from read_arguments(source, TAGS, name, tools.get(name, {}))
    yield make_call(name, given)
    yield from read_match(source, WHITESPACE)


GLM45 = Format(
    "glm45",
    think=("\n<think>", "</think>\n"),
    call=glm45_call,
    read=read_glm,
    call_openers=("<tool_call>",),
    extra_delimiters=("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    parameter=LINES,
    hints=("<arg_key>", "<arg_value>"),
)
GLM47 = replace(
    GLM45,
    name="glm47",
    think=("<think>", "</think>"),
    call=glm47_call,
    between="",
    text_call_separator="",
    parameter=JOINED,
    hints=("</arg_key><arg_value>",),
)
