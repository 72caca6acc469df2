"""Find out what a chat template takes and writes, once for each checkpoint, by rendering small conversations with it.

Templates differ in what they refuse (a system message in the middle, two user turns in a row, a tool result without
its call), in what they move, and in how an answer in the history begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from serve.formats.families import choose_format
from serve.formats.format import Format
from serve.prompt.conversation import ChatMessage
from serve.prompt.template import CALL_ID, Opening, Refused, Template, answer_turn, apply
from serve.prompt.tools_first import place_of_tools

# The texts of the small conversations: words that no template writes by itself, in the order of their numbers.
WORD = re.compile(r"word\d")
SYSTEM = {"role": "system", "content": "word0"}
USER = {"role": "user", "content": "word1"}
REMINDER = {"role": "system", "content": "word4"}
LATER = {"role": "user", "content": "word5"}
ANSWER = {"role": "assistant", "content": "word6"}
LAST = {"role": "user", "content": "word8"}
TOOL = {"type": "function", "function": {"name": "word9", "description": "", "parameters": {}}}


def probe_template(hf: Any, format_name: str | None = None) -> Template:
    """Render small conversations with the tokenizer's chat template, and describe what it makes of them."""
    # The ways to write an answer before tool results that the template takes: as text, as a call.
    ways = [as_tool_call for as_tool_call in (False, True) if takes(hf, *tool_loop(as_tool_call), ANSWER, LAST)]
    as_tool_call = ways[:1] == [True]
    loop = tool_loop(as_tool_call)
    anywhere = takes(hf, SYSTEM, USER, REMINDER, ANSWER, REMINDER | {"content": "word7"}, LAST)
    anywhere = anywhere and (not ways or takes(hf, *loop, REMINDER, ANSWER, LAST))
    first = takes(hf, SYSTEM, USER)
    source = hf.get_chat_template(tools=[TOOL])
    format = choose_format(source, format_name)
    return Template(
        format=format,
        control_tokens=control_tokens(hf, format),
        answer_as_tool_call=as_tool_call,
        after_call=after_call(hf) if as_tool_call else "",
        short_ids=bool(ways) and not takes(hf, *tool_loop(as_tool_call, "toolu_0123456789"), ANSWER, LAST),
        systems="anywhere" if anywhere else "first" if first else "never",
        users_in_a_row=takes(hf, USER, LATER, ANSWER, LAST),
        users_after_results=not ways or takes(hf, *loop, LATER, ANSWER, LAST),
        moves_tools_to_last_turn=moves_tools_to_last_turn(hf, [SYSTEM, USER] if first else [USER]),
        tools_can_lead=first and tools_can_lead(hf),
        reads_clock=any("strftime_now" in text for text in template_sources(hf)),
        openings={
            (role, thinking): opening(hf, turns, thinking, as_tool_call)
            for role, turns in (("user", [USER]), ("system", [USER, REMINDER]), ("tool", loop))
            for thinking in (False, True)
        },
    )


def template_sources(hf: Any) -> list[str]:
    """The sources of a tokenizer's chat templates: some have one for requests with tools, and one for others."""
    templates = hf.chat_template
    return list(templates.values()) if isinstance(templates, dict) else [templates]


def tool_loop(as_tool_call: bool, call_id: str = CALL_ID) -> list[ChatMessage]:
    """A question, an answer that calls a tool, and the result."""
    call = answer_turn("word2", as_tool_call, call_id)
    return [USER, call, {"role": "tool", "tool_call_id": call_id, "content": "word3"}]


def attempt(
    hf: Any, turns: Sequence[ChatMessage], tools: list[dict[str, Any]] | None = None, **template_flags: bool
) -> str:
    """The template's text, empty if it refuses."""
    try:
        return apply(hf, turns, tools, **template_flags)
    except Refused:
        return ""


def takes(hf: Any, *turns: ChatMessage) -> bool:
    """Whether the template writes every turn once and in its place."""
    return WORD.findall(attempt(hf, turns)) == [word for turn in turns for word in WORD.findall(str(turn))]


def moves_tools_to_last_turn(hf: Any, head: Sequence[ChatMessage]) -> bool:
    """Whether tools or the texts before the first answer are written elsewhere once the conversation goes on."""
    short, longer = (attempt(hf, turns, [TOOL]) for turns in (head, [*head, ANSWER, LAST]))
    stays = common_start(short, longer.partition("word6")[0])
    return any(word not in stays for word in WORD.findall(short))


def tools_can_lead(hf: Any) -> bool:
    """Whether a prompt can have its tools before the system text with the tokenizer's chat template."""
    try:
        text, place = apply(hf, [SYSTEM, USER], [TOOL]), place_of_tools(hf, "word0", [TOOL])
        text = place.tools_first(text, "word0") if place else text
    except Refused:
        return False
    return [word for word in WORD.findall(text) if word != "word1"] == ["word9", "word0"]


def opening(hf: Any, before: Sequence[ChatMessage], thinking: bool, as_tool_call: bool) -> Opening:
    """How answers begin after the turns `before`."""

    def text_before_answer(*turns: ChatMessage) -> str:
        text, found, _ = attempt(hf, [*before, *turns], thinking=thinking).partition("word6")
        return text if found else ""

    call = [answer_turn("word6", True), tool_loop(True)[-1], answer_turn("word7", False), LAST]
    forms = (
        attempt(hf, before, answer=True, thinking=thinking),
        text_before_answer(ANSWER),
        text_before_answer(ANSWER, LAST),
        text_before_answer(*call) if as_tool_call else "",
    )
    same = common_start(*filter(None, forms))
    closed = attempt(hf, before, thinking=thinking)
    header = same[len(closed) :] if closed and same.startswith(closed) else ""
    return Opening(header, *(text[len(same) :] for text in forms))


def common_start(*texts: str) -> str:
    """The longest start that all texts share."""
    low, high = min(texts, default=""), max(texts, default="")
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def control_tokens(hf: Any, format: Format) -> re.Pattern[str] | None:
    """A pattern of the special tokens, and of those other added tokens that a template or the format writes.

    Added tokens that neither writes, such as the HTML tags of some vocabularies, are words like any other.
    """
    structure = "".join([*template_sources(hf), *format.delimiters])
    tokens = [str(t) for t in hf.added_tokens_decoder.values() if str(t).strip() and (t.special or str(t) in structure)]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def after_call(hf: Any) -> str:
    """What the template writes between the argument of a call and the end of the turn, which is an added token."""
    plain = attempt(hf, [USER, ANSWER, LAST]).partition("word6")[2]
    end = next((token for token in map(str, hf.added_tokens_decoder.values()) if plain.startswith(token)), "")
    called = attempt(hf, [*tool_loop(True), ANSWER, LAST]).partition("word2")[2]
    return called.partition(end)[0] if end else ""
