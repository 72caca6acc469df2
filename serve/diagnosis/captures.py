"""The prompts in requests of all three APIs, as far as they can be read: of captures, told apart by their shape."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from serve.api.messages import CountTokensRequest, InvalidRequest, decode_count_tokens
from serve.api.openai import read_chat, read_responses
from serve.api.vendor_tools import CLIENT_TOOLS
from serve.limits.bodies import excess
from serve.limits.surrogates import mend_surrogates

Api = Literal["messages", "chat", "responses"]
Body = bytes | bytearray
READERS: dict[Api, Callable[[Body], CountTokensRequest]] = {
    "messages": decode_count_tokens,
    "chat": lambda body: read_chat(body)[0],
    "responses": lambda body: read_responses(body)[0],
}
# What makes a prompt. The other fields say how it is answered, which another engine may be able to do.
PROMPT_FIELDS: dict[Api, tuple[str, ...]] = {
    "messages": ("model", "system", "messages", "tools", "thinking"),
    "chat": ("model", "messages", "tools", "reasoning_effort"),
    "responses": ("model", "instructions", "input", "tools", "reasoning"),
}
CONVERSATIONS = ("messages", "input")
WRAPPERS = ("body", "request")  # fields in which captures hold a body, as an object or as text
MOST_WRAPPERS = 4

# What only one of the two APIs with `messages` has: https://docs.claude.com/en/api/messages and
# https://platform.openai.com/docs/api-reference/chat/create.
MESSAGES_FIELDS = {
    "system",
    "thinking",
    "stop_sequences",
    "top_k",
    "anthropic_version",
    "anthropic_beta",
    "output_config",
}
CHAT_FIELDS = {
    "max_completion_tokens", "stream_options", "response_format", "reasoning_effort", "stop", "n", "logprobs",
    "functions", "parallel_tool_calls", "frequency_penalty", "presence_penalty",
}  # fmt: skip
CHAT_ROLES = {"tool", "developer", "function"}
CHAT_MESSAGE_FIELDS = {"tool_calls", "function_call", "tool_call_id", "reasoning_content"}
CHAT_TYPES = {"image_url", "input_audio", "function"}


def read_file(path: Path) -> CountTokensRequest:
    """The request in a file. Raises ValueError, which names the file."""
    try:
        return read_capture(path.read_bytes())
    except (InvalidRequest, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected the body of a POST to /v1/messages, /v1/chat/completions or /v1/responses: {error}"
        ) from error


def read_capture(content: bytes) -> CountTokensRequest:
    """The request in a capture: a body, or an object that holds one in a field `body` or `request`.

    A byte order mark is allowed. Raises InvalidRequest, or ValueError or RecursionError for what is not JSON.
    """
    content = as_utf8(content)
    value = decode_json(content)
    for _ in range(MOST_WRAPPERS):
        inner = None
        if isinstance(value, dict) and not any(field in value for field in CONVERSATIONS):
            inner = next((value[field] for field in WRAPPERS if isinstance(value.get(field), (dict, str))), None)
        if inner is None:
            break
        content = inner.encode("utf-8", "surrogatepass") if isinstance(inner, str) else msgspec.json.encode(inner)
        value = decode_json(content) if isinstance(inner, str) else inner
    return read_prompt(content, api_of(value))


def read_prompt(body: Body, api: Api) -> CountTokensRequest:
    """The request in a body, or if the API refuses it, its prompt alone.

    Raises InvalidRequest for a body whose conversation cannot be read.
    """
    try:
        return READERS[api](body)
    except InvalidRequest:
        if (prompt := prompt_alone(body, api)) is None:
            raise
        with suppress(InvalidRequest):
            return READERS[api](prompt)
        raise


def prompt_alone(body: Body, api: Api) -> bytes | None:
    """A body with only the fields that make its prompt, and with functions for tools that only a vendor can run.

    None for a body that is no JSON object, or has too many parts.
    """
    try:
        value = None if excess(body) else decode_json(body)
        if not isinstance(value, dict):
            return None
        kept = {"model": "unknown"} | {field: value[field] for field in PROMPT_FIELDS[api] if field in value}
        if isinstance(kept.get("tools"), list):
            kept["tools"] = [as_function(tool, api) for tool in kept["tools"]]
        return msgspec.json.encode(kept)
    except (ValueError, RecursionError):
        return None


def as_function(tool: Any, api: Api) -> Any:
    """A tool that only its vendor can run as a function without parameters; any other as it is."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str) or kind in ("function", "custom") or kind in CLIENT_TOOLS:
        return tool
    name = tool["name"] if isinstance(tool.get("name"), str) else kind
    if api == "messages":
        return {"name": name, "description": kind, "input_schema": {"type": "object"}}
    function = {"name": name, "description": kind}
    return {"type": "function"} | ({"function": function} if api == "chat" else function)


def as_utf8(content: bytes) -> bytes:
    """A text without its byte order mark, in UTF-8; some shells write redirected output in UTF-16."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16").encode()
    return content.removeprefix(codecs.BOM_UTF8)


def decode_json(content: Body) -> Any:
    """A JSON value; half a surrogate pair is read as U+FFFD. Raises ValueError or RecursionError."""
    try:
        return msgspec.json.decode(content)
    except ValueError:
        if (mended := mend_surrogates(content)) is content:
            raise
        return msgspec.json.decode(mended)


def api_of(body: Any) -> Api:
    """The API that a body is for; the Messages API if nothing in it says so."""
    if not isinstance(body, dict):
        return "messages"
    if "messages" not in body:
        return "responses" if "input" in body or "instructions" in body else "messages"
    if body.keys() & MESSAGES_FIELDS:
        return "messages"
    if body.keys() & CHAT_FIELDS or any(tool.get("type") in CHAT_TYPES for tool in objects(body.get("tools"))):
        return "chat"
    messages = list(objects(body["messages"]))
    if messages and messages[0].get("role") == "system":  # the Messages API has no such message before a user's
        return "chat"
    return "chat" if any(map(is_of_chat, messages)) else "messages"


def is_of_chat(message: dict[str, Any]) -> bool:
    """Whether only Chat Completions has such a message."""
    if message.get("role") in CHAT_ROLES or message.keys() & CHAT_MESSAGE_FIELDS:
        return True
    return any(part.get("type") in CHAT_TYPES for part in objects(message.get("content")))


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in a list; none in what is not a list."""
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())
