"""The input items of the Responses API as messages of the Messages API.

Clients send their history again with every request, so no item is refused: one that cannot be read becomes a short text
that is a function of the item alone. Format: https://platform.openai.com/docs/api-reference/responses/create#input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from serve.api.messages import (
    InputMessage,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from serve.api.openai.common import call_input
from serve.api.openai.content import (
    answer_content,
    plain_text,
    result_content,
    system_content,
    unread_item,
    user_content,
)
from serve.api.openai.tools import ToolSpec, callable_tools, full_name, readable_tools
from serve.api.openai.vendor_tools import CLIENT_TOOLS, call_arguments

Item = dict[str, Any]

# Items that have nothing for the model to read.
SILENT = frozenset({"additional_tools", "compaction_trigger", "configuration_update", "ghost_snapshot"})
# Items of an answer whose types do not end in `_call`.
ANSWERED = frozenset({"mcp_approval_request", "mcp_list_tools", "program"})


def to_message(item: Item) -> InputMessage | None:
    """An item as a message, or None if it has nothing to read. Messages of one turn are joined later."""
    kind = type_of(item)
    if kind in SILENT:
        return None
    read = READERS.get(kind)
    return read(item) if read else unread(kind, item)


def tools_of(item: Item) -> tuple[ToolSpec, ...]:
    """The tools that an item adds to those of the request: Codex sends its own so, and those that a search found."""
    return readable_tools(item.get("tools")) if type_of(item) in ("additional_tools", "tool_search_output") else ()


def type_of(item: Item) -> str:
    """The type of an item. Messages and references may have none."""
    kind = item.get("type")
    if isinstance(kind, str) and kind:
        return kind
    if "role" in item or "content" in item:
        return "message"
    return "item_reference" if "id" in item else "item"


def message(item: Item) -> InputMessage | None:
    """A message of the user, of the system or of the assistant."""
    content = item.get("content")
    match item.get("role"):
        case "user" | None:
            return InputMessage("user", user_content(content))
        case "system" | "developer":
            return InputMessage("system", system_content(content))
        case "assistant" if content is None:
            return None
        case "assistant":
            return InputMessage("assistant", content if isinstance(content, str) else tuple(answer_content(content)))
        case role:
            return unread(str(role), item)


def reasoning(item: Item) -> InputMessage | None:
    """The reasoning of an answer: its text, another server's encrypted reasoning, or None without either."""
    thinking = "".join(texts(item.get("content"))) or "\n\n".join(texts(item.get("summary")))
    encrypted = item.get("encrypted_content")
    signature = encrypted if isinstance(encrypted, str) else ""
    if thinking:
        return InputMessage("assistant", (ThinkingBlock(thinking, signature),))
    return InputMessage("assistant", (RedactedThinkingBlock(signature),)) if signature else None


def texts(parts: Any) -> list[str]:
    """The texts of the parts of some reasoning."""
    listed = parts if isinstance(parts, list) else [] if parts is None else [parts]
    return [plain_text(part.get("text", part) if isinstance(part, dict) else part) for part in listed]


def function_call(item: Item) -> InputMessage:
    """A call of a function."""
    return called(item, item.get("name"), call_input(item.get("arguments")))


def custom_tool_call(item: Item) -> InputMessage:
    """A call of a tool that takes any text."""
    return called(item, item.get("name"), {"input": json_text(item.get("input"))})


def called(item: Item, name: Any, arguments: dict[str, Any]) -> InputMessage:
    """A call of a tool, or its words if the tool has no name."""
    if not isinstance(name, str) or not name:
        return unread(type_of(item), item)
    namespace = item.get("namespace")
    full = full_name(namespace if isinstance(namespace, str) else None, name)
    return InputMessage("assistant", (ToolUseBlock(call_id(item), full, arguments),))


def client_call(kind: str) -> Callable[[Item], InputMessage]:
    """The reader of calls of one of OpenAI's tools that the client runs: it is a call like any other."""

    def read(item: Item) -> InputMessage:
        value = item.get(CLIENT_TOOLS[kind].call)
        arguments = call_arguments(kind, value) if isinstance(value, dict) else call_input(value)
        return InputMessage("assistant", (ToolUseBlock(call_id(item), kind, arguments),))

    return read


def tool_output(item: Item) -> InputMessage:
    """The result of a call. Some clients send it as an object: its content, and whether the call succeeded."""
    output, failed = item.get("output"), False
    if isinstance(output, dict) and "content" in output:
        output, failed = output["content"], output.get("success") is False
    if not isinstance(output, list) and not (isinstance(output, dict) and "type" in output):
        output = json_text(output)
    return InputMessage("user", (ToolResultBlock(call_id(item), result_content(output), failed),))


def shell_output(item: Item) -> InputMessage:
    """The results of shell commands: what each printed, and how it ended unless that was well."""
    output = item.get("output")
    if not isinstance(output, list):
        return tool_output(item)
    parts = tuple(TextBlock(command_output(part)) for part in output)
    return InputMessage("user", (ToolResultBlock(call_id(item), parts),))


def command_output(part: Any) -> str:
    """What a shell command printed, and how it ended unless that was well."""
    if not isinstance(part, dict):
        return plain_text(part)
    printed = [text for key in ("stdout", "stderr") if isinstance(text := part.get(key), str) and text]
    match part.get("outcome"):
        case {"type": "timeout"}:
            printed.append("[timed out]")
        case {"exit_code": code} if code != 0:
            printed.append(f"[exit code {code}]")
    return "\n".join(text.rstrip("\n") for text in printed)


def patch_output(item: Item) -> InputMessage:
    """The result of a patch: what its tool printed, or whether it was applied."""
    output, failed = item.get("output"), item.get("status") == "failed"
    text = json_text(output) or ("failed" if failed else "completed")
    return InputMessage("user", (ToolResultBlock(call_id(item), text, failed),))


def tool_search_output(item: Item) -> InputMessage:
    """The tools that a search found, by their names."""
    found = tuple(ToolReferenceBlock(name) for name in callable_tools(tools_of(item)))
    return InputMessage("user", (ToolResultBlock(call_id(item), found),))


def unread(kind: str, item: Item) -> InputMessage:
    """An item of another type as a text: in the answer if the model made it, otherwise as the user's."""
    role: Literal["assistant", "user"] = "assistant" if kind.endswith("_call") or kind in ANSWERED else "user"
    fields = {key: value for key, value in item.items() if key not in ("role", "status")}
    if kind == "image_generation_call":
        fields["result"] = {"type": "input_image", "image_url": item.get("result")}
    return InputMessage(role, (unread_item(kind, fields),))


def call_id(item: Item) -> str:
    """The id that a call and its result share; empty without one."""
    return next((item[key] for key in ("call_id", "id") if isinstance(item.get(key), str)), "")


def json_text(value: Any) -> str:
    """A text, nothing as an empty one, or another value as JSON."""
    return value if isinstance(value, str) else "" if value is None else msgspec.json.encode(value).decode()


READERS: dict[str, Callable[[Item], InputMessage | None]] = {
    "message": message,
    "reasoning": reasoning,
    "function_call": function_call,
    "function_call_output": tool_output,
    "custom_tool_call": custom_tool_call,
    "custom_tool_call_output": tool_output,
    **{f"{kind}_call": client_call(kind) for kind in CLIENT_TOOLS},
    "local_shell_call_output": tool_output,
    "shell_call_output": shell_output,
    "apply_patch_call_output": patch_output,
    "tool_search_output": tool_search_output,
}
