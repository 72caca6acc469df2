"""Readers of tool calls, one function for each format, which parse a call while its text arrives.

The functions are generators. They yield None when they need more text, and each call as soon as it is complete. They
raise Malformed if the text is not a call. Each character is read once. `families` writes the same forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from serve.api.answers import new_id
from serve.formats.schemas import decode_json, member, typed, types_of

SPACE = " \t\r\n"  # whitespace; next to a delimiter it belongs to the delimiter, not to the blocks
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


@dataclass(frozen=True)
class Call:
    """A complete tool call. `arguments` is `input` as compact JSON. The id is new, as models repeat theirs."""

    id: str
    name: str
    input: dict[str, Any]
    arguments: str


class Malformed(Exception):
    """The text is not a call, although it began like one."""


class Source:
    """The text of an answer as it arrives, and how far calls were read in it."""

    def __init__(self) -> None:
        self.text, self.at = "", 0
        self.settled = 0  # the text before this belongs to complete calls
        self.ended = False  # no more text will come

    def add(self, more: str) -> None:
        """Append text. The interpreter does so in place if this is the only reference, and otherwise copies it all."""
        text, self.text = self.text, ""
        text += more
        self.text = text


T = TypeVar("T")
Tools = Mapping[str, dict[str, Any]]  # input schemas by name
Reading = Generator[None, None, T]  # yields when it needs more text
Calls = Generator[Call | None, None, None]  # also yields complete calls
Reader = Callable[[Source, Tools], Calls]


def make_call(name: object, input: object, id: object = None) -> Call:
    """A call with a new id. Raises Malformed unless it has a name and an object of arguments.

    If the model wrote an id of Mistral's form, ours ends with it, as templates with short ids take the end of ours.
    """
    if not (isinstance(name, str) and name and isinstance(input, dict)):
        raise Malformed
    try:
        arguments = msgspec.json.encode(input).decode()
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
JSON_REST = re.compile(r"[\s:,0-9+\-.eEtrufalsn]*")  # JSON without its strings and brackets
CALL_KEYS = ('"name"', '"arguments"', '"parameters"', '"type"', '"id"', '"function"')  # a call begins with one of these
XML_NEXT = ("<parameter=", "</function>", "</tool_call>")  # after a value; models sometimes forget the second


def wait_for_more(source: Source) -> Reading[None]:
    """Wait for more text. Raises Malformed if the text has ended."""
    if source.ended:
        raise Malformed
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


def read_name(source: Source, pattern: re.Pattern[str] = NAME) -> Reading[str]:
    """Read a name. Raises Malformed if there is none."""
    name = yield from read_match(source, pattern)
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
    """Read a delimiter. Raises Malformed if other text is there."""
    if not (yield from read_if(source, delimiter)):
        raise Malformed


def read_closing(source: Source, *delimiters: str) -> Reading[None]:
    """Read those of the delimiters that follow a complete call. A model may forget them, or be cut off."""
    for delimiter in delimiters:
        yield from read_match(source, WHITESPACE)
        was_read = yield from read_if(source, delimiter)
        if not was_read and source.ended and delimiter.startswith(source.text[source.at :]):
            source.at = len(source.text)
    yield from read_match(source, WHITESPACE)
    source.settled = source.at


def read_up_to(source: Source, delimiter: str) -> Reading[int]:
    """Read up to a delimiter and past it. Returns the position of the delimiter."""
    while (at := source.text.find(delimiter, source.at)) < 0:
        source.at = max(source.at, len(source.text) - len(delimiter) + 1)
        yield from wait_for_more(source)
    source.at = at + len(delimiter)
    return at


def read_object(source: Source) -> Reading[dict[str, Any]]:
    """Read a JSON object. Its end is found by brackets and strings, reading each character once; then it is decoded."""
    start, closing = source.at, ["}"]
    yield from read_exactly(source, "{")
    while closing:
        yield from read_match(source, JSON_REST)
        sign = yield from read_character(source)
        if sign == '"':
            yield from read_string(source)
        elif sign in "{[":
            closing.append("}" if sign == "{" else "]")
        elif sign != closing.pop():
            raise Malformed
    try:
        read: dict[str, Any] = decode_json(source.text[start : source.at])
        return read
    except ValueError:
        raise Malformed from None


def read_string(source: Source) -> Reading[None]:
    """Read a string of JSON after its opening quote."""
    while True:
        yield from read_match(source, STRING_TEXT)
        if (yield from read_character(source)) == '"':
            return
        yield from read_character(source)  # the character after a backslash


def read_character(source: Source) -> Reading[str]:
    """Read one character."""
    while source.at == len(source.text):
        yield from wait_for_more(source)
    source.at += 1
    return source.text[source.at - 1]


def read_json_call(source: Source) -> Calls:
    """Read `{"name": ..., "arguments": {...}}`, or Llama's `parameters`. Other JSON is rejected by its first key."""
    start = source.at
    yield from read_exactly(source, "{")
    yield from read_match(source, WHITESPACE)
    if not (yield from read_any(source, *CALL_KEYS)):
        raise Malformed
    source.at = start
    value = yield from read_object(source)
    yield make_call(value.get("name"), value.get("arguments", value.get("parameters")), value.get("id"))


