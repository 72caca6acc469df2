"""Why two requests have different prompts: system text, tools or messages, and what about them differs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from serve.api.answers import (
    CacheMissReason,
    MessagesChanged,
    ModelChanged,
    SystemChanged,
    ToolsChanged,
    Unavailable,
)
from serve.api.messages import CountTokensRequest, InputMessage
from serve.api.tools import Tool
from serve.diagnosis.sections import system_parts
from serve.prompt.conversation import block_text, blocks, shown
from serve.rules.normalize import strip_preamble

CAUSES = {
    "preamble": "a billing header before the system text differs",
    "system_changed": "the system text differs",
    "tools_reordered": "the same tools, but in another order or with their keys in another order",
    "tools_changed": "the tools differ",
    "history_edited": "an earlier message or answer was changed",
    "settings_changed": "the same texts, but rendered differently: thinking or tool_choice differ",
    "new_content": "this text was not sent before",
    "below_page_size": "the prompt is shorter than a page",
    "evicted": "it was cached, but had to make room",
    "no_longer_tracked": "the nearest sequence is cached, but this report no longer remembers it",
    "model_changed": "the nearest sequence belongs to another model",
}
# Causes by which nothing was lost: as far as is known, no token was computed a second time.
UNAVOIDABLE = ("new_content", "below_page_size", "no_longer_tracked")

AGENT_CHARS = 64  # of a system text, by which agents are distinguished


def changed_part(new: CountTokensRequest, old: CountTokensRequest, section: str) -> tuple[str, str]:
    """The section and the cause of the difference between two requests whose prompts first differ in `section`.

    The named part is checked first, then the others, as a template may write parts in any order.
    """
    kind = section.partition("[")[0]
    checks = {"system": system_cause, "tools": tools_cause, "messages": messages_cause}
    for part in sorted(checks, key=lambda part: part != kind):
        if cause := checks[part](new, old, section):
            return (section if part == kind else part), cause
    return section, "settings_changed"


def agent_text(request: CountTokensRequest) -> str:
    """The start of the system text, without billing headers. It is the same for all requests of one agent."""
    return "".join(strip_preamble(text).kept for _, text in system_parts(request))[:AGENT_CHARS]


def system_cause(new: CountTokensRequest, old: CountTokensRequest, section: str) -> str | None:
    """Why the system texts differ, or None."""
    new_texts, old_texts = ([text for _, text in system_parts(request)] for request in (new, old))
    return text_cause(new_texts, old_texts) if new_texts != old_texts else None


def text_cause(new_texts: Sequence[str], old_texts: Sequence[str]) -> Literal["preamble", "system_changed"]:
    """Whether the first of two lists of system texts that differs does so in its billing header or after it."""
    at = first_difference(new_texts, old_texts)
    headers = [strip_preamble(text).removed for texts in (new_texts, old_texts) for text in texts[at : at + 1]]
    return "preamble" if any(headers) and (len(headers) == 1 or headers[0] != headers[1]) else "system_changed"


def first_difference(new_texts: Sequence[str], old_texts: Sequence[str]) -> int:
    """The index of the first element that differs, or the length of the shorter list."""
    pairs = enumerate(zip(new_texts, old_texts, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(new_texts), len(old_texts)))


def tools_cause(new: CountTokensRequest, old: CountTokensRequest, section: str) -> str | None:
    """Why the tools differ, or None. The order of keys counts, because chat templates keep it."""

    def as_json(tools: Iterable[Tool], order: Literal["sorted"] | None) -> list[bytes]:
        return [msgspec.json.encode(tool, order=order) for tool in tools]

    new_tools, old_tools = comparable_tools(new, old), comparable_tools(old, new)
    try:
        if as_json(new_tools, None) == as_json(old_tools, None):
            return None
        same = sorted(as_json(new_tools, "sorted")) == sorted(as_json(old_tools, "sorted"))
    except RecursionError:  # schemas that are nested too deeply to be compared
        same = False
    return "tools_reordered" if same else "tools_changed"


def comparable_tools(request: CountTokensRequest, other: CountTokensRequest) -> list[Tool]:
    """The tools of the prompt's head, then the deferred ones that both requests define: one more changes no prompt."""
    both = {tool.name for tool in other.tools or () if tool.defer_loading}
    deferred = (tool for tool in request.tools or () if tool.defer_loading and tool.name in both)
    head = [tool for tool in request.tools or () if not tool.defer_loading]
    return head + sorted(deferred, key=lambda tool: tool.name)


def messages_cause(new: CountTokensRequest, old: CountTokensRequest, section: str) -> str | None:
    """Why the messages differ, from the message that `section` names on, or None."""
    new_messages, old_messages = shown(new.messages), shown(old.messages)
    named = int(section.partition("[")[2].partition("]")[0]) if section.startswith("messages") else 0
    at = named
    while at < min(len(new_messages), len(old_messages)) and blocks(new_messages[at]) == blocks(old_messages[at]):
        at += 1
    if at == len(new_messages) or named < at == len(old_messages):
        if section.endswith(("assistant", "thinking", "tool_use")):
            return "history_edited"  # the same content, but the answer was not rendered as it was sampled
        shorter = len(new_messages) < len(old_messages)
        return "new_content" if section.startswith("messages") and shorter else None
    if new_messages[at].role == "system" and at < len(old_messages):
        cause = text_cause(message_texts(new_messages[at]), message_texts(old_messages[at]))
        if cause == "preamble":
            return cause
    rest = zip(new_messages[at + 1 :], old_messages[at + 1 :], strict=False)
    same_conversation = at > 0 or any(blocks(a) == blocks(b) for a, b in rest)
    edited = same_conversation and any(message.role == "assistant" for message in new_messages[at:])
    return "history_edited" if edited else "new_content"


def message_texts(message: InputMessage) -> list[str]:
    """The text of each block of a message."""
    return [block_text(block) for block in blocks(message)]


def miss_reason(cause: str, missed_tokens: int) -> CacheMissReason:
    """A cause in the terms of the Messages API, which name only the part that changed."""
    if cause == "model_changed":
        return ModelChanged(missed_tokens)
    if cause in ("preamble", "system_changed"):
        return SystemChanged(missed_tokens)
    if cause in ("tools_reordered", "tools_changed"):
        return ToolsChanged(missed_tokens)
    if cause in ("history_edited", "new_content"):
        return MessagesChanged(missed_tokens)
    return Unavailable()
