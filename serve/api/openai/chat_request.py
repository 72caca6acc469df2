"""The request of Chat Completions, and its translation to the Messages API.

Format: https://platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from serve.api.messages import (
    Block,
    InputMessage,
    InvalidRequest,
    PositiveInt,
    SeededRequest,
    StopSequence,
    StopSequences,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from serve.api.openai.common import (
    ANY_OBJECT,
    NO_INPUT,
    UNLIMITED,
    JsonFormat,
    TextFormat,
    ToolMode,
    call_input,
    refuse_logprobs,
    split_system,
    to_output_config,
    to_thinking,
    to_tool_choice,
)
from serve.api.openai.content import (
    answer_content,
    plain_text,
    result_content,
    system_content,
    unread_item,
    user_content,
)
from serve.api.openai.tools import TEXT_INPUT
from serve.api.tools import NonEmptyStr, Tool


class ChatMessage(Struct, frozen=True):
    """A message of any role. Only its role is checked: history that cannot be read becomes a short text.

    `reasoning_content` and `reasoning` are not in OpenAI's API; clients that keep reasoning send it so. `function_call`
    is the older form of a tool call.
    """

    role: str
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    tool_call_id: Any = None
    name: Any = None


class Function(Struct, frozen=True):
    """A function that the client runs. Without `parameters` it takes none."""

    name: NonEmptyStr
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ChatTool(Struct, frozen=True):
    """A tool: a function, or a custom tool that takes any text. Other types are left out: only OpenAI runs them."""

    type: str | None = None
    function: Function | None = None
    custom: Function | None = None

    @property
    def kind(self) -> str:
        """Its type."""
        return self.type or "function"


class Named(Struct, frozen=True):
    """The name of a tool."""

    name: str


class NamedFunction(Struct, frozen=True, tag="function"):
    """The one function that must be called."""

    function: Named


class NamedCustom(Struct, frozen=True, tag="custom"):
    """The one custom tool that must be called."""

    custom: Named


class AllowedTools(Struct, frozen=True):
    """The tools that may be called, or must."""

    mode: Literal["auto", "required"]
    tools: tuple[NamedFunction | NamedCustom, ...]


class AllowedChoice(Struct, frozen=True, tag="allowed_tools"):
    """The choice of some of the tools."""

    allowed_tools: AllowedTools


class JsonSchema(Struct, frozen=True):
    """A schema. Its name is ignored."""

    schema: dict[str, Any] | None = None


class SchemaFormat(Struct, frozen=True, tag="json_schema"):
    """The answer is JSON that satisfies a schema, whether `strict` is set or not."""

    json_schema: JsonSchema


class StreamOptions(Struct, frozen=True):
    """Whether a stream ends with a chunk of token counts."""

    include_usage: bool | None = None


class PromptCacheOptions(Struct, frozen=True):
    """Whether only to fill the cache."""

    prewarm: bool | None = None


class ChatRequest(Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/chat/completions`. `functions` and `function_call` are the older form of tools."""

    model: str | None = None
    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1)]
    tools: tuple[ChatTool, ...] | None = None
    tool_choice: ToolMode | NamedFunction | NamedCustom | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: tuple[Function, ...] | None = None
    function_call: Literal["none", "auto"] | Named | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None
    reasoning_effort: str | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    stop: StopSequence | StopSequences | None = None
    seed: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Any = None
    top_logprobs: Any = None

    def __post_init__(self) -> None:
        """Raise ValueError for log probabilities."""
        refuse_logprobs(logprobs=self.logprobs, top_logprobs=self.top_logprobs)

    @property
    def custom_names(self) -> frozenset[str]:
        """The names of the tools that take any text."""
        return frozenset(tool.custom.name for tool in self.tools or () if tool.kind == "custom" and tool.custom)

    @property
    def legacy(self) -> bool:
        """Whether the client expects its calls in the older form."""
        return bool(self.functions) and not self.tools


# The accepted values of fields that have a fixed set, for error texts only: the structs above decide.
CHOICES = {
    "tool_choice": "none, auto, required",
    "tool_choice.type": "function, custom, allowed_tools (other tools are not available here)",
    "tool_choice.allowed_tools.mode": "auto, required",
    "tool_choice.allowed_tools.tools.type": "function, custom",
    "function_call": "none, auto",
    "response_format.type": "text, json_object, json_schema",
    "n": "1",
}

DECODER = msgspec.json.Decoder(ChatRequest)


def to_messages(chat: ChatRequest) -> SeededRequest:
    """A chat request as one of the Messages API. Raises InvalidRequest for errors that the schema does not catch."""
    head, rest = split_system([to_message(message) for message in chat.messages])
    mode, named, parallel = chosen(chat)
    tools = offered_tools(chat)
    if isinstance(chat.tool_choice, AllowedChoice):
        tools = allowed(chat.tool_choice.allowed_tools, tools)
    prewarms = chat.prompt_cache_options is not None and chat.prompt_cache_options.prewarm is True
    return SeededRequest(
        model=chat.model or "",
        system=head or None,
        messages=rest,
        tools=tools or None,
        tool_choice=to_tool_choice(mode, named, parallel, tools),
        thinking=to_thinking(chat.reasoning_effort),
        output_config=to_output_config(chat.reasoning_effort, wanted_schema(chat.response_format)),
        max_tokens=0 if prewarms else chat.max_completion_tokens or chat.max_tokens or UNLIMITED,
        stop_sequences=(chat.stop,) if isinstance(chat.stop, str) else chat.stop,
        temperature=chat.temperature,
        top_p=chat.top_p,
        stream=chat.stream is True,
        seed=chat.seed,
        left_out_tools=left_out(chat),
        places=tuple(range(len(chat.messages) - len(rest), len(chat.messages))),
    )


