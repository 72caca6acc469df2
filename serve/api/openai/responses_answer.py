"""The answer of the Responses API, translated from the Messages API: a stream of events, or a whole response.

Formats: https://platform.openai.com/docs/api-reference/responses/object and
https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
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
    MessageStart,
    Ping,
    Retained,
    SignatureDelta,
    StopReason,
    TextDelta,
    ThinkingDelta,
    Usage,
)
from serve.api.messages import OutputBlock, ToolUseBlock
from serve.api.openai.cache_diagnostics import CacheDiagnostics, cache_diagnostics
from serve.api.openai.common import PING, ToolMode, prompt_tokens
from serve.api.openai.output_items import (
    ClientCallItem,
    CustomCallItem,
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Status,
    block_content,
    completed_item,
    empty_item,
)
from serve.api.openai.responses_request import Reasoning, ResponsesRequest
from serve.api.openai.tools import ToolChoice, ToolSpec


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
    retention: tuple[Retained, ...] | UnsetType = UNSET  # an extension, as in the Messages API


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
    output: tuple[OutputItem, ...] = ()
    parallel_tool_calls: bool
    prompt_cache_diagnostics: CacheDiagnostics | UnsetType = UNSET  # only if the request asks for it
    reasoning: Reasoning
    temperature: float | None
    tool_choice: ToolMode | ToolChoice
    tools: tuple[ToolSpec, ...]
    top_p: float | None
    usage: ResponseUsage | None = None


class ResponseWriter:
    """Writes the answer to one request in the form of the Responses API, as events or whole.

    `created` is in seconds since 1970.
    """

    def __init__(self, request: ResponsesRequest, created: int) -> None:
        self.id = ""  # part of every id in the answer
        self.tools = request.callable_tools
        self.prewarms = request.prewarms
        self.response = Response(
            id="",
            created_at=created,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            model=request.model or "",
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning=request.reasoning or Reasoning(),
            temperature=request.temperature,
            tool_choice=request.tool_choice or "auto",
            tools=tuple(tool for tool in request.tools or () if tool.offered),
            top_p=request.top_p,
        )
        self.num_sent = 0  # events
        self.output: list[OutputItem] = []  # the complete items
        self.item: OutputItem = MessageItem("")  # the item in progress
        self.parts: list[str] = []  # its text so far
        self.signature = ""

    def begin(self, id: str, model: str) -> None:
        """Set the id of the message that is written, such as `msg_5b0c...`, and the name of the model."""
        self.id = id.removeprefix("msg_")
        self.response = replace(self.response, id=f"resp_{self.id}", model=model)

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
        self.diagnosed(message)
        items = [
            completed_item(self.empty_item(block, i), *block_content(block)) for i, block in enumerate(message.content)
        ]
        return msgspec.json.encode(self.final_response(message.stop_reason, message.usage, items))

    def events(self, event: Event) -> list[dict[str, Any]]:
        """The events for an event of the Messages API."""
        match event:
            case MessageStart(message):
                self.diagnosed(message)
            case ContentBlockStart(_, block):
                self.item, self.parts, self.signature = self.empty_item(block, len(self.output)), [], ""
                # A call of a type of its own has no form for a part of it: it is sent when it is complete.
                return [] if isinstance(self.item, ClientCallItem) else self.added_events(self.item)
            case ContentBlockDelta(_, SignatureDelta(signature)):
                self.signature = signature
            case ContentBlockDelta(_, TextDelta(more) | ThinkingDelta(more) | InputJsonDelta(more)):
                self.parts.append(more)
                return self.delta_events(more)
            case ContentBlockStop():
                text, late = "".join(self.parts), isinstance(self.item, ClientCallItem)
                self.item = completed_item(self.item, text, self.signature)
                events = self.added_events(replace(self.item, status="in_progress")) if late else []
                events += [*self.done_events(text), *self.part_events("done", text)]
                events.append(self.output_event("done", self.item))
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

    def empty_item(self, block: OutputBlock, index: int) -> OutputItem:
        """The item for a block, without content; `index` is its place in the output."""
        tool = self.tools.get(block.name) if isinstance(block, ToolUseBlock) else None
        return empty_item(block, f"{self.id}_{index}", tool)

    def diagnosed(self, message: Message) -> None:
        """Take over the diagnostics that the request asked for."""
        if message.diagnostics is not UNSET:
            self.response = replace(self.response, prompt_cache_diagnostics=cache_diagnostics(message.diagnostics))

    def final_response(self, reason: StopReason | None, usage: Usage, output: list[OutputItem]) -> Response:
        """The response when it is complete or cut short."""
        cut = None if self.prewarms else CUT_SHORT.get(reason)
        return replace(
            self.response,
            status="incomplete" if cut else "completed",
            incomplete_details=cut,
            output=tuple(output),
            usage=response_usage(usage),
        )

    def added_events(self, item: OutputItem) -> list[dict[str, Any]]:
        """The events that begin an item."""
        return [self.output_event("added", item), *self.part_events("added", "")]

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
        return []

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

    def output_event(self, kind: str, item: OutputItem) -> dict[str, Any]:
        """An event about an item as a whole."""
        return self.numbered_event(f"output_item.{kind}", output_index=len(self.output), item=item)

    def response_event(self, response: Response, kind: str) -> dict[str, Any]:
        """An event about the response."""
        return self.numbered_event(kind, response=response)

    def numbered_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next event, with its number."""
        self.num_sent += 1
        return {"type": f"response.{kind}", "sequence_number": self.num_sent - 1, **fields}


def response_usage(usage: Usage) -> ResponseUsage:
    """Token counts in OpenAI's form."""
    prompt = prompt_tokens(usage)
    return ResponseUsage(
        input_tokens=prompt,
        input_tokens_details=InputDetails(usage.cache_read_input_tokens, usage.cache_creation_input_tokens),
        output_tokens=usage.output_tokens,
        output_tokens_details=OutputDetails(),
        total_tokens=prompt + usage.output_tokens,
        retention=usage.retention,
    )
