"""Sessions on the wire: agents that their clients name, what each does and what it holds."""

from typing import Literal

from msgspec import Struct

AgentState = Literal["running", "tool", "person", "ended", "unknown"]


class SessionAgent(Struct, frozen=True):
    """An agent of a session. All lengths are in tokens, all times in seconds since 1970."""

    agent: str  # the id that its client sends, cut; a session's main agent has that of the session
    parent: str  # the agent that waits for its end; empty if a person does
    state: AgentState  # its request is answered, or it waits for a tool or a person, or will ask for nothing more
    since: float  # when its latest request was answered, or began
    last_read: float  # when its pages were used last
    device_tokens: int  # that the device has of all its conversations
    own_tokens: int  # of these, those that no other agent has used
    prompt_tokens: int  # of its latest prompt
    tiers: dict[str, int]  # of that prompt, what each tier has from its start on; those not asked are left out


class Session(Struct, frozen=True):
    """A session and its latest agents, the one that asked last first."""

    session: str  # the id that its client sends, cut
    key: str  # the name of the API key that sent it; empty where keys have none
    agents: tuple[SessionAgent, ...]


class SessionList(Struct, frozen=True):
    """The answer of `GET /v1/sessions`: the latest sessions, the one that asked last first."""

    data: tuple[Session, ...]
    left_out: int  # agents that are known and not listed
    reason: str | None  # why nothing is listed, or not everything
