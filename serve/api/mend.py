"""History that cannot be read, as history that can: JSON in, JSON out that the structs of `messages` accept.

Agents send their history again with every request, so an item that is refused ends the session. What has no struct, or
violates it, becomes a short text (see `unread`) or the nearest value; what the structs accept stays as it is. The
result for an item depends on that item alone. Options of a request, roles and a last message without content are not
mended: they are refused by name.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import msgspec

from serve.api import pdf, vendor_tools
from serve.api.tools import ToolAdditionBlock, ToolRemovalBlock
from serve.api.unread import MAX_NAME, source_of, unread_text, words

Block = dict[str, Any]


def mended(body: Any) -> Any:
    """The body of a request, with its system text, its tools and its messages mended."""
    if not isinstance(body, dict):
        return body
    with pdf.reading_time():
        return mended_fields(body)


def mended_fields(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request, mended."""
    fields = dict(body)
    if fields.get("stream", False) is None:
        del fields["stream"]
    choice = fields.get("tool_choice")
    if isinstance(choice, dict) and choice.get("disable_parallel_tool_use", False) is None:
        fields["tool_choice"] = {key: choice[key] for key in choice if key != "disable_parallel_tool_use"}
    if isinstance(fields.get("system"), list):
        fields["system"] = [system_text(block) for block in fields["system"]]
    if isinstance(fields.get("tools"), list):
        fields["tools"], left_out = vendor_tools.offered(fields["tools"])
        if left_out:
            fields["left_out_tools"] = left_out
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [mended_message(m, last=i == len(messages) - 1) for i, m in enumerate(messages)]
    return fields


def mended_message(message: Any, last: bool) -> Any:
    """A message with its content mended. The last one must have content, unless it is of the system."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, str) or (last and message.get("role") != "system" and not isinstance(content, list)):
        return message
    return message | {"content": mended_content(content, BLOCKS)}


def mended_content(content: Any, kinds: Kinds) -> list[Block]:
    """Content of any form as blocks of the types in `kinds`."""
    elements = content if isinstance(content, list) else [] if content is None else [content]
    return [mended_block(element, kinds) for element in elements]


def mended_block(block: Any, kinds: Kinds) -> Block:
    """A block of one of the types in `kinds`, or a text that has its words."""
    if not isinstance(block, dict):
        return text(block)
    kind = block.get("type")
    if not isinstance(kind, str):
        return text(block)
    mend = kinds.get(kind)
    return (mend(block) if mend else None) or unread(kind, block)


def system_text(block: Any) -> Any:
    """A block of a system text: other types than text become text; a text block without text is refused."""
    if not isinstance(block, dict) or ("text" not in block and block.get("type") == "text"):
        return block
    kind = block.get("type")
    if kind == "text":
        return text_block(block)
    if not isinstance(kind, str):
        return text(block)
    return text("\n".join(words(block)) if kind == "image" else unread_text(kind[:MAX_NAME], block))


def text(value: Any) -> Block:
    """A text block with the words of any value."""
    return {"type": "text", "text": "\n".join(words(value))}


def unread(kind: str, block: Any) -> Block:
    """The block for an item of a type that cannot be read."""
    return {"type": "unread", "kind": kind[:MAX_NAME], "text": unread_text(kind[:MAX_NAME], block)}


def text_block(block: Block) -> Block:
    """A text block."""
    return block if isinstance(block.get("text"), str) else text(block.get("text"))


def thinking_block(block: Block) -> Block:
    """A thinking block; without a signature that is text, it has none."""
    thinking, signature = block.get("thinking"), block.get("signature")
    return {
        "type": "thinking",
        "thinking": thinking if isinstance(thinking, str) else "\n".join(words(thinking)),
        "signature": signature if isinstance(signature, str) else "",
    }


def redacted_thinking_block(block: Block) -> Block:
    """A block of encrypted thinking."""
    return block if isinstance(block.get("data"), str) else block | {"data": ""}


def tool_use_block(block: Block) -> Block | None:
    """A call; None without a tool's name. Its input is an object: JSON in a text is decoded, other values are kept."""
    if not isinstance(block.get("name"), str):
        return None
    id = block.get("id")
    return block | {"id": id if isinstance(id, str) else "", "input": tool_input(block.get("input"))}


def tool_input(value: Any) -> dict[str, Any]:
    """The input of a call as an object; what is no object, also as JSON in a text, becomes its field `input`."""
    if isinstance(value, str):
        try:
            decoded = msgspec.json.decode(value or "{}")
        except (ValueError, RecursionError):
            decoded = value
        value = decoded if isinstance(decoded, dict) else value
    if isinstance(value, dict):
        return value
    return {} if value is None else {"input": value}


