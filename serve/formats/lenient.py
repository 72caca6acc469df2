r"""JSON as models write it: read strictly where it is JSON, and otherwise with its usual faults mended.

The faults: line breaks and invalid escapes in strings (the backslash of `\d` stays), halves of surrogate pairs, which
become U+FFFD, trailing commas, a bracket that an outer one closes, and Python's literals (single quotes, tuples, True,
False, None). The JSON of an answer that was cut off is read as far as it goes. Grammar:
https://www.rfc-editor.org/rfc/rfc8259.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

MAX_DEPTH = 100  # of JSON with faults
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
SPACES = re.compile(r"[ \t\r\n]*+")
STRING = re.compile(r'"([^"\\]*+(?:\\.[^"\\]*+)*+)"' + r"|'([^'\\]*+(?:\\.[^'\\]*+)*+)'", re.DOTALL)
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?(?![0-9A-Za-z_.])")
WORD = re.compile(r"(?:true|false|null|True|False|None)(?![0-9A-Za-z_])")
ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
ESCAPED = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
HALF_PAIR = re.compile("[\ud800-\udfff]")


def decode_json(text: str) -> Any:
    """The value of JSON, with line breaks in strings.

    Raises ValueError for text that is not JSON, and for values that an answer cannot contain: infinity, NaN, lone
    surrogates and nesting that is too deep.
    """
    try:
        return carried(json.loads(text, strict=False))
    except RecursionError as error:
        raise ValueError(str(error)) from None


def decode_lenient(text: str) -> Any:
    """The value of JSON, or of text that is JSON but for the usual faults. Raises ValueError as `decode_json` does."""
    try:
        return decode_json(text)
    except ValueError:
        value, end = read_value(text, 0, 0)
        if skip(text, end) < len(text):
            raise ValueError(f"expected nothing after the value, found {text[end : end + 20]!r}") from None
        return carried(value)


def carried(value: Any) -> Any:
    """The value. Raises ValueError if an answer cannot contain it."""
    try:
        same = msgspec.json.decode(msgspec.json.encode(value)) == value  # infinity and NaN become null
    except (OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not same:
        raise ValueError("infinity and NaN are not JSON")
    return value


def read_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value at `at`, and where it ends. Raises ValueError if there is none."""
    at = skip(text, at)
    if depth == MAX_DEPTH:
        raise ValueError(f"expected at most {MAX_DEPTH} levels")
    if text.startswith("{", at):
        members = {}
        for key, value, end in read_members(text, at, depth):
            members[key], at = value, end
        at = skip(text, skip_comma(text, at + (not members)))
        return members, at + text.startswith("}", at)
    if text.startswith(("[", "("), at):
        return read_list(text, at, depth)
    if string := STRING.match(text, at):
        return unescape(string), string.end()
    if number := NUMBER.match(text, at):
        return json.loads(number[0]), number.end()
    if word := WORD.match(text, at):
        return WORDS[word[0]], word.end()
    raise ValueError(f"expected a value, found {text[at : at + 20]!r}")


def read_members(text: str, at: int, depth: int) -> Iterator[tuple[str, Any, int]]:
    """The members of the object at `at`, each with the place after its value. Raises ValueError at the first fault."""
    at = skip(text, at + 1)
    while not text.startswith(("}", "]"), at):
        key = STRING.match(text, at)
        colon = skip(text, key.end()) if key else at
        if not key or not text.startswith(":", colon):
            raise ValueError(f"expected a key, found {text[at : at + 20]!r}")
        value, end = read_value(text, colon + 1, depth + 1)
        yield unescape(key), value, end
        at = next_item(text, end)


def read_list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    """The array or tuple at `at`, and where it ends."""
    values, at = [], skip(text, at + 1)
    while not text.startswith(("]", ")", "}"), at):
        value, at = read_value(text, at, depth + 1)
        values.append(value)
        at = next_item(text, at)
    return values, at + text.startswith(("]", ")"), at)


def next_item(text: str, at: int) -> int:
    """Where the next item or a closing bracket is. Raises ValueError if neither a comma nor a bracket follows.

    A bracket of the outer object or array closes the inner one as well.
    """
    if not text.startswith((",", "}", "]", ")"), skip(text, at)):
        raise ValueError(f"expected ',' or a closing bracket, found {text[at : at + 20]!r}")
    return skip(text, skip_comma(text, at))


def skip(text: str, at: int) -> int:
    """The end of the whitespace at `at`."""
    found = SPACES.match(text, at)
    return found.end() if found else at


def skip_comma(text: str, at: int) -> int:
    """The place after a comma, if there is one."""
    comma = skip(text, at)
    return comma + 1 if text.startswith(",", comma) else at


def unescape(string: re.Match[str]) -> str:
    """The text of a string in either quotes. Invalid escapes keep their backslash, half a pair becomes U+FFFD."""
    text: str = string[1] if string[1] is not None else string[2]
    known = ESCAPED if string[1] is not None else ESCAPED | {"'": "'"}

    def character(escape: re.Match[str]) -> str:
        code = escape[1]
        return chr(int(code[1:], 16)) if len(code) > 1 else known.get(code, escape[0])

    return whole_pairs(ESCAPE.sub(character, text))


def whole_pairs(text: str) -> str:
    """The text with its surrogate pairs joined, and U+FFFD for each half of a pair."""
    if not HALF_PAIR.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_cut_object(text: str) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The complete members of an object whose text may be cut off, and the key and text of a string that was cut off.

    A number at the very end of the text is not complete: more digits may have followed.
    """
    members: dict[str, Any] = {}
    at = skip(text, 0)
    if not text.startswith("{", at):
        return members, None
    end = at + 1
    try:
        for key, value, after in read_members(text, at, 0):
            if after == len(text) and isinstance(value, int | float) and not isinstance(value, bool):
                break
            members[key], end = value, after
    except ValueError:
        pass
    return members, cut_string(text, skip(text, skip_comma(text, end)))


def cut_string(text: str, at: int) -> tuple[str, str] | None:
    """The key and the text of a member at `at` whose string has no end; None for anything else."""
    key = STRING.match(text, at)
    colon = skip(text, key.end()) if key else at
    value = skip(text, colon + 1)
    if not key or not text.startswith(":", colon) or not text.startswith(('"', "'"), value):
        return None
    quote, rest = text[value], text[value + 1 :]
    rest = re.sub(r"(?<!\\)((?:\\\\)*)\\(?:u[0-9a-fA-F]{0,3})?\Z", r"\1", rest)  # half an escape
    string = STRING.fullmatch(quote + rest + quote)
    return (unescape(key), unescape(string)) if string else None
