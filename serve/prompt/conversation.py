"""A request as the turns that chat templates take. Knows no particular template and changes no text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from serve.api.messages import (
    Block,
    CountTokensRequest,
    DocumentBlock,
    ImageBlock,
    InputMessage,
    ResultBlock,
    SearchResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
    UnreadBlock,
)

ChatMessage = dict[str, Any]  # one message as chat templates take it


def is_prefilled(request: CountTokensRequest) -> bool:
    """Whether the last message is the start of the assistant's answer, to be continued."""
    last = request.messages[-1]
    return last.role == "assistant" and not any(isinstance(b, ToolUseBlock) for b in blocks(last))


def wants_thinking(request: CountTokensRequest) -> bool:
    """Whether the request asks for thinking; a model may think without being asked."""
    return request.thinking is not None and request.thinking.type != "disabled"


def joined(messages: Sequence[InputMessage]) -> list[InputMessage]:
    """The messages, with neighbouring ones of the assistant joined: some clients split an answer."""
    result: list[InputMessage] = []
    for role, group in groupby(messages, lambda message: message.role):
        run = list(group)
        split = role == "assistant" and len(run) > 1
        result += [InputMessage("assistant", tuple(b for message in run for b in blocks(message)))] if split else run
    return result


def answers(messages: Sequence[InputMessage]) -> list[tuple[Block, ...]]:
    """The blocks of each of the assistant's turns."""
    return [blocks(message) for message in joined(messages) if message.role == "assistant"]


def tool_definitions(request: CountTokensRequest) -> list[dict[str, Any]] | None:
    """The tools in the form that chat templates take; None without tools."""
    if not request.tools:
        return None
    return [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description or "", "parameters": t.input_schema},
        }
        for t in request.tools
    ]


def conversation(request: CountTokensRequest) -> list[ChatMessage]:
    """The request as a chat template's messages: the system text first, tool results as turns of role `tool`."""
    system = request.system if isinstance(request.system, str) else join(request.system or ())
    head = [{"role": "system", "content": system}] if system else []
    return head + [turn for message in joined(request.messages) for turn in turns(message)]


def turns(message: InputMessage) -> list[ChatMessage]:
    """One message of the API as one or more of a chat template."""
    if message.role == "assistant":
        return [assistant_turn(message)]
    result: list[ChatMessage] = []
    texts: list[Block] = []
    for block in blocks(message):
        if isinstance(block, ToolResultBlock):
            if texts:
                result.append({"role": message.role, "content": join(texts)})
                texts = []
            result.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result_text(block)})
        else:
            texts.append(block)
    if texts or not result:
        result.append({"role": message.role, "content": join(texts)})
    return result


def assistant_turn(message: InputMessage) -> ChatMessage:
    """An assistant message: text, reasoning and tool calls."""
    turn: ChatMessage = {"role": "assistant", "content": join(blocks(message))}
    thoughts = "\n\n".join(b.thinking for b in blocks(message) if isinstance(b, ThinkingBlock))
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": b.input}}
        for b in blocks(message)
        if isinstance(b, ToolUseBlock)
    ]
    return turn | ({"reasoning_content": thoughts} if thoughts else {}) | ({"tool_calls": calls} if calls else {})


def blocks(message: InputMessage) -> tuple[Block, ...]:
    """A message's content as blocks; a plain string is one text block, so both forms render alike.

    Answers consist of texts, thinking and calls, so that what cannot be read in one is a text on lines of its own.
    """
    if isinstance(message.content, str):
        return (TextBlock(message.content),)
    if message.role != "assistant":
        return message.content
    unread = UnreadBlock | ImageBlock | SearchResultBlock
    return tuple(TextBlock(f"\n{b.text}\n") if isinstance(b, unread) else b for b in message.content)


def result_text(block: ToolResultBlock) -> str:
    """The result of a tool as text; an error begins with `Error`."""
    text = block.content if isinstance(block.content, str) else join(block.content or ())
    return f"Error: {text}" if block.is_error and not text.startswith("Error") else text


def join(content: tuple[Block | ResultBlock, ...] | list[Block]) -> str:
    """The texts among the blocks, separated by blank lines."""
    return "\n\n".join(text for block in content if (text := block_text(block)))


def block_text(block: Block | ResultBlock) -> str:
    """The text that a block adds to the visible text of its turn."""
    if isinstance(block, TextBlock | DocumentBlock | SearchResultBlock | ImageBlock | UnreadBlock):
        return block.text
    if isinstance(block, ToolReferenceBlock):
        return block.tool_name
    return ""
