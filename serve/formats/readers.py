"""Tool calls of open models, read as they arrive: one function a format, which waits where the text ends so far.

The functions are generators: they yield None for "more text, please" and each call as soon as it is complete, and raise
Malformed for what is none. Each character is read once. The forms are those that `formats` writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from serve.api.answers import new_id
from serve.formats.schemas import decode_json, member, typed, types_of

SPACE = " \t\r\n"  # beside a mark it belongs to the mark, not to the blocks
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


@dataclass(frozen=True)
class Call:
    """A complete tool call; `arguments` is `input` as compact JSON. The id is a fresh one, as models repeat theirs."""

    id: str
    name: str
    input: dict[str, Any]
    arguments: str


class Malformed(Exception):
    """What began like a call is none."""


class Source:
    """The text of an answer as it arrives, and how far calls are read in it."""

    def __init__(self) -> None:
        self.text, self.at = "", 0
        self.settled = 0  # what stands before belongs to calls that are complete
        self.ended = False  # nothing more will come

    def add(self, more: str) -> None:
        """Append text. With no other reference to it the interpreter does so in place; else each copies all."""
        text, self.text = self.text, ""
        text += more
        self.text = text


T = TypeVar("T")
Tools = Mapping[str, dict[str, Any]]  # input schemas by name
Reading = Generator[None, None, T]  # yields where it needs more text than there is yet
Calls = Generator[Call | None, None, None]  # yields complete calls as well
Reader = Callable[[Source, Tools], Calls]


def make_call(name: object, input: object, id: object = None) -> Call:
    """A call; raises Malformed unless it has a name and an object of arguments.

    Its id ends with the model's own, if that is of Mistral's kind: templates that take short ids make them of the end.
    """
    if not (isinstance(name, str) and name and isinstance(input, dict)):
        raise Malformed
    try:
        arguments = msgspec.json.encode(input).decode()
    except RecursionError:
        raise Malformed from None
    own = id if isinstance(id, str) and SHORT_ID.fullmatch(id) else ""
    return Call(new_id("toolu") + own, name, input, arguments)


# Each reading function goes on where the source stands, and waits where the source ends.
BLANK = re.compile(f"[{SPACE}]*")
NAME = re.compile(r"""[^\s<>\[\]{}()"',;]*""")
KEY = re.compile(r"[^<>\n]*")
SHORT_ID = re.compile("[A-Za-z0-9]{9}")
PLAIN = re.compile(r'[^"\\]*')  # within a string of JSON
BETWEEN = re.compile(r"[\s:,0-9+\-.eEtrufalsn]*")  # the strings and brackets of JSON
CALL_KEYS = ('"name"', '"arguments"', '"parameters"', '"type"', '"id"', '"function"')  # a call begins with one
XML_NEXT = ("<parameter=", "</function>", "</tool_call>")  # behind a value; models forget the second at times


def more(source: Source) -> Reading[None]:
    """Wait for more text; raises Malformed if there is none to come."""
    if source.ended:
        raise Malformed
    yield


def end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where that ends which a pattern such as `[a-z]*` matches."""
    found = pattern.match(text, at)
    return found.end() if found else at


def take(source: Source, pattern: re.Pattern[str]) -> Reading[str]:
    """Read what a pattern such as `[a-z]*` matches, which may be nothing."""
    start = source.at
    while True:
        source.at = end_of(pattern, source.text, source.at)
        if source.at < len(source.text) or source.ended:
            return source.text[start : source.at]
        yield


def word(source: Source, pattern: re.Pattern[str] = NAME) -> Reading[str]:
    """Read a name; raises Malformed if none is there."""
    name = yield from take(source, pattern)
    if not name:
        raise Malformed
    return name


def skip(source: Source, mark: str) -> Reading[bool]:
    """Read a mark; false, and nothing is read, if something else is there."""
    while not source.text.startswith(mark, source.at):
        if source.ended or not mark.startswith(source.text[source.at : source.at + len(mark)]):
            return False
        yield
    source.at += len(mark)
    return True


def skip_any(source: Source, *marks: str) -> Reading[str]:
    """Read one of several marks and tell which; empty, and nothing is read, if something else is there."""
    for mark in marks:
        if (yield from skip(source, mark)):
            return mark
    return ""


def expect(source: Source, mark: str) -> Reading[None]:
    """Read a mark; raises Malformed if something else is there."""
    if not (yield from skip(source, mark)):
        raise Malformed


def close(source: Source, *marks: str) -> Reading[None]:
    """Read the marks behind a complete call, as far as they are there: a model may forget them, or be cut off."""
    for mark in marks:
        yield from take(source, BLANK)
        found = yield from skip(source, mark)
        if not found and source.ended and mark.startswith(source.text[source.at :]):
            source.at = len(source.text)
    yield from take(source, BLANK)
    source.settled = source.at


def find(source: Source, mark: str) -> Reading[int]:
    """Read up to a mark and over it; where the mark stood."""
    while (at := source.text.find(mark, source.at)) < 0:
        source.at = max(source.at, len(source.text) - len(mark) + 1)
        yield from more(source)
    source.at = at + len(mark)
    return at


def read_object(source: Source) -> Reading[dict[str, Any]]:
    """Read a JSON object: its end is found by brackets and strings, each character once, and then it is decoded."""
    start, closing = source.at, ["}"]
    yield from expect(source, "{")
    while closing:
        yield from take(source, BETWEEN)
        sign = yield from one(source)
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
    """Read a string of JSON behind its opening quote."""
    while True:
        yield from take(source, PLAIN)
        if (yield from one(source)) == '"':
            return
        yield from one(source)  # a backslash, and what it escapes


def one(source: Source) -> Reading[str]:
    """Read one character."""
    while source.at == len(source.text):
        yield from more(source)
    source.at += 1
    return source.text[source.at - 1]


def read_json_call(source: Source) -> Calls:
    """Read `{"name": ..., "arguments": {...}}`; Llama's models say parameters. Other JSON is known by its first key."""
    start = source.at
    yield from expect(source, "{")
    yield from take(source, BLANK)
    if not (yield from skip_any(source, *CALL_KEYS)):
        raise Malformed
    source.at = start
    value = yield from read_object(source)
    yield make_call(value.get("name"), value.get("arguments", value.get("parameters")), value.get("id"))


