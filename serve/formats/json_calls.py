"""Readers of calls that are JSON: one call in its usual form, and the formats of Mistral and DeepSeek."""

from __future__ import annotations

import re
from typing import Any

from serve.formats.lenient import read_cut_object
from serve.formats.readers import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEP,
    SPACE,
    WHITESPACE,
    Call,
    Calls,
    Cut,
    Malformed,
    Reading,
    Source,
    Tools,
    at_any,
    cut_call,
    decoded,
    make_call,
    not_found,
    read_any,
    read_brackets,
    read_closing,
    read_exactly,
    read_if,
    read_match,
    read_name,
    read_object,
    read_one_of,
    read_string,
)

NAMES, ARGUMENTS = ("name", "function"), ("arguments", "parameters")  # the keys of a call's JSON
CALL_KEYS = tuple(f"{quote}{key}{quote}" for key in (*NAMES, *ARGUMENTS, "type", "id") for quote in "\"'")
BRACES = re.compile("}*")
MORE_BRACES, MORE_BRACKETS = re.compile(f"[{SPACE}}}]*"), re.compile(f"[{SPACE}}}\\]]*")
CUT_ARGUMENTS = re.compile(r"""["'](?:arguments|parameters)["']\s*:\s*""")


def read_json_call(source: Source, tools: Tools, *ends: str, marked: bool = True) -> Calls:
    """Read `{"name": ..., "arguments": {...}}`, or Llama's `parameters`. Other JSON is rejected by its first key.

    Without a delimiter before it (not `marked`), JSON that has no arguments is a call only of a tool that was offered,
    and where it begins a line: elsewhere it is an example, or data with a name.
    """
    start, opened = source.at, marked and bool((yield from at_any(source, '"name"')))
    if not opened:
        yield from read_exactly(source, "{")
        yield from read_match(source, WHITESPACE)
    while marked and (yield from at_any(source, "{")):  # one too many
        start, source.at = source.at, source.at + 1
        yield from read_match(source, WHITESPACE)
    if not (yield from read_any(source, *CALL_KEYS)):
        raise not_found(source, *CALL_KEYS) if marked else Malformed()
    source.at = start
    try:
        text, missing = yield from read_brackets(source, *ends, opened=opened)
    except Cut:
        yield call_of_cut_json(source, start, tools, marked)
        return
    value = decoded(text)
    if missing and not value.keys() & {*ARGUMENTS, "function"}:
        raise Malformed
    if not (marked or has_arguments(value) or stands_alone(source.text, start, value)):
        raise Malformed
    yield call_of(value, {} if marked else tools)
    yield from read_braces(source, *ends)


def has_arguments(value: dict[str, Any]) -> bool:
    """Whether the JSON of a call has arguments, itself or in its member `function`."""
    inner = value.get("function")
    return any(key in part for part in (value, inner) if isinstance(part, dict) for key in ARGUMENTS)


def stands_alone(text: str, start: int, value: dict[str, Any]) -> bool:
    """Whether JSON at `start` without arguments may be a call: it begins a line, or follows a delimiter or a call."""
    before = text[max(0, start - 2) : start]
    return value.get("type", "function") == "function" and (before.endswith(("\n", ">")) or before in ("", "; "))


def call_of(value: dict[str, Any], offered: Tools) -> Call:
    """The call that a JSON object means.

    Where a tool may be described as well, `offered` has the tools: a call without an object of arguments, or within a
    member `function`, is of one of these, and has no `description`.
    """
    inner = value.get("function")
    if wrapped := isinstance(inner, dict) and "name" not in value:
        value = inner
    name = next((value[key] for key in NAMES if key in value), None)
    given = [value[key] for key in ARGUMENTS if key in value]
    if not given and value.keys() - {*NAMES, "type", "id"}:
        raise Malformed  # the arguments may be its other members
    plain = not wrapped and given and isinstance(given[0], dict)
    if offered and ("description" in value or (not plain and name not in offered)):
        raise Malformed
    return make_call(name, arguments_of(given[0] if given else None), value.get("id"))


def arguments_of(value: Any) -> Any:
    """The arguments that a value means: null and an empty string are none, other strings contain them as JSON."""
    if isinstance(value, str):
        value = decoded(value) if value.strip() else None
    return {} if value is None else value


def call_of_cut_json(source: Source, start: int, tools: Tools, marked: bool) -> Call:
    """The call at `start` if its arguments are complete although the text was cut off. Raises Cut for another."""
    members, _ = read_cut_object(source.text[start:])
    name = next((members[key] for key in NAMES if isinstance(members.get(key), str)), None)
    if not marked and name not in tools:
        raise Malformed
    if any(isinstance(members.get(key), dict) for key in ARGUMENTS):
        return call_of(members, {})
    if not name:
        raise Cut
    begun = CUT_ARGUMENTS.search(source.text, start)
    raise Cut(cut_call(name, *read_cut_object(source.text[begun.end() :] if begun else "")))


