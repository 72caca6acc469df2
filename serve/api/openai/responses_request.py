"""The request of the Responses API, and its translation to the Messages API, as far as agents with tools need it.

Responses are not stored: each request brings its whole conversation, reasoning included.
Format: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from serve.api.messages import (
    ImageBlock,
    InputMessage,
    InvalidRequest,
    MessagesRequest,
    PositiveInt,
    RedactedThinkingBlock,
    TextBlock,
    Thinking,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
)
from serve.api.openai.common import (
    ANY_OBJECT,
    NO_INPUT,
    UNLIMITED,
    JsonFormat,
    RefusalPart,
    TextFormat,
    ToolMode,
    parse_arguments,
    split_system,
    to_output_config,
    to_thinking,
    to_tool_choice,
)


class InputText(Struct, frozen=True, tag="input_text"):
    """Text of a user, a developer or a tool."""

    text: str


class OutputText(Struct, frozen=True, tag="output_text"):
    """Text of the assistant, in requests and in responses."""

    text: str
    annotations: tuple[Any, ...] = ()


class ReasoningText(Struct, frozen=True, tag="reasoning_text"):
    """The model's reasoning, in requests and in responses."""

    text: str


class SummaryText(Struct, frozen=True, tag="summary_text"):
    """A summary of another server's reasoning."""

    text: str


class InputImage(ImageBlock, frozen=True, tag="input_image"):
    """An image, which is refused."""

    media_type: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError."""
        raise ValueError("expected text, got an image, which this model cannot read")


CALLABLE = ("function", "custom", "namespace")  # the types of tools that are offered to the model
TEXT_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}

Part = InputText | OutputText | ReasoningText | TextBlock | RefusalPart | InputImage

# The fields that an item of each type must have.
ITEMS: Mapping[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "reasoning": (),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
}


class Item(Struct, frozen=True, kw_only=True):
    """One item of the conversation. Without a type it is a message."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | tuple[Part, ...] | None = None
    summary: tuple[SummaryText, ...] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | tuple[Part, ...] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for other types and for missing fields."""
        if self.type not in ITEMS:
            raise ValueError(f"expected an item of type {', '.join(ITEMS)}, got {self.type!r:.80}")
        for field in ITEMS[self.type]:
            if getattr(self, field) is None:
                raise ValueError(f"expected {field} in an item of type {self.type}, got none")


class ToolSpec(Struct, frozen=True, omit_defaults=True):
    """A tool: a `function`, a `custom` tool that takes any text, or a `namespace` of these. Others are ignored."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: tuple[ToolSpec, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a tool without a name."""
        if self.type in CALLABLE and not self.name:
            raise ValueError(f"expected a name in a tool of type {self.type}, got none")


class NamedTool(Struct, frozen=True):
    """The one tool that must be called."""

    type: Literal["function", "custom"]
    name: str


class SchemaFormat(Struct, frozen=True, tag="json_schema"):
    """The answer is JSON that satisfies a schema, whether `strict` is set or not."""

    schema: dict[str, Any]


class TextOptions(Struct, frozen=True):
    """The format of the answer's text."""

    format: TextFormat | JsonFormat | SchemaFormat | None = None


