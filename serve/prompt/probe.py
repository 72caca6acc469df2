"""Find out what a chat template takes and writes, once for each checkpoint, by rendering small conversations with it.

Templates differ in what they refuse (a system message in the middle, two user turns in a row, a tool result without
its call), in what they move, and in how an answer in the history begins. All of it may depend on whether the request
has tools and a system text, so each form of a conversation's head is probed by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import product
from threading import Thread
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
SECOND = {"role": "assistant", "content": "word7"}
LAST = {"role": "user", "content": "word8"}
# Templates write tools out of their parts: a schema without parameters is refused by some.
VALUE = {"type": "string", "description": "A value."}
SCHEMA = {"type": "object", "properties": {"value": VALUE}, "required": ["value"]}
# The longest that a template may take for two messages.
MOST_SECONDS = 10.0
TOOL = {"type": "function", "function": {"name": "word9", "description": "", "parameters": SCHEMA}}


@dataclass(frozen=True)
class Probe:
    """Renders small conversations that all have the same tools and the same turns before them."""

    hf: Any
    tools: list[dict[str, Any]] | None
    head: tuple[ChatMessage, ...] = ()

    def attempt(self, turns: Sequence[ChatMessage], **template_flags: bool) -> str:
        """The template's text, empty if it refuses."""
        return attempt(self.hf, [*self.head, *turns], self.tools, **template_flags)

    def takes(self, *turns: ChatMessage) -> bool:
        """Whether the template writes each of these turns once and in its place."""
        words = [word for turn in turns for word in WORD.findall(str(turn))]
        return [word for word in WORD.findall(self.attempt(turns)) if word in words] == words


def probe_template(hf: Any, format_name: str | None = None) -> Template:
    """Render small conversations with the tokenizer's chat template, and describe what it makes of them.

    The result is for requests with tools and a system text; its `heads` has the others.
    """
    format = choose_format(hf.get_chat_template(tools=[TOOL]), format_name)
    none = no_tools(hf)
    shared = Template(
        format=format,
        control_tokens=control_tokens(hf, format),
        no_tools=none,
        tools_can_lead=Probe(hf, none).takes(SYSTEM, USER) and tools_can_lead(hf),
        reads_clock=any("strftime_now" in text for text in template_sources(hf)),
    )
    heads = {
        (bool(tools), system): probe_head(hf, tools, system, shared)
        for tools in ([TOOL], none)
        for system in (True, False)
    }
    return replace(heads[True, True], heads=heads)


def check_usable(hf: Any, source: str) -> None:
    """Raise ValueError, with the checkpoint's name, unless the chat template writes a user's message, and soon."""
    problem: Future[str] = Future()
    # On a thread of its own, as nothing else can leave a template that does not end.
    Thread(target=lambda: problem.set_result(unusable(hf)), name="tokenzero-template", daemon=True).start()
    try:
        found = problem.result(MOST_SECONDS)
    except TimeoutError:
        found = f"takes more than {MOST_SECONDS:g} s for a conversation of one message"
    if found:
        raise ValueError(
            f"{source}: its chat_template {found}, expected the text of a conversation with the user's message in it: "
            "mend it in chat_template.jinja or tokenizer_config.json, or download the checkpoint again"
        )


def unusable(hf: Any) -> str:
    """Why no conversation can be had with the chat template; empty if one can."""
    reasons = []
    neither: tuple[list[dict[str, Any]] | None, ...] = (None, [])
    for turns, tools in product(([USER], [SYSTEM, USER]), neither):
        try:
            text = apply(hf, turns, tools, answer=True)
        except Refused as refused:
            reasons.append(f"fails: {' '.join(str(refused).split())!s:.200}")
            continue
        if str(USER["content"]) in text:
            return ""
        reasons.append(f"makes {text!r:.80} of a conversation")
    return reasons[0]


def no_tools(hf: Any) -> list[dict[str, Any]] | None:
    """The tools of a request without tools: an empty list for a template that refuses None."""
    return [] if not attempt(hf, [USER], answer=True) and attempt(hf, [USER], [], answer=True) else None


