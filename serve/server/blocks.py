"""The content blocks of an answer and their events, made from what the parser returns, in the model's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from serve.api.answers import (
    BlockEvent,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    SignatureDelta,
    TextDelta,
    ThinkingDelta,
)
from serve.api.messages import CountTokensRequest, OutputBlock, TextBlock, ThinkingBlock, ToolUseBlock
from serve.formats.readers import Call, CutCall, complete_arguments
from serve.formats.stream import AnswerEvent, Text, Thinking, ThinkingEnd

# What a client sees of thinking: its text, only a signed empty block, or nothing.
ThinkingDisplay = Literal["text", "signature", "nothing"]


def thinking_display(request: CountTokensRequest) -> ThinkingDisplay:
    """What a request wants to see of thinking: nothing unless it asked for thinking, even if the model thinks."""
    if request.thinking is None or request.thinking.type == "disabled":
        return "nothing"
    return "signature" if request.thinking.display == "omitted" else "text"


class BlockStream:
    """The blocks of one answer; a block opens with its first piece, and a piece of another kind closes it.

    `sign` returns the signature of the thinking that has just ended.
    """

    def __init__(self, thinking: ThinkingDisplay, sign: Callable[[], str]) -> None:
        self.thinking, self.sign = thinking, sign
        self.blocks: list[OutputBlock] = []  # the complete ones
        self.open: type[TextBlock] | type[ThinkingBlock] | None = None
        self.parts: list[str] = []  # the text of the open block

    @property
    def calls(self) -> int:
        """The number of tool calls so far."""
        return sum(isinstance(block, ToolUseBlock) for block in self.blocks)

    def add(self, piece: AnswerEvent) -> list[BlockEvent]:
        """The events that follow from a piece of the answer."""
        match piece:
            case Text(text):
                return self.grow(TextBlock, text, TextDelta(text))
            case Thinking(text) if self.thinking == "text":
                return self.grow(ThinkingBlock, text, ThinkingDelta(text))
            case Thinking() if self.thinking == "signature":
                return self.begin(ThinkingBlock)
            case ThinkingEnd():
                return self.close() if self.open is ThinkingBlock else []
            case Call(id, name, input, arguments):
                return self.add_call(ToolUseBlock(id, name, input), arguments)
            case CutCall(id, name, arguments):
                return self.add_call(ToolUseBlock(id, name, complete_arguments(arguments)), arguments)
        return []

    def add_call(self, block: ToolUseBlock, arguments: str) -> list[BlockEvent]:
        """A call as a block of its own; `arguments` is its JSON, or the beginning of it if the call was cut off."""
        closed = self.close()
        index = len(self.blocks)
        self.blocks.append(block)
        return [
            *closed,
            ContentBlockStart(index, ToolUseBlock(block.id, block.name, {})),
            ContentBlockDelta(index, InputJsonDelta(arguments)),
            ContentBlockStop(index),
        ]

    def begin(self, kind: type[TextBlock] | type[ThinkingBlock]) -> list[BlockEvent]:
        """Open a block of this kind unless one is open; return the events."""
        if self.open is kind:
            return []
        closed = self.close()
        self.open = kind
        return [*closed, ContentBlockStart(len(self.blocks), kind(""))]

    def grow(
        self, kind: type[TextBlock] | type[ThinkingBlock], text: str, delta: TextDelta | ThinkingDelta
    ) -> list[BlockEvent]:
        """Add to the open block of this kind, or open one; return the events."""
        begun = self.begin(kind)
        self.parts.append(text)
        return [*begun, ContentBlockDelta(len(self.blocks), delta)]

    def close(self) -> list[BlockEvent]:
        """Complete the open block, if there is one; return the events."""
        kind, text, index = self.open, "".join(self.parts), len(self.blocks)
        self.open, self.parts = None, []
        if kind is None:
            return []
        if kind is TextBlock:
            self.blocks.append(TextBlock(text))
            return [ContentBlockStop(index)]
        signature = self.sign()
        self.blocks.append(ThinkingBlock(text, signature))
        return [ContentBlockDelta(index, SignatureDelta(signature)), ContentBlockStop(index)]
