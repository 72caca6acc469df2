"""Readers of tool calls, one function for each format, which parse a call while its text arrives.

The functions are generators. They yield None when they need more text, and each call as soon as it is complete. They
raise Malformed if the text is not a call, and Cut if it ended before the call did. `families` writes the same forms;
the readers accept what models write instead as well: JSON with the faults that `lenient` mends, a bracket too many or
too few, several calls where one belongs, arguments as a string or without any, and closing delimiters twice or never.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from serve.api.answers import CutInput, new_id
from serve.formats.lenient import decode_lenient, read_cut_object

SPACE = " \t\r\n"  # whitespace; next to a delimiter it belongs to the delimiter, not to the blocks
CLOSING = ("</parameter>", "</function>", "</tool_call>")  # tags that models write after a call, in any number
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


@dataclass(frozen=True)
class Call:
    """A complete tool call. `arguments` is `input` as compact JSON. The id is new, as models repeat theirs."""

    id: str
    name: str
    input: dict[str, Any]
    arguments: str


@dataclass(frozen=True)
class CutCall:
    """A tool call that the limit of tokens ended. `arguments` is the beginning of its compact JSON, never all of it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Prose:
    """Text between the delimiters of a call; the call follows."""

    text: str


@dataclass(frozen=True)
class Channel:
    """A message has begun or ended: what follows is thinking, or else text."""

    thinking: bool


class Malformed(Exception):
    """The text is not a call, although it began like one."""


class Cut(Malformed):
    """The answer was cut off within a call, whose name is known if there is a `call`."""

    def __init__(self, call: CutCall | None = None) -> None:
        self.call = call


class Source:
    """The text of an answer as it arrives, and how far calls were read in it."""

    def __init__(self) -> None:
        self.text, self.at = "", 0
        self.settled = 0  # the text before this belongs to complete calls
        self.ended = False  # no more text will come
        self.cut = False  # it ended because of the limit of tokens
        self.unclosed = ""  # the closing delimiter that the last call still lacks
        self.flat = False  # values are read as if they had no calls in them

    def add(self, more: str) -> None:
        """Append text. The interpreter does so in place if this is the only reference, and otherwise copies it all."""
        text, self.text = self.text, ""
        text += more
        self.text = text


T = TypeVar("T")
Tools = Mapping[str, dict[str, Any]]  # input schemas by name
Reading = Generator[None, None, T]  # yields when it needs more text
Calls = Generator[Call | Prose | Channel | None, None, None]  # also yields complete calls, and channels
Reader = Callable[[Source, Tools], Calls]


def cut_call(name: str, members: dict[str, Any], string: tuple[str, str] | None = None) -> CutCall:
    """A call that was cut off: its complete arguments, and the key and text of a string that has no end."""
    text = encoded(members)[:-1]
    if string is not None:
        text += ("," if members else "") + encoded({string[0]: string[1]})[1:-2]
    return CutCall(new_id("toolu"), name, text)


def complete_arguments(arguments: str) -> dict[str, Any]:
    """The arguments in the JSON of a call; of a call that was cut off, those that are complete."""
    try:
        whole: dict[str, Any] = msgspec.json.decode(arguments)
        return whole
    except msgspec.DecodeError:
        members, _ = read_cut_object(f"{arguments} ")  # a number at the end is complete: see `cut_call`
        return CutInput(members, arguments)


def encoded(value: Any) -> str:
    """A value as compact JSON."""
    return msgspec.json.encode(value).decode()


def make_call(name: object, input: object, id: object = None) -> Call:
    """A call with a new id. Raises Malformed unless it has a name and an object of arguments.

    If the model wrote an id of Mistral's form, ours ends with it, as templates with short ids take the end of ours.
    """
    if not (isinstance(name, str) and name and isinstance(input, dict)):
        raise Malformed
    try:
        arguments = encoded(input)
    except RecursionError:
        raise Malformed from None
    own = id if isinstance(id, str) and SHORT_ID.fullmatch(id) else ""
    return Call(new_id("toolu") + own, name, input, arguments)


# The functions below read from `source.at` on, and wait when they reach the end of the text.
WHITESPACE = re.compile(f"[{SPACE}]*")
NAME = re.compile(r"""[^\s<>\[\]{}()"',;]*""")
KEY = re.compile(r"[^<>\n]*")
SHORT_ID = re.compile("[A-Za-z0-9]{9}")
STRING_TEXT = re.compile(r'[^"\\]*')  # in a string of JSON
PYTHON_STRING_TEXT = re.compile(r"[^'\\]*")  # in a string between single quotes
JSON_REST = re.compile(r"[\s:,0-9+\-.eEtrufalsnTFNo]*")  # JSON, and Python's words, without strings and brackets


def wait_for_more(source: Source) -> Reading[None]:
    """Wait for more text. Raises Malformed if the text has ended, Cut if that was due to the limit of tokens."""
    if source.ended:
        raise Cut if source.cut else Malformed
    yield


def match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The end of a pattern's match at `at`, or `at` if it does not match."""
    matched = pattern.match(text, at)
    return matched.end() if matched else at


def read_match(source: Source, pattern: re.Pattern[str]) -> Reading[str]:
    """Read the longest match of a pattern such as `[a-z]*`, which may be empty."""
    start = source.at
    while True:
        source.at = match_end(pattern, source.text, source.at)
        if source.at < len(source.text) or source.ended:
            return source.text[start : source.at]
        yield