def probe_head(hf: Any, tools: list[dict[str, Any]] | None, system: bool, shared: Template) -> Template:
    """What the template makes of conversations with these tools, and with a system text or none."""
    plain = Probe(hf, tools)
    leads = plain.takes(SYSTEM, USER)  # the template takes a system text
    probe = replace(plain, head=(SYSTEM,)) if system and leads else plain
    # The ways to write an answer before tool results that the template takes: as text, as a call.
    ways = [as_tool_call for as_tool_call in (False, True) if probe.takes(*tool_loop(as_tool_call), ANSWER, LAST)]
    as_tool_call = ways[:1] == [True]
    loop = tool_loop(as_tool_call)
    anywhere = plain.takes(*probe.head, USER, REMINDER, ANSWER, REMINDER | {"content": "word7"}, LAST)
    anywhere = anywhere and (not ways or probe.takes(*loop, REMINDER, ANSWER, LAST))
    moves = moves_tools_to_last_turn(probe)
    # The turns after a head that would move are rendered without it.
    rest = Probe(hf, shared.no_tools) if moves else probe
    return replace(
        shared,
        answer_as_tool_call=as_tool_call,
        after_call=after_call(probe, shared.format) if as_tool_call else "",
        short_ids=bool(ways) and not probe.takes(*tool_loop(as_tool_call, "toolu_0123456789"), ANSWER, LAST),
        systems="anywhere" if anywhere else "first" if leads else "never",
        users_in_a_row=probe.takes(USER, LATER, ANSWER, LAST),
        users_after_results=not ways or probe.takes(*loop, LATER, ANSWER, LAST),
        moves_tools_to_last_turn=moves,
        openings={
            (role, thinking): opening(rest, turns, thinking, as_tool_call, shared.format)
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


def moves_tools_to_last_turn(probe: Probe) -> bool:
    """Whether tools or the texts before the first answer are written elsewhere once the conversation goes on."""
    short, longer = probe.attempt([USER]), probe.attempt([USER, ANSWER, LAST])
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


def opening(probe: Probe, before: Sequence[ChatMessage], thinking: bool, as_tool_call: bool, format: Format) -> Opening:
    """How answers begin after the turns `before`."""
    word = WORD.findall(str(before[-1]))[-1]

    def after_word(text: str) -> str | None:
        return text.rpartition(word)[2] if text else None

    def before_answer(*turns: ChatMessage, answer: bool = True) -> str | None:
        text, found, _ = probe.attempt([*before, *turns], answer=answer, thinking=thinking).partition("word6")
        return after_word(text) if found else None

    result = tool_loop(as_tool_call)[-1]
    call = answer_turn("word6", True)
    generation = after_word(probe.attempt(before, answer=True, thinking=thinking))
    prefilled, history = before_answer(ANSWER, answer=False), before_answer(ANSWER, LAST)
    history_call = before_answer(call, result, SECOND, LAST) if as_tool_call else None
    # Templates write answers in another way after the last question than before it (Qwen3.5, Step-3.5, DeepSeek-V4).
    loops = (
        [before_answer(call, result), before_answer(call, result, SECOND, result)]
        if as_tool_call
        else [before_answer(ANSWER, result), before_answer(ANSWER, result, SECOND, LAST)]
    )
    written = [form for form in (prefilled, history, history_call, *loops) if form is not None]
    forms = [*written, *([] if generation is None else [generation])]
    same = without_part(common_start(*forms), forms, format.think_delimiters or ())
    closed = after_word(probe.attempt(before, thinking=thinking))

    def rest(form: str | None) -> str:
        return form[len(same) :] if form is not None else ""

    return Opening(
        header=same[len(closed) :] if closed is not None and same.startswith(closed) else "",
        generation=rest(generation),
        prefilled=rest(prefilled),
        history=rest(history),
        history_call=rest(history_call),
        written=tuple(sorted({rest(form) for form in written} or {""}, key=len, reverse=True)),
    )


def common_start(*texts: str) -> str:
    """The longest start that all texts share."""
    low, high = min(texts, default=""), max(texts, default="")
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def without_part(start: str, texts: Sequence[str], delimiters: Sequence[str]) -> str:
    """The start of some texts, without the part of a delimiter at its end that one of them goes on with."""
    parts = [
        size
        for delimiter in delimiters
        for size in range(1, len(delimiter))
        if start.endswith(delimiter[:size]) and any(t.startswith(delimiter, len(start) - size) for t in texts)
    ]
    return start[: len(start) - max(parts, default=0)]


def control_tokens(hf: Any, format: Format) -> re.Pattern[str] | None:
    """A pattern of the special tokens, and of those other added tokens that a template or the format writes.

    Added tokens that neither writes, such as the HTML tags of some vocabularies, are words like any other.
    """
    structure = "".join([*template_sources(hf), *format.delimiters])
    tokens = [str(t) for t in hf.added_tokens_decoder.values() if str(t).strip() and (t.special or str(t) in structure)]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def after_call(probe: Probe, format: Format) -> str:
    """What the template writes between the argument of a call and the end of the turn, which is an added token."""
    plain = probe.attempt([USER, ANSWER, LAST]).partition("word6")[2]
    end = next((token for token in map(str, probe.hf.added_tokens_decoder.values()) if plain.startswith(token)), "")
    end = format.call_end or end
    called = probe.attempt([*tool_loop(True), ANSWER, LAST]).partition("word2")[2]
    return called.partition(end)[0] if end else ""
