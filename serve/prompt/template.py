"""What a checkpoint's chat template takes and writes, found out once by rendering small conversations with it.

Templates differ in what they refuse (a system message in the middle, two user turns in a row, a tool result without
its call), in what they move, and in how a past answer begins. `probe_template` asks; `fold` writes a conversation so
that the template takes it, each run of turns between two answers always in the same way, whatever follows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from serve.formats.families import Format, choose, mistral_id
from serve.prompt.conversation import ChatMessage

CALL_ID = "call00000"  # nine letters and digits, since Mistral's templates take no other id

# What the questions to a template are made of: words that no template writes by itself, in the order of their numbers.
WORD = re.compile(r"word\d")
SYSTEM = {"role": "system", "content": "word0"}
USER = {"role": "user", "content": "word1"}
REMINDER = {"role": "system", "content": "word4"}
LATER = {"role": "user", "content": "word5"}
ANSWER = {"role": "assistant", "content": "word6"}
LAST = {"role": "user", "content": "word8"}
TOOL = {"type": "function", "function": {"name": "word9", "description": "", "parameters": {}}}


class Refused(Exception):
    """The chat template refuses a conversation, or writes it in a way that cannot be taken apart."""


@dataclass(frozen=True)
class Opening:
    """What stands between a turn and the words of the answer behind it: a header, and then what depends on the form.

    Qwen3 without thinking: `answer` is an empty think block, the others are empty. Mistral: `past` is a blank.
    """

    header: str = ""  # in all forms
    answer: str = ""  # in a prompt, behind which the model goes on
    begun: str = ""  # in a prompt whose answer the client has begun
    past: str = ""  # in the history
    call: str = ""  # in the history, ahead of the marker of a turn that is written as a call


@dataclass(frozen=True)
class Template:
    """How to write conversations for one chat template."""

    format: Format
    controls: re.Pattern[str] | None = None  # finds the tokens that structure a prompt, in a text where they must not
    as_call: bool = False  # an answer in front of tool results must be a call
    after_call: str = ""  # what the template writes behind the marker in that call
    short_ids: bool = False  # ids of tool calls must be nine letters and digits
    systems: Literal["anywhere", "first", "never"] = "anywhere"
    users_in_a_row: bool = True
    users_after_results: bool = True
    moves: bool = False  # writes tools or system text at the last question, not at the first
    tools_can_lead: bool = False  # the tools can be rendered ahead of the system text, see `tools_ahead`
    openings: Mapping[tuple[str, bool], Opening] = field(default_factory=dict)  # by role in front, and thinking

    def opening(self, role: str, thinking: bool) -> Opening:
        """How answers begin behind a turn of `role`."""
        return self.openings.get((role, thinking), Opening())


def apply(
    hf: Any,
    turns: Sequence[ChatMessage],
    tools: list[dict[str, Any]] | None = None,
    *,
    answer: bool = False,
    prefill: bool = False,
    thinking: bool = False,
) -> str:
    """The chat template's text, which ends with the start of an answer or inside the last turn; raises Refused."""
    try:
        # Templates call the switch by either name.
        text = hf.apply_chat_template(
            list(turns),
            tools=tools,
            add_generation_prompt=answer,
            continue_final_message=prefill,
            enable_thinking=thinking,
            thinking=thinking,
            tokenize=False,
        )
    # RecursionError: JSON that is nested too deeply for the template's `tojson`.
    except (TemplateError, ValueError, TypeError, RecursionError) as error:
        raise Refused(str(error)) from error
    return str(text)


