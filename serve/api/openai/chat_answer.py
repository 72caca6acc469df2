"""The answer of Chat Completions, translated from the Messages API: a stream of chunks, or a whole completion.

Formats: https://platform.openai.com/docs/api-reference/chat/object and
https://platform.openai.com/docs/api-reference/chat-streaming.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from serve.api.answers import (
    ERROR_STATUS,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    Error,
    Event,
    FunctionCall,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    Ping,
    Retained,
    StopReason,
    TextDelta,
    ThinkingDelta,
    Usage,
    written_arguments,
)
from serve.api.messages import TextBlock, ThinkingBlock, ToolUseBlock
from serve.api.openai.common import PING, custom_input, prompt_tokens
from serve.api.openai.errors import error_of

FinishReason = Literal["stop", "length", "tool_calls", "function_call", "content_filter"]
FINISH: dict[StopReason | None, FinishReason] = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class PromptTokensDetails(Struct, frozen=True):
    """How many tokens of the prompt were read from the cache."""

    cached_tokens: int


class ChatUsage(Struct, frozen=True):
    """Token counts. The prompt is counted whole, cached or not."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    retention: tuple[Retained, ...] | UnsetType = UNSET  # an extension, as in the Messages API


class PartialFunction(Struct, frozen=True, omit_defaults=True):
    """More of a function's arguments, and in its first chunk its name."""

    arguments: str
    name: str | None = None


class PartialCustom(Struct, frozen=True, omit_defaults=True):
    """The text for a custom tool, and in its first chunk the tool's name."""

    input: str
    name: str | None = None


class PartialCall(Struct, frozen=True, omit_defaults=True):
    """More of call number `index`. Its first chunk has the id."""

    index: int
    function: PartialFunction | None = None
    custom: PartialCustom | None = None
    id: str | None = None
    type: str | None = None


