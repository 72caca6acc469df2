"""Prompt-stability rules: a request in; the request with a stable system text and tools, and notes on each change, out.

A rule is a pure function of one system text, of the order of one message's texts or of the tools' definitions, so no
rule can change what a user, a tool or the model wrote. Logging, metrics and the choice of rules are the server's. The
rules are for local engines only: Anthropic's API needs the billing header.

To add a rule:

1. Write its function here: `str -> Edit` for a system text, `texts -> order` for the blocks of a user's message, or
   `tools -> tools` for the tools. It returns the same objects for what it does not change.
2. Add it to RULES, at its place in the order of application. The flags, `--normalize list`, the server, the proxy and
   `serve explain` take it from there.
3. Add what it repairs to `cases` in `experiments/stability.py`, and test it in `tests/serve/rules/test_rules.py`.
   `tests/serve/rules/test_body.py` runs every rule of RULES on bytes as well.
4. `python -m serve.docs` writes its row into the tables of the READMEs.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from serve.api.messages import Block, CountTokensRequest, InputMessage, TextBlock
from serve.api.tools import Tool

R = TypeVar("R", bound=CountTokensRequest)


class Edit(NamedTuple):
    """The result of a rule for a text: the text to keep, the text removed, and the line that it could not parse."""

    kept: str
    removed: str = ""
    unparsed: str = ""


class Rule(NamedTuple):
    """A rule that can be switched on. One without a function is applied where prompts are rendered."""

    description: str  # what it does, in a sentence
    reads: str  # what the model reads differently because of it
    edit: Callable[[str], Edit] | None = None  # of one system text
    moves: bool = False  # text that `edit` removes from `system` is moved after the first message
    order: Callable[[Sequence[str | None]], list[int]] | None = None  # of a message's blocks, by their texts
    arrange: Callable[[tuple[Tool, ...]], tuple[Tool, ...]] | None = None


class Applied(Struct, frozen=True):
    """A change by a rule. `where` is a path in the request as it came, such as `system[0]` or `tools`."""

    rule: str
    where: str
    removed: str


class Unparsed(Struct, frozen=True):
    """A text that begins like what a rule removes but does not parse, and was kept; `text` is the start of its line."""

    rule: str
    where: str
    text: str


class Normalized(Struct, Generic[R], frozen=True):
    """A request after the rules: the same object if no rule applied."""

    request: R
    applied: tuple[Applied, ...]
    unparsed: tuple[Unparsed, ...]


# The header is `x-anthropic-billing-header:` and `key=value;` fields separated by whitespace. It is matched by shape,
# because its fields change with releases. Only the last field of a line may lack its `;`. The whitespace and the line
# break after the last field are removed as well; a prompt on the same line is kept.
# Ambiguity: on the header's own line, prompt text such as ` foo=bar;` after a space is taken for a field. A malformed
# field could be either, so then the whole header is kept and reported:
#   x-anthropic-billing-header: cch=1; You are           -> You are
#   x-anthropic-billing-header: cch=1; foo=bar; You are  -> You are, as foo is taken for a field
#   x-anthropic-billing-header: cch=1;foo=bar; You are   -> kept and reported, as no space is before foo
# Every repeat is possessive, so the match never backtracks and takes linear time.
_NAME = r"\s*+(?ai:x-anthropic-billing-header)"
_KEY = r"[A-Za-z][A-Za-z0-9_-]*+="
_FIELD = _KEY + r"[^\s;]*+"
_LINE_END = r"[ \t]*+(?:\r?+\n|\Z)"
_HEADER = re.compile(
    rf"{_NAME}:[ \t]*+{_FIELD}(?:;[ \t]++{_FIELD})*+(?:;|(?={_LINE_END}))(?:{_LINE_END}|[ \t]*+(?!{_KEY}))"
)
_LIKE_HEADER = re.compile(rf"{_NAME}(?![\w-])[^\r\n]{{0,200}}+")


def strip_preamble(text: str) -> Edit:
    """Remove the billing headers at the start of a text, and the whitespace before them.

    The shape is that of Claude Code's releases and of NVIDIA Dynamo's published example.
    """
    end = 0
    while header := _HEADER.match(text, end):
        end = header.end()
    leftover = _LIKE_HEADER.match(text, end)
    return Edit(text[end:], text[:end], leftover.group().strip() if leftover else "")


# A countdown of tokens, in an element or on its own line. Its values differ in each request, its words do not.
_NUMBER = r"[ \t]*+[0-9][0-9,_.]*+[ \t]*+"
_COUNTDOWN = re.compile(
    r"<total_tokens>[^<>]{0,200}+</total_tokens>[ \t]*+(?:\r?+\n|\Z)?+"
    rf"|^[ \t]*+(?:<system_warning>)?+Token usage:{_NUMBER}/{_NUMBER}(?:[;,]{_NUMBER}(?:tokens )?+(?:remaining|left))?+"
    r"[.;]?+(?:</system_warning>)?+[ \t]*+(?:\r?+\n|\Z)",
    re.MULTILINE,
)
# A line with the date, or the status of git up to the next heading or tag. In a numbered line (Cline's environment) the
# date must be in figures, as lists of instructions have such lines as well.
_DATE = (
    r"^[ \t]*+(?:[-*][ \t]++)?+(?:(?:Today's|The current|Current) date(?: and time)?+(?: is)?+:?+|Date:)"
    r"[^\n0-9]*+[0-9][^\n]*+(?:\n|\Z)"
)
_NUMBERED_DATE = r"^[ \t]*+[0-9]{1,2}\.[ \t]++Date:[ \t]*+[0-9]{1,4}[/.-][0-9]{1,2}[/.-][0-9]{1,4}[ \t]*+\r?+(?:\n|\Z)"
_DATE_ELEMENT = r"^[ \t]*+<current_date>[^<>\n]*+</current_date>[ \t]*+\r?+(?:\n|\Z)"
_GIT = r"^[ \t]*+(?:gitStatus\b|Git status\b)[^\n]*+(?:\n(?![#<])[^\n]*+)*+(?:\n|\Z)"
# The folder, in a line of its own with a path (pi), or in an `<env>` element (opencode, Cline).
_FOLDER = r"^Current working directory:[ \t]*+(?:[~/]|[A-Za-z]:[\\/])[^\n]*+(?:\n|\Z)"
_VOLATILE = re.compile("|".join([_DATE, _NUMBERED_DATE, _DATE_ELEMENT, _GIT, _FOLDER]), re.MULTILINE)
_ENVIRONMENT = re.compile(r"^[ \t]*+<env>[ \t]*+\r?+\n(?:(?![ \t]*+</?env>)[^\n]*+\n)*+[ \t]*+</env>", re.MULTILINE)
_ENVIRONMENT_FOLDER = re.compile(
    r"^[ \t]*+(?:[0-9]{1,2}\.[ \t]++|[-*][ \t]++)?+"
    r"(?i:(?:(?:current|primary) )?+working directory|workspace root folder|is directory a git repo(?:sitory)?+)"
    r":[^\n]*+\n",
    re.MULTILINE,
)
_REMINDER = re.compile(r"\s*+<system-reminder>.*</system-reminder>\s*+", re.DOTALL)


def fold_reminders(text: str) -> Edit:
    """Remove token countdowns: `<total_tokens>` elements, and lines such as `Token usage: 2500/200000`."""
    return _without(_COUNTDOWN, text)


def cut_volatile(text: str) -> Edit:
    """Remove the lines with the date, the paragraphs of git's status, and the lines with the folder."""
    folders: list[str] = []

    def without_folders(environment: re.Match[str]) -> str:
        kept, removed, _ = _without(_ENVIRONMENT_FOLDER, environment[0])
        folders.append(removed)
        return kept

    kept, removed, _ = _without(_VOLATILE, _ENVIRONMENT.sub(without_folders, text))
    moved = "".join(folders) + removed
    return Edit(kept, moved) if moved else Edit(text)