def read_hermes(source: Source, tools: Tools) -> Calls:
    """Read one call. It is complete at the end of its object."""
    yield from read_exactly(source, "<tool_call>")
    yield from read_match(source, WHITESPACE)
    yield from read_json_call(source)
    yield from read_closing(source, "</tool_call>")


def read_xml(source: Source, tools: Tools) -> Calls:
    """Read one call. It is complete at `</function>` or at the outer closing tag. Models may forget outer tags."""
    yield from read_if(source, "<tool_call>")
    yield from read_match(source, WHITESPACE)
    yield from read_exactly(source, "<function=")
    name = yield from read_name(source)
    yield from read_exactly(source, ">")
    schema, given = tools.get(name, {}), {}
    yield from read_match(source, WHITESPACE)
    follows = yield from read_any(source, *XML_NEXT)
    while follows == "<parameter=":
        key = yield from read_name(source, KEY)
        yield from read_exactly(source, ">")
        text, follows = yield from read_value(source)
        given[key] = typed(text, types_of(member(schema.get("properties"), key), schema))
    if not follows:
        raise Malformed
    yield make_call(name, given)
    yield from read_closing(source, *(["</tool_call>"] if follows == "</function>" else []))


def read_value(source: Source) -> Reading[tuple[str, str]]:
    """Read a value and the tag after its `</parameter>`, which is part of the value if no known tag follows it."""
    start = source.at
    while True:
        end = yield from read_up_to(source, "</parameter>")
        yield from read_match(source, WHITESPACE)
        if follows := (yield from read_any(source, *XML_NEXT)):
            return source.text[start:end].removeprefix("\n").removesuffix("\n"), follows


def read_llama(source: Source, tools: Tools) -> Calls:
    """Read calls separated by semicolons. Each is complete at the end of its object."""
    yield from read_if(source, "<|python_tag|>")
    yield from read_match(source, WHITESPACE)
    yield from read_json_call(source)
    yield from read_match(source, WHITESPACE)
    while (yield from read_if(source, ";")):
        yield from read_match(source, WHITESPACE)
        yield from read_json_call(source)
        yield from read_match(source, WHITESPACE)


def read_mistral(source: Source, tools: Tools) -> Calls:
    """Read calls of either form. Each is complete at the end of its object."""
    yield from read_exactly(source, "[TOOL_CALLS]")
    yield from read_match(source, WHITESPACE)
    if (yield from read_if(source, "[")):
        another = True
        while another:
            yield from read_match(source, WHITESPACE)
            yield from read_json_call(source)
            yield from read_match(source, WHITESPACE)
            another = yield from read_if(source, ",")
        yield from read_closing(source, "]")
        return
    name, id = (yield from read_name(source)), None
    if (yield from read_if(source, "[CALL_ID]")):
        id = yield from read_name(source)
    yield from read_if(source, "[ARGS]")
    yield from read_match(source, WHITESPACE)
    yield make_call(name, (yield from read_object(source)), id)


def read_deepseek(source: Source, tools: Tools) -> Calls:
    """Read calls of either form. Each is complete at the end of its object."""
    yield from read_if(source, CALLS_BEGIN)
    yield from read_match(source, WHITESPACE)
    yield from read_exactly(source, CALL_BEGIN)
    another = True
    while another:
        name = yield from read_name(source)
        yield from read_exactly(source, SEP)
        yield from read_match(source, WHITESPACE)
        if not source.text.startswith("{", source.at):
            name = yield from read_name(source)
            yield from read_match(source, WHITESPACE)
            yield from read_if(source, "```json")
            yield from read_match(source, WHITESPACE)
        yield make_call(name, (yield from read_object(source)))
        yield from read_closing(source, "```", CALL_END)
        another = yield from read_if(source, CALL_BEGIN)
    yield from read_closing(source, CALLS_END)
