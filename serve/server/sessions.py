"""The route that lists sessions. Those who look share an answer for a second, so that they cost requests nothing."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.sessions import Session, SessionAgent, SessionList
from serve.engine.sessions import AgentNow, KnownAgents
from serve.server.engine_client import EngineClient
from serve.web.agents import shown_id
from serve.web.keys import viewer_of

log = logging.getLogger("tokenzero.server")

FRESH_SECONDS = 0.9  # for which an answer is given again; the dashboard asks once a second
ASK_SECONDS = 2.0  # that a caller waits for the engine, which answers between two steps
NOBODY = "no request has named its session: clients do by headers such as x-claude-code-session-id"
NONE = SessionList((), 0, None)
BUSY = "the engine has not answered in time: this is what it said before"
STOPPED = "the engine has stopped, or no replica answers"


async def get_sessions(request: Request) -> Response:
    """`GET /v1/sessions`: the latest sessions that clients name: what their agents do, and hold on which tier."""
    sessions: Sessions = request.app.state.sessions
    listed = await sessions.listed(viewer_of(request.scope))
    return Response(msgspec.json.encode(listed), media_type="application/json")


class Sessions:
    """The sessions of an engine, on the event loop; `viewer` is a key's name, None for all."""

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine
        self.latest: dict[str | None, SessionList] = {}  # by viewer
        self.asked: dict[str | None, tuple[float, asyncio.Task[KnownAgents | None]]] = {}  # when, by viewer

    async def listed(self, viewer: str | None) -> SessionList:
        """What a viewer may see. It never raises."""
        now = time.monotonic()
        at, task = self.asked.get(viewer, (-math.inf, None))
        if task is None or (task.done() and now - at > FRESH_SECONDS):
            task = asyncio.ensure_future(self.engine.sessions(viewer))
            self.asked[viewer] = now, task
        await asyncio.wait({task}, timeout=ASK_SECONDS)
        if not task.done():
            return msgspec.structs.replace(self.latest.get(viewer, NONE), reason=BUSY)
        try:
            found = task.result()
        except Exception as error:  # a look does not fail for it
            log.error("the sessions are not listed: %s: %s", type(error).__name__, error)
            found = None
        if found is None:
            return msgspec.structs.replace(NONE, reason=STOPPED)
        why = found.reason or (None if found.known else NOBODY)
        self.latest[viewer] = listed = SessionList(in_sessions(found.known), found.left_out, why)
        return listed


def in_sessions(agents: Iterable[AgentNow]) -> tuple[Session, ...]:
    """Agents by their sessions, with the ids that their clients sent."""
    sessions: dict[str, list[AgentNow]] = {}
    for agent in agents:
        sessions.setdefault(agent.session or agent.id, []).append(agent)
    return tuple(
        Session(client_id(id), owner_of(id), tuple(map(session_agent, members))) for id, members in sessions.items()
    )


def session_agent(agent: AgentNow) -> SessionAgent:
    """An agent on the wire."""
    return SessionAgent(
        agent=client_id(agent.id),
        parent=client_id(agent.parent),
        state=agent.state.value,
        since=round(agent.since, 3),
        last_read=round(agent.read, 3),
        device_tokens=agent.device_tokens,
        own_tokens=agent.own_tokens,
        prompt_tokens=agent.prompt_tokens,
        tiers=dict(agent.tiers),
    )


def owner_of(id: str) -> str:
    """The key in an id that the engine knows, see `serve.web.agents.own_id`."""
    return id.rpartition("\0")[0]


def client_id(id: str) -> str:
    """The client's own part of it, shown."""
    return shown_id(id.rpartition("\0")[2])


SESSION_ROUTES = [Route("/v1/sessions", get_sessions, methods=["GET"])]