def reminders_last(texts: Sequence[str | None]) -> list[int]:
    """The order of a message's blocks with those last that are a `<system-reminder>`; a block without text is None."""
    reminders = [bool(text and _REMINDER.fullmatch(text)) for text in texts]
    return sorted(range(len(texts)), key=reminders.__getitem__)


def sort_schema_keys(tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """The tools with the keys of their schemas in alphabetical order at every depth. Lists keep their order."""
    return tuple(map(_with_sorted_keys, tools))


def sort_tools(tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """The tools, sorted by name."""
    return tuple(sorted(tools, key=lambda tool: tool.name))


def _without(pattern: re.Pattern[str], text: str) -> Edit:
    removed = "".join(match[0] for match in pattern.finditer(text))
    return Edit(pattern.sub("", text), removed) if removed else Edit(text)


def _with_sorted_keys(tool: Tool) -> Tool:
    try:
        plain, ordered = (msgspec.json.encode(tool.input_schema, order=order) for order in (None, "sorted"))
    except RecursionError:  # a schema that is nested too deeply stays
        return tool
    return tool if plain == ordered else replace(tool, input_schema=msgspec.json.decode(ordered))


# In the order in which they are applied.
RULES = {
    "strip-preamble": Rule(
        "Remove the x-anthropic-billing-header line before a system text.",
        "The same without that line.",
        edit=strip_preamble,
    ),
    "fold-reminders": Rule(
        "Remove token countdowns (<total_tokens>, Token usage: n/m) from system texts.",
        "The same without how much of its context is left.",
        edit=fold_reminders,
    ),
    "volatile-last": Rule(
        "Move the date, the folder and git status from the system text to a system message after the first message.",
        "The same words, but later and without the text around them.",
        edit=cut_volatile,
        moves=True,
    ),
    "reminders-last": Rule(
        "Put <system-reminder> blocks last in the user's messages after the first answer.",
        "The same words, but reminders after the results and words of their message.",
        order=reminders_last,
    ),
    "sort-schema-keys": Rule(
        "Sort the keys of tool schemas.",
        "The same schemas with sorted parameters, which may change their order in calls.",
        arrange=sort_schema_keys,
    ),
    "sort-tools": Rule(
        "Sort tools by name.",
        "The same tools in another order, which may change the choice among them.",
        arrange=sort_tools,
    ),
    "tools-first": Rule(
        "Render tools before the system text, if the chat template writes them directly after it.",
        "The same words in an order that the model was not trained on.",
    ),
}
DEFAULT_RULES = frozenset({"strip-preamble"})
RULE_COLUMNS = ("rule", "default", "what it does", "what the model reads")


def rule_rows() -> list[tuple[str, str, str, str]]:
    """The rules as rows of a table with RULE_COLUMNS."""
    return [
        (name, "on" if name in DEFAULT_RULES else "off", rule.description, rule.reads) for name, rule in RULES.items()
    ]


def parse_rules(names: str) -> frozenset[str]:
    """The rules in a comma-separated list, or none for `none`. Raises ValueError for an unknown rule."""
    return known_rules({name.strip() for name in names.split(",")} - {"", "none"})


def known_rules(rules: Collection[str]) -> frozenset[str]:
    """The rules as a set. Raises ValueError for one that is not in RULES."""
    if unknown := sorted(set(rules) - RULES.keys()):
        raise ValueError(f"expected some of {', '.join(RULES)} or none, got {', '.join(unknown)}")
    return frozenset(rules)


class RuleEditor:
    """Applies rules to system texts and tools, and collects what they did."""

    def __init__(self, rules: Collection[str]) -> None:
        self.rules = [(name, rule) for name, rule in RULES.items() if name in rules]
        self.applied: list[Applied] = []
        self.unparsed: list[Unparsed] = []
        self.moved: list[str] = []  # texts removed from `system`, to stand after the first message

    def edit(self, text: str, where: str, movable: bool) -> str:
        """The text after the rules; rules that move text are applied only if it is `movable`."""
        for name, rule in self.rules:
            if rule.edit is None or (rule.moves and not movable):
                continue
            kept, removed, unparsed = rule.edit(text)
            if kept != text:
                self.applied.append(Applied(name, where, removed))
                self.moved.extend([removed] if rule.moves else [])
            if unparsed:
                self.unparsed.append(Unparsed(name, where, unparsed))
            text = kept
        return text

    @property
    def orders_blocks(self) -> bool:
        """Whether any of the rules changes the order of a message's blocks."""
        return any(rule.order for _, rule in self.rules)

    def order(self, texts: Sequence[str | None], where: str) -> list[int]:
        """The order of a message's blocks after the rules."""
        order = list(range(len(texts)))
        for name, rule in self.rules:
            if rule.order and (ordered := rule.order(texts)) != order:
                self.applied.append(Applied(name, where, ""))
                order = ordered  # there is one rule of this kind
        return order

    @property
    def arranges_tools(self) -> bool:
        """Whether any of the rules changes tools."""
        return any(rule.arrange for _, rule in self.rules)

    def arrange(self, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
        """The tools after the rules."""
        for name, rule in self.rules:
            if rule.arrange:
                arranged = rule.arrange(tools)
                # Not `==`: dicts with another order of keys are equal.
                if any(new is not old for new, old in zip(arranged, tools, strict=True)):
                    self.applied.append(Applied(name, "tools", ""))
                    tools = arranged
        return tools


def join_moved(moved: Collection[str]) -> str:
    """The moved texts, as one text."""
    return "\n\n".join(part.strip("\n") for part in moved)


def normalize(request: R, rules: Collection[str]) -> Normalized[R]:
    """Apply the named rules to a request's system texts (`system`, and messages with that role), messages and tools.

    Blocks and messages that become empty are dropped, but at least one message stays. Raises ValueError for an unknown
    rule.
    """
    rules = known_rules(rules)
    editor = RuleEditor(rules)
    system = request.system and _edit_content(request.system, "system", editor)
    messages = _edit_messages(request.messages, editor)
    if editor.moved:
        at = 1 if messages[0].role == "user" else 0
        messages = (*messages[:at], InputMessage("system", join_moved(editor.moved)), *messages[at:])
    tools = request.tools and editor.arrange(request.tools)
    if "tools-first" in rules and tools and system:
        editor.applied.append(Applied("tools-first", "tools", ""))  # it is applied by `prompt.render`
    if editor.applied:
        request = replace(request, system=system or None, messages=messages, tools=tools)
    return Normalized(request, tuple(editor.applied), tuple(editor.unparsed))


def _edit_messages(messages: tuple[InputMessage, ...], editor: RuleEditor) -> tuple[InputMessage, ...]:
    """Edit the system messages, and drop those that become empty, but never all messages; order users' blocks."""
    kept: list[InputMessage] = []
    answered = False
    for i, message in enumerate(messages):
        content = message.content
        answered |= message.role == "assistant"
        if answered and message.role == "user" and editor.orders_blocks and not isinstance(content, str):
            texts = [block.text if isinstance(block, TextBlock) else None for block in content]
            content = tuple(content[n] for n in editor.order(texts, f"messages[{i}].content"))
        if message.role == "system":
            content = _edit_content(content, f"messages[{i}].content", editor)
        if content == message.content:
            kept.append(message)
        elif content:
            kept.append(replace(message, content=content))
    return tuple(kept) or (replace(messages[-1], content=""),)


def _edit_content(content: str | tuple[Block, ...], where: str, editor: RuleEditor) -> str | tuple[Block, ...]:
    """Edit a text, or the text blocks of a list, and drop the blocks that become empty."""
    movable = where == "system"
    if isinstance(content, str):
        return editor.edit(content, where, movable)
    kept: list[Block] = []
    for i, block in enumerate(content):
        edited = block
        if isinstance(block, TextBlock):
            edited = TextBlock(editor.edit(block.text, f"{where}[{i}]", movable))
        if edited == block:
            kept.append(block)
        elif edited != TextBlock(""):
            kept.append(edited)
    return tuple(kept)