def read_braces(source: Source, *marks: str) -> Reading[None]:
    """Read braces that are too many: those right after a call, and those before one of the marks or the end."""
    yield from read_match(source, BRACES)
    at = source.at
    yield from read_match(source, MORE_BRACES if "]" in marks else MORE_BRACKETS)
    if not (yield from at_any(source, *marks)) and source.at < len(source.text):
        source.at = at


def read_json_calls(source: Source, tools: Tools, *ends: str, marked: bool = True) -> Calls:
    """Read calls as JSON: one, several, or an array, perhaps in a code block. Each may lack its last brackets."""
    fenced = yield from read_any(source, "```json", "```")
    yield from read_match(source, WHITESPACE)
    in_array = yield from read_if(source, "[")
    ends = (*ends, "]") if in_array else ends
    yield from read_match(source, WHITESPACE)
    another = "{"
    while another:
        if another == '"':
            yield from read_exactly(source, another)
            yield from read_string(source)  # no call
        else:
            yield from read_json_call(source, tools, *ends, marked=marked)
        yield from read_match(source, WHITESPACE)
        at = source.at
        comma = yield from read_any(source, ",", ";")
        yield from read_match(source, WHITESPACE)
        another = yield from at_any(source, "{", *(['"'] if in_array and comma else []))
        if not another and not (in_array and comma and (yield from at_any(source, "]"))):
            source.at = at
    yield from read_closing(source, *(["]"] if in_array else []), *(["```"] if fenced else []))


def read_arguments(source: Source, name: str, *ends: str) -> Reading[dict[str, Any]]:
    """Read the arguments of a call by themselves: an object, a string with it, null, or nothing before the ends."""
    start = source.at
    try:
        if (yield from at_any(source, "{")):
            return (yield from read_object(source, *ends))
        if (yield from read_if(source, '"')):
            yield from read_string(source)
        elif not (yield from read_any(source, "null", "None", *ends)) and source.at < len(source.text):
            raise not_found(source, "null", "None", "```json", "json", "[ARGS]", "[CALL_ID]", *ends)
        elif source.cut and source.at == len(source.text):
            raise Cut
    except Cut:
        raise Cut(cut_call(name, *read_cut_object(source.text[start:]))) from None
    text = source.text[start : source.at]
    value = arguments_of(decoded(text)) if text.startswith('"') else {}
    if text in ends:
        source.at = start
    if not isinstance(value, dict):
        raise Malformed
    return value


def read_mistral(source: Source, tools: Tools) -> Calls:
    """Read calls of either form. Each is complete at the end of its object."""
    while (yield from read_if(source, "[TOOL_CALLS]")):  # models write it twice
        yield from read_match(source, WHITESPACE)
    if opening := (yield from at_any(source, "[", "{")):
        yield from read_json_calls(source, tools, "[TOOL_CALLS]")
        while opening == "{" or source.text[source.at - 1] == "]":  # not after whitespace, where text may begin
            if not (yield from read_if(source, "]")):
                break
        return
    name, id = (yield from read_name(source)), None
    if (yield from read_if(source, "[CALL_ID]")):
        id = yield from read_name(source)
    yield from read_if(source, "[ARGS]")
    yield from read_match(source, WHITESPACE)
    yield make_call(name, (yield from read_arguments(source, name, "[TOOL_CALLS]")), id)
    yield from read_match(source, BRACES)


def spellings(mark: str) -> tuple[str, ...]:
    """DeepSeek's delimiters, as its models and those distilled from them spell them."""
    return tuple(mark.replace("▁", between) for between in ("▁", "_", " ", "\\_"))


def read_deepseek(source: Source, tools: Tools) -> Calls:
    """Read calls of either form. Each is complete at the end of its object."""
    ends = ("```", *spellings(CALL_END), *spellings(CALLS_END))
    yield from read_any(source, *spellings(CALLS_BEGIN))
    yield from read_match(source, WHITESPACE)
    if not (yield from read_any(source, *spellings(CALL_BEGIN))):
        raise not_found(source, *spellings(CALL_BEGIN))
    another = True
    while another:
        name = yield from read_name(source)
        if not (yield from read_any(source, *spellings(SEP))):
            raise not_found(source, *spellings(SEP))
        yield from read_match(source, WHITESPACE)
        if not (yield from at_any(source, "{", '"', *ends)):
            inner = yield from read_name(source)
            yield from read_match(source, WHITESPACE)
            if inner != "null" or not (yield from at_any(source, *ends)):
                name = inner
        yield from read_any(source, "```json", "```")
        yield from read_match(source, WHITESPACE)
        yield make_call(name, (yield from read_arguments(source, name, *ends)))
        yield from read_braces(source, *ends)
        yield from read_closing(source, "```")
        yield from read_one_of(source, *spellings(CALL_END))
        yield from read_closing(source)
        another = bool((yield from read_any(source, *spellings(CALL_BEGIN))))
    yield from read_one_of(source, *spellings(CALLS_END))
    yield from read_closing(source)
