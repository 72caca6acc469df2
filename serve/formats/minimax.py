"""The format of MiniMax-M2: calls as `invoke` tags in a common tag, with each argument in a tag.

https://huggingface.co/MiniMaxAI/MiniMax-M2/blob/main/docs/tool_calling_guide.md
"""

from __future__ import annotations

import re

from serve.api.messages import ToolUseBlock
from serve.formats.format import Format, tagged_arguments
from serve.formats.readers import (
    WHITESPACE,
    Calls,
    Source,
    Tools,
    make_call,
    read_closing,
    read_exactly,
    read_if,
    read_match,
    read_name,
)
from serve.formats.tags import Tags, read_arguments

BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"
INVOKE, PARAMETER = '<invoke name="', '<parameter name="'
QUOTED = re.compile(r'[^"<>\n]*')
TAGS = Tags(PARAMETER, QUOTED, ('">',), "</parameter>", ("</invoke>", END))
WRITTEN = (PARAMETER + '{}">', "</parameter>\n")


def minimax_call(call: ToolUseBlock) -> str:
    """A call in the form of MiniMax-M2, without the tag around all of them."""
    return f'{INVOKE}{call.name}">\n{tagged_arguments(call.input, WRITTEN)}</invoke>'


def read_minimax(source: Source, tools: Tools) -> Calls:
    """Read calls in a common tag. Each is complete at `</invoke>`, or at the closing tag of all."""
    yield from read_if(source, BEGIN)
    yield from read_match(source, WHITESPACE)
    yield from read_exactly(source, INVOKE)
    another = True
    while another:
        name = yield from read_name(source, QUOTED)
        yield from read_exactly(source, '">')
        yield from read_match(source, WHITESPACE)
        given, follows = yield from read_arguments(source, TAGS, name, tools.get(name, {}))
        yield make_call(name, given)
        yield from read_match(source, WHITESPACE)
        another = follows != END and (yield from read_if(source, INVOKE))
    yield from read_closing(source, *([END] if follows != END else []))


MINIMAX_M2 = Format(
    "minimax_m2",
    call=minimax_call,
    read=read_minimax,
    call_openers=(BEGIN, INVOKE),
    extra_delimiters=(END,),
    before=f"{BEGIN}\n",
    after=f"\n{END}",
    parameter=WRITTEN,
    hints=(BEGIN, INVOKE),
)
