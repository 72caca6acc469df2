"""Errors in OpenAI's form, such that its clients raise what they would raise for OpenAI."""

from __future__ import annotations

import re
from collections.abc import Container

import msgspec
from msgspec import Struct


class ErrorObject(Struct, frozen=True):
    """What went wrong, the field that is to blame and a name for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True):
    """Body of a failed request, and the last event of a stream that fails midway."""

    error: ErrorObject


CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "server_is_overloaded"}
# Fields of the Messages API and what each face calls them.
CHAT_FIELDS = {
    "output_config.format.schema": "response_format.json_schema.schema",
    "output_config.format": "response_format",
    ".input_schema": ".function.parameters",
}
RESPONSES_FIELDS = {"output_config.format": "text.format", ".input_schema": ".parameters", "messages": "input"}
FIELD = re.compile(r"(?!body:)([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): ")


def error_of(status: int, message: str, path: str = "/v1/chat/completions") -> ErrorBody:
    """An error in OpenAI's form; the fields that `message` names are called as the route at `path` calls them."""
    for ours, theirs in (RESPONSES_FIELDS if path.startswith("/v1/responses") else CHAT_FIELDS).items():
        message = message.replace(ours, theirs)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    field = FIELD.match(message) if status == 400 else None
    code = "context_length_exceeded" if "prompt is too long" in message else CODES.get(status_of(status))
    return ErrorBody(ErrorObject(message, kind, field and field[1], code))


def error_body(status: int, message: str, path: str) -> bytes:
    """The JSON body of an error; to be sent with `status_of(status)`."""
    return msgspec.json.encode(error_of(status, message, path))


def status_of(status: int) -> int:
    """The status that OpenAI's clients know: theirs for an overloaded server is 503."""
    return 503 if status == 529 else status


def is_openai(path: str, headers: Container[bytes]) -> bool:
    """Whether a request is to be answered in OpenAI's form; where both APIs have the path, by the names of its headers.

    Clients of the Messages API send `anthropic-version` with every request.
    """
    if path.startswith(("/v1/chat/", "/v1/responses")):
        return True
    return path.startswith("/v1/models") and b"anthropic-version" not in headers
