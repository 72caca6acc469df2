"""Which pages are evicted first: pure functions of what is known of the last use of pages.

A rule ranks pages by the time until somebody is expected to ask for them; those that are expected latest go first. The
rank of pages changes as time passes, but always in one of a few ways, so that a heap for each way keeps the order
(`cache.eviction_order`) and no page is looked at again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class State(StrEnum):
    """What the agent that used some pages last does now."""

    RUNNING = "running"  # its request is being answered
    TOOL = "tool"  # a tool runs, and its result is the next request
    PERSON = "person"  # a person reads the answer
    ENDED = "ended"  # it will ask for nothing more, or not for these pages
    UNKNOWN = "unknown"


# Seconds, from 355 recorded sessions of Claude Code: experiments/README.md has the comparison with others.
PACE_S = 9.0  # from a tool call to its result, for an agent of which nothing is known
FASTEST_S, SLOWEST_S = 4.0, 30.0  # bounds of the time after which a tool's result is expected
PACE_WEIGHT = 0.3  # of the latest gap in an agent's pace
PERSON_S = 300.0  # who waits for a person is expected as late as who has waited for a tool for so much longer
UNKNOWN_S = 60.0  # the same, where the answer's end says neither
ENDED_S = 30 * 86400.0  # the same, where nobody is expected
BACKGROUND_S = 600.0  # the same, for each step of priority below 0

NORMAL, BUSY = 1, 2  # levels, besides 0 for pages that nobody will ask for


@dataclass(frozen=True, slots=True)
class LastUse:
    """What a rule sees of some pages; times are seconds of one clock."""

    used: float  # when the latest request that used them was answered, or began if it still runs
    state: State = State.UNKNOWN  # of the agent that sent it; unknown, too, where several agents used them
    pace_s: float = PACE_S  # from this agent's tool calls to their results, about
    priority: int = 0  # of the request; below 0 is background
    tier: str = "device"
    bytes: int = 0
    cost_s: float = 0.0  # to compute them again


class Rank(NamedTuple):
    """The seconds until pages are expected to be asked for: `offset + slope * now`. Of a lower level, all go before."""

    level: int
    slope: int  # -1 while their use comes nearer, 1 when it is overdue, 0 for a rule without time
    offset: float
    until: float = math.inf  # when the rank is another one


Rule = Callable[[LastUse, float], Rank]  # of pages, and the time now


def agent_aware(use: LastUse, now: float) -> Rank:
    """Who waits for a tool is expected after its usual time, and if overdue, ever later; a person takes longer.

    Pages that were used once are the more unlikely to be used again the longer they were not, as by LRU. Those of an
    agent that has just called a tool are expected `pace_s` after that, so one that has just asked goes before another
    whose time has nearly come.
    """
    if use.state is State.RUNNING:
        return Rank(BUSY, 1, -use.used)
    if use.state is State.ENDED:
        return Rank(0, 1, -use.used)
    later_s = BACKGROUND_S * max(0, -use.priority)
    pace_s = min(max(use.pace_s, FASTEST_S), SLOWEST_S)
    overdue = use.used + pace_s / 2  # from here on, more time has passed than is left
    if use.state is State.TOOL and now < overdue:
        return Rank(NORMAL, -1, later_s + use.used + pace_s, overdue)
    if use.state is State.PERSON:
        later_s += PERSON_S
    if use.state is State.UNKNOWN:
        later_s += UNKNOWN_S
    return Rank(NORMAL, 1, later_s - use.used)


def demotion_s(state: State) -> float:
    """Seconds by which a tier below the device, which ranks by last use alone, counts a use as earlier."""
    return {State.PERSON: PERSON_S, State.ENDED: ENDED_S}.get(state, 0.0)


def least_recently_used(use: LastUse, now: float) -> Rank:
    """LRU."""
    return Rank(BUSY if use.state is State.RUNNING else NORMAL, 1, -use.used)


def greedy_dual(use: LastUse, now: float) -> Rank:
    """GreedyDual by the cost to compute pages again (Young, 1994; https://doi.org/10.1007/BF01189992).

    Its clock is not time: it stands at the lowest value of any page evicted so far.
    """
    return Rank(BUSY if use.state is State.RUNNING else NORMAL, 0, -use.used - use.cost_s)


def next_pace(pace_s: float, gap_s: float) -> float:
    """An agent's pace after another gap of so many seconds: a moving geometric mean."""
    gap_s = min(max(gap_s, 1.0), 3600.0)
    return math.exp((1 - PACE_WEIGHT) * math.log(pace_s) + PACE_WEIGHT * math.log(gap_s))