def marker_turn(mark: str, as_call: bool, call_id: str = CALL_ID) -> ChatMessage:
    """An answer that is nothing but a mark, which shows where its text goes."""
    if not as_call:
        return {"role": "assistant", "content": mark}
    call = {"id": call_id, "type": "function", "function": {"name": "call", "arguments": {"turn": mark}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def probe_template(hf: Any, format_name: str | None = None) -> Template:
    """Render small conversations with the tokenizer's chat template and see what it makes of them."""
    manners = [as_call for as_call in (False, True) if takes(hf, *tool_loop(as_call), ANSWER, LAST)]
    as_call = manners[:1] == [True]
    loop = tool_loop(as_call)
    behind_call = after_call(hf) if as_call else ""
    anywhere = takes(hf, SYSTEM, USER, REMINDER, ANSWER, REMINDER | {"content": "word7"}, LAST)
    anywhere = anywhere and (not manners or takes(hf, *loop, REMINDER, ANSWER, LAST))
    first = takes(hf, SYSTEM, USER)
    written_for = choose(hf.get_chat_template(tools=[TOOL]), format_name)
    return Template(
        format=written_for,
        controls=controls(hf, written_for),
        as_call=as_call,
        after_call=behind_call,
        short_ids=bool(manners) and not takes(hf, *tool_loop(as_call, "toolu_0123456789"), ANSWER, LAST),
        systems="anywhere" if anywhere else "first" if first else "never",
        users_in_a_row=takes(hf, USER, LATER, ANSWER, LAST),
        users_after_results=not manners or takes(hf, *loop, LATER, ANSWER, LAST),
        moves=moves(hf, [SYSTEM, USER] if first else [USER]),
        tools_can_lead=first and tools_can_lead(hf),
        openings={
            (role, thinking): opening(hf, turns, thinking, as_call)
            for role, turns in (("user", [USER]), ("system", [USER, REMINDER]), ("tool", loop))
            for thinking in (False, True)
        },
    )


def tool_loop(as_call: bool, call_id: str = CALL_ID) -> list[ChatMessage]:
    """A question, an answer that calls a tool, and the result."""
    return [USER, marker_turn("word2", as_call, call_id), {"role": "tool", "tool_call_id": call_id, "content": "word3"}]


def attempt(hf: Any, turns: Sequence[ChatMessage], tools: list[dict[str, Any]] | None = None, **how: bool) -> str:
    """The template's text, or none if it refuses."""
    try:
        return apply(hf, turns, tools, **how)
    except Refused:
        return ""


def takes(hf: Any, *turns: ChatMessage) -> bool:
    """Whether the template writes every turn once and in its place."""
    return WORD.findall(attempt(hf, turns)) == [word for turn in turns for word in WORD.findall(str(turn))]


def moves(hf: Any, head: Sequence[ChatMessage]) -> bool:
    """Whether tools or the texts ahead of the first answer stand elsewhere once the conversation goes on."""
    short, longer = (attempt(hf, turns, [TOOL]) for turns in (head, [*head, ANSWER, LAST]))
    stays = shared(short, longer.partition("word6")[0])
    return any(word not in stays for word in WORD.findall(short))


def tools_ahead(hf: Any, text: str, place: str, tools: list[dict[str, Any]]) -> str:
    """A conversation's text with the tools ahead of the system text, which `place` stands for; raises Refused.

    It is possible where the template writes the tools right behind the system text, in the same turn; nothing changes
    where they stand ahead of it already.
    """
    small = [{"role": "system", "content": place}, USER]
    head, _, behind = apply(hf, small, tools).partition(place)
    plain_head, _, plain = apply(hf, small).partition(place)
    written = behind.removesuffix(plain)
    if head != plain_head and behind == plain:
        return text
    if head != plain_head or not behind.endswith(plain) or not text.startswith(head + place + written):
        raise Refused("expected the tools right behind the system text, in its turn, found them elsewhere")
    first = written.lstrip()
    gap = written[: len(written) - len(first)]
    return head + first + gap + place + text[len(head + place + written) :]


def tools_can_lead(hf: Any) -> bool:
    """Whether `tools_ahead` works with the tokenizer's chat template, and moves something where it should."""
    try:
        text = tools_ahead(hf, apply(hf, [SYSTEM, USER], [TOOL]), "word0", [TOOL])
    except Refused:
        return False
    return [word for word in WORD.findall(text) if word != "word1"] == ["word9", "word0"]


def opening(hf: Any, before: Sequence[ChatMessage], thinking: bool, as_call: bool) -> Opening:
    """How answers begin behind the turns `before`."""

    def ahead(*turns: ChatMessage) -> str:
        text, mark, _ = attempt(hf, [*before, *turns], thinking=thinking).partition("word6")
        return text if mark else ""

    call = [marker_turn("word6", True), tool_loop(True)[-1], marker_turn("word7", False), LAST]
    forms = (
        attempt(hf, before, answer=True, thinking=thinking),
        ahead(ANSWER),
        ahead(ANSWER, LAST),
        ahead(*call) if as_call else "",
    )
    same = shared(*filter(None, forms))
    closed = attempt(hf, before, thinking=thinking)
    return Opening(
        same[len(closed) :] if closed and same.startswith(closed) else "", *(text[len(same) :] for text in forms)
    )


def shared(*texts: str) -> str:
    """What all texts begin with."""
    low, high = min(texts, default=""), max(texts, default="")
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def controls(hf: Any, written_for: Format) -> re.Pattern[str] | None:
    """Finds control tokens, and those other added tokens that the template or the format of answers writes.

    Added tokens that neither writes, such as the HTML tags of some vocabularies, are words like any other.
    """
    structure = hf.get_chat_template(tools=[TOOL]) + "".join(written_for.marks)
    tokens = [str(t) for t in hf.added_tokens_decoder.values() if str(t).strip() and (t.special or str(t) in structure)]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def after_call(hf: Any) -> str:
    """What the template writes between the marker of a call and the end of the turn, which is an added token."""
    plain = attempt(hf, [USER, ANSWER, LAST]).partition("word6")[2]
    end = next((token for token in map(str, hf.added_tokens_decoder.values()) if plain.startswith(token)), "")
    called = attempt(hf, [*tool_loop(True), ANSWER, LAST]).partition("word2")[2]
    return called.partition(end)[0] if end else ""


def fold(turns: Sequence[ChatMessage], template: Template) -> list[ChatMessage]:
    """The conversation as the template takes it: what it refuses in its place becomes part of the turn beside it."""
    folded: list[ChatMessage] = []
    for answers, group in groupby(turns, lambda turn: turn["role"] == "assistant"):
        run = list(group)
        folded += run if answers else fold_run(run, template, first=not folded)
    return [shorten(turn) for turn in folded] if template.short_ids else folded


def fold_run(run: Sequence[ChatMessage], template: Template, first: bool) -> list[ChatMessage]:
    """The turns between two answers, or ahead of the first: system texts as user turns, user turns joined."""
    turns = []
    for i, turn in enumerate(run):
        heads = first and i == 0
        if turn["role"] != "system" or template.systems == "anywhere" or (template.systems == "first" and heads):
            turns.append(turn)
        else:
            # At the head it is the prompt itself; further on it interrupts the user, and is marked as doing so.
            text = turn["content"]
            content = text if heads else f"<system-reminder>\n{text}\n</system-reminder>"
            turns.append({"role": "user", "content": content})
    if not template.users_after_results and any(turn["role"] == "tool" for turn in turns):
        turns = into_results(join_users(turns))
    if not template.users_in_a_row:
        turns = join_users(turns)
    return turns


def join_users(run: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Neighbouring user turns as one."""
    turns: list[ChatMessage] = []
    for users, group in groupby(run, lambda turn: turn["role"] == "user"):
        same = list(group)
        turns += [{"role": "user", "content": "\n\n".join(turn["content"] for turn in same)}] if users else same
    return turns


def into_results(run: Sequence[ChatMessage]) -> list[ChatMessage]:
    """User turns beside tool results as part of the result ahead of them, or else of the one behind."""
    turns: list[ChatMessage] = []
    waiting: list[str] = []
    for turn in run:
        if turn["role"] == "tool":
            turns.append(turn | {"content": "\n\n".join([*waiting, turn["content"]])})
            waiting = []
        elif turn["role"] == "user" and turns and turns[-1]["role"] == "tool":
            turns[-1] = turns[-1] | {"content": f"{turns[-1]['content']}\n\n{turn['content']}"}
        elif turn["role"] == "user":
            waiting.append(turn["content"])
        else:
            turns.append(turn)
    # Behind a system turn, which stands between them and the results.
    return turns + [{"role": "user", "content": text} for text in waiting]


def shorten(turn: ChatMessage) -> ChatMessage:
    """The turn with ids of tool calls in the short form."""
    if turn["role"] == "tool":
        return turn | {"tool_call_id": mistral_id(turn["tool_call_id"])}
    if "tool_calls" in turn:
        return turn | {"tool_calls": [call | {"id": mistral_id(call["id"])} for call in turn["tool_calls"]]}
    return turn
