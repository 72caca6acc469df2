"""The Anthropic Messages API on the wire: requests in, messages, events and errors out, as frozen msgspec structs.

The structs are the schema: what they do not name is ignored, what they name is checked while the JSON is read. Nothing
here knows tokens, templates or HTTP, and nothing here changes a request. Formats: https://docs.claude.com/en/api/messages.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from serve.api.stops import LONGEST, MOST
from serve.api.validation import explain
from serve.limits.bodies import excess

Role = Literal["user", "assistant", "system"]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal", "model_context_window_exceeded"]

# Counts end in int32 arrays.
PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
NonEmptyStr = Annotated[str, Meta(min_length=1)]
StopSequence = Annotated[str, Meta(min_length=1, max_length=LONGEST)]
StopSequences = Annotated[tuple[StopSequence, ...], Meta(max_length=MOST)]


class TextBlock(Struct, frozen=True, tag="text"):
    """Text; in requests and in responses."""

    text: str


class ThinkingBlock(Struct, frozen=True, tag="thinking"):
    """Reasoning of the model; in requests and in responses. The signature may be empty."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Struct, frozen=True, tag="redacted_thinking"):
    """Reasoning that another server encrypted; this one cannot read it."""

    data: str


class ToolUseBlock(Struct, frozen=True, tag="tool_use"):
    """A call of a tool by the model; in requests and in responses. The input keeps its key order."""

    id: str
    name: str
    input: dict[str, Any]


class ToolReferenceBlock(Struct, frozen=True, tag="tool_reference"):
    """The name of a tool whose definition a tool search found."""

    tool_name: str


class TextSource(Struct, frozen=True, tag="text"):
    """A document given as plain text, the only kind that a text model reads."""

    data: str


class DocumentBlock(Struct, frozen=True, tag="document"):
    """A plain-text document, with its title and context."""

    source: TextSource
    title: str | None = None
    context: str | None = None


class ImageBlock(Struct, frozen=True, tag="image"):
    """An image: part of the API, refused by name."""

    def __post_init__(self) -> None:
        """Refuse."""
        raise ValueError("expected text, got an image, which this model cannot read")


ResultBlock = TextBlock | DocumentBlock | ToolReferenceBlock | ImageBlock


class ToolResultBlock(Struct, frozen=True, tag="tool_result"):
    """What a tool returned for the call `tool_use_id`; that call need not be in the conversation."""

    tool_use_id: str
    content: str | tuple[ResultBlock, ...] | None = None
    is_error: bool = False


OutputBlock = TextBlock | ThinkingBlock | ToolUseBlock
Block = OutputBlock | RedactedThinkingBlock | ToolResultBlock | ResultBlock


class InputMessage(Struct, frozen=True):
    """One message of the conversation; a system message may stand anywhere, an assistant message last is a prefill."""

    role: Role
    content: str | tuple[Block, ...]


class Tool(Struct, frozen=True):
    """A tool that the client runs. The vendor's own tools carry another `type` and are refused."""

    name: NonEmptyStr
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None


class ToolChoice(Struct, frozen=True):
    """Whether the model may (auto), must (any), must by `name` (tool) or must not (none) call a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Struct, frozen=True):
    """Whether the model thinks first: yes (enabled), as it sees fit (adaptive), or not. Nothing enforces the budget."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: PositiveInt | None = None
    display: str | None = None  # `omitted`: the client wants the signatures only

    def __post_init__(self) -> None:
        """Refuse manual thinking without its budget."""
        if self.type == "enabled" and self.budget_tokens is None:
            raise ValueError("expected budget_tokens beside type 'enabled', got none")


class JsonSchemaFormat(Struct, frozen=True, tag="json_schema"):
    """The answer is JSON that obeys a schema."""

    schema: dict[str, Any]


class OutputConfig(Struct, frozen=True):
    """How the answer should look and how much effort it is worth."""

    effort: str | None = None
    format: JsonSchemaFormat | None = None