def find_match(source: Source, pattern: re.Pattern[str], longest: int) -> Reading[re.Match[str] | None]:
    """Find the next match, of at most `longest` characters, or None if there is none up to the end of the answer.

    `source.at` stays before the match.
    """
    while not (found := pattern.search(source.text, source.at)):
        source.at = max(source.at, len(source.text) - longest + 1)
        if source.ended:
            source.at = len(source.text)
            return None
        yield
    return found


def read_name(source: Source, pattern: re.Pattern[str] = NAME) -> Reading[str]:
    """Read a name. Raises Malformed if there is none, and Cut if it may go on where the text was cut off."""
    name = yield from read_match(source, pattern)
    if source.cut and source.at == len(source.text):
        raise Cut
    if not name:
        raise Malformed
    return name


def read_if(source: Source, delimiter: str) -> Reading[bool]:
    """Read a delimiter and return True, or return False and read nothing if other text is there."""
    while not source.text.startswith(delimiter, source.at):
        if source.ended or not delimiter.startswith(source.text[source.at : source.at + len(delimiter)]):
            return False
        yield
    source.at += len(delimiter)
    return True


def read_any(source: Source, *delimiters: str) -> Reading[str]:
    """Read and return one of several delimiters, or return "" and read nothing if other text is there."""
    for delimiter in delimiters:
        if (yield from read_if(source, delimiter)):
            return delimiter
    return ""


def read_exactly(source: Source, delimiter: str) -> Reading[None]:
    """Read a delimiter. Raises Malformed if other text is there, Cut if the text was cut off within it."""
    if not (yield from read_if(source, delimiter)):
        raise not_found(source, delimiter)


def not_found(source: Source, *delimiters: str) -> Malformed:
    """The error for a text that continues with none of the delimiters."""
    rest = source.text[source.at : source.at + max(map(len, delimiters))]
    return Cut() if source.cut and any(delimiter.startswith(rest) for delimiter in delimiters) else Malformed()


def at_any(source: Source, *delimiters: str) -> Reading[str]:
    """The one of several delimiters that comes next, or "". Nothing is read."""
    at = source.at
    found = yield from read_any(source, *delimiters)
    source.at = at
    return found


def read_closing(source: Source, *delimiters: str) -> Reading[None]:
    """Read those of the delimiters that follow a complete call. A model may forget them, or be cut off."""
    for delimiter in delimiters:
        yield from read_one_of(source, delimiter)
    yield from read_match(source, WHITESPACE)
    source.settled = source.at


def read_one_of(source: Source, *spellings: str) -> Reading[str]:
    """Read and return one of the spellings of a delimiter after a complete call, or ""."""
    yield from read_match(source, WHITESPACE)
    found = yield from read_any(source, *spellings)
    if not found and source.ended and any(mark.startswith(source.text[source.at :]) for mark in spellings):
        source.at = len(source.text)
    return found


def read_up_to(source: Source, delimiter: str) -> Reading[int]:
    """Read up to a delimiter and past it. Returns the position of the delimiter."""
    while (at := source.text.find(delimiter, source.at)) < 0:
        source.at = max(source.at, len(source.text) - len(delimiter) + 1)
        yield from wait_for_more(source)
    source.at = at + len(delimiter)
    return at


def read_object(source: Source, *ends: str) -> Reading[dict[str, Any]]:
    """Read a JSON object. Raises Malformed for anything else.

    Its end is found by brackets and strings, reading each character once; then it is decoded. Where one of `ends`
    follows, or nothing, brackets may be missing.
    """
    value = decoded((yield from read_brackets(source, *ends))[0])
    if not isinstance(value, dict):
        raise Malformed
    return value


def decoded(text: str) -> Any:
    """The value of JSON with the usual faults. Raises Malformed for other text."""
    try:
        return decode_lenient(text)
    except ValueError:
        raise Malformed from None


def read_brackets(source: Source, *ends: str, opened: bool = False) -> Reading[tuple[str, str]]:
    """Read the text of a JSON object; return it, and the brackets that are missing at its end, which are added.

    With `opened` its first brace is missing as well.
    """
    start, closing = source.at, ["}"]
    if not opened:
        yield from read_exactly(source, "{")
    while closing:
        yield from read_match(source, JSON_REST)
        if source.ended and not source.cut and source.at == len(source.text):
            break
        sign = yield from read_character(source)
        if sign in "\"'":
            yield from read_string(source, sign)
        elif sign in "{[":
            closing.append("}" if sign == "{" else "]")
        elif sign in closing[-2:]:  # it may close the bracket within as well
            while closing.pop() != sign:
                pass
        else:
            source.at -= 1
            if not (yield from at_any(source, *ends)):
                raise Malformed
            break
    missing = "".join(reversed(closing))
    return "{" * opened + source.text[start : source.at] + missing, missing


def read_string(source: Source, quote: str = '"') -> Reading[None]:
    """Read a string after its opening quote."""
    pattern = STRING_TEXT if quote == '"' else PYTHON_STRING_TEXT
    while True:
        yield from read_match(source, pattern)
        if (yield from read_character(source)) == quote:
            return
        yield from read_character(source)  # the character after a backslash


def read_character(source: Source) -> Reading[str]:
    """Read one character."""
    while source.at == len(source.text):
        yield from wait_for_more(source)
    source.at += 1
    return source.text[source.at - 1]


def overlap(text: str, delimiter: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `delimiter`."""
    for size in range(min(len(text), len(delimiter) - 1), 0, -1):
        if text.endswith(delimiter[:size]):
            return size
    return 0
