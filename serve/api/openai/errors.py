"""Errors in OpenAI's form: its clients raise the same exceptions as for OpenAI's own server.

Codes: https://platform.openai.com/docs/guides/error-codes.
"""

from __future__ import annotations

import re
from collections.abc import Container

import msgspec
from msgspec import Struct


class ErrorObject(Struct, frozen=True):
    """What went wrong, the field at fault, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True):
    """Body of a failed request; also the last event of a stream that fails."""

    error: ErrorObject


CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "server_is_overloaded"}
# Fields of the Messages API, and their names in each of the two APIs.
CHAT_FIELDS = {
    "output_config.format.schema": "response_format.json_schema.schema",
    "output_config.format": "response_format",
    ".input_schema": ".function.parameters",
}
RESPONSES_FIELDS = {"output_config.format": "text.format", ".input_schema": ".parameters"}
MESSAGES = re.compile(r"^messages(?=[:\[.])")  # the field of both others that is `input` in the Responses API
FIELD = re.compile(r"(?!body:)([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): ")


def error_of(status: int, message: str, path: str = "/v1/chat/completions") -> ErrorBody:
    """An error in OpenAI's form. Fields named in `message` get the names that the API at `path` has for them."""
    responses = path.startswith("/v1/responses")
    for ours, theirs in (RESPONSES_FIELDS if responses else CHAT_FIELDS).items():
        message = message.replace(ours, theirs)
    if responses:
        message = MESSAGES.sub("input", message)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    if message.startswith("prompt is too long"):
        param = "input" if responses else "messages"
        return ErrorBody(ErrorObject(message, kind, param, "context_length_exceeded"))
    field = FIELD.match(message) if status == 400 else None
    return ErrorBody(ErrorObject(message, kind, field and field[1], CODES.get(status_of(status))))


def error_body(status: int, message: str, path: str) -> bytes:
    """The JSON body of an error, to be sent with the status `status_of(status)`."""
    return msgspec.json.encode(error_of(status, message, path))


def status_of(status: int) -> int:
    """The HTTP status in OpenAI's API, which has 503 for an overloaded server."""
    return 503 if status == 529 else status


def is_openai(path: str, headers: Container[bytes]) -> bool:
    """Whether a request is to be answered in OpenAI's form. The headers decide where both APIs have the path.

    Clients of the Messages API send `anthropic-version` with every request.
    """
    if path.startswith(("/v1/chat/", "/v1/responses", "/v1/completions", "/v1/embeddings")):
        return True
    return path.startswith("/v1/models") and b"anthropic-version" not in headers
