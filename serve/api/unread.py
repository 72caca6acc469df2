"""Short constant texts for what a text model cannot read: images, documents without text, blocks of unknown types.

A text is a function of its item alone, so that it stays the same in every later request of a session.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from serve.api import pdf

MAX_NAME = 64  # characters of a type, and of a media type
MAX_WHERE = 200  # characters of a URL or of a file's id
MIN_DATA = 1024  # characters; shorter texts are taken for words
BASE64 = re.compile(r"[\w+/-]+={0,2}", re.ASCII)
# Fields whose strings are no words: ids, marks for caches, encrypted or encoded data.
WORDLESS = frozenset({"type", "id", "signature", "cache_control", "caller", "citations", "data", "media_type"})
# Fields whose strings need no name before them.
BARE = frozenset({"text", "content", "thinking", "summary"})

# The types that are counted under their own name, so that a client cannot add series to a metric without bound: all
# others are `other`. From https://docs.claude.com/en/api/messages.
KINDS = frozenset({
    "text", "thinking", "redacted_thinking", "tool_use", "tool_result", "tool_reference", "image", "document",
    "search_result", "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "advisor_tool_result",
    "code_execution_tool_result", "bash_code_execution_tool_result", "text_editor_code_execution_tool_result",
    "tool_search_tool_result", "mcp_tool_use", "mcp_tool_result", "mcp_tool_listing", "container_upload",
    "compaction", "fallback", "tool_addition", "tool_removal",
})  # fmt: skip
# Likewise from https://platform.openai.com/docs/api-reference/responses/create.
OPENAI_KINDS = frozenset({
    "input_audio", "tool_call", "agent_message", "code_interpreter_call", "compaction_summary", "computer_call",
    "computer_call_output", "context_compaction", "file_search_call", "image_generation_call", "item_reference",
    "mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools", "program", "program_output",
    "web_search_call",
})  # fmt: skip


# The same for tools that only a vendor can run, without the date at the end of their types.
VENDOR_TOOLS = frozenset({
    "web_search", "web_fetch", "code_execution", "computer", "computer_toolset", "browser_toolset", "mcp_toolset",
    "advisor", "tool_search_tool_bm25", "tool_search_tool_regex",
    # From https://platform.openai.com/docs/api-reference/responses/create.
    "code_interpreter", "computer_use_preview", "file_search", "image_generation", "mcp", "programmatic_tool_calling",
    "shell", "tool_search", "web_search_preview",
})  # fmt: skip


def counted_tool(kind: str) -> str:
    """The name under which a tool that is left out is counted."""
    name = re.sub(r"_\d{8}$", "", kind)
    return name if name in VENDOR_TOOLS else "other"


def counted_kind(kind: str) -> str:
    """The name under which a type is counted."""
    return kind if kind in KINDS | OPENAI_KINDS else "other"


def image_text(media_type: str, size: int, where: str) -> str:
    """What the model reads in place of an image."""
    return f"[image: this model reads text only{_about(media_type, size, where)}]"


def document_text(reason: str, media_type: str, size: int, where: str) -> str:
    """What the model reads in place of a document."""
    return f"[document: {reason}{_about(media_type, size, where)}]"


def _about(media_type: str, size: int, where: str) -> str:
    known = [part for part in (media_type, f"{size:,} bytes" if size else "", where) if part]
    return f" ({', '.join(known)})" if known else ""


def source_of(block: dict[str, Any]) -> dict[str, Any]:
    """Media type, size in bytes and place of an image or of a document, as far as its source, or itself, says them."""
    given = block.get("source")
    source = given if isinstance(given, dict) else block
    data, size, media_type = source.get("data"), source.get("size"), source.get("media_type")
    where = next((source[key] for key in ("url", "file_id", "where") if isinstance(source.get(key), str)), "")
    return {
        "media_type": media_type[:MAX_NAME] if isinstance(media_type, str) else "",
        "size": base64_size(data) if isinstance(data, str) else size if type(size) is int else 0,
        "where": without_query(where),
    }


def base64_size(data: str) -> int:
    """The bytes that a text in Base64 stands for."""
    return max(0, len(data) * 3 // 4 - data[-2:].count("="))


def without_query(url: str) -> str:
    """A URL without its query, which may be signed anew in each turn; empty for a URL that is its own data."""
    return "" if url.startswith("data:") else url.partition("?")[0][:MAX_WHERE]


def unread_text(kind: str, item: Any) -> str:
    """An item as its type in brackets and its words, line by line."""
    return "\n".join([f"[{kind}]", *words(item)])


def words(item: Any) -> Iterator[str]:
    """The words in a JSON value, in their order, with the names of their fields; ids and encoded data are left out."""
    waiting = [("", item)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            if value.get("type") == "image":
                yield image_text(**source_of(value))
            elif value.get("type") == "base64" and isinstance(data := value.get("data"), str):
                found = pdf.pdf_text(data)
                yield found.text or document_text(found.reason, **source_of({"source": value}))
            else:
                # A source of plain text has its words in `data`.
                plain = value.get("type") == "text" and isinstance(value.get("data"), str)
                fields = {"text": value["data"]} if plain else value
                waiting += reversed([(key, field) for key, field in fields.items() if not is_wordless(key)])
        elif isinstance(value, list):
            waiting += reversed([(name, element) for element in value])
        elif isinstance(value, str):
            if value := without_data(value):
                yield value if name in BARE or not name else f"{name}: {value}"
        elif value is not None and value is not False:
            yield f"{name}: {json.dumps(value)}" if name else json.dumps(value)


def without_data(text: str) -> str:
    """A text, or the size of the data that it encodes: that of a `data:` URL, or much Base64 without a break."""
    head, comma, data = text.partition(",") if text.startswith("data:") else ("", "", text)
    if not comma and (len(text) < MIN_DATA or not BASE64.fullmatch(text)):
        return text
    media_type = head.removeprefix("data:").partition(";")[0][:MAX_NAME]
    return f"[data: not read{_about(media_type, base64_size(data), '')}]"


def is_wordless(name: str) -> bool:
    """Whether a field has no words."""
    return name in WORDLESS or name.endswith("_id") or name.startswith("encrypted_")
