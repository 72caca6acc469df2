"""The Messages API on the wire: what the server sends back, as frozen structs: messages, events and errors.

Formats: https://docs.claude.com/en/api/messages, https://docs.claude.com/en/docs/build-with-claude/streaming and
https://docs.claude.com/en/api/errors.
"""

import secrets
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from serve.api.messages import OutputBlock


class CutInput(dict[str, Any]):
    """The complete members of the input of a call that was cut off; `arguments` is the beginning of its JSON."""

    def __init__(self, members: Mapping[str, Any], arguments: str) -> None:
        super().__init__(members)
        self.arguments = arguments


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal", "model_context_window_exceeded"]


class CacheCreation(Struct, frozen=True):
    """Of the tokens that were computed and stored, those that are kept for five minutes and for an hour."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class Retained(Struct, frozen=True):
    """An extension: what came of a request to keep a prefix in the cache."""

    asked: str  # the field that asks
    ttl: str  # the time from each use on, as it was asked for
    tokens: int  # of the prompt, from the first on, that stay; 0 for none
    until: str | None  # unless they are used before; RFC 3339, in UTC
    tier: str | None  # where they are
    instead: str | None  # what was done in place of what was asked, and why


class Usage(Struct, frozen=True):
    """Token counts. The length of the prompt is the sum of the three input counts."""

    input_tokens: int  # computed, and computed again by a request with the same prompt: the last token
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0
    # An extension: the tokens read from the cache by where they were, `device` or the name of a tier.
    cache_read_by_tier: dict[str, int] = {}
    # Of requests that ask for retention: see `serve/README.md`, the cache contract.
    cache_creation: CacheCreation | UnsetType = UNSET
    retention: tuple[Retained, ...] | UnsetType = UNSET


class ModelChanged(Struct, frozen=True, tag="model_changed"):
    """The earlier request was for another model."""

    cache_missed_input_tokens: int


class SystemChanged(Struct, frozen=True, tag="system_changed"):
    """The system text differs from that of the earlier request."""

    cache_missed_input_tokens: int


class ToolsChanged(Struct, frozen=True, tag="tools_changed"):
    """The tools or their order differ."""

    cache_missed_input_tokens: int


class MessagesChanged(Struct, frozen=True, tag="messages_changed"):
    """An earlier message differs: the conversation was not only appended to."""

    cache_missed_input_tokens: int


class PreviousMessageNotFound(Struct, frozen=True, tag="previous_message_not_found"):
    """The server does not remember the earlier message (any more)."""


class Unavailable(Struct, frozen=True, tag="unavailable"):
    """No part of the request explains the miss."""


CacheMissReason = ModelChanged | SystemChanged | ToolsChanged | MessagesChanged | PreviousMessageNotFound | Unavailable


class Diagnostics(Struct, frozen=True):
    """Why the cache missed the prefix of the earlier message."""

    cache_miss_reason: CacheMissReason


class Message(Struct, frozen=True, kw_only=True):
    """The answer. `model` must repeat the request's name: clients drop their thinking history if it differs."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: tuple[OutputBlock, ...] = ()
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: Usage
    diagnostics: Diagnostics | UnsetType | None = UNSET  # only if the request asks for it


class CacheForecast(Struct, frozen=True):
    """What a prompt would find if it were sent now, as its usage would say, and when its first token would come."""

    cache_read_input_tokens: int
    cache_read_by_tier: dict[str, int]
    predicted_ttft_ms: float  # from the last byte of the request


class TokenCount(Struct, frozen=True):
    """The answer of `POST /v1/messages/count_tokens`."""

    input_tokens: int
    cache: CacheForecast | UnsetType = UNSET  # an extension; left out where the engine is too busy to say


class CacheWarmed(Struct, frozen=True):
    """The answer of `POST /v1/cache/warm`: what is in the cache now, and what that took."""

    input_tokens: int  # of the whole prompt
    warmed_tokens: int  # of these, tokens from the first on that are in the cache now
    until: str  # where these end: before this message of the request, after the rules
    cache_read_input_tokens: int  # that were there before
    cache_creation_input_tokens: int  # that were computed
    cache_read_by_tier: dict[str, int]
    phases_ms: dict[str, float]
    type: Literal["cache_warmed"] = "cache_warmed"


