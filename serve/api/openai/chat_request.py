"""The request of Chat Completions, and its translation to the Messages API.

Format: https://platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from serve.api.messages import (
    Block,
    ImageBlock,
    InputMessage,
    NonEmptyStr,
    PositiveInt,
    SeededRequest,
    StopSequence,
    StopSequences,
    TextBlock,
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


class ImagePart(ImageBlock, frozen=True, tag="image_url"):
    """An image, which is refused."""

    media_type: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError."""
        raise ValueError("expected text, got an image, which this model cannot read")


class SystemMessage(Struct, frozen=True, tag_field="role", tag="system"):
    """Instructions, at the start of the conversation or anywhere in it."""

    content: str | tuple[TextBlock, ...]


class DeveloperMessage(SystemMessage, frozen=True, tag_field="role", tag="developer"):
    """The newer name of a system message."""


class UserMessage(Struct, frozen=True, tag_field="role", tag="user"):
    """A message of the user."""

    content: str | tuple[TextBlock | ImagePart, ...]


class CalledFunction(Struct, frozen=True):
    """A function's name, and its arguments: a JSON object as text."""

    name: NonEmptyStr
    arguments: str


class ToolCall(Struct, frozen=True, tag="function"):
    """A tool call of the assistant."""

    id: str
    function: CalledFunction


class AssistantMessage(Struct, frozen=True, tag_field="role", tag="assistant"):
    """An earlier answer. `reasoning_content` is not in OpenAI's API; clients that keep reasoning send it so."""

    content: str | tuple[TextBlock | RefusalPart, ...] | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None


class ToolMessage(Struct, frozen=True, tag_field="role", tag="tool"):
    """The result of a tool call."""

    tool_call_id: str
    content: str | tuple[TextBlock | ImagePart, ...]


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class Function(Struct, frozen=True):
    """A function that the client runs. Without `parameters` it takes none."""

    name: NonEmptyStr
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FunctionTool(Struct, frozen=True, tag="function"):
    """A tool. Types other than function are refused."""

    function: Function


class FunctionName(Struct, frozen=True):
    """The name of one of the functions."""

    name: str


class NamedTool(Struct, frozen=True, tag="function"):
    """The one function that must be called."""

    function: FunctionName


class JsonSchema(Struct, frozen=True):
    """A schema. Its name is ignored."""

    schema: dict[str, Any] | None = None


class SchemaFormat(Struct, frozen=True, tag="json_schema"):
    """The answer is JSON that satisfies a schema, whether `strict` is set or not."""

    json_schema: JsonSchema


class StreamOptions(Struct, frozen=True):
    """Whether a stream ends with a chunk of token counts."""

    include_usage: bool | None = None


class ChatRequest(Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    model: str
    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1)]
    tools: tuple[FunctionTool, ...] | None = None
    tool_choice: ToolMode | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None
    reasoning_effort: str | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    stop: StopSequence | StopSequences | None = None
    seed: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None


# The accepted values of fields that have a fixed set, for error texts only: the structs above decide.
CHOICES = {
    "messages.role": "system, developer, user, assistant, tool",
    "messages.content.type": "text",
    "messages.tool_calls.type": "function",
    "tools.type": "function",
    "tool_choice": "none, auto, required",
    "tool_choice.type": "function",
    "response_format.type": "text, json_object, json_schema",
    "n": "1",
}

DECODER = msgspec.json.Decoder(ChatRequest)


def to_messages(chat: ChatRequest) -> SeededRequest:
    """A chat request as one of the Messages API. Raises InvalidRequest for errors that the schema does not catch."""
    head, rest = split_system([to_message(message, f"messages[{i}]") for i, message in enumerate(chat.messages)])
    tools = tuple(to_tool(tool.function) for tool in chat.tools or ())
    named = chat.tool_choice.function.name if isinstance(chat.tool_choice, NamedTool) else None
    mode = chat.tool_choice if isinstance(chat.tool_choice, str) else None
    return SeededRequest(
        model=chat.model,
        system=head or None,
        messages=rest,
        tools=tools or None,
        tool_choice=to_tool_choice(mode, named, chat.parallel_tool_calls, tools),
        thinking=to_thinking(chat.reasoning_effort),
        output_config=to_output_config(chat.reasoning_effort, wanted_schema(chat.response_format)),
        max_tokens=chat.max_completion_tokens or chat.max_tokens or UNLIMITED,
        stop_sequences=(chat.stop,) if isinstance(chat.stop, str) else chat.stop,
        temperature=chat.temperature,
        top_p=chat.top_p,
        stream=chat.stream is True,
        seed=chat.seed,
    )


def to_message(message: ChatMessage, where: str) -> InputMessage:
    """One message of a chat; `where` is its path."""
    match message:
        case SystemMessage(content):
            return InputMessage("system", content)
        case UserMessage(content):
            return InputMessage("user", content)
        case ToolMessage(call, content):
            return InputMessage("user", (ToolResultBlock(call, content),))
        case AssistantMessage():
            return InputMessage("assistant", tuple(answer_blocks(message, where)))


def answer_blocks(answer: AssistantMessage, where: str) -> list[Block]:
    """The blocks of an earlier answer, in the order in which models write them: reasoning, text, calls."""
    blocks: list[Block] = []
    if answer.reasoning_content:
        blocks.append(ThinkingBlock(answer.reasoning_content))
    content = (TextBlock(answer.content),) if isinstance(answer.content, str) else answer.content or ()
    blocks += [TextBlock(part.text) for part in content if part.text]
    for i, call in enumerate(answer.tool_calls or ()):
        arguments = parse_arguments(call.function.arguments, f"{where}.tool_calls[{i}].function.arguments")
        blocks.append(ToolUseBlock(call.id, call.function.name, arguments))
    return blocks


def to_tool(function: Function) -> Tool:
    """A function as a tool."""
    schema = NO_INPUT if function.parameters is None else function.parameters
    return Tool(function.name, schema, function.description)


def wanted_schema(format: TextFormat | JsonFormat | SchemaFormat | None) -> dict[str, Any] | None:
    """The schema that the answer must satisfy, or None."""
    match format:
        case JsonFormat():
            return ANY_OBJECT
        case SchemaFormat(JsonSchema(schema)):
            return ANY_OBJECT if schema is None else schema
    return None
