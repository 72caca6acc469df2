"""One plan of a conversation: the turns that the chat template gets, and how each answer among them is written.

A placeholder stands for every answer, so that the template writes only what is around it. Made once for a request;
`render` reads all borders off it.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

from serve.api.messages import Block, CountTokensRequest, ToolUseBlock
from serve.formats.families import Format
from serve.prompt.adapt import adapt_conversation
from serve.prompt.conversation import ChatMessage, answers, conversation, is_prefilled, tool_definitions, wants_thinking
from serve.prompt.template import Opening, Template, answer_turn


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
    tools: list[dict] | None  # control tokens broken
    thinking: bool
    prefilled: bool  # the last answer is begun by the client
    tools_first: bool  # tools before the system text

    @property
    def template_flags(self) -> dict[str, bool]:
        """How the turns are to be rendered: closed by the start of an answer, unless the client has begun it."""
        return {"answer": not self.prefilled, "thinking": self.thinking}

    def can_be_written(self, format: Format) -> bool:
        """Whether a format can write all answers; one without tool calls would lose them."""
        return format.call is not None or not any(isinstance(b, ToolUseBlock) for a in self.answers for b in a.blocks)


def plan_chat(request: CountTokensRequest, template: Template, tools_first: bool = False) -> Chat:
    """The plan of a request. Raises RecursionError for JSON that nests too deeply."""
    placeholder, answer_placeholder = secrets.token_hex(12), secrets.token_hex(12)
    prefilled, thinking = is_prefilled(request), wants_thinking(request)
    adapted = adapt_conversation(conversation(request), template)
    roles = [turn["role"] for turn in adapted]
    at = [i for i, role in enumerate(roles) if role == "assistant"]
    planned = [
        PlannedAnswer(
            turn=i,
            blocks=blocks,
            opening=template.opening(role_before(roles, i), thinking),
            thinking_opening=template.opening(role_before(roles, i), True),
            as_tool_call=template.answer_as_tool_call and roles[i + 1 : i + 2] == ["tool"],
            prefilled=prefilled and i == at[-1],
        )
        for i, blocks in zip(at, answers(request.messages), strict=True)
    ]
    numbers = {answer.turn: n for n, answer in enumerate(planned)}
    return Chat(
        placeholder,
        answer_placeholder,
        adapted,
        [
            answer_turn(f"{answer_placeholder}{numbers[i]}x", planned[numbers[i]].as_tool_call)
            if i in numbers
            else break_controls(turn, template.control_tokens, placeholder)
            for i, turn in enumerate(adapted)
        ],
        planned,
        template.opening(role_before(roles, len(roles)), thinking),
        break_controls(tool_definitions(request), template.control_tokens, placeholder),
        thinking,
        prefilled,
        tools_first,
    )


def role_before(roles: list[str], index: int) -> str:
    """The role of the turn before a turn; before the first one, as after a user."""
    return roles[index - 1] if index else "user"


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
    written = {name: getattr(block, name) for name in MODEL_FIELDS.intersection(block.__struct_fields__)}
    broken = break_controls(written, controls, placeholder)
    return block if broken == written else msgspec.structs.replace(block, **broken)


MODEL_FIELDS = frozenset(("text", "thinking", "name", "input"))
