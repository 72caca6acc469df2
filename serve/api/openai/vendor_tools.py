"""OpenAI's tools that the client runs itself: offered to the model as functions, called as items of their own types.

The schemas are those of the items: https://platform.openai.com/docs/guides/tools-local-shell,
https://platform.openai.com/docs/guides/tools-shell, https://platform.openai.com/docs/guides/tools-apply-patch and
https://platform.openai.com/docs/guides/tools-tool-search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TEXT = {"type": "string"}
MILLISECONDS = {"type": "integer", "description": "Time limit in milliseconds."}


def arguments_of(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    """The schema of a function's arguments."""
    return {"type": "object", "properties": properties, "required": list(required)}


@dataclass(frozen=True)
class ClientTool:
    """A tool of a type that has no schema in the request: the function that it is for the model.

    `call` is the field of its item that holds the arguments of a call; `constant` is what that field has besides them.
    """

    description: str
    parameters: dict[str, Any]
    call: str
    constant: dict[str, Any] = field(default_factory=dict)


LOCAL_SHELL = ClientTool(
    "Runs a command on the user's machine, and returns its output.",
    arguments_of(
        ("command",),
        command={"type": "array", "items": TEXT, "description": 'The program and its arguments, as in ["ls", "-l"].'},
        working_directory=TEXT,
        env={"type": "object", "additionalProperties": TEXT, "description": "Environment variables."},
        timeout_ms=MILLISECONDS,
        user=TEXT,
    ),
    call="action",
    constant={"type": "exec", "env": {}},
)
SHELL = ClientTool(
    "Runs shell commands on the user's machine, and returns the output and the exit code of each.",
    arguments_of(
        ("commands",),
        commands={"type": "array", "items": TEXT, "description": "Shell commands, which may run at the same time."},
        timeout_ms=MILLISECONDS,
        max_output_length={"type": "integer", "description": "The most characters of output to return."},
    ),
    call="action",
)
APPLY_PATCH = ClientTool(
    "Creates, updates or deletes one file. The diff is in the V4A format: context lines begin with a space, removed "
    "lines with -, added lines with +, and @@ begins a section. A new file has added lines only.",
    arguments_of(
        ("type", "path"),
        type={"enum": ["create_file", "update_file", "delete_file"]},
        path={"type": "string", "description": "Relative to the root of the workspace."},
        diff={"type": "string", "description": "The changes; none to delete a file."},
    ),
    call="operation",
)
TOOL_SEARCH = ClientTool(
    "Searches for tools that are not loaded yet. The tools that it finds can be called afterwards.",
    arguments_of(("query",), query={"type": "string", "description": "What the tools should do."}),
    call="arguments",
)
CLIENT_TOOLS = {
    "local_shell": LOCAL_SHELL,
    "shell": SHELL,
    "apply_patch": APPLY_PATCH,
    "tool_search": TOOL_SEARCH,
}


def call_field(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, as the field of its item has them. A command that is one text goes to a shell."""
    match kind, arguments:
        case "local_shell", {"command": str(command)}:
            arguments = arguments | {"command": ["bash", "-lc", command]}
        case "shell", {"commands": str(command)}:
            arguments = arguments | {"commands": [command]}
    return CLIENT_TOOLS[kind].constant | arguments


def has_required(kind: str, arguments: dict[str, Any]) -> bool:
    """Whether the arguments have what the field of the item must have. Those of a search are the client's own."""
    if kind == "tool_search":
        return True
    required = {*CLIENT_TOOLS[kind].parameters["required"]}
    if kind == "apply_patch" and arguments.get("type") != "delete_file":
        required.add("diff")
    return required <= arguments.keys()


def call_arguments(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call from the field of its item, as the model wrote them: what is null or constant is not."""
    constant = CLIENT_TOOLS[kind].constant
    return {key: item for key, item in value.items() if item is not None and constant.get(key) != item}
