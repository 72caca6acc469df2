"""Eviction on recorded agents: rules over the real prefix cache, and the optimum, by budget.

A page of the cache is one block of a trace, by its number: `PrefixCache` with pages of one token, whose tokens are
these numbers, is a prefix cache of whole pages.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cache.eviction import Rule, agent_aware, greedy_dual, least_recently_used
from cache.nodes import Agent
from cache.prefix_cache import PrefixCache
from experiments.replay.recorded import Arrival
from experiments.routing.cache import UniquePool

# Seconds for the page that ends at a position: the cost model of 8B parameters on an H200 in bfloat16, at 60% of its
# peak: 16e9 FLOP a token, and 4 * 36 layers * 4,096 FLOP for each token before it.
FLOP_A_TOKEN, FLOP_A_PAIR, FLOPS = 16e9, 4 * 36 * 4096, 0.6 * 989e12


@dataclass
class Clock:
    """The time of a replay, in seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@dataclass(frozen=True)
class Policy:
    """A rule, and what it is told."""

    name: str
    rule: Rule
    headers: bool = False  # agents are known by ids, and their ends are told
    ages: bool = False  # its clock is not time, but the value of what was evicted last


POLICIES = (
    Policy("LRU", least_recently_used),
    Policy("GreedyDual", greedy_dual, ages=True),
    Policy("agent-aware", agent_aware),
    Policy("agent-aware, headers", agent_aware, headers=True),
)


def page_seconds(page_tokens: int) -> Callable[[int], float]:
    """Seconds to compute the page that ends at a position, which counts pages."""

    def seconds(end: int) -> float:
        return page_tokens * (FLOP_A_TOKEN + FLOP_A_PAIR * page_tokens * (end - 0.5)) / FLOPS

    return seconds


def replay_rule(arrivals: Sequence[Arrival], pages: int, policy: Policy, page_tokens: int) -> np.ndarray:
    """Pages of each prompt that the real cache of `pages` pages finds, [arrivals] int64.

    A prompt that does not fit into the cache as a whole is computed without it.
    """
    clock = Clock()
    cache = PrefixCache(pages, 1, rule=policy.rule, clock=clock, page_cost=page_seconds(page_tokens))
    cache.pool = cache.tree.pool = cache.preloaded.pool = UniquePool(pages)
    agents: dict[tuple[int, int], Agent] = {}
    found = np.zeros(len(arrivals), np.int64)
    for index, arrival in enumerate(arrivals):
        clock.now = cache.tree.leaves.evicted if policy.ages else arrival.time_s
        prompt, name = arrival.pages, (arrival.session, arrival.turn.agent)
        if len(prompt) > pages:
            continue
        agent = agents.setdefault(name, Agent(f"{name}", f"{name[0]}")) if policy.headers else None
        use = cache.begin(prompt, agent=agent)
        lease = cache.match(prompt, use=use)
        found[index] = lease.reused
        lease, _ = cache.extend(lease, len(prompt))
        cache.insert(lease, prompt)
        cache.release(lease)
        cache.answered(use, arrival.turn.state)
        if policy.headers and arrival.turn.agent and arrival.turn.last:
            cache.end(agents.pop(name))
        if policy.headers and arrival.ends:
            for other in [key for key in agents if key[0] == arrival.session]:
                cache.end(agents.pop(other))
    return found


def next_uses(arrivals: Sequence[Arrival], total: int) -> list[np.ndarray]:
    """For each page of each prompt, the number of the next prompt with it, or of all prompts: each [pages] int32."""
    following = np.full(total, len(arrivals), np.int32)
    uses: list[np.ndarray] = []
    for number in reversed(range(len(arrivals))):
        uses.append(following[arrivals[number].pages])
        following[arrivals[number].pages] = number
    return uses[::-1]


def replay_optimum(arrivals: Sequence[Arrival], pages: int) -> np.ndarray:
    """Pages of each prompt that are found where the pages with the latest next use go first, [arrivals] int64.

    No other policy has more (Belady, 1966; https://doi.org/10.1147/sj.52.0078).
    """
    total = 1 + max(int(arrival.pages.max()) for arrival in arrivals)
    uses = next_uses(arrivals, total)
    cached, upcoming = np.zeros(total, bool), np.zeros(total, np.int32)
    latest: list[tuple[int, int, np.ndarray]] = []  # minus the next use, a serial number, the pages: a heap
    found, used, serial = np.zeros(len(arrivals), np.int64), 0, 0
    for number, (arrival, following) in enumerate(zip(arrivals, uses, strict=True)):
        prompt = arrival.pages
        hits = cached[prompt]
        found[number] = len(prompt) if hits.all() else int(hits.argmin())
        used += len(prompt) - int(hits.sum())
        cached[prompt], upcoming[prompt] = True, following
        for run in np.split(np.arange(len(prompt)), np.flatnonzero(np.diff(following)) + 1):
            serial += 1
            heapq.heappush(latest, (-int(following[run[0]]), serial, prompt[run]))
        while used > pages:
            use, _, run = heapq.heappop(latest)
            run = run[cached[run] & (upcoming[run] == -use)]  # the others were used since, or are gone
            gone = min(len(run), used - pages)
            cached[run[len(run) - gone :]] = False
            used -= gone
            if gone < len(run):
                serial += 1
                heapq.heappush(latest, (use, serial, run[: len(run) - gone]))
    return found


def replay_session_optimum(arrivals: Sequence[Arrival], pages: int) -> np.ndarray:
    """The same, where the session goes first whose next request is the latest, whatever pages that has.

    Of one session, those pages go first that its latest prompts have not used, and then the ends of prompts.
    """
    total = 1 + max(int(arrival.pages.max()) for arrival in arrivals)
    cached, by = np.zeros(total, bool), np.full(total, -1, np.int32)  # the latest prompt with each page
    upcoming, following = next_requests(arrivals), dict[int, int]()
    runs: dict[int, deque[tuple[int, np.ndarray]]] = defaultdict(deque)  # of each session: prompts, oldest first
    latest: list[tuple[int, int]] = []  # minus the next request, and the session: a heap
    found, used = np.zeros(len(arrivals), np.int64), 0
    for number, arrival in enumerate(arrivals):
        prompt, session = arrival.pages, arrival.session
        hits = cached[prompt]
        found[number] = len(prompt) if hits.all() else int(hits.argmin())
        used += len(prompt) - int(hits.sum())
        cached[prompt], by[prompt], following[session] = True, number, upcoming[number]
        runs[session].append((number, prompt))
        heapq.heappush(latest, (-upcoming[number], session))
        while used > pages:
            use, session = latest[0]
            if following[session] != -use or not runs[session]:
                heapq.heappop(latest)
                continue
            maker, run = runs[session].popleft()
            run = run[cached[run] & (by[run] == maker)]
            gone = min(len(run), used - pages)
            cached[run[len(run) - gone :]] = False
            used -= gone
            if gone < len(run):
                runs[session].appendleft((maker, run[: len(run) - gone]))
    return found


def next_requests(arrivals: Sequence[Arrival]) -> list[int]:
    """The number of the next request of each one's session, or of all requests."""
    following: dict[int, int] = {}
    numbers = []
    for number in reversed(range(len(arrivals))):
        numbers.append(following.get(arrivals[number].session, len(arrivals)))
        following[arrivals[number].session] = number
    return numbers[::-1]