class ModelInfo(Struct, frozen=True, kw_only=True):
    """A model and its limits in tokens; the date says nothing."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str = "1970-01-01T00:00:00Z"
    max_input_tokens: int
    max_tokens: int


class ModelPage(Struct, frozen=True):
    """The answer of `GET /v1/models`: all models."""

    data: tuple[ModelInfo, ...]
    has_more: bool
    first_id: str
    last_id: str


class MessageStart(Struct, frozen=True, tag="message_start"):
    """First event: the message without content, and the token counts of its prompt."""

    message: Message


class ContentBlockStart(Struct, frozen=True, tag="content_block_start"):
    """A block begins, empty: text "", thinking "" or input {}."""

    index: int
    content_block: OutputBlock


class Ping(Struct, frozen=True, tag="ping"):
    """Keeps the connection alive."""


class TextDelta(Struct, frozen=True, tag="text_delta"):
    """More text."""

    text: str


class ThinkingDelta(Struct, frozen=True, tag="thinking_delta"):
    """More thinking."""

    thinking: str


class SignatureDelta(Struct, frozen=True, tag="signature_delta"):
    """The signature of a thinking block, sent just before the block stops."""

    signature: str


class InputJsonDelta(Struct, frozen=True, tag="input_json_delta"):
    """More of a tool call's input. All pieces joined are one JSON object."""

    partial_json: str


class ContentBlockDelta(Struct, frozen=True, tag="content_block_delta"):
    """A block grows."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStop(Struct, frozen=True, tag="content_block_stop"):
    """A block is complete."""

    index: int


class Stop(Struct, frozen=True):
    """Why the message ended, and at which of the request's stop sequences."""

    stop_reason: StopReason
    stop_sequence: str | None = None


class MessageDelta(Struct, frozen=True, tag="message_delta"):
    """Second to last event: why the message ended, and its cumulative token counts."""

    delta: Stop
    usage: Usage


class MessageStop(Struct, frozen=True, tag="message_stop"):
    """Last event."""


class FunctionCall(Struct, frozen=True):
    """A tool call in OpenAI's form: its name, and its arguments as JSON text."""

    name: str
    arguments: str


class DispatchedCall(Struct, frozen=True):
    """A complete tool call: number `index` of the answer's calls, from 0."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDispatch(Struct, frozen=True, tag="tool_call_dispatch"):
    """An extension, in the form of NVIDIA Dynamo: this call may be run now, while the answer goes on."""

    tool_call: DispatchedCall
    choice_index: int = 0


class ErrorDetail(Struct, frozen=True):
    """The type, one of the values of ERROR_TYPES, and a sentence for people."""

    type: str
    message: str


class Error(Struct, frozen=True, tag="error", omit_defaults=True):
    """Body of a failed request; also the last event of a stream that fails."""

    error: ErrorDetail
    request_id: str | None = None  # where the client has given its request one


BlockEvent = ContentBlockStart | ContentBlockDelta | ContentBlockStop
Event = MessageStart | BlockEvent | ToolCallDispatch | MessageDelta | MessageStop | Ping | Error

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
ERROR_STATUS = {type: status for status, type in ERROR_TYPES.items()}


def new_id(kind: Literal["msg", "toolu"]) -> str:
    """A new random id of a message or a tool call, such as `msg_5b0c...`."""
    return f"{kind}_{secrets.token_hex(12)}"


def written_arguments(input: dict[str, Any]) -> str:
    """The arguments of a call as the model wrote them, in compact JSON; of a call that was cut off, the beginning."""
    return input.arguments if isinstance(input, CutInput) else msgspec.json.encode(input).decode()


def encode(answer: Message | TokenCount | CacheWarmed | ModelInfo | ModelPage | Error) -> bytes:
    """The JSON body of an answer."""
    return msgspec.json.encode(answer)


def encode_event(event: Event) -> bytes:
    """One server-sent event: its name, its JSON on one line, and an empty line."""
    return f"event: {event.__struct_config__.tag}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