def to_message(message: ChatMessage) -> InputMessage:
    """One message of a chat."""
    match message.role:
        case "system" | "developer":
            return InputMessage("system", system_content(message.content))
        case "user":
            return InputMessage("user", user_content(message.content))
        case "assistant":
            return InputMessage("assistant", tuple(answer_blocks(message)))
        case "tool" | "function":
            # The result of a function in the older form has its name instead of an id.
            id = message.tool_call_id if message.role == "tool" else message.name
            content = result_content(message.content)
            return InputMessage("user", (ToolResultBlock(id if isinstance(id, str) else "", content),))
    return InputMessage("user", (unread_item(message.role, {"name": message.name, "content": message.content}),))


def answer_blocks(answer: ChatMessage) -> list[Block]:
    """The blocks of an earlier answer, in the order in which models write them: reasoning, text, calls."""
    content = answer_content(answer.content or answer.refusal)
    reasoning = answer.reasoning_content or answer.reasoning
    blocks: list[Block] = []
    if reasoning and not any(isinstance(block, ThinkingBlock) for block in content):
        blocks.append(ThinkingBlock(plain_text(reasoning)))
    calls = answer.tool_calls if isinstance(answer.tool_calls, list) else [answer.tool_calls]
    older = [{"id": named_id(answer.function_call), "function": answer.function_call}]
    called = calls if answer.function_call is None else calls + older
    return blocks + content + [to_call(call) for call in called if call is not None]


def named_id(call: Any) -> Any:
    """The name of a call in the older form, which stands for its id."""
    return call.get("name") if isinstance(call, dict) else None


def to_call(call: Any) -> Block:
    """A call of a function or of a custom tool, or its words if it is malformed."""
    match call:
        case {"function": {"name": str(name)} as function} if name:
            return ToolUseBlock(id_of(call), name, call_input(function.get("arguments")))
        case {"custom": {"name": str(name)} as custom} if name:
            text = custom.get("input")
            return ToolUseBlock(id_of(call), name, {"input": "" if text is None else plain_text(text)})
    return unread_item("tool_call", call)


def id_of(call: Mapping[str, Any]) -> str:
    """The id of a call; empty without one."""
    id = call.get("id")
    return id if isinstance(id, str) else ""


def offered_tools(chat: ChatRequest) -> tuple[Tool, ...]:
    """The tools that the client runs. Raises InvalidRequest for one without a definition."""
    tools = [to_tool(function, function.parameters) for function in chat.functions or ()]
    for i, tool in enumerate(chat.tools or ()):
        match tool.kind, tool:
            case "function", ChatTool(function=Function() as function):
                tools.append(to_tool(function, function.parameters))
            case "custom", ChatTool(custom=Function() as custom):
                tools.append(to_tool(custom, TEXT_INPUT))
            case "function" | "custom", _:
                raise InvalidRequest(f"tools[{i}].{tool.kind}: field required")
    return tuple(tools)


def to_tool(function: Function, schema: dict[str, Any] | None) -> Tool:
    """A function as a tool."""
    return Tool(function.name, NO_INPUT if schema is None else schema, function.description)


def left_out(chat: ChatRequest) -> tuple[str, ...]:
    """The types of the tools that only OpenAI can run."""
    return tuple(tool.kind for tool in chat.tools or () if tool.kind not in ("function", "custom"))


def chosen(chat: ChatRequest) -> tuple[ToolMode | None, str | None, bool | None]:
    """The mode, the tool that must be called, and whether calls may be parallel."""
    match chat.tool_choice:
        case NamedFunction(Named(name)) | NamedCustom(Named(name)):
            return None, name, chat.parallel_tool_calls
        case AllowedChoice(AllowedTools(mode)):
            return mode, None, chat.parallel_tool_calls
        case str(mode):
            return mode, None, chat.parallel_tool_calls
    parallel = False if chat.legacy else chat.parallel_tool_calls  # the older form has room for one call
    match chat.function_call:
        case Named(name):
            return None, name, parallel
    return chat.function_call, None, parallel


def allowed(choice: AllowedTools, tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """The tools that are allowed. Raises InvalidRequest for a name that is not among the tools."""
    names = [entry.function.name if isinstance(entry, NamedFunction) else entry.custom.name for entry in choice.tools]
    for i, name in enumerate(names):
        if name not in {tool.name for tool in tools}:
            field = f"tool_choice.allowed_tools.tools[{i}]"
            raise InvalidRequest(f"{field}: expected the name of one of tools, got {name!r:.80}")
    return tuple(tool for tool in tools if tool.name in names)


def wanted_schema(format: TextFormat | JsonFormat | SchemaFormat | None) -> dict[str, Any] | None:
    """The schema that the answer must satisfy, or None."""
    match format:
        case JsonFormat():
            return ANY_OBJECT
        case SchemaFormat(JsonSchema(schema)):
            return ANY_OBJECT if schema is None else schema
    return None
