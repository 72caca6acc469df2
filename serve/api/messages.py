"""The Messages API on the wire: content blocks and requests, as frozen structs. The answers are in `answers`.

The structs are the schema: fields that they do not name are ignored, the others are checked while the JSON is decoded.
This module knows no tokens, no templates and no HTTP, and never changes a request.
Formats: https://docs.claude.com/en/api/messages and https://docs.claude.com/en/api/messages-count-tokens.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from serve.api import unread
from serve.api.mend import mended
from serve.api.stops import MAX_STOP_CHARS, MAX_STOPS
from serve.api.tools import Tool, ToolAdditionBlock, ToolDefinition, ToolReference, ToolRemovalBlock
from serve.api.validation import explain_error
from serve.limits.bodies import excess
from serve.limits.surrogates import mend_surrogates

Role = Literal["user", "assistant", "system"]

# Counts are stored in int32 arrays.
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
StopSequence = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
TOO_MANY_STOPS = re.compile(r"stop(_sequences)?: expected array of length <=")
StopSequences = Annotated[tuple[StopSequence, ...], Meta(max_length=MAX_STOPS)]


class TextBlock(Struct, frozen=True, tag="text"):
    """Text, in requests and in answers."""

    text: str


class ThinkingBlock(Struct, frozen=True, tag="thinking"):
    """Reasoning of the model, in requests and in answers. The signature may be empty."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Struct, frozen=True, tag="redacted_thinking"):
    """Reasoning that another server encrypted, and that this one cannot read."""

    data: str


class ToolUseBlock(Struct, frozen=True, tag="tool_use"):
    """A call of a tool by the model, in requests and in answers. The input keeps its key order."""

    id: str
    name: str
    input: dict[str, Any]


class ToolReferenceBlock(Struct, frozen=True, tag="tool_reference"):
    """The name of a tool whose definition a tool search found."""

    tool_name: str


class ImageBlock(Struct, frozen=True, tag="image"):
    """An image, which a text model cannot read. `mend` makes it of an image of any source, whose bytes it drops."""

    media_type: str  # empty if the request does not say it
    size: int  # bytes; 0 if unknown
    where: str = ""  # the URL without its query, or the id of a file

    @property
    def text(self) -> str:
        """What the model reads in its place."""
        return unread.image_text(self.media_type, self.size, self.where)


class TextSource(Struct, frozen=True, tag="text"):
    """The plain text of a document."""

    data: str

    @property
    def text(self) -> str:
        """The text."""
        return self.data


class ContentSource(Struct, frozen=True, tag="content"):
    """The text of a document, or its blocks."""

    content: str | tuple[TextBlock | ImageBlock, ...]

    @property
    def text(self) -> str:
        """The texts of the blocks, separated by blank lines."""
        if isinstance(self.content, str):
            return self.content
        return "\n\n".join(block.text for block in self.content if block.text)


class UnreadSource(Struct, frozen=True, tag="unread"):
    """A document that cannot be read, and why. `mend` makes it of sources that have no text."""

    media_type: str  # empty if the request does not say it
    size: int  # bytes; 0 if unknown
    reason: str
    where: str = ""  # the URL without its query, or the id of a file

    @property
    def text(self) -> str:
        """What the model reads in its place."""
        return unread.document_text(self.reason, self.media_type, self.size, self.where)


class DocumentBlock(Struct, frozen=True, tag="document"):
    """A document, with its title and context."""

    source: TextSource | ContentSource | UnreadSource
    title: str | None = None
    context: str | None = None

    @property
    def text(self) -> str:
        """Title, context and text, line by line."""
        return "\n".join(part for part in (self.title, self.context, self.source.text) if part)


class SearchResultBlock(Struct, frozen=True, tag="search_result"):
    """A passage that a search by the client found."""

    source: str
    title: str
    content: tuple[TextBlock, ...]

    @property
    def text(self) -> str:
        """Title, source and passages, line by line."""
        return "\n".join(part for part in (self.title, self.source, *(block.text for block in self.content)) if part)


class UnreadBlock(Struct, frozen=True, tag="unread"):
    """A block that has no struct of its own, or violates it, as a short text. Made by `mend`."""

    kind: str  # its type
    text: str  # what the model reads in its place