class Delta(Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[PartialCall, ...] | None = None
    function_call: PartialFunction | None = None  # the older form of a call


class ChunkChoice(Struct, frozen=True):
    """The only choice, number 0."""

    delta: Delta
    finish_reason: FinishReason | None = None
    index: int = 0


class Chunk(Struct, frozen=True, kw_only=True):
    """One piece of a stream. If usage is asked for, all chunks have the field, and the last one has the counts."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: ChatUsage | UnsetType | None = UNSET


class CompleteCall(Struct, frozen=True, tag="function"):
    """A tool call of the answer."""

    id: str
    function: FunctionCall


class CustomInput(Struct, frozen=True):
    """The name of a custom tool, and the text for it."""

    name: str
    input: str


class CustomCall(Struct, frozen=True, tag="custom"):
    """A call of a custom tool in the answer."""

    id: str
    custom: CustomInput


class ChatAnswer(Struct, frozen=True, kw_only=True):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: tuple[CompleteCall | CustomCall, ...] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET
    refusal: None = None


class CompletionChoice(Struct, frozen=True):
    """The only choice, number 0."""

    message: ChatAnswer
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None


class Completion(Struct, frozen=True, kw_only=True):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: ChatUsage


class ChatWriter:
    """Writes one answer in the form of Chat Completions, as chunks or whole.

    `created` is in seconds since 1970; `custom` names the tools that take any text. A `legacy` client gets its one call
    in the older form, as `function_call`.
    """

    def __init__(
        self, created: int, with_usage: bool = False, custom: frozenset[str] = frozenset(), legacy: bool = False
    ) -> None:
        self.created, self.with_usage, self.custom, self.legacy = created, with_usage, custom, legacy
        self.id = self.model = ""
        self.calls = 0  # that have begun
        self.custom_parts: list[str] | None = None  # the arguments so far, within a call of a custom tool

    def begin(self, id: str, model: str) -> None:
        """Do nothing: the first event has the id and the model."""

    def event(self, event: Event) -> bytes:
        """An event of the Messages API as server-sent events: none, one or several."""
        match event:
            case Ping():
                return PING
            case Error(detail):
                return sse_data(error_of(ERROR_STATUS.get(detail.type, 500), detail.message))
            case MessageStop():
                return b"data: [DONE]\n\n"
        return b"".join(sse_data(chunk) for chunk in self.chunks(event))

    def whole(self, message: Message) -> bytes:
        """The body of a chat completion."""
        return msgspec.json.encode(completion(message, self.created, self.custom, self.legacy))

    def chunks(self, event: Event) -> list[Chunk]:
        """The chunks for an event of the Messages API."""
        match event:
            case MessageStart(message):
                self.id, self.model = completion_id(message), message.model
                return [self.chunk(Delta(role="assistant", content=""))]
            case ContentBlockStart(_, ToolUseBlock(id, name)):
                self.calls += 1
                self.custom_parts = [] if name in self.custom else None
                return [self.chunk(self.call_delta(PartialFunction("", name), id))]
            case ContentBlockDelta(_, TextDelta(text)):
                return [self.chunk(Delta(content=text))]
            case ContentBlockDelta(_, ThinkingDelta(text)):
                return [self.chunk(Delta(reasoning_content=text))]
            case ContentBlockDelta(_, InputJsonDelta(more)) if self.custom_parts is not None:
                self.custom_parts.append(more)
            case ContentBlockDelta(_, InputJsonDelta(more)):
                return [self.chunk(self.call_delta(PartialFunction(more)))]
            case ContentBlockStop() if self.custom_parts is not None:
                whole = self.call_delta(PartialFunction(custom_input("".join(self.custom_parts))))
                self.custom_parts = None
                return [self.chunk(whole)]
            case MessageDelta(stop, usage):
                last = self.chunk(Delta(), finish_reason(stop.stop_reason, self.legacy))
                counts = msgspec.structs.replace(last, choices=(), usage=chat_usage(usage))
                return [last, counts] if self.with_usage else [last]
        return []

    def call_delta(self, more: PartialFunction, id: str | None = None) -> Delta:
        """More of the latest call, in the form of its tool; `id` belongs to its first piece."""
        if self.legacy:
            return Delta(function_call=more)
        index = self.calls - 1
        if self.custom_parts is None:
            return Delta(tool_calls=(PartialCall(index, more, None, id, id and "function"),))
        custom = PartialCustom(more.arguments, more.name)
        return Delta(tool_calls=(PartialCall(index, None, custom, id, id and "custom"),))

    def chunk(self, delta: Delta, finish_reason: FinishReason | None = None) -> Chunk:
        """A chunk of this answer."""
        return Chunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=(ChunkChoice(delta, finish_reason),),
            usage=None if self.with_usage else UNSET,
        )


def completion(
    message: Message, created: int, custom: frozenset[str] = frozenset(), legacy: bool = False
) -> Completion:
    """A message as a chat completion. `created`, `custom` and `legacy` as in ChatWriter."""
    text = "".join(block.text for block in message.content if isinstance(block, TextBlock))
    thinking = "".join(block.thinking for block in message.content if isinstance(block, ThinkingBlock))
    calls = tuple(complete_call(block, custom) for block in message.content if isinstance(block, ToolUseBlock))
    older = calls[0].function if legacy and calls and isinstance(calls[0], CompleteCall) else UNSET
    answer = ChatAnswer(
        content=text or (None if calls else ""),
        reasoning_content=thinking or UNSET,
        tool_calls=UNSET if legacy else calls or UNSET,
        function_call=older,
    )
    return Completion(
        id=completion_id(message),
        created=created,
        model=message.model,
        choices=(CompletionChoice(answer, finish_reason(message.stop_reason, legacy)),),
        usage=chat_usage(message.usage),
    )


def complete_call(block: ToolUseBlock, custom: frozenset[str]) -> CompleteCall | CustomCall:
    """A call in the form of its tool."""
    arguments = written_arguments(block.input)
    if block.name in custom:
        return CustomCall(block.id, CustomInput(block.name, custom_input(arguments)))
    return CompleteCall(block.id, FunctionCall(block.name, arguments))


def finish_reason(reason: StopReason | None, legacy: bool) -> FinishReason:
    """Why the answer ended."""
    return "function_call" if legacy and reason == "tool_use" else FINISH.get(reason, "stop")


def completion_id(message: Message) -> str:
    """The id of a message's completion."""
    return f"chatcmpl-{message.id.removeprefix('msg_')}"


def chat_usage(usage: Usage) -> ChatUsage:
    """Token counts in OpenAI's form."""
    prompt, output = prompt_tokens(usage), usage.output_tokens
    details = PromptTokensDetails(usage.cache_read_input_tokens)
    return ChatUsage(prompt, output, prompt + output, details, usage.retention)


def sse_data(data: Struct) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