def read_hermes(source: Source, tools: Tools) -> Calls:
    """One call; complete with its object."""
    yield from expect(source, "<tool_call>")
    yield from take(source, BLANK)
    yield from read_json_call(source)
    yield from close(source, "</tool_call>")


def read_xml(source: Source, tools: Tools) -> Calls:
    """One call, whose outer tag models forget at times; complete with `</function>`, or the outer tag in its place."""
    yield from skip(source, "<tool_call>")
    yield from take(source, BLANK)
    yield from expect(source, "<function=")
    name = yield from word(source)
    yield from expect(source, ">")
    schema, given = tools.get(name, {}), {}
    yield from take(source, BLANK)
    follows = yield from skip_any(source, *XML_NEXT)
    while follows == "<parameter=":
        key = yield from word(source, KEY)
        yield from expect(source, ">")
        text, follows = yield from read_value(source)
        given[key] = typed(text, types_of(member(schema.get("properties"), key), schema))
    if not follows:
        raise Malformed
    yield make_call(name, given)
    yield from close(source, *(["</tool_call>"] if follows == "</function>" else []))


def read_value(source: Source) -> Reading[tuple[str, str]]:
    """A value and what follows its closing tag: another parameter or the call's end, else the text holds the tag."""
    start = source.at
    while True:
        end = yield from find(source, "</parameter>")
        yield from take(source, BLANK)
        if follows := (yield from skip_any(source, *XML_NEXT)):
            return source.text[start:end].removeprefix("\n").removesuffix("\n"), follows


def read_llama(source: Source, tools: Tools) -> Calls:
    """Calls with semicolons between them; each is complete with its object."""
    yield from skip(source, "<|python_tag|>")
    yield from take(source, BLANK)
    yield from read_json_call(source)
    yield from take(source, BLANK)
    while (yield from skip(source, ";")):
        yield from take(source, BLANK)
        yield from read_json_call(source)
        yield from take(source, BLANK)


def read_mistral(source: Source, tools: Tools) -> Calls:
    """Either form; a call is complete with its object."""
    yield from expect(source, "[TOOL_CALLS]")
    yield from take(source, BLANK)
    if (yield from skip(source, "[")):
        another = True
        while another:
            yield from take(source, BLANK)
            yield from read_json_call(source)
            yield from take(source, BLANK)
            another = yield from skip(source, ",")
        yield from close(source, "]")
        return
    name, id = (yield from word(source)), None
    if (yield from skip(source, "[CALL_ID]")):
        id = yield from word(source)
    yield from skip(source, "[ARGS]")
    yield from take(source, BLANK)
    yield make_call(name, (yield from read_object(source)), id)


def read_deepseek(source: Source, tools: Tools) -> Calls:
    """Calls of either form; each is complete with its object."""
    yield from skip(source, CALLS_BEGIN)
    yield from take(source, BLANK)
    yield from expect(source, CALL_BEGIN)
    another = True
    while another:
        name = yield from word(source)
        yield from expect(source, SEP)
        yield from take(source, BLANK)
        if not source.text.startswith("{", source.at):
            name = yield from word(source)
            yield from take(source, BLANK)
            yield from skip(source, "```json")
            yield from take(source, BLANK)
        yield make_call(name, (yield from read_object(source)))
        yield from close(source, "```", CALL_END)
        another = yield from skip(source, CALL_BEGIN)
    yield from close(source, CALLS_END)
