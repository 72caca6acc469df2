"""The answer of the Responses API, translated from the Messages API: a stream of events, or a whole response.

Formats: https://platform.openai.com/docs/api-reference/responses/object and
https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from serve.api.answers import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    Error,
    Event,
    InputJsonDelta,
    Message,
    MessageDelta,
    Ping,
    SignatureDelta,
    StopReason,
    TextDelta,
    ThinkingDelta,
    Usage,
)
from serve.api.messages import OutputBlock, TextBlock, ThinkingBlock, ToolUseBlock
from serve.api.openai.common import PING, ToolMode, prompt_tokens
from serve.api.openai.responses_request import (
    CALLABLE,
    NamedTool,
    OutputText,
    Reasoning,
    ReasoningText,
    ResponsesRequest,
    SummaryText,
    ToolSpec,
    callable_tools,
)

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class MessageItem(Struct, frozen=True, tag="message"):
    """Text of the answer."""

    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: tuple[OutputText, ...] = ()


class ReasoningItem(Struct, frozen=True, tag="reasoning"):
    """Reasoning of the answer. `encrypted_content` is its signature here; clients send back both."""

    id: str
    status: Status = "in_progress"
    summary: tuple[SummaryText, ...] = ()
    content: tuple[ReasoningText, ...] = ()
    encrypted_content: str | None = None


class FunctionCallItem(Struct, frozen=True, tag="function_call"):
    """A call of a function."""

    id: str
    call_id: str
    name: str
    namespace: str | None
    status: Status = "in_progress"
    arguments: str = ""


class CustomCallItem(Struct, frozen=True, tag="custom_tool_call"):
    """A call of a tool that takes any text."""

    id: str
    call_id: str
    name: str
    namespace: str | None
    status: Status = "in_progress"
    input: str = ""


Item = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem


class InputDetails(Struct, frozen=True):
    """How many tokens of the prompt were read from the cache, and how many were written to it."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Struct, frozen=True):
    """Tokens of reasoning, which are not counted separately here."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    """Token counts. The input is counted whole, cached or not."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(Struct, frozen=True):
    """Why a response failed."""

    message: str
    code: str = "server_error"


class IncompleteDetails(Struct, frozen=True):
    """Why a response ended early."""

    reason: str


CUT_SHORT: dict[StopReason | None, IncompleteDetails] = {
    "max_tokens": IncompleteDetails("max_output_tokens"),
    "model_context_window_exceeded": IncompleteDetails("max_output_tokens"),
    "refusal": IncompleteDetails("content_filter"),
}


