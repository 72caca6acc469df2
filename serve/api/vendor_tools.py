"""Anthropic's own tools: those that a client runs, as functions with their documented inputs; the rest has no schema.

The vendor's models know these schemas by heart; others have to read them. From
https://docs.claude.com/en/docs/agents-and-tools/tool-use/bash-tool,
https://docs.claude.com/en/docs/agents-and-tools/tool-use/text-editor-tool and
https://docs.claude.com/en/docs/agents-and-tools/tool-use/memory-tool. The computer tools show screenshots, which a text
model cannot read, so they are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

JSON = dict[str, Any]


def text(description: str) -> JSON:
    """The schema of a text."""
    return {"type": "string", "description": description}


def line(description: str) -> JSON:
    """The schema of a line's number."""
    return {"type": "integer", "description": description}


def commands(names: Sequence[str], required: Sequence[str], fields: JSON) -> JSON:
    """The schema of a tool with several commands."""
    command = {"type": "string", "enum": list(names), "description": "What to do."}
    return {"type": "object", "properties": {"command": command, **fields}, "required": ["command", *required]}


VIEW_RANGE = {
    "type": "array",
    "items": {"type": "integer"},
    "description": "For view, of a file: the first and the last line to show, counted from 1; -1 is the end.",
}
EDITS = {
    "file_text": text("For create: what the file shall contain."),
    "old_str": text("For str_replace: the text to replace; it must match exactly and stand in the file once."),
    "new_str": text("For str_replace: the text in its place."),
    "insert_line": line("For insert: the line after which the text is inserted; 0 is the start of the file."),
    "insert_text": text("For insert: the text to insert."),
}
EDIT_COMMANDS = ("view", "create", "str_replace", "insert")

BASH: JSON = {
    "description": "Run a command in a bash shell that keeps its state between calls; returns its output.",
    "input_schema": {
        "type": "object",
        "properties": {
            "command": text("The command to run. Required unless restart is true."),
            "restart": {"type": "boolean", "description": "Whether to start the shell anew."},
        },
    },
}
EDITOR: JSON = {
    "description": "View, create and edit text files, and list directories.",
    "input_schema": commands(
        EDIT_COMMANDS,
        ["path"],
        {"path": text("The path of the file or directory."), "view_range": VIEW_RANGE, **EDITS},
    ),
}
# Until 2025-01-24 the inserted text was `new_str`, and the last edit could be undone.
OLD_EDITOR: JSON = {
    "description": EDITOR["description"],
    "input_schema": commands(
        (*EDIT_COMMANDS, "undo_edit"),
        ["path"],
        {
            "path": text("The path of the file or directory."),
            "view_range": VIEW_RANGE,
            **{name: EDITS[name] for name in ("file_text", "old_str", "insert_line")},
            "new_str": text("For str_replace: the text in place of old_str. For insert: the text to insert."),
        },
    ),
}
MEMORY: JSON = {
    "description": "Keep notes over conversations as files in the directory /memories: view, create, edit, delete and"
    " rename them.",
    "input_schema": commands(
        (*EDIT_COMMANDS, "delete", "rename"),
        [],
        {
            "path": text("The path of the file or directory. Required unless the command is rename."),
            "view_range": VIEW_RANGE,
            **EDITS,
            "old_path": text("For rename: the path now."),
            "new_path": text("For rename: the new path."),
        },
    ),
}

# Description and schema of each tool that a client runs, by its type.
CLIENT_TOOLS: dict[str, JSON] = {
    "bash_20241022": BASH,
    "bash_20250124": BASH,
    "text_editor_20241022": OLD_EDITOR,
    "text_editor_20250124": OLD_EDITOR,
    "text_editor_20250429": EDITOR,
    "text_editor_20250728": EDITOR,
    "memory_20250818": MEMORY,
}


def is_vendors(tool: Any) -> bool:
    """Whether a tool is one of the vendor's."""
    return isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "custom"


def offered(tools: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Tools with those that a client runs as functions, and the types of those that are left out.

    If nothing could be offered then, the tools stay as they are: such a request is refused by name. Tools that wait for
    the vendor's search are offered at once, as nothing else finds them.
    """
    kept = [as_function(tool) for tool in tools if not is_vendors(tool) or tool["type"] in CLIENT_TOOLS]
    if not kept:
        return list(tools), []
    left_out = [tool["type"] for tool in tools if is_vendors(tool) and tool["type"] not in CLIENT_TOOLS]
    if any(kind.startswith("tool_search_tool") for kind in left_out):
        kept = [tool | {"defer_loading": None} if isinstance(tool, dict) else tool for tool in kept]
    return kept, left_out


def as_function(tool: Any) -> Any:
    """A tool of the vendor that a client runs as a function of the same name; any other as it is."""
    if not is_vendors(tool):
        return tool
    return {key: value for key, value in tool.items() if key != "type"} | CLIENT_TOOLS[tool["type"]]