ResultBlock = TextBlock | DocumentBlock | SearchResultBlock | ToolReferenceBlock | ImageBlock | UnreadBlock


class ToolResultBlock(Struct, frozen=True, tag="tool_result"):
    """The result of the tool call `tool_use_id`. The call itself need not be in the conversation."""

    tool_use_id: str
    content: str | tuple[ResultBlock, ...] | None = None
    is_error: bool = False


OutputBlock = TextBlock | ThinkingBlock | ToolUseBlock
Block = OutputBlock | RedactedThinkingBlock | ToolResultBlock | ResultBlock | ToolAdditionBlock | ToolRemovalBlock


class InputMessage(Struct, frozen=True):
    """One message of the conversation. System messages may stand anywhere; a last assistant message is a prefill."""

    role: Role
    content: str | tuple[Block, ...]
    clear_at: Any = None  # `next_user_message`: a system message's text is gone once one follows


class ToolChoice(Struct, frozen=True):
    """Whether the model may call a tool (auto), must (any), must call the one of `name` (tool) or must not (none)."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Struct, frozen=True):
    """Whether the model thinks first: always (enabled), as it likes (adaptive, between_tools) or never.

    The budget is not checked.
    """

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: PositiveInt | None = None
    display: str | None = None  # `omitted`: the client wants the signatures only

    def __post_init__(self) -> None:
        """Raise ValueError for enabled thinking without a budget."""
        if self.type == "enabled" and self.budget_tokens is None:
            raise ValueError("expected budget_tokens with type 'enabled', got no budget_tokens")


class JsonSchemaFormat(Struct, frozen=True, tag="json_schema"):
    """The answer is JSON that satisfies a schema."""

    schema: dict[str, Any]


class OutputConfig(Struct, frozen=True):
    """The form of the answer, and how much effort it is worth."""

    effort: str | None = None
    format: JsonSchemaFormat | None = None


class CountTokensRequest(Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`: all that determines the prompt."""

    model: str
    messages: Annotated[tuple[InputMessage, ...], Meta(min_length=1)]
    system: str | tuple[TextBlock, ...] | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonSchemaFormat | None = None  # what the API's first beta had in place of `output_config.format`
    left_out_tools: tuple[str, ...] = ()  # types of the vendor's tools that only the vendor can run; set by `mend`
    places: tuple[int, ...] = ()  # of the messages in a request of OpenAI's APIs, from which these were made

    def __post_init__(self) -> None:
        """Raise ValueError if `tool_choice` needs a tool that is not in `tools`."""
        choice, names = self.tool_choice, {tool.name for tool in self.tools or ()}
        if choice and choice.type in ("any", "tool") and choice.name not in names:
            names |= _names_defined_in(self.messages)
        if choice and choice.type == "any" and not names:
            raise ValueError("tool_choice: expected 'any' together with tools, got no tools")
        if choice and choice.type == "tool" and choice.name not in names:
            left_out = f" (left out, as only their vendor can run them: {', '.join(self.left_out_tools)!s:.80})"
            found = f"{choice.name!r:.80}{left_out if self.left_out_tools else ''}"
            raise ValueError(f"tool_choice.name: expected the name of one of tools, got {found}")

    @property
    def answer_format(self) -> JsonSchemaFormat | None:
        """The form that the answer must have; None if it is free."""
        return (self.output_config.format if self.output_config else None) or self.output_format


