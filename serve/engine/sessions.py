"""Which agents an engine knows by the ids that their clients send, what each does now, and what it holds on which tier.

The engine's thread answers between two steps, and local tiers are asked on a thread that no request waits for. Neither
is a use of a page, and both are bounded: to the latest sessions, by `cache.holdings`, and as the tiers are asked by
bisection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from cache.eviction import State
from cache.holdings import holding
from cache.nodes import Agent
from serve.engine.core import EngineCore
from serve.engine.read_ahead import ReadAhead

log = logging.getLogger("tokenzero.sessions")

DEVICE = "device"
MOST_SESSIONS = 32  # the latest ones
MOST_AGENTS = 8  # of each, the latest ones
TIER_SECONDS = 0.3  # after which what the tiers have is left out


@dataclass(frozen=True)
class AgentNow:
    """An agent; its ids are those of its requests (serve.engine.request)."""

    id: str
    session: str
    parent: str
    state: State
    since: float  # seconds since 1970: when its latest request was answered, or began
    read: float  # seconds since 1970, when its pages were used last; now, while it runs
    device_tokens: int  # that the device has of all its conversations
    own_tokens: int  # of these, those that no other agent has used
    prompt_tokens: int  # of its latest prompt
    tiers: Mapping[str, int] = field(default_factory=dict)  # of that prompt, tokens from its start on, by tier


@dataclass(frozen=True)
class KnownAgents:
    """The agents of the latest sessions, the one that asked last first; and how many more are known."""

    known: tuple[AgentNow, ...]
    left_out: int = 0
    reason: str = ""  # why some are missing


@dataclass(frozen=True, eq=False)
class Look:
    """What the engine's thread has found, and the keys of latest prompts to look for in the tiers, by place."""

    agents: KnownAgents
    chains: Mapping[int, Sequence[bytes]]


def look(core: EngineCore, read_ahead: ReadAhead, owner: str | None) -> Look:
    """What is known of the latest sessions of an `owner`, or of all. On the engine's thread."""
    cache = core.memory.prefix_cache
    chosen, left_out = latest_agents(reversed(cache.agents.known.values()), owner)
    computed = {each.use: each.computed for each in core.running if each.use}
    zero = time.time() - cache.tree.now()  # of the tree's clock, in seconds since 1970
    found = tuple(agent_now(agent, zero, computed.get(agent.uses[-1], 0)) for agent in chosen)
    chains = dict[int, Sequence[bytes]]()
    for place, agent in enumerate(chosen):
        latest = read_ahead.latest.get(agent.id)
        if latest and (latest.request.salt, latest.length) == (agent.salt, found[place].prompt_tokens):
            chains[place] = latest.keys[: (latest.length - 1) // core.settings.page_size]
    return Look(KnownAgents(found, left_out), chains)


def agent_now(agent: Agent, zero: float, computed: int) -> AgentNow:
    """What an agent does and holds; `computed` are the tokens that its request has, if one runs."""
    held, use = holding(agent), agent.uses[-1]
    runs = use.state is State.RUNNING
    prompt, on_device = held.prompt_tokens or use.tokens, held.prompt
    if computed:  # of which the tree has what is published
        prompt, on_device = use.tokens, min(use.tokens, computed)
    return AgentNow(
        agent.id,
        agent.session,
        agent.parent,
        use.state,
        since=zero + use.used,
        read=time.time() if runs else zero + use.used,
        device_tokens=max(held.tokens, on_device),
        own_tokens=held.own,
        prompt_tokens=prompt + 1,  # the last one always runs through the model, and is looked up nowhere
        tiers={DEVICE: on_device},
    )


def latest_agents(known: Iterable[Agent], owner: str | None) -> tuple[list[Agent], int]:
    """The latest agents of the latest sessions of an `owner`, and how many of its are left out.

    `known` begins with the one that asked last.
    """
    of_session: dict[str, int] = {}
    chosen, left_out = list[Agent](), 0
    for agent in known:
        if (owner is not None and not agent.id.startswith(f"{owner}\0")) or not agent.uses:
            continue
        session = agent.session or agent.id
        count = of_session.get(session, 0)
        if count >= MOST_AGENTS or (not count and len(of_session) >= MOST_SESSIONS):
            left_out += 1
            continue
        of_session[session] = count + 1
        chosen.append(agent)
    return chosen, left_out


async def agents_now(
    core: EngineCore, read_ahead: ReadAhead, owner: str | None, ask: Callable[[Callable[[], None]], None]
) -> KnownAgents:
    """What an engine knows of an owner's sessions; `ask` has a question answered on its thread.

    Raises what `ask` raises.
    """
    result = Future[Look]()

    def answer() -> None:
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(look(core, read_ahead, owner))
        except Exception as error:  # which is no request's fault
            log.exception("the sessions are not listed")
            result.set_exception(error)

    ask(answer)
    seen = await asyncio.wrap_future(result)
    if core.tiers is None or not seen.chains:
        return seen.agents
    looking = asyncio.wrap_future(core.tiers.held(list(seen.chains.values())))
    await asyncio.wait({looking}, timeout=TIER_SECONDS)
    if not looking.done() or looking.cancelled() or looking.exception():
        looking.cancel()
        return seen.agents
    return with_tiers(seen, looking.result(), core.settings.page_size)


def with_tiers(seen: Look, pages: Sequence[Mapping[str, int]], page_size: int) -> KnownAgents:
    """The same with what the tiers have, in `pages` of the latest prompts."""
    agents = list(seen.agents.known)
    for place, counts in zip(seen.chains, pages, strict=True):
        tokens = {name: count * page_size for name, count in counts.items()}
        agents[place] = replace(agents[place], tiers={**agents[place].tiers, **tokens})
    return replace(seen.agents, known=tuple(agents))


def merged(answers: Sequence[KnownAgents], reason: str = "") -> KnownAgents:
    """What several engines know: each agent as the one has it that it asked last."""
    latest: dict[tuple[str, str], AgentNow] = {}
    for agent in (agent for answer in answers for agent in answer.known):
        name = agent.session, agent.id
        if name not in latest or latest[name].read < agent.read:
            latest[name] = agent
    known = sorted(latest.values(), key=lambda agent: -agent.read)
    return KnownAgents(tuple(known), sum(answer.left_out for answer in answers), reason)
