"""Synthetic sessions with the lengths, pauses and breaks of recorded agents: `fitted.json`, and traces drawn from it.

`python -m experiments.wild.fit TRACES` writes the file: quantiles and rates, nothing of the traces themselves. A
session is a pure function of the fit and a seed, and a trace like a recorded one, so that what reads one reads both.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from experiments.workloads.agentx import BLOCK, Agent, Trace, TraceRequest

FITTED = Path(__file__).parent / "fitted.json"
T = TypeVar("T")
# Percent; close at the ends, where most of the tokens of a heavy tail are.
LEVELS = (0.0, 0.1, 0.5, 1.0, *(2.5 * step for step in range(1, 40)), 99.0, 99.5, 99.8, 99.9, 100.0)
Quantiles = list[float]  # at LEVELS


class Break(msgspec.Struct, frozen=True):
    """How one kind of break comes: where it stops matching, and how long the new prompt is. Two lists are empty."""

    behind_head: Quantiles  # the place: tokens from the end of tools and system text
    kept: Quantiles  # or its share of the old prompt
    change_tokens: Quantiles  # the length: less or more than the old prompt
    length: Quantiles  # or its share of the old prompt


class Fit(msgspec.Struct, frozen=True):
    """What recorded sessions are like."""

    sessions: int  # that it was fitted to
    head_tokens: Quantiles  # tools and system text
    first_tokens: Quantiles  # of the first prompt behind them
    first_edges: list[float]  # tokens
    requests: list[Quantiles]  # of a session, by the first prompt's tokens behind the head
    appended_tokens: Quantiles
    output_tokens: Quantiles
    api_time_s: Quantiles
    end_turn: float  # share of answers that end their turn; the others call a tool
    tool_pause_s: Quantiles
    person_pause_s: Quantiles
    pause_edges_s: list[float]
    break_rates: dict[str, list[float]]  # by kind: a request's, by its pause
    window_tokens: Quantiles  # of a session: a prompt that would be longer is compacted
    unlimited: float  # share of sessions that have no window
    compaction_rate: float  # a request's, within its window
    breaks: dict[str, Break]
    subagents: float  # a request, on average
    subagent_requests: Quantiles
    subagent_head_tokens: Quantiles
    subagent_first_tokens: Quantiles


def load_fit(path: Path = FITTED) -> Fit:
    """The fit in a file. Raises OSError, or msgspec.MsgspecError for a file that is none."""
    return msgspec.json.decode(path.read_bytes(), type=Fit)


def draw(rng: random.Random, quantiles: Quantiles) -> float:
    """A value of the distribution with these quantiles, between two of them linearly."""
    level = 100 * rng.random()
    at = bisect_right(LEVELS, level)
    low, high = LEVELS[at - 1], LEVELS[at]
    return quantiles[at - 1] + (level - low) / (high - low) * (quantiles[at] - quantiles[at - 1])


def of_bin(bins: Sequence[T], edges: Sequence[float], value: float) -> T:
    """What belongs to the bin of a value; `edges` are those between the bins."""
    return bins[bisect_right(edges, value)]


@dataclass
class Conversation:
    """One agent's prompt as it grows; ids are numbered over the whole session."""

    agent: Agent
    rng: random.Random
    numbers: Iterator[int]
    window: float = float("inf")  # tokens
    ids: list[int] = field(default_factory=list)

    def append(self, tokens: float) -> None:
        """Put about so many tokens behind the prompt, in whole blocks: in the mean as many."""
        whole, rest = divmod(max(0.0, tokens) / BLOCK, 1)
        self.ids = self.ids + [next(self.numbers) for _ in range(int(whole) + (self.rng.random() < rest))]

    def leave(self, how: Break) -> None:
        """Stop matching the prompt at a place, and go on with other text."""
        blocks = len(self.ids)
        if how.kept:
            kept = draw(self.rng, how.kept) * blocks
        else:
            kept = (self.agent.head_tokens + draw(self.rng, how.behind_head)) / BLOCK
        if how.length:
            length = draw(self.rng, how.length) * blocks
        else:
            length = blocks + draw(self.rng, how.change_tokens) / BLOCK
        self.ids = self.ids[: max(0, min(round(kept), blocks - 1))]
        self.append(BLOCK * max(1, length - len(self.ids)))


def sessions(fit: Fit, count: int, seed: int = 0) -> Iterator[Trace]:
    """So many sessions, one after another."""
    for number in range(count):
        yield session(fit, f"fitted {seed} {number}")


def session(fit: Fit, name: str) -> Trace:
    """The session of a name."""
    rng = random.Random(name)
    numbers = iter(range(1, 2**31))
    head, first = round(draw(rng, fit.head_tokens)), draw(rng, fit.first_tokens)
    count = round(draw(rng, of_bin(fit.requests, fit.first_edges, first)))
    window = draw(rng, fit.window_tokens)
    unlimited = rng.random() < fit.unlimited or head + first > window
    main = Conversation(Agent("", None, head, 0), rng, numbers, float("inf") if unlimited else window)
    made: list[TraceRequest] = []
    for turn, request in enumerate(turns(fit, main, count, first, 0.0)):
        made.append(request)
        if rng.random() < fit.subagents:
            own = Agent(f"sub {turn}", "", round(draw(rng, fit.subagent_head_tokens)), 0)
            length = max(1, round(draw(rng, fit.subagent_requests)))
            began = request.t_s + (request.api_time_s or 0.0)
            made.extend(
                turns(fit, Conversation(own, rng, numbers), length, draw(rng, fit.subagent_first_tokens), began)
            )
    return Trace(f"{name}.json", name, BLOCK, head, 0, made)


def turns(fit: Fit, talk: Conversation, count: int, first_tokens: float, time_s: float) -> Iterator[TraceRequest]:
    """An agent's requests from a time on; `first_tokens` of its first prompt are behind the head."""
    rng, pause, stop = talk.rng, 0.0, ""
    for turn in range(max(1, count)):
        if not turn:
            talk.append(max(BLOCK, talk.agent.head_tokens + first_tokens))
        else:
            pause = draw(rng, fit.person_pause_s if stop == "end_turn" else fit.tool_pause_s)
            grow(fit, talk, pause)
        time_s += pause
        stop = "end_turn" if rng.random() < fit.end_turn else "tool_use"
        api_time, output = draw(rng, fit.api_time_s), round(draw(rng, fit.output_tokens))
        length = len(talk.ids) * BLOCK + rng.randrange(BLOCK)
        ids = np.array(talk.ids, np.int32)
        yield TraceRequest(talk.agent, "fitted", time_s, length, output, ids, stop, api_time, None, pause)
        time_s += api_time


def grow(fit: Fit, talk: Conversation, pause: float) -> None:
    """Make the next prompt after a pause: a break of some kind, or appended text."""
    chance = talk.rng.random()
    for kind, rates in fit.break_rates.items():
        chance -= of_bin(rates, fit.pause_edges_s, pause)
        if chance < 0:
            return talk.leave(fit.breaks[kind])
    more = draw(talk.rng, fit.appended_tokens)
    if chance < fit.compaction_rate or len(talk.ids) * BLOCK + more > talk.window:
        return talk.leave(fit.breaks["compaction"])
    return talk.append(more)
