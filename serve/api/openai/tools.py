"""The tools of a request of the Responses API, and which of them the model may or must call.

Tools that only OpenAI can run, such as its web search, are left out: agents list them for every server.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import Struct

from serve.api.messages import InvalidRequest
from serve.api.openai.common import NO_INPUT, ToolMode
from serve.api.openai.vendor_tools import CLIENT_TOOLS
from serve.api.tools import Tool

TEXT_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
NAMED = ("function", "custom", "namespace")  # the types of tools that have a name of their own
CHOICES = ", ".join(("function", "custom", "allowed_tools", *CLIENT_TOOLS))


class ToolSpec(Struct, frozen=True, omit_defaults=True):
    """A tool: a `function`, a `custom` tool that takes any text, a `namespace` of these, or of a type of OpenAI's."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: tuple[ToolSpec, ...] | None = None
    execution: str | None = None  # of a tool search: by the `server` or by the `client`
    environment: dict[str, Any] | None = None  # of a shell: the client's machine or a container at OpenAI

    def __post_init__(self) -> None:
        """Raise ValueError for a tool without a name."""
        if self.type in NAMED and not self.name:
            raise ValueError(f"expected a name in a tool of type {self.type}, got none")

    @property
    def offered(self) -> bool:
        """Whether the model can call it: its client runs it."""
        if self.type == "tool_search":
            return self.execution == "client"
        if self.type == "shell":
            return not self.environment or self.environment.get("type") == "local"
        return self.type in NAMED or self.type in CLIENT_TOOLS


class ToolChoice(Struct, frozen=True, omit_defaults=True):
    """The one tool that must be called, or the tools that may be."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class CallableTool:
    """A tool that the model can call, and its namespace."""

    spec: ToolSpec
    namespace: str | None
    found: bool = False  # by a tool search, so that it is defined where its result stands

    @property
    def own_name(self) -> str:
        """Its name within its namespace; that of a type of OpenAI's is the type."""
        return self.spec.name or self.spec.type


def callable_tools(tools: Sequence[ToolSpec], namespace: str | None = None) -> dict[str, CallableTool]:
    """The tools that the model can call, by the names that it calls them by."""
    tools_by_name: dict[str, CallableTool] = {}
    for spec in tools:
        if spec.type == "namespace":
            tools_by_name |= callable_tools(spec.tools or (), spec.name)
        elif spec.offered:
            tool = CallableTool(spec, namespace)
            tools_by_name[full_name(namespace, tool.own_name)] = tool
    return tools_by_name


def left_out(tools: Sequence[ToolSpec]) -> tuple[str, ...]:
    """The types of the tools that only OpenAI can run."""
    return tuple(spec.type for spec in tools if not spec.offered)


def full_name(namespace: str | None, name: str) -> str:
    """The name by which the model calls a tool."""
    return f"{namespace}__{name}" if namespace else name


def to_tool(name: str, tool: CallableTool) -> Tool:
    """A tool of the Messages API. A custom tool gets its text as its only argument, `input`."""
    spec, deferred = tool.spec, tool.found or None
    if own := CLIENT_TOOLS.get(spec.type):
        return Tool(name, spec.parameters or own.parameters, spec.description or own.description)
    schema = TEXT_INPUT if spec.type == "custom" else spec.parameters
    return Tool(name, NO_INPUT if schema is None else schema, spec.description, defer_loading=deferred)


def readable_tools(tools: Any) -> tuple[ToolSpec, ...]:
    """The tools in an item of the conversation; those that are malformed are left out."""
    found = []
    for tool in tools if isinstance(tools, list) else ():
        try:
            found.append(msgspec.convert(tool, ToolSpec))
        except msgspec.ValidationError:
            continue
    return tuple(found)


def chosen(
    choice: ToolMode | ToolChoice | None, tools: Mapping[str, CallableTool]
) -> tuple[ToolMode | None, str | None, Collection[str]]:
    """The mode, the tool that must be called, and the tools that are offered.

    Raises InvalidRequest for a tool that only OpenAI can run and for names that are not among the tools.
    """
    if not isinstance(choice, ToolChoice):
        return choice, None, tools
    if choice.type == "allowed_tools":
        return choice.mode, None, allowed(choice.tools or (), tools)
    if choice.type in CLIENT_TOOLS:
        return None, choice.type, tools
    if choice.type not in ("function", "custom"):
        raise InvalidRequest(
            f"tool_choice.type: expected {CHOICES}, got {choice.type!r:.80}: it is not available here, so choose 'auto'"
        )
    if choice.name is None:
        raise InvalidRequest("tool_choice.name: field required")
    return None, choice.name, tools


def allowed(entries: Sequence[dict[str, Any]], tools: Mapping[str, CallableTool]) -> list[str]:
    """The names of the tools in a list of allowed ones, in the order of the request's tools."""
    named = []
    for i, entry in enumerate(entries):
        kind = entry.get("type")
        if kind in ("function", "custom"):
            named.append(name := entry.get("name"))
            if not any(name in (full, tool.own_name) for full, tool in tools.items()):
                raise InvalidRequest(
                    f"tool_choice.tools[{i}].name: expected the name of one of tools, got {name!r:.80}"
                )
        elif isinstance(kind, str) and kind in CLIENT_TOOLS:
            named.append(kind)
    return [full for full, tool in tools.items() if full in named or tool.own_name in named]
