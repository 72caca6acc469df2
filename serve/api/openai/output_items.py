"""The items of a response, and how the blocks of an answer become them.

Format: https://platform.openai.com/docs/api-reference/responses/object#responses/object-output.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from serve.api.answers import written_arguments
from serve.api.messages import OutputBlock, TextBlock, ThinkingBlock, ToolUseBlock
from serve.api.openai.common import custom_input, whole_arguments
from serve.api.openai.tools import CallableTool
from serve.api.openai.vendor_tools import CLIENT_TOOLS, call_field, has_required

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Struct, frozen=True, tag="output_text"):
    """Text of the answer."""

    text: str
    annotations: tuple[Any, ...] = ()


class ReasoningText(Struct, frozen=True, tag="reasoning_text"):
    """Reasoning of the answer."""

    text: str


class SummaryText(Struct, frozen=True, tag="summary_text"):
    """A summary of reasoning, which this server never writes."""

    text: str


class MessageItem(Struct, frozen=True, tag="message"):
    """Text of the answer."""

    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: tuple[OutputText, ...] = ()


class ReasoningItem(Struct, frozen=True, tag="reasoning"):
    """Reasoning of the answer. `encrypted_content` is its signature here; clients send back both."""

    id: str
    status: Status = "in_progress"
    summary: tuple[SummaryText, ...] = ()
    content: tuple[ReasoningText, ...] = ()
    encrypted_content: str | None = None


class FunctionCallItem(Struct, frozen=True, tag="function_call"):
    """A call of a function."""

    id: str
    call_id: str
    name: str
    namespace: str | None
    status: Status = "in_progress"
    arguments: str = ""


class CustomCallItem(Struct, frozen=True, tag="custom_tool_call"):
    """A call of a tool that takes any text."""

    id: str
    call_id: str
    name: str
    namespace: str | None
    status: Status = "in_progress"
    input: str = ""


class LocalShellCallItem(Struct, frozen=True, tag="local_shell_call"):
    """A command for the client's machine."""

    id: str
    call_id: str
    status: Status = "in_progress"
    action: dict[str, Any] = {}


class ShellCallItem(Struct, frozen=True, tag="shell_call"):
    """Commands for a shell on the client's machine."""

    id: str
    call_id: str
    status: Status = "in_progress"
    action: dict[str, Any] = {}


class ApplyPatchCallItem(Struct, frozen=True, tag="apply_patch_call"):
    """A change of one file."""

    id: str
    call_id: str
    status: Status = "in_progress"
    operation: dict[str, Any] = {}


class ToolSearchCallItem(Struct, frozen=True, tag="tool_search_call"):
    """A search for tools, which the client does."""

    id: str
    call_id: str
    status: Status = "in_progress"
    execution: Literal["client"] = "client"
    arguments: dict[str, Any] = {}


ClientCallItem = LocalShellCallItem | ShellCallItem | ApplyPatchCallItem | ToolSearchCallItem
OutputItem = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem | ClientCallItem
CLIENT_ITEMS: dict[str, tuple[type[ClientCallItem], str]] = {
    "local_shell": (LocalShellCallItem, "lsh"),
    "shell": (ShellCallItem, "sh"),
    "apply_patch": (ApplyPatchCallItem, "apc"),
    "tool_search": (ToolSearchCallItem, "tsc"),
}


def empty_item(block: OutputBlock, id: str, tool: CallableTool | None) -> OutputItem:
    """The item for a block, without content. `id` is part of its id; `tool` is the one that is called, if known."""
    match block:
        case TextBlock():
            return MessageItem(f"msg_{id}")
        case ThinkingBlock():
            return ReasoningItem(f"rs_{id}")
        case ToolUseBlock(call, name) if tool is None:
            return FunctionCallItem(f"fc_{id}", call, name, None)
        case ToolUseBlock(call, name):
            if tool.spec.type in CLIENT_ITEMS:
                item, prefix = CLIENT_ITEMS[tool.spec.type]
                return item(f"{prefix}_{id}", call)
            if tool.spec.type == "custom":
                return CustomCallItem(f"ctc_{id}", call, tool.own_name, tool.namespace)
            return FunctionCallItem(f"fc_{id}", call, tool.own_name, tool.namespace)


def completed_item(item: OutputItem, text: str, signature: str) -> OutputItem:
    """An item with its content: the text of a block's deltas, and the signature of thinking.

    A call of a type of its own that lacks what its item must have, as one that was cut off, becomes a function's.
    """
    match item:
        case MessageItem():
            return replace(item, status="completed", content=(OutputText(text),))
        case ReasoningItem():
            return replace(
                item, status="completed", content=(ReasoningText(text),), encrypted_content=signature or None
            )
    arguments = whole_arguments(text)
    status: Status = "incomplete" if arguments is None else "completed"
    match item:
        case FunctionCallItem():
            return replace(item, status=status, arguments=text)
        case CustomCallItem():
            return replace(item, status=status, input=custom_input(text))
    kind = next(kind for kind, (form, _) in CLIENT_ITEMS.items() if isinstance(item, form))
    if arguments is None or not has_required(kind, arguments):
        return FunctionCallItem(f"fc_{item.id.partition('_')[2]}", item.call_id, kind, None, status, text)
    return replace(item, status=status, **{CLIENT_TOOLS[kind].call: call_field(kind, arguments)})


def block_content(block: OutputBlock) -> tuple[str, str]:
    """The text and the signature of a block, as its deltas would have sent them."""
    match block:
        case TextBlock(text):
            return text, ""
        case ThinkingBlock(text, signature):
            return text, signature
        case ToolUseBlock(input=arguments):
            return written_arguments(arguments), ""
