"""The prompt-stability rules on a body's bytes: new JSON in place of what a rule changes, every other byte as it came.

A body is read only as far as the rules need it, so what they do not know (images, the vendor's tools, fields of other
engines) survives. Paths in notes are those of the body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Raw, Struct

from serve.api.messages import Tool
from serve.limits.bodies import excess
from serve.rules.normalize import RULES, Applied, Unparsed, edit_text, joined

# By route: the field of the system text, and that of the conversation.
FIELDS = {
    "/v1/messages": ("system", "messages"),
    "/v1/messages/count_tokens": ("system", "messages"),
    "/v1/chat/completions": ("system", "messages"),
    "/v1/responses": ("instructions", "input"),
}
SYSTEM_ROLES = ("system", "developer")
TEXT_TYPES = ("text", "input_text")
ABSENT = Raw()


class Body(Struct):
    """The fields that rules read; the value of each, unread."""

    system: Raw = ABSENT
    instructions: Raw = ABSENT
    messages: Raw = ABSENT
    input: Raw = ABSENT
    tools: Raw = ABSENT


class RawMessage(Struct):
    """A message, or an item of the Responses API, which may have no role."""

    role: str = ""
    content: Raw = ABSENT


class Part(Struct):
    """A block of text or of something else."""

    type: str = ""
    text: Raw = ABSENT


class Function(Struct):
    """What Chat Completions wraps a tool in."""

    name: str = ""
    parameters: Raw = ABSENT


class ToolSpec(Struct):
    """A tool in the form of any of the three APIs."""

    name: str = ""
    input_schema: Raw = ABSENT
    parameters: Raw = ABSENT
    function: Function | None = None

    @property
    def schema(self) -> Raw:
        """The JSON of its parameters, wherever it is."""
        return self.function.parameters if self.function else self.input_schema or self.parameters


class ByteEdit(NamedTuple):
    """New bytes in place of those in [start, stop)."""

    start: int
    stop: int
    new: bytes


class EditedBody(NamedTuple):
    """A body after the rules: the very same object if none applied."""

    body: bytes | bytearray
    applied: tuple[Applied, ...] = ()
    unparsed: tuple[Unparsed, ...] = ()


Edit = Callable[[str, str], str]  # a text and its path -> the text to keep
_BODY = msgspec.json.Decoder(Body)
_ELEMENTS = msgspec.json.Decoder(list[Raw])
_TURN = msgspec.json.Decoder(RawMessage)
_PART = msgspec.json.Decoder(Part)
_TOOL = msgspec.json.Decoder(ToolSpec)


def normalize_body(body: bytes | bytearray, path: str, rules: frozenset[str]) -> EditedBody:
    """Apply the rules to the body of a POST to `path`, one of FIELDS; what is no chat request stays as it is.

    So does one of more parts than the server would read.

    As in `normalize`: a text that becomes empty goes, with its message, but one message always stays.
    """
    if excess(body):
        return EditedBody(body)
    try:
        return _normalized(body, path, rules)
    except (ValueError, RecursionError):  # not JSON, or not of this API's shape
        return EditedBody(body)


def _normalized(body: bytes | bytearray, path: str, rules: frozenset[str]) -> EditedBody:
    fields = _BODY.decode(body)
    system_field, turns_field = FIELDS[path]
    system, conversation = getattr(fields, system_field), getattr(fields, turns_field)
    if not _is_list(conversation) and not (path == "/v1/responses" and _is_text(conversation)):
        return EditedBody(body)
    where = Ranges(body)
    notes: list[Applied | Unparsed] = []
    moved: list[str] = []

    def editing(movable: bool) -> Edit:
        def edit(text: str, at: str) -> str:
            edited = edit_text(text, at, rules, movable)
            notes.extend(edited.notes)
            moved.extend(edited.moved)
            return edited.kept

        return edit

    splices: list[ByteEdit] = []
    edited = content_splices(system, system_field, editing(True), where)
    splices += [where.replaced(system, b"[]" if _is_list(system) else b'""')] if edited is None else edited
    if _is_list(conversation):
        elements = _ELEMENTS.decode(conversation)
        turns = [_TURN.decode(element) for element in elements]
        # Where the system text has no field of its own, it is the messages that a conversation begins with.
        in_turns = path in ("/v1/chat/completions", "/v1/responses")
        head = len(list(takewhile(lambda turn: turn.role in SYSTEM_ROLES, turns[:-1]))) if in_turns else 0
        dropped: set[int] = set()
        for i, turn in enumerate(turns):
            if turn.role in SYSTEM_ROLES:
                edited = content_splices(turn.content, f"{turns_field}[{i}].content", editing(i < head), where)
                splices += edited or ()
                dropped |= {i} if edited is None else set()
        said = [i for i in range(head, len(turns)) if i not in dropped]
        if turns and not said:
            dropped.remove(len(turns) - 1)
            splices.append(where.replaced(turns[-1].content, b'""'))
            said = [len(turns) - 1]
        splices += where.without(elements, dropped)
        if moved:
            behind = turns[said[0]].role == "user"
            splices.append(where.inserted(elements, said[0] + behind, _system_turn(moved)))
    elif moved:
        user = b'{"role":"user","content":' + bytes(conversation) + b"}"
        splices.append(where.replaced(conversation, b"[" + user + b"," + _system_turn(moved) + b"]"))
    if _is_list(fields.tools):
        splices += tool_splices(_ELEMENTS.decode(fields.tools), rules, notes, where)
    applied = tuple(note for note in notes if isinstance(note, Applied))
    unparsed = tuple(note for note in notes if isinstance(note, Unparsed))
    return EditedBody(spliced(body, splices) if splices else body, applied, unparsed)


def content_splices(content: Raw, path: str, edit: Edit, where: Ranges) -> list[ByteEdit] | None:
    """What editing the texts of a string or of a list of blocks changes; None if nothing would be left of it."""
    if _is_text(content):
        text = msgspec.json.decode(content, type=str)
        kept = edit(text, path)
        if kept == text:
            return []
        return [where.replaced(content, msgspec.json.encode(kept))] if kept else None
    if not _is_list(content):
        return []
    splices: list[ByteEdit] = []
    dropped: set[int] = set()
    elements = _ELEMENTS.decode(content)
    for i, element in enumerate(elements):
        part = _PART.decode(element)
        if part.type in TEXT_TYPES:
            edited = content_splices(part.text, f"{path}[{i}]", edit, where)
            splices += edited or ()
            dropped |= {i} if edited is None else set()
    if dropped and len(dropped) == len(elements):
        return None
    return [*splices, *where.without(elements, dropped)]


def tool_splices(
    elements: Sequence[Raw], rules: frozenset[str], notes: list[Applied | Unparsed], where: Ranges
) -> Iterator[ByteEdit]:
    """What the rules change in the tools' definitions; notes which ones did."""
    wanted = {name: rule.arrange for name, rule in RULES.items() if name in rules and rule.arrange}
    if not wanted:
        return
    specs = [_TOOL.decode(element) for element in elements]
    # The description tells which tool it was.
    given = tuple(
        Tool(spec.function.name if spec.function else spec.name, _object(spec.schema), str(i))
        for i, spec in enumerate(specs)
    )
    tools = given
    for name, arrange in wanted.items():
        arranged = arrange(tools)
        if any(new is not old for new, old in zip(arranged, tools, strict=True)):
            notes.append(Applied(name, "tools", ""))
        tools = arranged
    for place, tool in enumerate(tools):
        source = int(tool.description or 0)
        new = bytes(elements[source])
        if tool.input_schema is not given[source].input_schema:
            inside = Ranges(elements[source]).replaced(specs[source].schema, msgspec.json.encode(tool.input_schema))
            new = spliced(new, [inside])
        if source != place or new != bytes(elements[place]):
            yield where.replaced(elements[place], new)