class Response(Struct, frozen=True, kw_only=True):
    """A response, complete or in progress."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: tuple[Item, ...] = ()
    parallel_tool_calls: bool
    reasoning: Reasoning
    temperature: float | None
    tool_choice: ToolMode | NamedTool
    tools: tuple[ToolSpec, ...]
    top_p: float | None
    usage: ResponseUsage | None = None


class ResponseWriter:
    """Writes the answer to one request in the form of the Responses API, as events or whole.

    `id` is part of every id in the answer; `created` is in seconds since 1970.
    """

    def __init__(self, request: ResponsesRequest, id: str, created: int) -> None:
        self.id = id
        self.tools = callable_tools(request.tools or ())
        self.response = Response(
            id=f"resp_{id}",
            created_at=created,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            model=request.model,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning=request.reasoning or Reasoning(),
            temperature=request.temperature,
            tool_choice=request.tool_choice or "auto",
            tools=tuple(tool for tool in request.tools or () if tool.type in CALLABLE),
            top_p=request.top_p,
        )
        self.num_sent = 0  # events
        self.output: list[Item] = []  # the complete items
        self.item: Item = MessageItem("")  # the item in progress
        self.parts: list[str] = []  # its text so far
        self.signature = ""

    def event(self, event: Event) -> bytes:
        """An event of the Messages API as server-sent events: none, one or several."""
        events = (
            []
            if self.num_sent
            else [self.response_event(self.response, "created"), self.response_event(self.response, "in_progress")]
        )
        events += self.events(event)
        data = b"".join(f"event: {e['type']}\ndata: ".encode() + msgspec.json.encode(e) + b"\n\n" for e in events)
        return data + PING if isinstance(event, Ping) else data

    def whole(self, message: Message) -> bytes:
        """The body of a response."""
        items = [
            completed_item(self.empty_item(block, i), *block_content(block)) for i, block in enumerate(message.content)
        ]
        return msgspec.json.encode(self.final_response(message.stop_reason, message.usage, items))

    def events(self, event: Event) -> list[dict[str, Any]]:
        """The events for an event of the Messages API."""
        match event:
            case ContentBlockStart(_, block):
                self.item, self.parts, self.signature = self.empty_item(block, len(self.output)), [], ""
                return [self.output_event("added"), *self.part_events("added", "")]
            case ContentBlockDelta(_, SignatureDelta(signature)):
                self.signature = signature
            case ContentBlockDelta(_, TextDelta(more) | ThinkingDelta(more) | InputJsonDelta(more)):
                self.parts.append(more)
                return self.delta_events(more)
            case ContentBlockStop():
                text = "".join(self.parts)
                self.item = completed_item(self.item, text, self.signature)
                events = [*self.done_events(text), *self.part_events("done", text), self.output_event("done")]
                self.output.append(self.item)
                return events
            case MessageDelta(stop, usage):
                response = self.final_response(stop.stop_reason, usage, self.output)
                return [self.response_event(response, response.status)]
            case Error(detail):
                error = ResponseError(detail.message)
                failed = replace(self.response, status="failed", error=error, output=tuple(self.output))
                return [self.response_event(failed, "failed")]
        return []

    def empty_item(self, block: OutputBlock, index: int) -> Item:
        """The item for a block, without content; `index` is its place in the output."""
        match block:
            case TextBlock():
                return MessageItem(f"msg_{self.id}_{index}")
            case ThinkingBlock():
                return ReasoningItem(f"rs_{self.id}_{index}")
            case ToolUseBlock(call, name):
                tool = self.tools.get(name)
                own, namespace = (tool.spec.name, tool.namespace) if tool else (name, None)
                if tool and tool.custom:
                    return CustomCallItem(f"ctc_{self.id}_{index}", call, own, namespace)
                return FunctionCallItem(f"fc_{self.id}_{index}", call, own, namespace)

    def final_response(self, reason: StopReason | None, usage: Usage, output: list[Item]) -> Response:
        """The response when it is complete or cut short."""
        cut = CUT_SHORT.get(reason)
        return replace(
            self.response,
            status="incomplete" if cut else "completed",
            incomplete_details=cut,
            output=tuple(output),
            usage=response_usage(usage),
        )

    def delta_events(self, more: str) -> list[dict[str, Any]]:
        """Events for more text of the item. A custom tool's input is sent only when it is complete."""
        match self.item:
            case MessageItem():
                return [self.item_event("output_text.delta", content_index=0, delta=more, logprobs=())]
            case ReasoningItem():
                return [self.item_event("reasoning_text.delta", content_index=0, delta=more)]
            case FunctionCallItem():
                return [self.item_event("function_call_arguments.delta", delta=more)]
        return []

    def done_events(self, text: str) -> list[dict[str, Any]]:
        """Events for the end of the item's text."""
        match self.item:
            case MessageItem():
                return [self.item_event("output_text.done", content_index=0, text=text, logprobs=())]
            case ReasoningItem():
                return [self.item_event("reasoning_text.done", content_index=0, text=text)]
            case FunctionCallItem(name=name, arguments=arguments):
                return [self.item_event("function_call_arguments.done", name=name, arguments=arguments)]
            case CustomCallItem(input=text):
                delta = self.item_event("custom_tool_call_input.delta", delta=text)
                return [delta, self.item_event("custom_tool_call_input.done", input=text)]

    def part_events(self, kind: str, text: str) -> list[dict[str, Any]]:
        """The event about an item's only part, if it has parts."""
        match self.item:
            case MessageItem():
                return [self.item_event(f"content_part.{kind}", content_index=0, part=OutputText(text))]
            case ReasoningItem():
                return [self.item_event(f"content_part.{kind}", content_index=0, part=ReasoningText(text))]
        return []

    def item_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event about the content of the item."""
        return self.numbered_event(kind, item_id=self.item.id, output_index=len(self.output), **fields)

    def output_event(self, kind: str) -> dict[str, Any]:
        """An event about the item as a whole."""
        return self.numbered_event(f"output_item.{kind}", output_index=len(self.output), item=self.item)

    def response_event(self, response: Response, kind: str) -> dict[str, Any]:
        """An event about the response."""
        return self.numbered_event(kind, response=response)

    def numbered_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next event, with its number."""
        self.num_sent += 1
        return {"type": f"response.{kind}", "sequence_number": self.num_sent - 1, **fields}


def block_content(block: OutputBlock) -> tuple[str, str]:
    """The text and the signature of a block, as its deltas would have sent them."""
    match block:
        case TextBlock(text):
            return text, ""
        case ThinkingBlock(text, signature):
            return text, signature
        case ToolUseBlock(input=arguments):
            return msgspec.json.encode(arguments).decode(), ""


def completed_item(item: Item, text: str, signature: str) -> Item:
    """An item with its content."""
    match item:
        case MessageItem():
            return replace(item, status="completed", content=(OutputText(text),))
        case ReasoningItem():
            return replace(
                item, status="completed", content=(ReasoningText(text),), encrypted_content=signature or None
            )
        case FunctionCallItem():
            return replace(item, status=call_status(text), arguments=text)
        case CustomCallItem():
            return replace(item, status=call_status(text), input=custom_input(text))


def call_status(arguments: str) -> Status:
    """The status of a call: incomplete if its arguments were cut off."""
    try:
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return "incomplete"
    return "completed"


def custom_input(arguments: str) -> str:
    """The text for a custom tool: `input` of the arguments that the model wrote, or all of them without one.

    Arguments that were cut off are returned as they are.
    """
    if call_status(arguments) == "incomplete":
        return arguments
    text = msgspec.json.decode(arguments).get("input")
    return text if isinstance(text, str) else arguments


def response_usage(usage: Usage) -> ResponseUsage:
    """Token counts in OpenAI's form."""
    prompt = prompt_tokens(usage)
    return ResponseUsage(
        input_tokens=prompt,
        input_tokens_details=InputDetails(usage.cache_read_input_tokens, usage.cache_creation_input_tokens),
        output_tokens=usage.output_tokens,
        output_tokens_details=OutputDetails(),
        total_tokens=prompt + usage.output_tokens,
    )
