"""Prompt-stability rules: a request in, the same request with stable system texts out, and a report of what was done.

A rule is a pure function of one system text, so no rule can touch what a user, a tool or the model wrote. Logging,
metrics and the choice of rules belong to the server. For local engines only: the vendor's API needs the preamble.
"""

import re
from collections.abc import Callable, Collection
from typing import Generic, NamedTuple, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from serve.messages import Block, CountTokensRequest, InputMessage, TextBlock

R = TypeVar("R", bound=CountTokensRequest)


class Edit(NamedTuple):
    """What a rule makes of a text: the text to keep, the text removed, and the line that it could not read."""

    kept: str
    removed: str = ""
    unparsed: str = ""


class Rule(NamedTuple):
    """A switchable rule: what it does in one sentence, and the function that does it to one system text."""

    description: str
    edit: Callable[[str], Edit]


class Applied(Struct, frozen=True):
    """A rule removed text; `where` is a path in the request as it came, such as `system[0]`."""

    rule: str
    where: str
    removed: str


class Unparsed(Struct, frozen=True):
    """A text begins like what a rule removes but has another shape, and stayed; `text` is the start of its line."""

    rule: str
    where: str
    text: str


class Normalized(Struct, Generic[R], frozen=True):
    """A request after the rules: the very same object if no rule applied."""

    request: R
    applied: tuple[Applied, ...]
    unparsed: tuple[Unparsed, ...]


# The preamble is `x-anthropic-billing-header:` and then `key=value;` fields with blanks between them, matched by shape
# because fields come and go with releases. A field may lack its `;` at the end of a line only. The blanks and the line
# break behind the last field go too; a prompt on the same line stays. One ambiguity remains: on the header's own line,
# prompt text behind a blank that reads like a field is one to us. What begins like a field there and is none (no
# blank before it, or one in its value) may be either, so the header stays whole and is reported.
# Every repeat is possessive: no text makes the match go back, so it takes linear time.
_NAME = r"\s*+(?ai:x-anthropic-billing-header)"
_KEY = r"[A-Za-z][A-Za-z0-9_-]*+="
_FIELD = _KEY + r"[^\s;]*+"
_LINE_END = r"[ \t]*+(?:\r?+\n|\Z)"
_HEADER = re.compile(
    rf"{_NAME}:[ \t]*+{_FIELD}(?:;[ \t]++{_FIELD})*+(?:;|(?={_LINE_END}))(?:{_LINE_END}|[ \t]*+(?!{_KEY}))"
)
_LIKE_HEADER = re.compile(rf"{_NAME}(?![\w-])[^\r\n]{{0,200}}+")


def strip_preamble(text: str) -> Edit:
    """Remove the billing headers that a text starts with, together with the blanks in front of them.

    The shape is that of Claude Code's releases and of NVIDIA Dynamo's published example.
    """
    end = 0
    while header := _HEADER.match(text, end):
        end = header.end()
    leftover = _LIKE_HEADER.match(text, end)
    return Edit(text[end:], text[:end], leftover.group().strip() if leftover else "")


# In the order in which they apply.
RULES = {
    "strip-preamble": Rule("Remove the x-anthropic-billing-header line in front of a system text.", strip_preamble),
}


def normalize(request: R, rules: Collection[str]) -> Normalized[R]:
    """Apply the named rules to the system texts of a request: its `system` and its messages of role system.

    A block or message that becomes empty goes, but one message always stays. Raises ValueError for an unknown rule.
    """
    if unknown := sorted(set(rules) - RULES.keys()):
        raise ValueError(f"rules: expected some of {', '.join(RULES)}, got {', '.join(unknown)}")
    notes: list[Applied | Unparsed] = []

    def edit(text: str, where: str) -> str:
        for name in RULES:
            if name in rules:
                kept, removed, unparsed = RULES[name].edit(text)
                if kept != text:
                    notes.append(Applied(name, where, removed))
                if unparsed:
                    notes.append(Unparsed(name, where, unparsed))
                text = kept
        return text

    system = request.system and _edit_content(request.system, "system", edit)
    messages = _edit_messages(request.messages, edit)
    applied = tuple(note for note in notes if isinstance(note, Applied))
    unparsed = tuple(note for note in notes if isinstance(note, Unparsed))
    if applied:
        request = replace(request, system=system or None, messages=messages)
    return Normalized(request, applied, unparsed)


def _edit_messages(messages: tuple[InputMessage, ...], edit: Callable[[str, str], str]) -> tuple[InputMessage, ...]:
    """Edit the system messages; drop those that become empty, except that the list never does."""
    kept: list[InputMessage] = []
    for i, message in enumerate(messages):
        content = message.content
        if message.role == "system":
            content = _edit_content(content, f"messages[{i}].content", edit)
        if content == message.content:
            kept.append(message)
        elif content:
            kept.append(replace(message, content=content))
    return tuple(kept) or (replace(messages[-1], content=""),)


def _edit_content(
    content: str | tuple[Block, ...], where: str, edit: Callable[[str, str], str]
) -> str | tuple[Block, ...]:
    """Edit a text or the text blocks of a list; drop the blocks that become empty."""
    if isinstance(content, str):
        return edit(content, where)
    kept: list[Block] = []
    for i, block in enumerate(content):
        edited = TextBlock(edit(block.text, f"{where}[{i}]")) if isinstance(block, TextBlock) else block
        if edited == block:
            kept.append(block)
        elif edited != TextBlock(""):
            kept.append(edited)
    return tuple(kept)
