"""A conversation in the form that its chat template takes.

Each run of turns between two answers is written in the same way whatever follows it, so that a longer conversation
extends a shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from serve.formats.families import mistral_id
from serve.prompt.conversation import ChatMessage
from serve.prompt.template import Template


def adapt_conversation(turns: Sequence[ChatMessage], template: Template) -> list[ChatMessage]:
    """The conversation as the template takes it: a turn that it refuses becomes part of the turn next to it."""
    adapted: list[ChatMessage] = []
    for is_answer, group in groupby(turns, lambda turn: turn["role"] == "assistant"):
        run = list(group)
        adapted += run if is_answer else adapt_run(run, template, first=not adapted)
    if template.format.history_id:
        return number_calls(adapted, template.format.history_id)
    return [shorten_ids(turn) for turn in adapted] if template.short_ids else adapted


def adapt_run(run: Sequence[ChatMessage], template: Template, first: bool) -> list[ChatMessage]:
    """The turns between two answers, or before the first: system texts as user turns, user turns joined."""
    turns = []
    for i, turn in enumerate(run):
        leads = first and i == 0
        if turn["role"] != "system" or template.systems == "anywhere" or (template.systems == "first" and leads):
            turns.append(turn)
        else:
            # As the first turn it is the system prompt itself; later it interrupts the user, and says so.
            text = turn["content"]
            content = text if leads else f"<system-reminder>\n{text}\n</system-reminder>"
            turns.append({"role": "user", "content": content})
    if not template.users_after_results and any(turn["role"] == "tool" for turn in turns):
        # Before the first answer there is no call: a template of strict alternation wants a user there.
        turns = [as_user(turn) for turn in turns] if first else into_results(join_users(turns))
    if not template.users_in_a_row:
        turns = join_users(turns)
    return turns


def as_user(turn: ChatMessage) -> ChatMessage:
    """The turn, with the user in the place of a tool."""
    return {"role": "user", "content": turn["content"]} if turn["role"] == "tool" else turn


def join_users(run: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The turns, with neighbouring ones of the user joined."""
    turns: list[ChatMessage] = []
    for is_user, group in groupby(run, lambda turn: turn["role"] == "user"):
        same = list(group)
        turns += [{"role": "user", "content": "\n\n".join(turn["content"] for turn in same)}] if is_user else same
    return turns


def into_results(run: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The turns, with those of the user moved into the tool result just before them, or else into the next one."""
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
    # After a system turn, which stands between them and the results.
    return turns + [{"role": "user", "content": text} for text in waiting]


def shorten_ids(turn: ChatMessage) -> ChatMessage:
    """The turn with ids of tool calls in the short form."""
    if turn["role"] == "tool":
        return turn | {"tool_call_id": mistral_id(turn["tool_call_id"])}
    if "tool_calls" in turn:
        return turn | {"tool_calls": [call | {"id": mistral_id(call["id"])} for call in turn["tool_calls"]]}
    return turn


def number_calls(turns: Sequence[ChatMessage], history_id: Callable[[str, str, int], str]) -> list[ChatMessage]:
    """The turns with the ids of calls as the model writes them, and each result named after its call.

    `history_id` makes them of the call's name, its id and the number of calls before it.
    """
    result: list[ChatMessage] = []
    named: dict[str, dict[str, str]] = {}  # by id: what a result says of its call
    count = 0
    for turn in turns:
        if "tool_calls" in turn:
            calls = []
            for call in turn["tool_calls"]:
                name = call["function"]["name"]
                own = history_id(name, call["id"], count)
                named[call["id"]] = {"tool_call_id": own, "name": name}
                calls.append(call | {"id": own})
                count += 1
            result.append(turn | {"tool_calls": calls})
        else:
            result.append(turn | (named.get(turn["tool_call_id"], {}) if turn["role"] == "tool" else {}))
    return result
