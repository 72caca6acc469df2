"""The prompt-stability rules on the bytes of a body: JSON that a rule changes is replaced, all other bytes stay.

A body is decoded only as far as the rules need it, so unknown parts (images, the vendor's tools, fields of other
engines) are kept. Paths in notes are those of the body.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Raw, Struct

from serve.api.tools import Tool
from serve.limits.bodies import excess
from serve.limits.surrogates import mend_surrogates
from serve.rules.normalize import Applied, RuleEditor, Unparsed, join_moved

# For each route, the field of the system text and that of the conversation.
FIELDS = {
    "/v1/messages": ("system", "messages"),
    "/v1/messages/count_tokens": ("system", "messages"),
    "/v1/chat/completions": ("system", "messages"),
    "/v1/responses": ("instructions", "input"),
    "/v1/responses/input_tokens": ("instructions", "input"),
}
SYSTEM_ROLES = ("system", "developer")
TEXT_TYPES = ("text", "input_text")
ABSENT = Raw()


class Body(Struct):
    """The fields that rules read, with their values not decoded."""

    system: Raw = ABSENT
    instructions: Raw = ABSENT
    messages: Raw = ABSENT
    input: Raw = ABSENT
    tools: Raw = ABSENT


class RawMessage(Struct):
    """A message, or an item of the Responses API, which may have no role; its content is not decoded."""

    role: str = ""
    content: Raw = ABSENT


class Part(Struct):
    """A content block of any type."""

    type: str = ""
    text: Raw = ABSENT


class Function(Struct):
    """The function of a tool in Chat Completions."""

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
        """The JSON of its parameters, in the field that the API has for them."""
        return self.function.parameters if self.function else self.input_schema or self.parameters


class ByteEdit(NamedTuple):
    """New bytes in place of those in [start, stop)."""

    start: int
    stop: int
    new: bytes


class Unread(NamedTuple):
    """Why the rules could not be applied to a body."""

    reason: Literal["too_large", "encoding", "malformed"]
    text: str


class EditedBody(NamedTuple):
    """A body after the rules: the same object if no rule applied."""

    body: bytes | bytearray
    applied: tuple[Applied, ...] = ()
    unparsed: tuple[Unparsed, ...] = ()
    unread: Unread | None = None


_BODY = msgspec.json.Decoder(Body)
_ELEMENTS = msgspec.json.Decoder(list[Raw])
_MESSAGE = msgspec.json.Decoder(RawMessage)
_PART = msgspec.json.Decoder(Part)
_TOOL = msgspec.json.Decoder(ToolSpec)


def normalize_body(body: bytes | bytearray, path: str, rules: frozenset[str]) -> EditedBody:
    """Apply the rules to the body of a POST to `path`, one of FIELDS.

    As in `normalize`, texts and messages that become empty are dropped, but at least one message stays. A body without
    a conversation is returned as it is, and so is one that is not JSON of this API or has more parts than the server
    accepts: then `unread` says why.
    """
    if problem := excess(body):
        return EditedBody(body, unread=Unread("too_large", problem))
    editor = RuleEditor(rules)
    try:
        edits = body_edits(body, path, editor)
    except (ValueError, RecursionError) as error:
        # The places of edits in the mended body are those in this one: its length is the same.
        if (mended := mend_surrogates(body)) is body:
            return EditedBody(body, unread=Unread("malformed", str(error)))
        editor = RuleEditor(rules)
        try:
            edits = body_edits(mended, path, editor)
        except (ValueError, RecursionError) as still:
            return EditedBody(body, unread=Unread("malformed", str(still)))
    edited = apply_edits(body, edits) if edits else body
    return EditedBody(edited, tuple(editor.applied), tuple(editor.unparsed))


def body_edits(body: bytes | bytearray, path: str, editor: RuleEditor) -> list[ByteEdit]:
    """What the rules change in a body. Raises ValueError or RecursionError if it cannot be decoded."""
    fields = _BODY.decode(body)
    system_field, messages_field = FIELDS[path]
    system, conversation = getattr(fields, system_field), getattr(fields, messages_field)
    if not _is_list(conversation) and not (messages_field == "input" and _is_text(conversation)):
        return []
    ranges = Ranges(body)
    edits = content_edits(system, system_field, editor, True, ranges)
    if edits is None:
        edits = [ranges.replace(system, b"[]" if _is_list(system) else b'""')]
    if _is_list(conversation):
        # Where the system text has no field of its own, it is the messages at the start of the conversation.
        system_first = path.startswith(("/v1/chat/completions", "/v1/responses"))
        elements = _ELEMENTS.decode(conversation)
        edits += message_edits(elements, messages_field, system_first, editor, ranges)
        if editor.moved and not elements:
            edits.append(ranges.replace(conversation, b"[" + _system_message(editor.moved) + b"]"))
    elif editor.moved:
        user = b'{"role":"user","content":' + bytes(conversation) + b"}"
        edits.append(ranges.replace(conversation, b"[" + user + b"," + _system_message(editor.moved) + b"]"))
    if _is_list(fields.tools):
        edits += tool_edits(_ELEMENTS.decode(fields.tools), editor, ranges)
    return edits


def message_edits(
    elements: Sequence[Raw], field: str, system_first: bool, editor: RuleEditor, ranges: Ranges
) -> list[ByteEdit]:
    """Edits of the system messages of a list, and the insertion of the texts that rules moved out of `system`.

    With `system_first`, system messages at the start of the list are the request's system text.
    """
    messages = [_MESSAGE.decode(element) for element in elements]
    leading = takewhile(lambda message: message.role in SYSTEM_ROLES, messages[:-1])
    head = len(list(leading)) if system_first else 0
    edits: list[ByteEdit] = []
    dropped: set[int] = set()
    answered = False
    for i, message in enumerate(messages):
        answered |= message.role in ("assistant", "")  # items of the Responses API without a role follow a call
        if answered and message.role == "user" and editor.orders_blocks and _is_list(message.content):
            edits += order_edits(message.content, f"{field}[{i}].content", editor, ranges)
        if message.role in SYSTEM_ROLES:
            edited = content_edits(message.content, f"{field}[{i}].content", editor, i < head, ranges)
            edits += edited or ()
            dropped |= {i} if edited is None else set()
    kept = [i for i in range(head, len(messages)) if i not in dropped]
    if messages and not kept:
        last = len(messages) - 1
        dropped.remove(last)
        edits.append(ranges.replace(messages[last].content, b'""'))
        kept = [last]
    edits += ranges.remove(elements, dropped)
    if editor.moved and messages:
        after_user = messages[kept[0]].role == "user"
        edits.append(ranges.insert(elements[kept[0]], after_user, _system_message(editor.moved)))
    return edits


def content_edits(content: Raw, path: str, editor: RuleEditor, movable: bool, ranges: Ranges) -> list[ByteEdit] | None:
    """Edits of a string, or of the texts in a list of blocks; None if nothing would be left of it."""
    if _is_text(content):
        text = msgspec.json.decode(content, type=str)
        kept = editor.edit(text, path, movable)
        if kept == text:
            return []
        return [ranges.replace(content, msgspec.json.encode(kept))] if kept else None
    if not _is_list(content):
        return []
    edits: list[ByteEdit] = []
    dropped: set[int] = set()
    elements = _ELEMENTS.decode(content)
    for i, element in enumerate(elements):
        part = _PART.decode(element)
        if part.type in TEXT_TYPES:
            edited = content_edits(part.text, f"{path}[{i}]", editor, movable, ranges)
            edits += edited or ()
            dropped |= {i} if edited is None else set()
    if dropped and len(dropped) == len(elements):
        return None
    return [*edits, *ranges.remove(elements, dropped)]


def order_edits(content: Raw, path: str, editor: RuleEditor, ranges: Ranges) -> Iterator[ByteEdit]:
    """Edits that give a message's blocks another order."""
    elements = _ELEMENTS.decode(content)
    parts = [_PART.decode(element) for element in elements]
    texts = [
        msgspec.json.decode(part.text, type=str) if part.type in TEXT_TYPES and _is_text(part.text) else None
        for part in parts
    ]
    for place, source in enumerate(editor.order(texts, path)):
        if source != place:
            yield ranges.replace(elements[place], bytes(elements[source]))


