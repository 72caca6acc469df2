"""Recorded agents at work side by side: the requests of many sessions in the order in which a server would get them.

Where a session ends, its seat begins the next one. A request comes so long after the answer before it as it did when it
was recorded; answers themselves take no time, so that no policy changes who comes when.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.eviction import State
from cache.nodes import NO_PAGES
from cache.radix_tree import common_prefix
from experiments.workloads.agentx import Trace, read_traces

LONGEST_PAUSE_S = 3600.0
STATES = {"tool_use": State.TOOL, "end_turn": State.PERSON}  # after an answer that ended so


@dataclass(frozen=True, eq=False, slots=True)
class Turn:
    """One request of a session."""

    agent: int  # in its session; 0 is the one that a person talks to
    ids: np.ndarray  # [pages] int32, the full pages of its prompt, numbered within the session
    pause_s: float  # after the answer before it
    state: State  # of its agent when it is answered
    last: bool  # of its agent


@dataclass(frozen=True, eq=False, slots=True)
class Recorded:
    """A session, in the order in which its agents wait for each other."""

    name: str
    page_tokens: int
    turns: Sequence[Turn]

    @property
    def pages(self) -> int:
        """How many different pages its prompts have."""
        return 1 + max(int(turn.ids.max(initial=-1)) for turn in self.turns)


@dataclass(frozen=True, eq=False, slots=True)
class Arrival:
    """A request that the server gets."""

    time_s: float
    session: int
    turn: Turn
    pages: np.ndarray  # [pages] int32, of its prompt; equal numbers are equal text after equal text
    ends: bool  # its session


def recorded(trace: Trace) -> Recorded:
    """A trace's requests; their pages are views of one array as long as each extends the one before it."""
    requests = [request for request in trace.requests if len(request.hash_ids)]
    numbers = {id: number for number, id in enumerate(dict.fromkeys(request.agent.id for request in requests))}
    last = {request.agent.id: index for index, request in enumerate(requests)}
    turns, known = list[Turn](), dict[str, np.ndarray]()
    for index, request in enumerate(requests):
        agent = request.agent.id
        before, ids = known.get(agent, NO_PAGES), request.hash_ids
        known[agent] = ids = before[: len(ids)] if common_prefix(before, ids) == len(ids) else ids
        pause = min(request.think_time_s or 0.0, LONGEST_PAUSE_S)
        state = STATES.get(request.stop, State.UNKNOWN)
        turns.append(Turn(numbers[agent], ids, pause, state, last[agent] == index))
    return Recorded(trace.file, trace.block_size, turns)


def read_recorded(path: Path, problems: list[str]) -> list[Recorded]:
    """The sessions of a folder or an archive, by name; what cannot be read is in `problems`."""
    sessions = [recorded(trace) for trace in read_traces(path, problems.append)]
    return sorted((session for session in sessions if session.turns), key=lambda session: session.name)


def halves(sessions: Sequence[Recorded], seed: int = 1) -> tuple[list[Recorded], list[Recorded]]:
    """Two halves, drawn at random: one to choose a rule on, the other to report on."""
    order = list(range(len(sessions)))
    random.Random(seed).shuffle(order)
    middle = len(order) // 2
    return [sessions[i] for i in order[:middle]], [sessions[i] for i in order[middle:]]


def at_work(sessions: Iterable[Recorded], seats: int, seed: int = 0) -> list[Arrival]:
    """The requests of so many sessions at a time, by their times; `seed` draws the order in which they are dealt."""
    dealt = list(sessions)
    random.Random(seed).shuffle(dealt)
    free, arrivals, first_page = [(0.0, seat) for seat in range(seats)], list[Arrival](), 0
    for number, session in enumerate(dealt):
        now, seat = heapq.heappop(free)
        shifted: tuple[np.ndarray, np.ndarray] = (NO_PAGES, NO_PAGES)
        for index, turn in enumerate(session.turns):
            now += turn.pause_s if index else 0.0
            if shifted[0] is not turn.ids:
                shifted = turn.ids, turn.ids + np.int32(first_page)
            arrivals.append(Arrival(now, number, turn, shifted[1], index == len(session.turns) - 1))
        first_page += session.pages
        heapq.heappush(free, (now, seat))
    return sorted(arrivals, key=lambda arrival: arrival.time_s)
