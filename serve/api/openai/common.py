"""What the requests and answers of OpenAI's two APIs have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal

import msgspec
from msgspec import Struct

from serve.api.messages import (
    InputMessage,
    InvalidRequest,
    JsonSchemaFormat,
    OutputConfig,
    TextBlock,
    Thinking,
    Tool,
    ToolChoice,
    Usage,
)

# What an answer may have that names no limit: all the room that the context has, as the Messages API clamps it.
UNLIMITED = 2**31 - 1
ANY_OBJECT = {"type": "object"}
NO_INPUT = {"type": "object", "properties": {}}  # of a function that declares no parameters
PING = b": ping\n\n"  # a comment, which clients skip

ToolMode = Literal["none", "auto", "required"]


class TextFormat(Struct, frozen=True, tag="text"):
    """The answer is any text."""


class JsonFormat(Struct, frozen=True, tag="json_object"):
    """The answer is any JSON object."""


class RefusalPart(Struct, frozen=True, tag="refusal"):
    """What the assistant said instead of an answer; text like any other."""

    refusal: str

    @property
    def text(self) -> str:
        """The refusal."""
        return self.refusal


def split_system(messages: Sequence[InputMessage]) -> tuple[tuple[TextBlock, ...], tuple[InputMessage, ...]]:
    """The system text that a conversation begins with, and the rest of it, which is never empty.

    Instructions in mid-conversation stay where they are.
    """
    head = list(takewhile(lambda message: message.role == "system", messages[:-1]))
    return tuple(block for message in head for block in texts(message)), tuple(messages[len(head) :])


def texts(message: InputMessage) -> list[TextBlock]:
    """A message's texts."""
    if isinstance(message.content, str):
        return [TextBlock(message.content)]
    return [block for block in message.content if isinstance(block, TextBlock)]


def parse_arguments(text: str, where: str) -> dict[str, Any]:
    """A call's arguments; no text stands for none. Raises InvalidRequest unless they are a JSON object."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{where}: expected a JSON object as text, got {text!r:.80}") from None


def to_tool_choice(
    mode: ToolMode | None, named: str | None, parallel: bool | None, tools: Sequence[Tool]
) -> ToolChoice | None:
    """`tool_choice`, a mode or a tool's name, and `parallel_tool_calls`. Raises InvalidRequest without such a tool."""
    if named is not None and named not in {tool.name for tool in tools}:
        raise InvalidRequest(f"tool_choice: expected the name of one of tools, got {named!r:.80}")
    if mode == "required" and not tools:
        raise InvalidRequest("tool_choice: expected 'required' together with tools, got no tools")
    if not tools:
        return None
    kinds: dict[ToolMode | None, Literal["auto", "any", "none"]] = {"required": "any", "none": "none"}
    return ToolChoice("tool" if named is not None else kinds.get(mode, "auto"), named, parallel is False)


def to_thinking(effort: str | None) -> Thinking | None:
    """Whether the model reasons first: as OpenAI's models do, unless `none`, but only if the request speaks of it."""
    return None if effort is None else Thinking("disabled" if effort == "none" else "adaptive")


def to_output_config(effort: str | None, schema: dict[str, Any] | None) -> OutputConfig | None:
    """The effort and the schema, if there are any."""
    wanted = None if effort == "none" else effort
    format = None if schema is None else JsonSchemaFormat(schema)
    return OutputConfig(wanted, format) if wanted or format else None


def prompt_tokens(usage: Usage) -> int:
    """The length of the whole prompt."""
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
