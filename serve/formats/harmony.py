"""The format of gpt-oss, harmony: an answer is messages, each with a header that names its channel and its recipient.

Channels become thinking (`analysis`) and text; a message to a tool becomes a call:
https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from serve.api.messages import Block, TextBlock, ThinkingBlock, ToolUseBlock
from serve.formats.format import Format, to_json
from serve.formats.json_calls import read_arguments
from serve.formats.readers import (
    WHITESPACE,
    Calls,
    Channel,
    Cut,
    Malformed,
    Reading,
    Source,
    Tools,
    at_any,
    cut_call,
    make_call,
    read_any,
    read_character,
    read_match,
)

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
ANALYSIS, COMMENTARY, FINAL = (f"{CHANNEL}{name}{MESSAGE}" for name in ("analysis", "commentary", "final"))
NEXT = f"{START}assistant"  # the header of each message but the first, which the prompt has begun
WORDS = re.compile(r"[^<\n]*")  # between the tokens of a header
RECIPIENT = re.compile(r"\bto=(\S+)")
ENDS = (CALL, END, RETURN, START)  # after the arguments of a call
CODE = re.compile(r"[^<]*")
NOBODY = ("assistant", "user", "all")  # recipients of messages that are no calls


def harmony_call(call: ToolUseBlock) -> str:
    """A call as a message to a tool, without the token after it."""
    return f"{CHANNEL}commentary to=functions.{call.name} {CONSTRAIN}json{MESSAGE}{to_json(call.input)}"


def harmony_turn(blocks: Sequence[Block]) -> str:
    """The messages of a turn without the token after the last. Text before a call is commentary, else it is final."""
    last = max((i for i, block in enumerate(blocks) if isinstance(block, ToolUseBlock)), default=-1)
    messages = [message(block, FINAL if i > last else COMMENTARY) for i, block in enumerate(blocks)]
    ends = [(CALL if isinstance(block, ToolUseBlock) else END) + NEXT for block in blocks[:-1]]
    return "".join(text + end for text, end in zip(messages, [*ends, ""], strict=False))


def message(block: Block, text_header: str) -> str:
    """One block as a message."""
    match block:
        case ThinkingBlock(thinking):
            return ANALYSIS + thinking
        case ToolUseBlock():
            return harmony_call(block)
        case TextBlock(text):
            return text_header + text
    raise AssertionError(f"{type(block).__name__} is not written")


def read_harmony(source: Source, tools: Tools) -> Calls:
    """Read the end of a message, or the header of the next one and its call. A header that is cut off is dropped."""
    names: list[str] = []
    channel = mark = ""
    while mark != MESSAGE:
        words = yield from read_match(source, WORDS)
        channel = words if mark == CHANNEL else channel
        names += RECIPIENT.findall(words)
        if not (following := (yield from read_any(source, START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN))):
            if mark and source.ended and source.at == len(source.text):
                return
            raise Malformed
        mark = following
        if mark in (END, CALL, RETURN):
            yield Channel(thinking=False)
            return
    if not names or names[-1] in NOBODY:
        yield Channel(thinking=channel.strip() == "analysis")
        return
    if not tools:
        raise Malformed
    yield from read_match(source, WHITESPACE)
    name = names[-1].removeprefix("functions.")
    is_json = names[-1] != name or (yield from at_any(source, "{"))
    read = read_arguments(source, name, *ENDS) if is_json else read_code(source, name)
    yield make_call(name, (yield from read))
    yield from read_match(source, WHITESPACE)
    yield from read_any(source, CALL, END)


def read_code(source: Source, name: str) -> Reading[dict[str, Any]]:
    """Read what is sent to a tool that is no function, such as `python`, up to the end of the message."""
    start = source.at
    while True:
        yield from read_match(source, CODE)
        end = source.at
        if source.cut and end == len(source.text):
            raise Cut(cut_call(name, {}, ("code", source.text[start:])))
        if end == len(source.text) or (yield from at_any(source, *ENDS)):
            break
        yield from read_character(source)
    code = source.text[start:end].strip()
    return {"code": code} if code else {}


HARMONY = Format(
    "harmony",
    think=(ANALYSIS, f"{END}{NEXT}"),
    call=harmony_call,
    read=read_harmony,
    extra_delimiters=(CONSTRAIN,),
    ends_with_call=True,
    named_results=True,
    call_end=CALL,
    headers=(START, CHANNEL, MESSAGE, END, CALL, RETURN),
    leading=("to=",),
    think_tokens=(ANALYSIS, END),
    answer_header=FINAL,
    write=harmony_turn,
    hints=(CHANNEL, "analysis", "final"),
)
