"""Arguments of calls in tags, as GLM's and MiniMax's models write them: their values, and the types of these.

Values stand as they are, so that a value may contain every tag. It ends at its closing tag where another tag of the
call follows, unless a call that is quoted in it is still open. Where the closing tag is forgotten, it ends at the next
argument that the tool's schema knows, or at the end of the call.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from serve.formats.readers import (
    WHITESPACE,
    Cut,
    Malformed,
    Reading,
    Source,
    cut_call,
    find_match,
    not_found,
    overlap,
    read_any,
    read_exactly,
    read_match,
    read_name,
)
from serve.formats.schemas import properties_of, typed, value_types

MAX_TAG = 40  # characters


@dataclass(frozen=True)
class Tags:
    """The tags of one format. An argument is `opening`, its name, the `middle` tags, its value and `closing`."""

    opening: str
    name: re.Pattern[str]
    middle: tuple[str, ...]
    closing: str
    ends: tuple[str, ...]  # that may follow the last argument

    @property
    def any(self) -> re.Pattern[str]:
        """A pattern of the tags that can follow or end a value."""
        return re.compile("|".join(map(re.escape, (self.closing, self.opening, *self.ends))))


def read_arguments(
    source: Source, tags: Tags, name: str, schema: dict[str, Any]
) -> Reading[tuple[dict[str, Any], str]]:
    """Read the arguments of the tool `name` up to the tag that ends them. Returns both. Raises Malformed, and Cut."""
    properties = properties_of(schema)
    given: dict[str, Any] = {}
    string: tuple[str, str] | None = None  # the one that is being read
    try:
        follows = yield from read_any(source, tags.opening, *tags.ends)
        if not follows:
            raise not_found(source, tags.opening, *tags.ends)
        while follows == tags.opening:
            key = yield from read_key(source, tags)
            start, types = source.at, value_types(properties.get(key), schema)
            if not types or "string" in types:
                string = (key, "")
            missing = properties.keys() - given.keys() - {key}
            end, follows = yield from read_value(source, tags, missing)
            given[key], string = typed(source.text[start:end], types), None
    except Cut:
        if string:
            begun = source.text[start:]
            string = (string[0], begun[: len(begun) - max(overlap(begun, tag) for tag in (tags.closing, *tags.ends))])
        raise Cut(cut_call(name, given, string)) from None
    return given, follows


def read_key(source: Source, tags: Tags) -> Reading[str]:
    """Read the name of an argument and the tags before its value."""
    key = yield from read_name(source, tags.name)
    for tag in tags.middle:
        yield from read_match(source, WHITESPACE)
        yield from read_exactly(source, tag)
    return key.strip()


def read_value(source: Source, tags: Tags, missing: Collection[str]) -> Reading[tuple[int, str]]:
    """Read a value and the tag after it. Returns the value's end and that tag.

    An end that is not certain counts if the answer ends without a certain one; then it does for later values as well.
    """
    depth, start = 0, source.at  # depth: arguments of quoted calls that are open
    possible: tuple[int, int, str] | None = None  # the first end that is not certain, where the text goes on, the tag
    while tag := (yield from find_match(source, tags.any, MAX_TAG)):
        at, source.at, follows = tag.start(), tag.end(), tag[0]
        if follows == tags.closing:
            yield from read_match(source, WHITESPACE)
            follows = yield from read_any(source, tags.opening, *tags.ends)
            if follows and (source.flat or not depth):
                return at, follows
            depth = max(0, depth - 1)
        elif follows == tags.opening:
            depth += 1
            follows = follows if (yield from begins_argument(source, tags, missing)) else ""
        if follows and not possible:
            closed = tag[0] == tags.closing
            end = at if closed else start + len(source.text[start:at].rstrip())
            possible = (end, source.at if closed else tag.end(), follows)
        if possible and source.flat:
            break
        source.at = tag.end()
    if not possible:
        raise Cut if source.cut else Malformed
    source.flat = True
    end, source.at, follows = possible
    return end, follows


def begins_argument(source: Source, tags: Tags, missing: Collection[str]) -> Reading[bool]:
    """Whether an argument that is still missing begins here, after its opening tag."""
    try:
        key = yield from read_key(source, tags)
    except Malformed:
        return False
    return key in missing
