"""A request as the turns that chat templates take. Knows no particular template and changes no text."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from msgspec.structs import replace

from serve.api.messages import (
    Block,
    CountTokensRequest,
    DocumentBlock,
    ImageBlock,
    InputMessage,
    RedactedThinkingBlock,
    ResultBlock,
    SearchResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
    UnreadBlock,
)
from serve.api.tools import ToolAdditionBlock, ToolRemovalBlock
from serve.prompt.offered_tools import as_function, offered_tools

ChatMessage = dict[str, Any]  # one message as chat templates take it

# Tuples, as `isinstance` takes far longer for unions, and each block of a long history is asked.
OF_ANSWERS = (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock)  # others are texts in an answer
OTHERS = (UnreadBlock, ImageBlock, SearchResultBlock, ToolAdditionBlock, ToolRemovalBlock)
WITH_TEXT = (TextBlock, DocumentBlock, *OTHERS)


def is_prefilled(request: CountTokensRequest) -> bool:
    """Whether the last message is the start of the assistant's answer, to be continued."""
    last = next((m for m in reversed(request.messages) if not is_silent(m)), request.messages[-1])
    return last.role == "assistant" and not any(isinstance(b, ToolUseBlock) for b in blocks(last))


def wants_thinking(request: CountTokensRequest) -> bool:
    """Whether the request asks for thinking; a model may think without being asked."""
    return request.thinking is not None and request.thinking.type != "disabled"


def shown(messages: Sequence[InputMessage]) -> list[InputMessage]:
    """The messages as the model is to see them, one for one: results in the order of their calls, no cleared text."""
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
    result = [*lasting(messages[:last_user]), *messages[last_user:]]
    calls: list[str] = []
    heard = (i for i, message in enumerate(result) if not is_silent(message))
    for is_answer, group in groupby(heard, lambda i: result[i].role == "assistant"):
        run = list(group)
        if is_answer:
            calls = [block.id for i in run for block in blocks(result[i]) if isinstance(block, ToolUseBlock)]
        elif calls:
            for i, message in zip(run, in_call_order([result[i] for i in run], calls), strict=True):
                result[i] = message
    return result


def lasting(messages: Sequence[InputMessage]) -> list[InputMessage]:
    """The messages, one for one, without the texts of those system messages that the next user message clears.

    A longer conversation does not have these texts: it differs from the shorter one where they stood.
    """
    return [
        replace(message, content=tuple(block for block in blocks(message) if not isinstance(block, TextBlock)))
        if message.role == "system" and message.clear_at == "next_user_message"
        else message
        for message in messages
    ]


def is_silent(message: InputMessage) -> bool:
    """Whether a message adds nothing to the prompt: a system message without text."""
    return message.role == "system" and not join(blocks(message))


def in_call_order(run: Sequence[InputMessage], calls: Sequence[str]) -> Sequence[InputMessage]:
    """The messages after an answer with these ids of calls, its results exchanged until they are in the calls' order.

    Formats that write no ids pair results with calls by their places. Results without a call come last.
    """
    results = [block for message in run for block in blocks(message) if isinstance(block, ToolResultBlock)]
    if len(results) < 2:
        return run
    places: defaultdict[str, deque[int]] = defaultdict(deque)
    for place, id in enumerate(calls):
        places[id].append(place)
    order = [waiting.popleft() if (waiting := places[r.tool_use_id]) else len(calls) for r in results]
    if order == sorted(order):
        return run
    ordered = iter([result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])])
    return [
        replace(m, content=tuple(next(ordered) if isinstance(b, ToolResultBlock) else b for b in blocks(m)))
        for m in run
    ]


def joined(messages: Sequence[InputMessage]) -> list[InputMessage]:
    """The messages as they are shown, with neighbouring ones of the assistant joined: some clients split an answer."""
    return joined_shown(shown(messages))


def joined_shown(messages: Sequence[InputMessage]) -> list[InputMessage]:
    """`joined` for messages that are already as they are shown."""
    heard = [message for message in messages if not is_silent(message)]
    result: list[InputMessage] = []
    for role, group in groupby(heard or messages[-1:], lambda message: message.role):
        run = list(group)
        split = role == "assistant" and len(run) > 1
        result += [InputMessage("assistant", tuple(b for message in run for b in blocks(message)))] if split else run
    return result


def answers(messages: Sequence[InputMessage]) -> list[tuple[Block, ...]]:
    """The blocks of each of the assistant's turns."""
    return [blocks(message) for message in joined(messages) if message.role == "assistant"]


def tool_definitions(request: CountTokensRequest) -> list[dict[str, Any]] | None:
    """The tools of the prompt's head in the form that chat templates take; None without tools."""
    return [as_function(tool) for tool in request.tools or () if not tool.defer_loading] or None


def conversation(request: CountTokensRequest) -> list[ChatMessage]:
    """The request as a chat template's messages: the system text first, tool results as turns of role `tool`."""
    system = request.system if isinstance(request.system, str) else join(request.system or ())
    head = [{"role": "system", "content": system}] if system else []
    # In the order of the calls, so that a definition keeps its place whatever the order of the results.
    ordered = replace(request, messages=tuple(shown(request.messages)))
    return head + [turn for message in joined_shown(offered_tools(ordered).messages) for turn in turns(message)]


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

    Answers consist of texts, thinking and calls, so that anything else in one is a text on lines of its own.
    """
    if isinstance(message.content, str):
        return (TextBlock(message.content),)
    if message.role != "assistant":
        return message.content
    if all(isinstance(block, OF_ANSWERS) for block in message.content):
        return message.content
    return tuple(b if isinstance(b, OF_ANSWERS) else TextBlock(f"\n{block_text(b)}\n") for b in message.content)


def result_text(block: ToolResultBlock) -> str:
    """The result of a tool as text; an error begins with `Error`."""
    text = block.content if isinstance(block.content, str) else join(block.content or ())
    return f"Error: {text}" if block.is_error and not text.startswith("Error") else text


def join(content: tuple[Block | ResultBlock, ...] | list[Block]) -> str:
    """The texts among the blocks, separated by blank lines."""
    return "\n\n".join(text for block in content if (text := block_text(block)))


def block_text(block: Block | ResultBlock) -> str:
    """The text that a block adds to the visible text of its turn."""
    if isinstance(block, WITH_TEXT):
        return block.text
    if isinstance(block, ToolResultBlock):
        return result_text(block)
    return block.tool_name if isinstance(block, ToolReferenceBlock) else ""
