"""One plan of a conversation: the turns that the chat template gets, and how each answer among them is written.

A placeholder stands for every answer, so that the template writes only what is around it. Made once for a request;
`render` reads all borders off it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from serve.api.messages import Block, CountTokensRequest, TextBlock, ThinkingBlock, ToolUseBlock
from serve.formats.format import Format
from serve.prompt.adapt import adapt_conversation
from serve.prompt.conversation import ChatMessage, answers, conversation, is_prefilled, tool_definitions, wants_thinking
from serve.prompt.template import CALL_NAME, Opening, Template, answer_turn


@dataclass(frozen=True)
class PlannedAnswer:
    """One answer in the history, or the one that the client has begun."""

    turn: int  # its index in `Chat.turns`
    blocks: tuple[Block, ...]  # as the client sent them
    opening: Opening  # what the template writes before its words
    thinking_opening: Opening  # the same in a conversation that thinks
    as_tool_call: bool  # its placeholder is the argument of a tool call
    prefilled: bool  # the client has begun it, the model goes on


@dataclass(frozen=True)
class Chat:
    """A request as its chat template takes it. A `placeholder` is random, so that no text of the request holds it."""

    placeholder: str  # stands inside each control token in a text from outside: see `break_controls`
    answer_placeholder: str  # followed by its number and an x it stands for an answer
    adapted: list[ChatMessage]  # as the template takes them, with the client's answers and whole control tokens
    turns: list[ChatMessage]  # the same with answers as placeholders and control tokens broken
    answers: list[PlannedAnswer]
    next_opening: Opening  # before the answer that the model is to give
    tools: list[dict[str, Any]] | None  # as the template takes them, control tokens broken
    template: Template  # for the form of head that the request has
    thinking: bool
    prefilled: bool  # the last answer is begun by the client
    tools_first: bool  # tools before the system text

    @property
    def template_flags(self) -> dict[str, bool]:
        """How the turns are to be rendered: closed by the start of an answer, unless the client has begun it."""
        return {"answer": not self.prefilled, "thinking": self.thinking}

    @property
    def last_opening(self) -> Opening:
        """The opening of the answer that the prompt ends in."""
        return self.answers[-1].opening if self.prefilled else self.next_opening

    def can_be_written(self, format: Format) -> bool:
        """Whether a format can write all answers; one without tool calls would lose them."""
        return format.call is not None or not any(isinstance(b, ToolUseBlock) for a in self.answers for b in a.blocks)


def plan_chat(request: CountTokensRequest, template: Template, tools_first: bool = False) -> Chat:
    """The plan of a request. Raises RecursionError for JSON that nests too deeply."""
    placeholder, answer_placeholder = secrets.token_hex(12), secrets.token_hex(12)
    prefilled, thinking = is_prefilled(request), wants_thinking(request)
    chat, tools = conversation(request), tool_definitions(request)
    template = template.for_head(bool(tools), any(turn["role"] == "system" for turn in chat[:1]))
    adapted = adapt_conversation(chat, template)
    given = answers(request.messages)
    turns: list[ChatMessage] = []
    planned: list[PlannedAnswer] = []
    role_before = "user"  # the first turn is written as after a user
    for turn, following in zip(adapted, [*adapted[1:], None], strict=True):
        if turn["role"] != "assistant":
            turns.append(break_turn(turn, template.control_tokens, placeholder))
        else:
            blocks = with_ids(given[len(planned)], turn) if template.format.history_id else given[len(planned)]
            name = call_name(blocks) if template.format.named_results else CALL_NAME
            name = break_controls(name, template.control_tokens, placeholder)
            opening = template.opening(role_before, thinking)
            answer = PlannedAnswer(
                turn=len(turns),
                blocks=blocks,
                opening=opening.with_name(name),
                thinking_opening=template.opening(role_before, True),
                as_tool_call=template.answer_as_tool_call and following is not None and following["role"] == "tool",
                prefilled=prefilled and len(planned) == len(given) - 1,
            )
            turns.append(answer_turn(f"{answer_placeholder}{len(planned)}x", answer.as_tool_call, name=name))
            planned.append(answer)
        role_before = turn["role"]
    return Chat(
        placeholder=placeholder,
        answer_placeholder=answer_placeholder,
        adapted=adapted,
        turns=turns,
        answers=planned,
        next_opening=template.opening(role_before, thinking),
        tools=break_controls(tools, template.control_tokens, placeholder) if tools else template.no_tools,
        template=template,
        thinking=thinking,
        prefilled=prefilled,
        tools_first=tools_first,
    )


def call_name(blocks: Sequence[Block]) -> str:
    """The name of the first call in an answer, as the template is to write it."""
    return next((block.name for block in blocks if isinstance(block, ToolUseBlock)), CALL_NAME)


def with_ids(blocks: Sequence[Block], turn: ChatMessage) -> tuple[Block, ...]:
    """An answer's blocks with the ids that its calls have in the adapted turn."""
    ids = iter([call["id"] for call in turn.get("tool_calls", ())])
    return tuple(
        msgspec.structs.replace(block, id=next(ids)) if isinstance(block, ToolUseBlock) else block for block in blocks
    )


def break_turn(turn: ChatMessage, controls: re.Pattern[str] | None, placeholder: str) -> ChatMessage:
    """`break_controls` for a turn, whose keys are ours."""
    if controls is None:
        return turn
    return {key: break_controls(item, controls, placeholder) for key, item in turn.items()}


def break_controls(value: Any, controls: re.Pattern[str] | None, placeholder: str) -> Any:
    """JSON with `placeholder` after the first character of each control token in its strings.

    The placeholders come out of the template with the text, which is cut at them before it is tokenised: a control
    token in two parts is ordinary text.
    """
    if controls is None:
        return value
    if isinstance(value, str):
        return break_text(value, controls, placeholder) if controls.search(value) else value
    if isinstance(value, dict):
        return {
            break_controls(key, controls, placeholder): break_controls(item, controls, placeholder)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [break_controls(item, controls, placeholder) for item in value]
    return value


def break_text(text: str, controls: re.Pattern[str], placeholder: str) -> str:
    """`break_controls` for a text. The part of a token after its first character may hold a shorter control token."""
    return controls.sub(lambda m: m[0][0] + placeholder + break_text(m[0][1:], controls, placeholder), text)


def break_block(block: Block, controls: re.Pattern[str] | None, placeholder: str) -> Block:
    """`break_controls` for the fields of a block that the model wrote."""
    names: tuple[str, ...] = ()
    match block:
        case TextBlock():
            names = ("text",)
        case ThinkingBlock():
            names = ("thinking",)
        case ToolUseBlock():
            names = ("name", "input")
    written = {name: getattr(block, name) for name in names}
    broken = {name: break_controls(value, controls, placeholder) for name, value in written.items()}
    return block if broken == written else msgspec.structs.replace(block, **broken)
