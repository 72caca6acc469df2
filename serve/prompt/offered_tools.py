"""The tools of a conversation: those in the prompt's head, and those that are loaded, added or removed on the way.

A tool with `defer_loading` is not in the head. Its definition is written where a `tool_reference` or a `tool_addition`
first names it, as text in the form of the head, so that loading a tool appends to the prompt and changes nothing before
it. Later its name is enough, unless it was removed: a body of many references is no prompt of as many definitions.
A tool that is removed stays where it is written, for the same reason; a later text says that it is gone.
Formats: https://platform.claude.com/docs/en/agents-and-tools/tool-use/tool-use-with-prompt-caching and
https://platform.claude.com/docs/en/build-with-claude/mid-conversation-system-messages.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from serve.api.messages import (
    Block,
    CountTokensRequest,
    InputMessage,
    ResultBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    UnreadBlock,
)
from serve.api.tools import Tool, ToolAdditionBlock, ToolDefinition, ToolNameReference, ToolRemovalBlock

MOST_TIMES = 8  # that one definition is written
Definition = tuple[str, Tool]  # a tool, and the field of the request that defines it


@dataclass(frozen=True)
class OfferedTools:
    """The tools of one request."""

    head: tuple[Definition, ...]  # written before the conversation
    callable: tuple[Definition, ...]  # those that the answer may call, in the order of their definitions
    messages: tuple[InputMessage, ...]  # the request's, one for one, with each definition as text where it is loaded


def offered_tools(request: CountTokensRequest) -> OfferedTools:
    """The tools of a request, at its end and on the way there. Raises RecursionError for JSON that nests too deeply."""
    declared = tuple((f"tools[{i}]", tool) for i, tool in enumerate(request.tools or ()))
    head = tuple(definition for definition in declared if not definition[1].defer_loading)
    known = {tool.name: tool for _, tool in declared}  # by now, in the order of the conversation
    inline: dict[str, Definition] = {}
    offered = {tool.name for _, tool in head}
    defined: set[str] = set()  # the tools whose definitions were written on the way, and that were not removed since
    times = Counter[str]()  # how often each definition was written

    def written(block: Any, field: str) -> Any:
        """A block with the definitions that it loads as text."""
        match block:
            case ToolResultBlock(content=tuple(content)):
                texts = tuple(written(part, field) for part in content)
                return block if texts == content else replace(block, content=texts)
            case ToolAdditionBlock(ToolDefinition(tool)):
                known[tool.name], inline[tool.name] = tool, (f"{field}.tool.definition", tool)
                name = tool.name
                defined.discard(name)
                times[name] = 0
            case ToolReferenceBlock(name) | ToolAdditionBlock(ToolNameReference(name)) if name in known:
                pass
            case ToolRemovalBlock(ToolNameReference(name)):
                offered.discard(name)
                defined.discard(name)
                return block
            case _:
                return block
        offered.add(name)
        if name in defined or times[name] == MOST_TIMES:
            return block
        defined.add(name)
        times[name] += 1
        # No TextBlock: `clear_at` clears those.
        return UnreadBlock("tool_definition", definition_text(known[name]))

    def rewritten(message: InputMessage, field: str) -> InputMessage:
        if message.role == "assistant" or not isinstance(message.content, tuple):
            return message
        content: tuple[Block | ResultBlock, ...] = tuple(
            written(block, f"{field}.content[{i}]") for i, block in enumerate(message.content)
        )
        return message if content == message.content else replace(message, content=content)

    messages = tuple(rewritten(message, f"messages[{i}]") for i, message in enumerate(request.messages))
    latest = (*(d for d in declared if d[1].name not in inline), *inline.values())
    return OfferedTools(head, tuple(d for d in latest if d[1].name in offered), messages)


def as_function(tool: Tool) -> dict[str, Any]:
    """A tool in the form that chat templates take."""
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def definition_text(tool: Tool) -> str:
    """The text that makes a tool known in mid-conversation: as most templates write it in the head."""
    return f"Tool available from here on:\n{json.dumps(as_function(tool), ensure_ascii=False)}"