class DiagnosticsRequest(Struct, frozen=True):
    """Asks why the cache missed the prefix of an earlier message; null for the first message of a conversation."""

    previous_message_id: str | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/messages`: a prompt and how to continue it."""

    max_tokens: Count  # 0: the prompt is computed for later requests, and not answered
    stream: bool = False
    stop_sequences: StopSequences | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    diagnostics: DiagnosticsRequest | UnsetType | None = UNSET
    safeguards: Any = None  # verdicts on tool calls that only the vendor gives


class SeededRequest(MessagesRequest, frozen=True, kw_only=True):
    """A request translated from an API that has a seed: the same prompt and seed give the same answer."""

    seed: int | None = None


class InvalidRequest(Exception):
    """A request that the API refuses. Its text names the field, what was expected and what was found."""

    type = "invalid_request_error"
    status = 400

    def __init__(self, text: str, limit: str = "") -> None:
        """`limit` is the name of the limit that the request goes beyond, if it is one."""
        super().__init__(text)
        self.limit = limit


def decode_request(body: bytes | bytearray) -> MessagesRequest:
    """Decode the body of `POST /v1/messages`. Raises InvalidRequest if it is not one."""
    return decode(_MESSAGES, body, _CHOICES, mended)


def decode_count_tokens(body: bytes | bytearray) -> CountTokensRequest:
    """Decode the body of `POST /v1/messages/count_tokens`. Raises InvalidRequest if it is not one."""
    return decode(_COUNT_TOKENS, body, _CHOICES, mended)


_MESSAGES = msgspec.json.Decoder(MessagesRequest)
_COUNT_TOKENS = msgspec.json.Decoder(CountTokensRequest)

R = TypeVar("R")


def decode(
    decoder: msgspec.json.Decoder[R],
    body: bytes | bytearray,
    choices: Mapping[str, str],
    mend: Callable[[Any], Any] | None = None,
) -> R:
    """Decode a body with the decoder of its schema. Raises InvalidRequest; `choices` as in `explain_error`.

    `mend`, if given, rewrites the JSON of a body that violates the schema, so that history which cannot be read costs
    no request. What the schema accepts, it leaves as it is.
    """
    if problem := excess(body):
        raise InvalidRequest(f"body: {problem}", "json_parts")
    try:
        return decoder.decode(body)
    # ValueError: malformed JSON, bad UTF-8 or a violated schema. RecursionError: JSON that is nested too deeply.
    except (ValueError, RecursionError) as error:
        if (readable := mend_surrogates(body)) is not body:
            return decode(decoder, readable, choices, mend)
        if mend is not None and isinstance(error, msgspec.ValidationError):
            return _decode_mended(decoder, body, choices, mend, error)
        raise _refusal(explain_error(error, body, choices)) from None


def _decode_mended(
    decoder: msgspec.json.Decoder[R],
    body: bytes | bytearray,
    choices: Mapping[str, str],
    mend: Callable[[Any], Any],
    violation: msgspec.ValidationError,
) -> R:
    """Decode a body after `mend`. Raises InvalidRequest for what is left, or for `violation` if nothing was mended."""
    try:
        plain = msgspec.json.decode(body)
        repaired = mend(plain)
    except (ValueError, RecursionError):  # such as a number that Python cannot hold
        raise _refusal(explain_error(violation, body, choices)) from None
    try:
        if repaired == plain:
            raise violation
        return msgspec.convert(repaired, decoder.type)
    except (msgspec.ValidationError, RecursionError) as error:
        same = error is violation or isinstance(error, RecursionError)
        shown = body if same else msgspec.json.encode(repaired)
        raise _refusal(explain_error(error, shown, choices)) from None


def _refusal(problem: str) -> InvalidRequest:
    """The refusal of a body that violates its schema."""
    return InvalidRequest(problem, "max_stop_sequences" if TOO_MANY_STOPS.match(problem) else "")


def _names_defined_in(messages: Iterable[InputMessage]) -> set[str]:
    """The names of the tools that are defined in mid-conversation."""
    blocks = (block for message in messages for block in message.content if isinstance(block, ToolAdditionBlock))
    return {block.tool.definition.name for block in blocks if isinstance(block.tool, ToolDefinition)}


def _tags(union: Any) -> str:
    """The tags of a union of structs, separated by commas."""
    return ", ".join(struct.__struct_config__.tag for struct in get_args(union) or (union,))


# The accepted values of fields that have a fixed set, for error texts only: the structs above decide.
_CHOICES = {
    "messages.role": ", ".join(get_args(Role)),
    "messages.content.type": _tags(Block),
    "messages.content.content.type": _tags(ResultBlock),
    "messages.content.tool.type": _tags(ToolReference | ToolDefinition),
    "system.type": _tags(TextBlock),
    "tools.type": "custom (the vendor's own tools are not available here)",
    "tool_choice.type": "auto, any, tool, none",
    "thinking.type": "enabled, adaptive, between_tools, disabled",
    "output_config.format.type": _tags(JsonSchemaFormat),
    "output_format.type": _tags(JsonSchemaFormat),
}
