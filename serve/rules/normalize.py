"""Prompt-stability rules: a request in, the same request with a stable frame out, and a report of what was done.

A rule is a pure function of one system text or of the tools' definitions, so no rule can touch what a user, a tool or
the model wrote. Logging, metrics and the choice of rules belong to the server. For local engines only: the vendor's API
needs the preamble.
"""

import re
from collections.abc import Callable, Collection
from typing import Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from serve.api.messages import Block, CountTokensRequest, InputMessage, TextBlock, Tool

R = TypeVar("R", bound=CountTokensRequest)


class Edit(NamedTuple):
    """What a rule makes of a text: the text to keep, the text removed, and the line that it could not read."""

    kept: str
    removed: str = ""
    unparsed: str = ""


class Rule(NamedTuple):
    """A switchable rule, and the function that does it; `render` does what has neither `edit` nor `arrange`."""

    description: str  # what it does, in a sentence
    reads: str  # what the model reads differently for it
    edit: Callable[[str], Edit] | None = None  # of one system text
    moves: bool = False  # what `edit` takes out of `system` stands behind the first message instead
    arrange: Callable[[tuple[Tool, ...]], tuple[Tool, ...]] | None = None


class Applied(Struct, frozen=True):
    """A rule changed something; `where` is a path in the request as it came, such as `system[0]` or `tools`."""

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


# A countdown of tokens, in an element or on a line of its own. Values differ in each request, the words do not.
_NUMBER = r"[ \t]*+[0-9][0-9,_.]*+[ \t]*+"
_COUNTDOWN = re.compile(
    r"<total_tokens>[^<>]{0,200}+</total_tokens>[ \t]*+(?:\r?+\n|\Z)?+"
    rf"|^[ \t]*+(?:<system_warning>)?+Token usage:{_NUMBER}/{_NUMBER}(?:[;,]{_NUMBER}(?:tokens )?+(?:remaining|left))?+"
    r"[.;]?+(?:</system_warning>)?+[ \t]*+(?:\r?+\n|\Z)",
    re.MULTILINE,
)
# A line that says which day it is, or the report of git, up to the next heading or tag.
_DATE = (
    r"^[ \t]*+(?:[-*][ \t]++)?+(?:(?:Today's|The current|Current) date(?: is)?+:?+|Date:)"
    r"[^\n0-9]*+[0-9][^\n]*+(?:\n|\Z)"
)
_GIT = r"^[ \t]*+(?:gitStatus\b|Git status\b)[^\n]*+(?:\n(?![#<])[^\n]*+)*+(?:\n|\Z)"
_VOLATILE = re.compile(f"{_DATE}|{_GIT}", re.MULTILINE)


def fold_reminders(text: str) -> Edit:
    """Remove token countdowns: `<total_tokens>` elements, and lines such as `Token usage: 2500/200000`."""
    return _without(_COUNTDOWN, text)


def cut_volatile(text: str) -> Edit:
    """Take out the lines with the date and the paragraphs of git's status."""
    return _without(_VOLATILE, text)


