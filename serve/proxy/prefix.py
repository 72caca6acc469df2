"""The prefix of a request to engines whose tokens are unknown: keys of its prompt's text, a chain over equal blocks.

The text is what a chat template would write, in its order, in bytes that do not depend on how the body spells it: the
system text, the tools, the messages. Two requests share as many keys as they share blocks from the start on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import xxhash

from serve.diagnosis.captures import decode_json
from serve.rules.body import FIELDS, SYSTEM_ROLES, TEXT_TYPES
from serve.web.agents import Sender, sender_of
from serve.web.headers import SALT_HEADER

BLOCK_BYTES = 256  # of text, a key each: about 64 tokens
FILE_TYPES = ("image", "document", "image_url", "input_image", "input_file", "input_audio", "file")
FILE_REPEATS = 128  # of a file's hash of 32 bytes, which stands for it: as much text as an image has tokens, about
TEXTS = (*TEXT_TYPES, "output_text")
Body = bytes | bytearray


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that is to be sent to one of several engines."""

    id: str
    keys: np.ndarray  # [blocks] uint64, see `chain_keys`
    size: int  # bytes of its text
    sender: Sender
    continues: str | None = None  # id of the response before it, which only the engine that gave it remembers


def read_prompt(id: str, body: Body, route: str, headers: Mapping[str, str]) -> Prompt:
    """The prompt in a body and its sender; `route` is one of FIELDS. A body that cannot be read shares nothing."""
    sender = sender_of(headers)
    try:
        value = decode_json(body)
        text = prompt_text(value, route)
    except (ValueError, RecursionError):
        return Prompt(id, np.empty(0, np.uint64), len(body), sender)
    scope = json.dumps([value.get("model"), value.get("cache_salt"), headers.get(SALT_HEADER)]).encode()
    previous = value.get("previous_response_id")
    return Prompt(id, chain_keys(text, scope), len(text), sender, previous if isinstance(previous, str) else None)


def prompt_text(value: Any, route: str) -> bytes:
    """The prompt of a body as text. Raises ValueError for one that has no conversation."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    system_field, messages_field = FIELDS[route]
    messages = value.get(messages_field)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        raise ValueError(f"{messages_field}: expected a list, got {type(messages).__name__}")
    # Where the system text has no field of its own, it is the messages at the start of the conversation.
    first = next((i for i, message in enumerate(messages) if not is_system(message)), len(messages))
    system = value.get(system_field) if messages_field != system_field else None
    tools = value.get("tools")
    parts = [
        *content_texts(system),
        *(text for message in messages[:first] for text in message_texts(message)),
        *(plain(tool) for tool in (tools if isinstance(tools, list) else ())),
        *(text for message in messages[first:] for text in message_texts(message)),
    ]
    return b"\x1e".join(parts)


def chain_keys(text: bytes, scope: bytes = b"") -> np.ndarray:
    """A key for each whole block of a text, [blocks] uint64: each hashes its block and the key before it.

    Requests of different scopes, such as models or salts, have no key in common.
    """
    view, key = memoryview(text), xxhash.xxh3_64_intdigest(scope)
    keys = np.empty(len(text) // BLOCK_BYTES, np.uint64)
    for i in range(len(keys)):
        key = xxhash.xxh3_64_intdigest(view[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES], key)
        keys[i] = key
    return keys


def is_system(message: Any) -> bool:
    """Whether a message is the operator's."""
    return isinstance(message, dict) and message.get("role") in SYSTEM_ROLES


def message_texts(message: Any) -> Iterator[bytes]:
    """The texts of a message, or of an item of the Responses API."""
    if not isinstance(message, dict) or "content" not in message:
        yield plain(message)
        return
    yield str(message.get("role")).encode("utf-8", "replace")
    yield from content_texts(message["content"])
    if rest := {name: value for name, value in message.items() if name not in ("role", "content", "type", "id")}:
        yield plain(rest)


def content_texts(content: Any) -> Iterator[bytes]:
    """The texts of a content; one text and a list of one text block are the same."""
    if isinstance(content, str):
        yield content.encode("utf-8", "replace")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXTS and isinstance(text := part.get("text"), str):
            yield text.encode("utf-8", "replace")
        elif kind in FILE_TYPES:
            yield xxhash.xxh3_128_hexdigest(plain(part)).encode() * FILE_REPEATS
        else:
            yield plain(part)


def plain(value: Any) -> bytes:
    """A value as JSON, without the marks of cache breakpoints, which move from turn to turn."""
    if isinstance(value, dict) and "cache_control" in value:
        value = {name: item for name, item in value.items() if name != "cache_control"}
    return msgspec.json.encode(value)