class Reasoning(Struct, frozen=True):
    """How much to reason. A client that asks for a summary gets the reasoning itself."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/responses`."""

    model: str
    input: str | Annotated[tuple[Item, ...], Meta(min_length=1)]
    instructions: str | None = None
    tools: tuple[ToolSpec, ...] | None = None
    tool_choice: ToolMode | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_output_tokens: PositiveInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for fields that need stored responses."""
        for field in ("previous_response_id", "conversation", "prompt", "background"):
            if getattr(self, field):
                raise ValueError(f"{field}: expected none, as nothing is stored here: send the whole input")


# The accepted values of fields that have a fixed set, for error texts only: the structs above decide.
CHOICES = {
    "input.role": "user, assistant, system, developer",
    "input.content.type": "input_text, output_text, reasoning_text, text, refusal",
    "input.output.type": "input_text, text",
    "input.summary.type": "summary_text",
    "tool_choice": "none, auto, required",
    "tool_choice.type": "function, custom",
    "text.format.type": "text, json_object, json_schema",
}

DECODER = msgspec.json.Decoder(ResponsesRequest)


def to_messages(request: ResponsesRequest) -> MessagesRequest:
    """A request of the Responses API as one of the Messages API.

    Raises InvalidRequest for errors that the schema does not catch.
    """
    items = (Item(role="user", content=request.input),) if isinstance(request.input, str) else request.input
    said = [message for i, item in enumerate(items) if (message := to_message(item, f"input[{i}]"))]
    if not said:
        raise InvalidRequest("input: expected at least one message, got only reasoning that is not here")
    head, rest = split_system(said)
    instructions = (TextBlock(request.instructions),) if request.instructions else ()
    tools = tuple(to_tool(name, tool) for name, tool in callable_tools(request.tools or ()).items())
    reasoning = request.reasoning or Reasoning()
    return MessagesRequest(
        model=request.model,
        system=(*instructions, *head) or None,
        messages=rest,
        tools=tools or None,
        tool_choice=to_tool_choice(
            request.tool_choice if isinstance(request.tool_choice, str) else None,
            request.tool_choice.name if isinstance(request.tool_choice, NamedTool) else None,
            request.parallel_tool_calls,
            tools,
        ),
        thinking=to_thinking(reasoning.effort) or (Thinking("adaptive") if reasoning.summary else None),
        output_config=to_output_config(reasoning.effort, wanted_schema(request.text)),
        max_tokens=request.max_output_tokens or UNLIMITED,
        temperature=request.temperature,
        top_p=request.top_p,
        stream=request.stream is True,
    )


def to_message(item: Item, where: str) -> InputMessage | None:
    """An item as a message, or None if it is empty. `where` is its path. Messages of one turn are joined later."""
    match item:
        case Item(type="message", role=role, content=content):
            assert role is not None
            role = "system" if role == "developer" else role
            return InputMessage(role, content if isinstance(content, str) else text_blocks(content or ()))
        case Item(type="reasoning"):
            return reasoning_message(item)
        case Item(type="function_call", call_id=str(id), name=str(name), arguments=str(arguments)):
            called = parse_arguments(arguments, f"{where}.arguments")
            return InputMessage("assistant", (ToolUseBlock(id, full_name(item.namespace, name), called),))
        case Item(type="custom_tool_call", call_id=str(id), name=str(name), input=text):
            return InputMessage("assistant", (ToolUseBlock(id, full_name(item.namespace, name), {"input": text}),))
        case Item(call_id=str(id), output=output):
            result = output if isinstance(output, str) else text_blocks(output or ())
            return InputMessage("user", (ToolResultBlock(id, result),))
    raise AssertionError(f"an item of type {item.type} has its fields")


def reasoning_message(item: Item) -> InputMessage | None:
    """The message of a reasoning item: its text, another server's encrypted reasoning, or None without either."""
    content = (
        item.content if isinstance(item.content, str) else "".join(p.text for p in text_blocks(item.content or ()))
    )
    thinking = content or "\n\n".join(part.text for part in item.summary or ())
    if thinking:
        return InputMessage("assistant", (ThinkingBlock(thinking, item.encrypted_content or ""),))
    if item.encrypted_content:
        return InputMessage("assistant", (RedactedThinkingBlock(item.encrypted_content),))
    return None


def text_blocks(parts: Sequence[Part]) -> tuple[TextBlock, ...]:
    """The text blocks of an item's parts."""
    return tuple(TextBlock(part.text) for part in parts if not isinstance(part, InputImage))


def wanted_schema(text: TextOptions | None) -> dict[str, Any] | None:
    """The schema that the answer must satisfy, or None."""
    match text and text.format:
        case JsonFormat():
            return ANY_OBJECT
        case SchemaFormat(schema):
            return schema
    return None


@dataclass(frozen=True)
class CallableTool:
    """A tool that the model can call, and its namespace."""

    spec: ToolSpec
    namespace: str | None

    @property
    def custom(self) -> bool:
        """Whether its input is any text instead of JSON."""
        return self.spec.type == "custom"


def callable_tools(tools: Sequence[ToolSpec], namespace: str | None = None) -> dict[str, CallableTool]:
    """The tools that the model can call, by the names that it calls them by.

    OpenAI's own tools, such as its web search, are left out: agents list them for every server.
    """
    tools_by_name: dict[str, CallableTool] = {}
    for spec in tools:
        if spec.type == "namespace":
            tools_by_name |= callable_tools(spec.tools, spec.name)
        elif spec.type in CALLABLE:
            tools_by_name[full_name(namespace, spec.name)] = CallableTool(spec, namespace)
    return tools_by_name


def full_name(namespace: str | None, name: str) -> str:
    """The name by which the model calls a tool."""
    return f"{namespace}__{name}" if namespace else name


def to_tool(name: str, tool: CallableTool) -> Tool:
    """A tool of the Messages API. A custom tool gets its text as its only argument, `input`."""
    schema = TEXT_INPUT if tool.custom else tool.spec.parameters
    return Tool(name, NO_INPUT if schema is None else schema, tool.spec.description)