def sort_schema_keys(tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """Tools with the keys of their schemas in alphabetical order at every depth; lists keep their order."""
    return tuple(map(_with_sorted_keys, tools))


def sort_tools(tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """Tools in the order of their names."""
    return tuple(sorted(tools, key=lambda tool: tool.name))


def _without(pattern: re.Pattern[str], text: str) -> Edit:
    removed = "".join(match[0] for match in pattern.finditer(text))
    return Edit(pattern.sub("", text), removed) if removed else Edit(text)


def _with_sorted_keys(tool: Tool) -> Tool:
    try:
        plain, ordered = (msgspec.json.encode(tool.input_schema, order=order) for order in (None, "sorted"))
    except RecursionError:  # a schema that nests too deeply stays
        return tool
    return tool if plain == ordered else replace(tool, input_schema=msgspec.json.decode(ordered))


# In the order in which they apply.
RULES = {
    "strip-preamble": Rule(
        "Remove the x-anthropic-billing-header line in front of a system text.",
        "Everything but that line.",
        edit=strip_preamble,
    ),
    "fold-reminders": Rule(
        "Remove token countdowns (<total_tokens>, Token usage: n/m) from system texts.",
        "The model is not told how much of its context is left.",
        edit=fold_reminders,
    ),
    "volatile-last": Rule(
        "Move the date and git status from the system text to a system message behind the first message.",
        "The same words, later and outside of what surrounded them.",
        edit=cut_volatile,
        moves=True,
    ),
    "sort-schema-keys": Rule(
        "Sort the keys of tool schemas.",
        "The same schemas; parameters in alphabetical order, which may sway the order in calls.",
        arrange=sort_schema_keys,
    ),
    "sort-tools": Rule(
        "Sort tools by name.",
        "The same tools in another order, which may sway the choice among them.",
        arrange=sort_tools,
    ),
    "tools-first": Rule(
        "Render tools ahead of the system text, where the chat template writes them right behind it.",
        "The same words in another order than the model was trained on.",
    ),
}
DEFAULT_RULES = frozenset({"strip-preamble"})


def parse_rules(names: str) -> frozenset[str]:
    """Read a comma-separated list of rules, or `none`; raises ValueError for an unknown one."""
    return known_rules({name.strip() for name in names.split(",")} - {"", "none"})


def known_rules(rules: Collection[str]) -> frozenset[str]:
    """The rules, which must be among RULES; raises ValueError."""
    if unknown := sorted(set(rules) - RULES.keys()):
        raise ValueError(f"expected some of {', '.join(RULES)} or none, got {', '.join(unknown)}")
    return frozenset(rules)


class Edited(NamedTuple):
    """What the rules make of one system text: the text to keep, what they did, what is to stand elsewhere."""

    kept: str
    notes: tuple[Applied | Unparsed, ...]
    moved: tuple[str, ...]


def edit_text(text: str, where: str, rules: Collection[str], movable: bool) -> Edited:
    """Apply the named rules to one system text; those that move something only where it is `movable`."""
    notes: list[Applied | Unparsed] = []
    moved: list[str] = []
    for name, rule in RULES.items():
        if name not in rules or rule.edit is None or (rule.moves and not movable):
            continue
        kept, removed, unparsed = rule.edit(text)
        if kept != text:
            notes.append(Applied(name, where, removed))
            moved.extend([removed] if rule.moves else [])
        if unparsed:
            notes.append(Unparsed(name, where, unparsed))
        text = kept
    return Edited(text, tuple(notes), tuple(moved))


def joined(moved: Collection[str]) -> str:
    """What was moved, as one text."""
    return "\n\n".join(part.strip("\n") for part in moved)


def normalize(request: R, rules: Collection[str]) -> Normalized[R]:
    """Apply the named rules to the system texts (`system`, and messages of role system) and tools of a request.

    A block or message that becomes empty goes, but one message always stays. Raises ValueError for an unknown rule.
    """
    rules = known_rules(rules)
    notes: list[Applied | Unparsed] = []
    moved: list[str] = []

    def edit(text: str, where: str) -> str:
        edited = edit_text(text, where, rules, movable=where.startswith("system"))
        notes.extend(edited.notes)
        moved.extend(edited.moved)
        return edited.kept

    system = request.system and _edit_content(request.system, "system", edit)
    messages = _edit_messages(request.messages, edit)
    if moved:
        at = 1 if messages[0].role == "user" else 0
        messages = (*messages[:at], InputMessage("system", joined(moved)), *messages[at:])
    tools = request.tools
    for name, rule in RULES.items():
        if name in rules and rule.arrange and tools:
            arranged = rule.arrange(tools)
            # Not `==`: dicts are equal whatever the order of their keys.
            if any(new is not old for new, old in zip(arranged, tools, strict=True)):
                notes.append(Applied(name, "tools", ""))
                tools = arranged
    if "tools-first" in rules and tools and system:
        notes.append(Applied("tools-first", "tools", ""))  # by `render`
    applied = tuple(note for note in notes if isinstance(note, Applied))
    unparsed = tuple(note for note in notes if isinstance(note, Unparsed))
    if applied:
        request = replace(request, system=system or None, messages=messages, tools=tools)
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
