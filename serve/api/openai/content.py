"""The content of messages and of tool results in OpenAI's two APIs, as blocks of the Messages API.

What a text model cannot read becomes a short text, as in `serve.api.mend`. Nothing here is refused: clients send their
history again with every request. Formats: https://platform.openai.com/docs/api-reference/chat/create and
https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from typing import Any

import msgspec

from serve.api.mend import BLOCKS, RESULT_BLOCKS, Kinds, mended_block, unread
from serve.api.messages import Block, ResultBlock, TextBlock, UnreadBlock
from serve.api.unread import words

TEXT_PARTS = frozenset({"text", "input_text", "output_text", "summary_text", "reasoning_text"})
IMAGE_PARTS = frozenset({"image_url", "input_image", "computer_screenshot"})
FILE_PARTS = frozenset({"file", "input_file"})
PART_LEVELS = 50  # of JSON in which images and files are looked for
USER_BLOCKS: Kinds = RESULT_BLOCKS | {"tool_result": BLOCKS["tool_result"]}
ANSWER_BLOCKS: Kinds = RESULT_BLOCKS | {kind: BLOCKS[kind] for kind in ("thinking", "redacted_thinking", "tool_use")}


def user_content(content: Any) -> str | tuple[Block, ...]:
    """The content of a user's message; null is empty."""
    return content if isinstance(content, str) else tuple(to_blocks(content, USER_BLOCKS)) or ""


def system_content(content: Any) -> str | tuple[TextBlock, ...]:
    """The content of a system message: text only."""
    if isinstance(content, str):
        return content
    return tuple(TextBlock(text_of(block)) for block in to_blocks(content, RESULT_BLOCKS)) or ""


def answer_content(content: Any) -> list[Block]:
    """The blocks of an earlier answer; empty texts are left out."""
    return [b for b in to_blocks(content, ANSWER_BLOCKS) if not isinstance(b, TextBlock) or b.text]


def result_content(content: Any) -> str | tuple[ResultBlock, ...]:
    """The content of a tool's result; null is empty."""
    if isinstance(content, str):
        return content
    return msgspec.convert(msgspec.to_builtins(to_blocks(content, RESULT_BLOCKS)), tuple[ResultBlock, ...]) or ""


def to_blocks(content: Any, kinds: Kinds) -> list[Block]:
    """Content of any form as blocks of the types in `kinds`: a text, a part or a list of these."""
    parts = content if isinstance(content, list) else [] if content is None else [content]
    return [to_block(part, kinds) for part in parts if part is not None]


def to_block(part: Any, kinds: Kinds) -> Block:
    """One part of a content as a block of one of the types in `kinds`, or as a text that keeps its words."""
    if kind_of(part) in TEXT_PARTS and isinstance(part.get("text"), str):
        return TextBlock(part["text"])
    block: Block = msgspec.convert(mended_block(translated(part), kinds), Block)
    return block


def unread_item(kind: str, item: Any) -> UnreadBlock:
    """The block for an item, a message or a call of a type that is not read here."""
    return msgspec.convert(unread(kind, translated_parts(item)), UnreadBlock)


def text_of(block: Block) -> str:
    """The text of a block in a system message."""
    text = getattr(block, "text", "")
    return text if isinstance(text, str) else ""


def plain_text(value: Any) -> str:
    """A text, or the words of any other value."""
    return value if isinstance(value, str) else "\n".join(words(translated_parts(value)))


def translated_parts(value: Any, levels: int = PART_LEVELS) -> Any:
    """A JSON value with the images and files in it, down to so many levels, as the Messages API has them."""
    if isinstance(value, list) and levels:
        return [translated_parts(element, levels - 1) for element in value]
    if isinstance(value, dict) and levels:
        part = translated(value)
        return part if part is not value else {key: translated_parts(field, levels - 1) for key, field in value.items()}
    return value


def kind_of(part: Any) -> str | None:
    """The type of a part; None if it has none."""
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else None


def translated(part: Any) -> Any:
    """A part as the JSON of a block of the Messages API; one of any other type as it is."""
    kind = kind_of(part)
    if kind in TEXT_PARTS:
        return {"type": "text", "text": part.get("text")}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if kind in ("thinking", "reasoning") and "summary" not in part:
        thinking = next((part[key] for key in ("thinking", "reasoning", "text") if part.get(key) is not None), "")
        return {"type": "thinking", "thinking": plain_text(thinking), "signature": part.get("signature")}
    if kind in IMAGE_PARTS:
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        return {"type": "image", "source": source(url, part.get("file_id"))}
    if kind in FILE_PARTS:
        nested = part.get("file")
        file = nested if isinstance(nested, dict) else part
        data = file.get("file_data") or file.get("file_url")
        return {"type": "document", "source": source(data, file.get("file_id")), "title": file.get("filename")}
    return part


def source(data: Any, file_id: Any) -> dict[str, Any]:
    """The source of an image or a file: its data in a URL or in plain Base64, its address, or its id."""
    if not isinstance(data, str) or not data:
        return {"type": "file", "file_id": file_id}
    if data.startswith(("http://", "https://")):
        return {"type": "url", "url": data}
    if not data.startswith("data:"):
        return {"type": "base64", "data": data}
    head, _, content = data.removeprefix("data:").partition(",")
    return {"type": "base64", "media_type": head.partition(";")[0], "data": content}
