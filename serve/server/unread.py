"""What a model that reads text only does not see of a request: counted, logged, or refused by `--on-image error`."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from serve.api.messages import (
    Block,
    ContentSource,
    CountTokensRequest,
    DocumentBlock,
    ImageBlock,
    InvalidRequest,
    MessagesRequest,
    ResultBlock,
    ToolResultBlock,
    UnreadBlock,
    UnreadSource,
)
from serve.api.unread import counted_kind, counted_tool
from serve.rules.log import is_new
from serve.server.context import ServerContext

log = logging.getLogger("tokenzero.server")

Unread = ImageBlock | DocumentBlock | UnreadBlock


def unread_blocks(request: CountTokensRequest) -> Iterator[tuple[str, Unread]]:
    """Place and block of each image, document without text and unknown block in the messages of a request."""
    for i, message in enumerate(request.messages):
        if not isinstance(message.content, str):
            place = request.places[i] if i < len(request.places) else i
            yield from unread_among(f"messages[{place}].content", message.content)


def unread_among(where: str, blocks: tuple[Block | ResultBlock, ...]) -> Iterator[tuple[str, Unread]]:
    """Place and block of each of `blocks` that cannot be read, and of those in results and documents among them."""
    for i, block in enumerate(blocks):
        place = f"{where}[{i}]"
        if isinstance(block, ImageBlock | UnreadBlock):
            yield place, block
        elif isinstance(block, ToolResultBlock) and isinstance(block.content, tuple):
            yield from unread_among(f"{place}.content", block.content)
        elif isinstance(block, DocumentBlock) and isinstance(block.source, UnreadSource):
            yield place, block
        elif isinstance(block, DocumentBlock) and isinstance(block.source, ContentSource):
            content = block.source.content
            yield from unread_among(f"{place}.source.content", content if isinstance(content, tuple) else ())


def refuse_images(request: CountTokensRequest) -> None:
    """Raise InvalidRequest for an image or a document without text, in words that clients recover from."""
    for place, block in unread_blocks(request):
        if isinstance(block, ImageBlock):
            raise InvalidRequest(f"{place}: Could not process image: this model reads text only, send text instead")
        if isinstance(block, DocumentBlock):
            raise InvalidRequest(f"{place}: this model does not support PDF input, send its text: {block.source.text}")


def report_unread(context: ServerContext, request: CountTokensRequest) -> None:
    """Count what cannot be read and which tools are left out, by type, and log each type once."""
    for place, block in unread_blocks(request):
        kind = block.kind if isinstance(block, UnreadBlock) else str(block.__struct_config__.tag)
        name = counted_kind(kind)
        context.metrics.unread.labels(name).inc()
        if is_new(f"block {name}", context.reported):
            log.warning("%s: the model reads a short text in place of a block of type %.64r", place, kind)
    for tool in request.left_out_tools:
        name = counted_tool(tool)
        context.metrics.left_out_tools.labels(name).inc()
        if is_new(f"tool {name}", context.reported):
            log.warning("tools: left out %.64r, which only its vendor can run", tool)


def report_safeguards(context: ServerContext, request: MessagesRequest) -> None:
    """Log once that a client waits for verdicts on tool calls, and what that costs."""
    if request.safeguards and is_new("safeguards", context.reported):
        log.warning(
            "safeguards: no verdicts on tool calls are given here, so Claude Code's auto mode asks the model for each "
            "in a request of its own (38,181 tokens when cold), or denies the call: use --permission-mode default"
        )
