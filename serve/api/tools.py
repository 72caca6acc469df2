"""The tools of the Messages API on the wire, and the blocks that add and remove them in mid-conversation.

Format: https://platform.claude.com/docs/en/build-with-claude/mid-conversation-system-messages.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

NonEmptyStr = Annotated[str, Meta(min_length=1)]


class Tool(Struct, frozen=True):
    """A tool that the client runs. `mend` makes one of a tool of the vendor that a client runs.

    With `defer_loading` it is part of the prompt only from the first reference to it on.
    """

    name: NonEmptyStr
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    defer_loading: bool | None = None


class ToolNameReference(Struct, frozen=True, tag="tool_reference"):
    """A tool of `tools`, or one that was defined before in the conversation, by the name that the model calls."""

    name: str

    @property
    def text(self) -> str:
        """The tool's name."""
        return self.name


class McpToolReference(Struct, frozen=True, tag="mcp_tool_reference"):
    """A tool of an MCP server that the vendor connects to."""

    name: str
    server_name: str

    @property
    def text(self) -> str:
        """The tool and its server."""
        return f"{self.name} of {self.server_name}"


class McpToolsetReference(Struct, frozen=True, tag="mcp_toolset_reference"):
    """All tools of an MCP server that the vendor connects to."""

    server_name: str

    @property
    def text(self) -> str:
        """The server."""
        return f"all of {self.server_name}"


class ToolDefinition(Struct, frozen=True, tag="tool_definition"):
    """A tool by value."""

    definition: Tool

    @property
    def text(self) -> str:
        """The tool's name."""
        return self.definition.name


ToolReference = ToolNameReference | McpToolReference | McpToolsetReference


class ToolAdditionBlock(Struct, frozen=True, tag="tool_addition"):
    """From here on the model may call a tool. Part of system messages."""

    tool: ToolReference | ToolDefinition

    @property
    def text(self) -> str:
        """What the model reads of a tool whose definition is not known."""
        return f"Tool available from here on: {self.tool.text}"


class ToolRemovalBlock(Struct, frozen=True, tag="tool_removal"):
    """From here on the model may not call a tool any more. Part of system messages."""

    tool: ToolReference

    @property
    def text(self) -> str:
        """What the model reads."""
        return f"Tool no longer available: {self.tool.text}"