def tool_edits(elements: Sequence[Raw], editor: RuleEditor, ranges: Ranges) -> Iterator[ByteEdit]:
    """Edits of the tools' definitions."""
    if not editor.arranges_tools:
        return
    specs = [_TOOL.decode(element) for element in elements]
    # The description holds the tool's place in the body.
    given = tuple(
        Tool(spec.function.name if spec.function else spec.name, _object(spec.schema), str(i))
        for i, spec in enumerate(specs)
    )
    for place, tool in enumerate(editor.arrange(given)):
        source = int(tool.description or 0)
        new = bytes(elements[source])
        if tool.input_schema is not given[source].input_schema:
            schema = Ranges(elements[source]).replace(specs[source].schema, msgspec.json.encode(tool.input_schema))
            new = apply_edits(new, [schema])
        if source != place or new != bytes(elements[place]):
            yield ranges.replace(elements[place], new)


class Ranges:
    """Byte ranges in a buffer of values that were decoded from it as Raw, which are views of the buffer."""

    def __init__(self, buffer: Any) -> None:
        self.base = _address(buffer)

    def range_of(self, value: Raw) -> tuple[int, int]:
        """The range [start, stop) of a value."""
        start = _address(value) - self.base
        return start, start + len(memoryview(value))

    def replace(self, value: Raw, new: bytes) -> ByteEdit:
        """New bytes in place of a value."""
        return ByteEdit(*self.range_of(value), new)

    def insert(self, beside: Raw, after: bool, new: bytes) -> ByteEdit:
        """A new element of a list, before or after one that stays."""
        start, end = self.range_of(beside)
        return ByteEdit(end, end, b"," + new) if after else ByteEdit(start, start, new + b",")

    def remove(self, elements: Sequence[Raw], dropped: set[int]) -> Iterator[ByteEdit]:
        """A list without some of its elements, and without the comma next to each."""
        last = max((i for i in range(len(elements)) if i not in dropped), default=-1)
        for i in sorted(dropped):
            start, stop = self.range_of(elements[i])
            if i < last:
                yield ByteEdit(start, self.range_of(elements[i + 1])[0], b"")
            else:
                yield ByteEdit(self.range_of(elements[i - 1])[1] if i else start, stop, b"")


def apply_edits(body: bytes | bytearray, edits: Sequence[ByteEdit]) -> bytes:
    """The body after edits that do not overlap."""
    parts, done = [], 0
    for start, stop, new in sorted(edits):
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
    """A schema's value, or an empty object if there is none or it is not an object."""
    value = msgspec.json.decode(schema) if memoryview(schema) else None
    return value if isinstance(value, dict) else {}


def _system_message(moved: Sequence[str]) -> bytes:
    return msgspec.json.encode({"role": "system", "content": join_moved(moved)})