class Ranges:
    """Where in a buffer the values lie that were decoded from it as Raw, which are views of it."""

    def __init__(self, buffer: Any) -> None:
        self.base = _address(buffer)

    def of(self, value: Raw) -> tuple[int, int]:
        """The first byte of a value and the one behind its last."""
        start = _address(value) - self.base
        return start, start + len(memoryview(value))

    def replaced(self, value: Raw, new: bytes) -> ByteEdit:
        """Another value in place of one."""
        return ByteEdit(*self.of(value), new)

    def inserted(self, elements: Sequence[Raw], at: int, new: bytes) -> ByteEdit:
        """A new element of a list, ahead of number `at` or at its end."""
        if at < len(elements):
            start, _ = self.of(elements[at])
            return ByteEdit(start, start, new + b",")
        _, end = self.of(elements[-1])
        return ByteEdit(end, end, b"," + new)

    def without(self, elements: Sequence[Raw], dropped: set[int]) -> Iterator[ByteEdit]:
        """A list without some of its elements, each with the comma beside it."""
        last = max((i for i in range(len(elements)) if i not in dropped), default=-1)
        for i in sorted(dropped):
            start, stop = self.of(elements[i])
            if i < last:
                yield ByteEdit(start, self.of(elements[i + 1])[0], b"")
            else:
                yield ByteEdit(self.of(elements[i - 1])[1] if i else start, stop, b"")


def spliced(body: bytes | bytearray, splices: Sequence[ByteEdit]) -> bytes:
    """The body with these ranges replaced; none overlaps another."""
    parts, done = [], 0
    for start, stop, new in sorted(splices):
        parts += [body[done:start], new]
        done = stop
    return b"".join([*parts, body[done:]])


def _address(buffer: Any) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _is_list(value: Raw) -> bool:
    return bytes(memoryview(value)[:1]) == b"["


def _is_text(value: Raw) -> bool:
    return bytes(memoryview(value)[:1]) == b'"'


def _object(schema: Raw) -> dict[str, Any]:
    value = msgspec.json.decode(schema) if memoryview(schema) else None
    return value if isinstance(value, dict) else {}


def _system_turn(moved: Sequence[str]) -> bytes:
    return msgspec.json.encode({"role": "system", "content": joined(moved)})
