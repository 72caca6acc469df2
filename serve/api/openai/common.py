"""What OpenAI's two APIs share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal

import msgspec
from msgspec import Struct

from serve.api.answers import Usage
from serve.api.messages import (
    InputMessage,
    InvalidRequest,
    JsonSchemaFormat,
    OutputConfig,
    TextBlock,
    Thinking,
    ToolChoice,
)
from serve.api.tools import Tool

# max_tokens of a request without a limit. The server reduces it to the room that is left in the context.
UNLIMITED = 2**31 - 1
ANY_OBJECT = {"type": "object"}
NO_INPUT = {"type": "object", "properties": {}}  # for a function without parameters
PING = b": ping\n\n"  # a comment, which clients ignore

NO_LOGPROBS = "expected none, as this server returns no log probabilities: leave it out"

ToolMode = Literal["none", "auto", "required"]


class TextFormat(Struct, frozen=True, tag="text"):
    """The answer is any text."""


class JsonFormat(Struct, frozen=True, tag="json_object"):
    """The answer is any JSON object."""


def split_system(messages: Sequence[InputMessage]) -> tuple[tuple[TextBlock, ...], tuple[InputMessage, ...]]:
    """The system text at the start of a conversation, and the rest of it, which is never empty.

    Later system messages stay where they are.
    """
    head = list(takewhile(lambda message: message.role == "system", messages[:-1]))
    return tuple(block for message in head for block in text_blocks(message)), tuple(messages[len(head) :])


def text_blocks(message: InputMessage) -> list[TextBlock]:
    """The text blocks of a message."""
    if isinstance(message.content, str):
        return [TextBlock(message.content)]
    return [block for block in message.content if isinstance(block, TextBlock)]


def call_input(arguments: Any) -> dict[str, Any]:
    """The input of a call in the history: the object in a JSON text, or an object that was never encoded.

    Anything else is kept as it is in the field `arguments`, so that the model sees what it wrote: clients send
    malformed calls back, with their own error message after them.
    """
    value = decoded(decoded(arguments))  # some clients encode the text twice
    if isinstance(value, dict):
        return value
    absent = arguments is None or (isinstance(arguments, str) and not arguments.strip())
    return {} if absent else {"arguments": arguments}


def decoded(text: Any) -> Any:
    """The JSON in a text; any other value as it is."""
    try:
        return msgspec.json.decode(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def whole_arguments(arguments: str) -> dict[str, Any] | None:
    """The arguments of a call that the model wrote; None if they were cut off."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None


def custom_input(arguments: str) -> str:
    """The text for a custom tool: `input` of the arguments that the model wrote, or all of them without one.

    Arguments that were cut off are returned as they are.
    """
    text = (whole_arguments(arguments) or {}).get("input")
    return text if isinstance(text, str) else arguments


def to_tool_choice(
    mode: ToolMode | None, named: str | None, parallel: bool | None, tools: Sequence[Tool]
) -> ToolChoice | None:
    """The tool choice for a mode or a tool's name. Raises InvalidRequest if the tools that it needs are missing."""
    if named is not None and named not in {tool.name for tool in tools}:
        raise InvalidRequest(f"tool_choice: expected the name of one of tools, got {named!r:.80}")
    if mode == "required" and not tools:
        raise InvalidRequest("tool_choice: expected 'required' together with tools, got no tools")
    if not tools:
        return None
    kinds: dict[ToolMode | None, Literal["auto", "any", "none"]] = {"required": "any", "none": "none"}
    return ToolChoice("tool" if named is not None else kinds.get(mode, "auto"), named, parallel is False)


def refuse_logprobs(**fields: Any) -> None:
    """Raise ValueError for a field that asks for log probabilities. False, 0 and null do not."""
    for name, value in fields.items():
        if value:
            raise ValueError(f"{name}: {NO_LOGPROBS}")


def to_thinking(effort: str | None) -> Thinking | None:
    """Whether the model reasons first: None if the request names no effort, else not for `none` only."""
    return None if effort is None else Thinking("disabled" if effort == "none" else "adaptive")


def to_output_config(effort: str | None, schema: dict[str, Any] | None) -> OutputConfig | None:
    """The effort and the schema, or None if there is neither."""
    wanted = None if effort == "none" else effort
    format = None if schema is None else JsonSchemaFormat(schema)
    return OutputConfig(wanted, format) if wanted or format else None


def prompt_tokens(usage: Usage) -> int:
    """The length of the whole prompt in tokens."""
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
