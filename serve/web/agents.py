"""Which agent sent a request: the ids that coding agents put in their headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

MOST_ID_CHARS = 200
SHOWN_ID_CHARS = 64
# The narrowest id first: sub-agents share their parent's session. Claude Code, Codex, OpenCode.
AGENT_HEADERS = ("x-claude-code-agent-id", "thread-id")
# The agent that waits for this one's end.
PARENT_HEADERS = (
    "x-claude-code-parent-agent-id",
    "x-codex-parent-thread-id",
    "x-parent-session-id",
    "x-dynamo-parent-session-id",
)
# https://docs.nvidia.com/dynamo/dev/agents/identify-agent-sessions
FINAL_HEADER = "x-dynamo-session-final"
SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "x-session-id", "x-dynamo-session-id")


class Sender(NamedTuple):
    """Who sent a request: the agent whose requests follow each other, and its session; "" where no header says so."""

    agent: str
    session: str


def sender_of(headers: Mapping[str, str]) -> Sender:
    """The sender of a request; an agent without an id of its own is its session's only one. Names in lower case."""
    session = first_of(headers, SESSION_HEADERS)
    return Sender(first_of(headers, AGENT_HEADERS) or session, session)


def parent_of(headers: Mapping[str, str]) -> str:
    """The agent that started the one that sends a request; "" where no header says so.

    Claude Code names no parent of an agent that its session's main agent has started: that is the session.
    """
    if parent := first_of(headers, PARENT_HEADERS):
        return parent
    sender = sender_of(headers)
    return sender.session if sender.agent != sender.session else ""


def is_final(headers: Mapping[str, str]) -> bool:
    """Whether a request is the last one of its session."""
    return headers.get(FINAL_HEADER, "").strip().lower() == "true"


def shown_ids(headers: Mapping[str, str]) -> dict[str, str]:
    """Who sent a request, as its headers say, for its record; nothing where they say nothing."""
    sender, parent = sender_of(headers), parent_of(headers)
    named = {"session": sender.session, "agent": sender.agent, "parent": parent}
    return {name: shown_id(id) for name, id in named.items() if id}


def shown_id(id: str) -> str:
    """A client's id, cut to be shown."""
    return id if len(id) <= SHOWN_ID_CHARS else f"{id[: SHOWN_ID_CHARS - 1]}…"


def first_of(headers: Mapping[str, str], names: tuple[str, ...]) -> str:
    """The first of these headers that is there, cut to a bounded length; "" if none is."""
    return next((value[:MOST_ID_CHARS] for name in names if (value := headers.get(name))), "")


def own_id(owner: str, id: str) -> str:
    """A client's id of an agent or session, which does not mean that of another owner's client; "" stays ""."""
    return f"{owner}\0{id}" if id and owner else id