class CountTokensRequest(Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`: everything that makes the prompt."""

    model: str
    messages: Annotated[tuple[InputMessage, ...], Meta(min_length=1)]
    system: str | tuple[TextBlock, ...] | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def __post_init__(self) -> None:
        """Refuse a choice among tools that are not there."""
        choice, names = self.tool_choice, {tool.name for tool in self.tools or ()}
        if choice and choice.type == "any" and not names:
            raise ValueError("tool_choice: expected 'any' together with tools, got no tools")
        if choice and choice.type == "tool" and choice.name not in names:
            raise ValueError(f"tool_choice.name: expected the name of one of tools, got {choice.name!r:.80}")


class DiagnosticsRequest(Struct, frozen=True):
    """Asks why the cache missed what it had of an earlier message; null for the first of a conversation."""

    previous_message_id: str | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/messages`: a prompt and how to continue it."""

    max_tokens: PositiveInt
    stream: bool = False
    stop_sequences: StopSequences | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    diagnostics: DiagnosticsRequest | UnsetType | None = UNSET


class SeededRequest(MessagesRequest, frozen=True, kw_only=True):
    """A request that came over another API, which knows a seed: the same prompt and seed give the same answer."""

    seed: int | None = None


class InvalidRequest(Exception):
    """A request that the API refuses; its text names the field, what was expected and what was found."""

    type = "invalid_request_error"
    status = 400


def decode_request(body: bytes | bytearray) -> MessagesRequest:
    """Read the body of `POST /v1/messages`; raise InvalidRequest if it is not one."""
    return decode(_MESSAGES, body, _CHOICES)


def decode_count_tokens(body: bytes | bytearray) -> CountTokensRequest:
    """Read the body of `POST /v1/messages/count_tokens`; raise InvalidRequest if it is not one."""
    return decode(_COUNT_TOKENS, body, _CHOICES)


_MESSAGES = msgspec.json.Decoder(MessagesRequest)
_COUNT_TOKENS = msgspec.json.Decoder(CountTokensRequest)

R = TypeVar("R")


def decode(decoder: msgspec.json.Decoder[R], body: bytes | bytearray, choices: Mapping[str, str]) -> R:
    """Read a body by its schema; raise InvalidRequest if it is not one. `choices` are as `explain` takes them."""
    if problem := excess(body):
        raise InvalidRequest(f"body: {problem}")
    try:
        return decoder.decode(body)
    # ValueError is malformed JSON, bad UTF-8 or a broken schema; RecursionError is JSON nested too deeply.
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(explain(error, body, choices)) from None


def _tags(union: Any) -> str:
    return ", ".join(struct.__struct_config__.tag for struct in get_args(union) or (union,))


# What the fields with a fixed set of values accept, for messages only: the structs above are what decides.
_CHOICES = {
    "messages.role": ", ".join(get_args(Role)),
    "messages.content.type": _tags(Block),
    "messages.content.content.type": _tags(ResultBlock),
    "messages.content.source.type": _tags(TextSource),
    "messages.content.content.source.type": _tags(TextSource),
    "system.type": _tags(TextBlock),
    "tools.type": "custom (the vendor's own tools are not available here)",
    "tool_choice.type": "auto, any, tool, none",
    "thinking.type": "enabled, adaptive, disabled",
    "output_config.format.type": _tags(JsonSchemaFormat),
}


class Usage(Struct, frozen=True):
    """Token counts; the prompt is the sum of the three input counts."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0
    # Not the API's: where the tokens that were read came from, `device` or a tier's name.
    cache_read_by_tier: dict[str, int] = {}


class ModelChanged(Struct, frozen=True, tag="model_changed"):
    """The earlier request was another model's."""

    cache_missed_input_tokens: int


class SystemChanged(Struct, frozen=True, tag="system_changed"):
    """The system text differs from the earlier request's."""

    cache_missed_input_tokens: int


class ToolsChanged(Struct, frozen=True, tag="tools_changed"):
    """The tools differ, or their order does."""

    cache_missed_input_tokens: int


class MessagesChanged(Struct, frozen=True, tag="messages_changed"):
    """An earlier message differs: more than an append."""

    cache_missed_input_tokens: int


class PreviousMessageNotFound(Struct, frozen=True, tag="previous_message_not_found"):
    """Nothing is remembered of the earlier message."""


class Unavailable(Struct, frozen=True, tag="unavailable"):
    """The parts are the same, and yet it missed."""


CacheMissReason = ModelChanged | SystemChanged | ToolsChanged | MessagesChanged | PreviousMessageNotFound | Unavailable


class Diagnostics(Struct, frozen=True):
    """Why the cache missed what it had of the earlier message."""

    cache_miss_reason: CacheMissReason


class Message(Struct, frozen=True, kw_only=True):
    """The answer. `model` must echo the request's name: clients drop their thinking history when it differs."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: tuple[OutputBlock, ...] = ()
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: Usage
    diagnostics: Diagnostics | UnsetType | None = UNSET  # only where the request asks for it


class TokenCount(Struct, frozen=True):
    """The answer of count_tokens."""

    input_tokens: int


class MessageStart(Struct, frozen=True, tag="message_start"):
    """First event: the message without content, with the usage of its prompt."""

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
    """The signature of a thinking block, just before it stops."""

    signature: str


class InputJsonDelta(Struct, frozen=True, tag="input_json_delta"):
    """More of a tool call's input; the pieces join to one JSON object."""

    partial_json: str


class ContentBlockDelta(Struct, frozen=True, tag="content_block_delta"):
    """A block grows."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStop(Struct, frozen=True, tag="content_block_stop"):
    """A block is complete."""

    index: int


class Stop(Struct, frozen=True):
    """Why the message ended, and by which of the request's stop sequences."""

    stop_reason: StopReason
    stop_sequence: str | None = None


class MessageDelta(Struct, frozen=True, tag="message_delta"):
    """Last event but one: why the message ended and its whole, cumulative usage."""

    delta: Stop
    usage: Usage


class MessageStop(Struct, frozen=True, tag="message_stop"):
    """Last event."""


class FunctionCall(Struct, frozen=True):
    """A call in OpenAI's form: its name and its arguments as JSON text."""

    name: str
    arguments: str


class DispatchedCall(Struct, frozen=True):
    """A tool call that is complete, as `index` among the answer's calls."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDispatch(Struct, frozen=True, tag="tool_call_dispatch"):
    """Not the API's: a call may be run now, though the answer goes on. The form is that of NVIDIA Dynamo."""

    tool_call: DispatchedCall
    choice_index: int = 0


class ErrorDetail(Struct, frozen=True):
    """One of ERROR_TYPES' values, and a sentence for people."""

    type: str
    message: str


class Error(Struct, frozen=True, tag="error"):
    """Body of a failed request, and the last event of a stream that fails midway."""

    error: ErrorDetail


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
    """A fresh id of a message or of a tool call, such as `msg_5b0c...`."""
    return f"{kind}_{secrets.token_hex(12)}"


def encode(answer: Message | TokenCount | Error) -> bytes:
    """The JSON body of an answer."""
    return msgspec.json.encode(answer)


def encode_event(event: Event) -> bytes:
    """One server-sent event: its name, its JSON on one line and an empty line."""
    return f"event: {event.__struct_config__.tag}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
