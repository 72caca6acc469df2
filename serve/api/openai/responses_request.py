"""The request of the Responses API, and its translation to the Messages API, as far as agents with tools need it.

Responses are not stored: each request brings its whole conversation, reasoning included.
Format: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from serve.api.messages import (
    DiagnosticsRequest,
    InvalidRequest,
    MessagesRequest,
    PositiveInt,
    TextBlock,
    Thinking,
)
from serve.api.openai.common import (
    ANY_OBJECT,
    NO_LOGPROBS,
    UNLIMITED,
    JsonFormat,
    TextFormat,
    ToolMode,
    refuse_logprobs,
    split_system,
    to_output_config,
    to_thinking,
    to_tool_choice,
)
from serve.api.openai.items import Item, to_message, tools_of, type_of
from serve.api.openai.tools import CallableTool, ToolChoice, ToolSpec, callable_tools, chosen, left_out, to_tool


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


class ConfigurationUpdate(Struct, frozen=True):
    """An item that changes the options of the conversation from there on."""

    reasoning: Reasoning | None = None
    text: TextOptions | None = None


class PromptCacheOptions(Struct, frozen=True):
    """Whether only to fill the cache, and which earlier response to compare with."""

    prewarm: bool | None = None
    comparison_response_id: str | None = None


class ResponsesRequest(Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/responses`, and of `POST /v1/responses/input_tokens`."""

    model: str | None = None
    input: str | Annotated[tuple[Item, ...], Meta(min_length=1)]
    instructions: str | None = None
    tools: tuple[ToolSpec, ...] | None = None
    tool_choice: ToolMode | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_output_tokens: PositiveInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    top_logprobs: Any = None
    include: tuple[str, ...] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for fields that need stored responses, and for log probabilities."""
        for field in ("previous_response_id", "conversation", "prompt", "background"):
            if getattr(self, field):
                raise ValueError(f"{field}: expected none, as nothing is stored here: send the whole input")
        refuse_logprobs(top_logprobs=self.top_logprobs)
        if "message.output_text.logprobs" in (self.include or ()):
            raise ValueError(f"include: {NO_LOGPROBS}")

    @property
    def callable_tools(self) -> dict[str, CallableTool]:
        """The tools that the model can call, by name: the request's own, then those that its items bring.

        Of several definitions the first one counts, so that a later item changes nothing before it.
        """
        tools = callable_tools(self.tools or ())
        for item in () if isinstance(self.input, str) else self.input:
            for name, tool in callable_tools(tools_of(item)).items():
                tools.setdefault(name, replace(tool, found=type_of(item) == "tool_search_output"))
        return tools

    @property
    def prewarms(self) -> bool:
        """Whether the request only fills the cache."""
        return self.prompt_cache_options is not None and self.prompt_cache_options.prewarm is True


# The accepted values of fields that have a fixed set, for error texts only: the structs above decide.
CHOICES = {
    "tool_choice": "none, auto, required",
    "tool_choice.mode": "auto, required",
    "text.format.type": "text, json_object, json_schema",
}

DECODER = msgspec.json.Decoder(ResponsesRequest)


def to_messages(request: ResponsesRequest) -> MessagesRequest:
    """A request of the Responses API as one of the Messages API.

    Raises InvalidRequest for errors that the schema does not catch.
    """
    items: tuple[Item, ...] = (
        ({"role": "user", "content": request.input},) if isinstance(request.input, str) else request.input
    )
    numbered = [(i, message) for i, item in enumerate(items) if (message := to_message(item))]
    if not numbered:
        raise InvalidRequest("input: expected at least one message, got only reasoning that is not here")
    head, rest = split_system([message for _, message in numbered])
    instructions = (TextBlock(request.instructions),) if request.instructions else ()
    tools_by_name = request.callable_tools
    mode, named, offered = chosen(request.tool_choice, tools_by_name)
    tools = tuple(to_tool(name, tools_by_name[name]) for name in offered)
    reasoning, text = configuration(request, items)
    return MessagesRequest(
        model=request.model or "",
        system=(*instructions, *head) or None,
        messages=rest,
        tools=tools or None,
        tool_choice=to_tool_choice(mode, named, request.parallel_tool_calls, tools),
        thinking=to_thinking(reasoning.effort) or (Thinking("adaptive") if reasoning.summary else None),
        output_config=to_output_config(reasoning.effort, wanted_schema(text)),
        max_tokens=0 if request.prewarms else request.max_output_tokens or UNLIMITED,
        temperature=request.temperature,
        top_p=request.top_p,
        stream=request.stream is True,
        diagnostics=comparison(request.prompt_cache_options),
        left_out_tools=left_out(request.tools or ()),
        places=tuple(i for i, _ in numbered[len(numbered) - len(rest) :]),
    )


def configuration(request: ResponsesRequest, items: Sequence[Item]) -> tuple[Reasoning, TextOptions | None]:
    """The reasoning and the text options after the latest of the items that change them; malformed ones change none."""
    reasoning, text = request.reasoning or Reasoning(), request.text
    for item in items:
        if type_of(item) == "configuration_update":
            with suppress(msgspec.ValidationError):
                update = msgspec.convert(item, ConfigurationUpdate)
                if update.reasoning and update.reasoning.effort:
                    reasoning = Reasoning(update.reasoning.effort, reasoning.summary)
                text = update.text or text
    return reasoning, text


def comparison(options: PromptCacheOptions | None) -> DiagnosticsRequest | UnsetType:
    """The request for diagnostics in the Messages API's form: its message has the id of the response that it became."""
    if options is None or options.comparison_response_id is None:
        return UNSET
    return DiagnosticsRequest(f"msg_{options.comparison_response_id.removeprefix('resp_')}")


def wanted_schema(text: TextOptions | None) -> dict[str, Any] | None:
    """The schema that the answer must satisfy, or None."""
    match text and text.format:
        case JsonFormat():
            return ANY_OBJECT
        case SchemaFormat(schema):
            return schema
    return None