def tool_result_block(block: Block) -> Block:
    """A tool result; whose call it is may be unknown, and what is no blocks becomes one."""
    id, content = block.get("tool_use_id"), block.get("content")
    readable = content is None or isinstance(content, str)
    return {
        "type": "tool_result",
        "tool_use_id": id if isinstance(id, str) else "",
        "content": content if readable else mended_content(content, RESULT_BLOCKS),
        "is_error": block.get("is_error") is True,
    }


def tool_reference_block(block: Block) -> Block | None:
    """The name of a tool that was found; None without one."""
    return block if isinstance(block.get("tool_name"), str) else None


def image_block(block: Block) -> Block:
    """An image without its bytes; one in the form of its struct stays as it is."""
    form = [type(block.get("media_type")), type(block.get("size")), type(block.get("where", ""))]
    return block if form == [str, int, str] else {"type": "image", **source_of(block)}


def document_block(block: Block) -> Block:
    """A document: its text, or why it has none."""
    titles = {key: block[key] for key in ("title", "context") if isinstance(block.get(key), str)}
    return {"type": "document", "source": document_source(block), **titles}


def document_source(block: Block) -> Block:
    """The source of a document as a text, as blocks or as the reason why it cannot be read."""
    given = block.get("source")
    source: Block = given if isinstance(given, dict) else {}
    kind, content = source.get("type"), source.get("content")
    if (kind == "text" and isinstance(source.get("data"), str)) or (kind == "content" and isinstance(content, str)):
        return source
    if kind == "content":
        kinds: Kinds = {"text": text_block, "image": image_block}
        blocks = mended_content(content, kinds)
        return {"type": "content", "content": [b if b["type"] in kinds else text(b["text"]) for b in blocks]}
    if kind == "base64" and isinstance(source.get("data"), str):
        return base64_source(source)
    reasons = {"base64": "it has no data", "url": "not fetched", "file": "not available here"}
    said = source.get("reason") if kind == "unread" else None  # it was mended before
    reason = said if isinstance(said, str) else reasons.get(str(kind), "unknown source")
    return unread_source(source, reason)


def unread_source(source: Block, reason: str) -> Block:
    """The source of a document that cannot be read."""
    return {"type": "unread", "reason": reason, **source_of({"source": source})}


def base64_source(source: Block) -> Block:
    """The text of a file in Base64: of a PDF, which is the default, or of a text."""
    media_type = str(source.get("media_type") or "application/pdf")
    if media_type.startswith("text/"):
        return {"type": "text", "data": decoded_text(source["data"])}
    if media_type != "application/pdf":
        return unread_source(source, "only texts and PDFs are read")
    found = pdf.pdf_text(source["data"])
    return {"type": "text", "data": found.text} if found.text else unread_source(source, found.reason)


def decoded_text(data: str) -> str:
    """A text in Base64; what is not UTF-8 becomes replacement characters."""
    try:
        return base64.b64decode(data).decode("utf-8", "replace")
    except ValueError:
        return data


def search_result_block(block: Block) -> Block:
    """A search result, with text for each field that it lacks."""
    content = mended_content(block.get("content"), {"text": text_block})
    named = {key: block[key] if isinstance(block.get(key), str) else "" for key in ("source", "title")}
    return {"type": "search_result", **named, "content": [{"type": "text", "text": b["text"]} for b in content]}


def tool_change_block(block: Block) -> Block | None:
    """An addition or removal of a tool; None for one that has no struct, or of a tool that only the vendor can run."""
    tool = block.get("tool")
    if isinstance(tool, dict) and "definition" in tool:
        (definition,), _ = vendor_tools.offered([tool["definition"]])
        block = block | {"tool": tool | {"definition": definition}}
    try:
        msgspec.convert(block, ToolAdditionBlock | ToolRemovalBlock)
    except (msgspec.ValidationError, RecursionError):
        return None
    return block


def unread_block(block: Block) -> Block | None:
    """A block that was mended before."""
    return block if isinstance(block.get("kind"), str) and isinstance(block.get("text"), str) else None


# How to mend a block of each type that has a struct. None: its words are kept as those of an unknown type.
Kinds = dict[str, Callable[[Block], Block | None]]
RESULT_BLOCKS: Kinds = {
    "text": text_block,
    "image": image_block,
    "document": document_block,
    "search_result": search_result_block,
    "tool_reference": tool_reference_block,
    "unread": unread_block,
}
# Each type in the union `messages.Block` needs an entry.
BLOCKS: Kinds = RESULT_BLOCKS | {
    "thinking": thinking_block,
    "redacted_thinking": redacted_thinking_block,
    "tool_use": tool_use_block,
    "tool_result": tool_result_block,
    "tool_addition": tool_change_block,
    "tool_removal": tool_change_block,
}
