"""Readers of calls between tags: Qwen3-Coder's parameters in tags, the JSON of Hermes, and Llama's.

Qwen3-Coder writes values as they are, so that a value may contain every tag. It ends at `</parameter>` where another
tag of the call follows. Where that is forgotten or misspelt, it ends at the next parameter that the tool's schema
knows, or at `</function>`. A whole call inside a value is part of the value.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from serve.formats.json_calls import read_arguments, read_json_calls
from serve.formats.readers import (
    CLOSING,
    KEY,
    NAME,
    WHITESPACE,
    Calls,
    Cut,
    Malformed,
    Prose,
    Reading,
    Source,
    Tools,
    at_any,
    cut_call,
    find_match,
    make_call,
    match_end,
    not_found,
    overlap,
    read_any,
    read_closing,
    read_exactly,
    read_if,
    read_match,
    read_name,
)
from serve.formats.schemas import properties_of, typed, value_types

PROSE = re.compile(r"[^<{]*")
MAX_TAG = 40  # characters of a misspelt closing tag
MAX_PROSE = 300  # characters between the opening tag and the call
TAGS = ("<parameter=", "</function>", "</tool_call>")  # after a value; models sometimes forget the second
TAG = re.compile("</parameter>|<parameter=|</function>|</tool_call>|<function=")
TAG_CHARS = len("</parameter>")


@dataclass(frozen=True)
class ValueEnd:
    """Where a value may end, and what follows it."""

    at: int  # the value's end in the text
    after: int  # where the text goes on after the tag that follows
    follows: str  # that tag; empty at the end of the answer
    key: str = ""  # of the parameter that follows
    closed: bool = True  # whether `</parameter>` stands there


def read_tagged(source: Source, tools: Tools) -> Calls:
    """Read the calls in one `<tool_call>`, as JSON or in tags, or one in tags without it.

    A call is complete at the end of its object, at `</function>`, or at the outer tag. Models may forget outer tags.
    """
    wrapped = False
    while (yield from read_if(source, "<tool_call>")):  # models write it twice
        wrapped = True
        yield from read_match(source, WHITESPACE)
    start = source.at
    if not (yield from at_any(source, "<function=", "{", "[", "```", '"name"')):
        if not (yield from read_prose(source)):
            raise not_found(source, "<function=")
        if not (yield from at_any(source, "<function=", "{")):
            raise Malformed
    prose = source.text[start : source.at].rstrip()
    in_tags = yield from at_any(source, "<function=")
    calls = read_functions(source, tools) if in_tags else read_json_calls(source, tools, "</tool_call>", "<tool_call>")
    for call in calls:
        if call and prose:
            yield Prose(prose)
            prose = ""
        yield call
    yield from read_tags(source, wrapped)


def read_prose(source: Source) -> Reading[str]:
    """Read the words that a model writes before a call, at most MAX_PROSE characters."""
    start = source.at
    while True:
        source.at = match_end(PROSE, source.text, source.at)
        if source.at - start > MAX_PROSE:
            raise Malformed
        if source.at < len(source.text) or source.ended:
            return source.text[start : source.at]
        yield


def read_tags(source: Source, wrapped: bool) -> Reading[None]:
    """Read all closing tags after a call, and note whether the outer one is still to come."""
    closed = not wrapped
    while tag := (yield from read_any(source, *CLOSING)):
        closed = closed or tag == "</tool_call>"
        yield from read_match(source, WHITESPACE)
    if not closed:
        yield from read_closing(source, "</tool_call>")
        source.unclosed = "</tool_call>"
    yield from read_closing(source)


def read_functions(source: Source, tools: Tools) -> Calls:
    """Read calls in tags, one after the other."""
    another = True
    while another:
        yield from read_function(source, tools)
        yield from read_match(source, WHITESPACE)
        another = bool((yield from at_any(source, "<function=")))


def read_function(source: Source, tools: Tools) -> Calls:
    """Read `<function=name>`, its parameters in tags or as one JSON object, and the closing tag."""
    yield from read_exactly(source, "<function=")
    yield from read_match(source, WHITESPACE)
    name = yield from read_name(source)
    yield from read_match(source, WHITESPACE)
    if not (yield from at_any(source, "<parameter=")):  # before it, models forget the bracket
        yield from read_exactly(source, ">")
    yield from read_match(source, WHITESPACE)
    if (yield from at_any(source, "{")):
        yield make_call(name, (yield from read_arguments(source, name, *TAGS)))
        yield from read_closing(source, "</function>")
        return
    given: dict[str, Any] = {}
    try:
        last = yield from read_parameters(source, tools.get(name, {}), given)
    except CutValue as cut:
        raise Cut(cut_call(name, given, cut.string)) from None
    except Cut:
        raise Cut(cut_call(name, given)) from None
    if last == "</tool_call>":
        source.at -= len(last)  # it belongs to what is around the call
    yield make_call(name, given)


class CutValue(Cut):
    """The answer was cut off within a value; `string` has its parameter and what there is of it, if it is a string."""

    def __init__(self, string: tuple[str, str] | None) -> None:
        super().__init__()
        self.string = string


def read_parameters(source: Source, schema: dict[str, Any], given: dict[str, Any]) -> Reading[str]:
    """Read parameters into `given`; return the tag that ends them."""
    properties = properties_of(schema)
    missing = set(properties)  # those that may still follow
    follows = yield from read_any(source, *TAGS)
    if not follows:
        raise not_found(source, *TAGS)
    key = (yield from read_first_key(source)) if follows == "<parameter=" else ""
    while follows == "<parameter=":
        start, types = source.at, value_types(properties.get(key), schema)
        missing.discard(key)
        try:
            end = yield from read_value(source, properties, missing)
        except Cut:
            begun = without_partial_tag(source.text[start:].removeprefix("\n"))
            raise CutValue((key, begun) if not types or "string" in types else None) from None
        text = source.text[start : end.at]
        text = (text if end.closed else without_misspelt_tag(text, key)).removeprefix("\n").removesuffix("\n")
        given[key] = typed(text, types)
        source.at, follows, key = end.after, end.follows, end.key
    return follows


def read_first_key(source: Source) -> Reading[str]:
    """Read the name of the first parameter and `>`. Raises Malformed if it has none."""
    key = yield from read_name(source, KEY)
    yield from read_exactly(source, ">")
    return key.strip()


def read_key(source: Source) -> Reading[str]:
    """Read the name of a parameter and `>`, or return "" and read nothing if there is none."""
    at = source.at
    key = (yield from read_match(source, KEY)).strip()
    if key and (yield from read_if(source, ">")):
        return key
    source.at = at
    return ""


def read_value(source: Source, known: Collection[str], missing: Collection[str]) -> Reading[ValueEnd]:
    """Find the end of the value that begins here.

    `known` are the parameters that the schema has, `missing` those of them that were not given yet. Where a value lacks
    its closing tag, its end is certain only when the answer ends or another call begins: until then a closing tag may
    follow. Raises Malformed if it has no end.
    """
    start, depth = source.at, 0  # the number of quoted calls around the place
    # Ends without a closing tag, those that may as well be words, those within a quoted call, those at the outer tag.
    unclosed = unlikely = inner = outer = None
    while tag := (yield from find_match(source, TAG, TAG_CHARS)):
        at = source.at = tag.end()
        if tag[0] == "<function=":
            if (yield from begins_call(source)):
                if end := unclosed or ((unlikely or outer) if source.flat else None):
                    return end
                depth += not source.flat
        elif tag[0] == "</parameter>":
            end = yield from read_closed(source, start, tag.start(), known)
            if end and not depth:
                return end
            inner = inner or end
        elif tag[0] == "</function>":
            end = ValueEnd(tag.start(), tag.end(), tag[0], closed=False)
            follows = (yield from after_call(source)) if not depth else ""
            if follows == "</tool_call>" or (follows and on_its_line(source, start, tag.start())):
                unclosed = unclosed or end
            elif not depth:
                unlikely = unlikely or end
            depth = max(0, depth - 1)
        elif tag[0] == "</tool_call>":
            outer = outer or ValueEnd(tag.start(), tag.end(), tag[0], closed=False)
        elif not depth and not unclosed and (key := (yield from read_key(source))) in missing:
            text = source.text[max(start, tag.start() - MAX_TAG) : tag.start()]
            if on_its_line(source, start, tag.start()) or without_misspelt_tag(text, "") != text:
                return ValueEnd(tag.start(), source.at, tag[0], key, closed=False)
        source.at = at
    first = min(filter(None, (unlikely, inner)), key=lambda end: end.at, default=outer)
    found = unclosed or (first if not source.cut else None)
    if not found:
        raise Cut if source.cut else Malformed
    source.flat = True
    return found


def begins_call(source: Source) -> Reading[bool]:
    """Whether a call follows `<function=`, and not only words about one."""
    name = yield from read_match(source, NAME)
    if not name or not (yield from read_if(source, ">")):
        return False
    yield from read_match(source, WHITESPACE)
    follows = yield from read_any(source, "<parameter=", "</function>")
    return follows == "</function>" or bool(follows and (yield from read_key(source)))


def after_call(source: Source) -> Reading[str]:
    """What follows a complete call: one of the tags around calls, a new line or the end as "\\n", or words as ""."""
    space = yield from read_match(source, WHITESPACE)
    tag = yield from at_any(source, "</tool_call>", "<tool_call>", "<function=")
    return tag or ("\n" if "\n" in space or source.at == len(source.text) else "")


def read_closed(source: Source, start: int, at: int, known: Collection[str]) -> Reading[ValueEnd | None]:
    """Read what follows a closing tag at `at`: the end of the value, or None if the tag is part of the value.

    Where the closing tag stands elsewhere than this call has its closing tags, it counts before a parameter that the
    schema has, and where the call ends visibly.
    """
    yield from read_match(source, WHITESPACE)
    follows = yield from read_any(source, *TAGS)
    if not follows:
        return ValueEnd(at, source.at, "") if source.at == len(source.text) and not source.cut else None
    usual = on_its_line(source, start, at)
    key = (yield from read_key(source)) if follows == "<parameter=" else ""
    end = ValueEnd(at, source.at, follows, key)
    if follows == "<parameter=":
        return end if key and (usual or not known or key in known) else None
    return end if usual or (yield from after_call(source)) else None


def on_its_line(source: Source, start: int, at: int) -> bool:
    """Whether a tag at `at` begins a line, if the value does, as the model writes all tags on lines of their own."""
    while source.text[at - 1] in " \t":
        at -= 1
    return not source.text.startswith("\n", start) or source.text.startswith("\n", at - 1)


def without_misspelt_tag(text: str, key: str) -> str:
    """A value without a misspelt closing tag at its end: `</param`, `</parameter1>`, or `</path>` for `path`."""
    end = len(text.rstrip())
    begin = text.rfind("<", max(0, end - MAX_TAG - len(key)), end)
    if begin < 0 or not re.fullmatch(rf"<\s*[/\\]\s*(?:para\w*|{re.escape(key) or '(?!)'})\s*>?", text[begin:end]):
        return text
    return text[:begin]


def without_partial_tag(text: str) -> str:
    """The beginning of a value without what may be the beginning of its closing tag."""
    text = text[: len(text) - max(overlap(text, tag) for tag in ("</parameter>", *TAGS))]
    return text.removesuffix("\n")


def read_llama(source: Source, tools: Tools) -> Calls:
    """Read calls as JSON, separated by semicolons, or in `<function=name>`. Each is complete at its object's end."""
    if (yield from at_any(source, "<function=")):
        yield from read_functions(source, tools)
        return
    marked = yield from read_if(source, "<|python_tag|>")
    yield from read_match(source, WHITESPACE)
    yield from read_json_calls(source, tools, ";", marked=marked)
