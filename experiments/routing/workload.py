"""What a simulated fleet is asked: the requests of agents and users, as lanes.

A lane is a row of requests of which each comes a pause after the answer before it, as an agent's calls do (a closed
loop). A lane of one request comes at its time, whatever becomes of the others (an open loop).

A prompt is the numbers of its full pages, [pages] int32. Equal numbers stand for equal text after equal text, as the
chained keys of the prefix cache do, so two prompts share exactly their common start.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from cache.nodes import NO_PAGES
from cache.radix_tree import common_prefix
from experiments.workloads.agentx import BLOCK, Trace, read_traces, trace_names
from experiments.workloads.traces import MOONCAKE_BLOCK, Agents, generate, read_mooncake

AGENTX_PAGE = BLOCK
LONGEST_PAUSE_S = 3600.0


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """One request of a trace."""

    agent: int  # whose calls build on one another
    pages: np.ndarray  # [pages] int32, the full pages of its prompt
    tokens: int  # of its prompt
    output: int  # tokens of its answer
    pause_s: float = 0.0  # after the answer before it in its lane


@dataclass(frozen=True, eq=False, slots=True)
class Lane:
    """Requests of which each follows the answer before it."""

    start_s: float
    requests: Sequence[Request]


@dataclass(frozen=True, eq=False)
class Workload:
    """All lanes, and the tokens of a page."""

    name: str
    page_size: int
    lanes: Sequence[Lane]

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return sum(len(lane.requests) for lane in self.lanes)


class PageNumbers:
    """Numbers for pages, by names that are equal where a page and all pages before it are equal."""

    def __init__(self) -> None:
        self.known: dict[Hashable, int] = {}

    def of(self, names: Iterable[Hashable]) -> np.ndarray:
        """The numbers of pages, [pages] int32; a name that was never seen gets the next number."""
        return np.array([self.known.setdefault(name, len(self.known)) for name in names], np.int32)

    def chained(self, contents: Iterable[Hashable]) -> np.ndarray:
        """The numbers of a prompt's pages by their contents, [pages] int32."""
        before, numbers = -1, []
        for content in contents:
            before = self.known.setdefault((before, content), len(self.known))
            numbers.append(before)
        return np.array(numbers, np.int32)


def read_agentx(path: Path, agents: int, seed: int = 0) -> list[list[Request]]:
    """The sessions of `agents` traces of recorded coding agents, drawn with `seed`, each a list of requests in order.

    The format is that of `experiments.workloads.agentx`. Tools and system text come first; two traces whose tools and
    system text have the same lengths are taken to share these. A sub-agent is an agent of its own, and its parent waits
    for its end. Raises ValueError if there are fewer traces.
    """
    names = trace_names(path)
    if len(names) < agents:
        raise ValueError(f"{path} has {len(names)} traces, expected at least {agents}: ask for fewer agents")
    chosen = set(random.Random(seed).sample(names, agents))
    sessions, numbers = dict[str, list[Request]](), PageNumbers()
    for trace in read_traces(path, only=chosen):
        sessions[trace.file] = agentx_session(trace, numbers, 1000 * len(sessions))
    order = sorted(sessions)
    random.Random(seed).shuffle(order)
    return [sessions[name] for name in order if sessions[name]]


def agentx_session(trace: Trace, numbers: PageNumbers, agent: int) -> list[Request]:
    """One trace's requests in the order in which its agent waits for them; its agents are numbered from `agent` on."""
    made: list[Request] = []
    own: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}  # number, ids and pages of an agent's latest prompt
    for asked in trace.requests:
        if not len(asked.hash_ids):
            continue
        number, before, pages = own.get(asked.agent.id, (agent + len(own), NO_PAGES, NO_PAGES))
        lengths, shared = (asked.agent.tool_tokens, asked.agent.system_tokens), asked.agent.head_tokens // AGENTX_PAGE
        common = common_prefix(before, asked.hash_ids)
        new = enumerate(asked.hash_ids[common:].tolist(), common)
        fresh = numbers.of((lengths, i) if i < shared else (trace.id, block) for i, block in new)
        # A prompt that is the start of the one before it is a part of the same array.
        pages = np.concatenate([pages[:common], fresh]) if len(fresh) else pages[:common]
        own[asked.agent.id] = number, asked.hash_ids, pages
        pause = min(asked.think_time_s or 0.0, LONGEST_PAUSE_S)
        made.append(Request(number, pages, max(1, asked.input_tokens), max(1, asked.output_tokens), pause))
    return made


def agents_at_work(sessions: Sequence[Sequence[Request]], lanes: int, ramp_s: float, seed: int = 0) -> list[Lane]:
    """So many lanes at work all the time: where a session ends, its lane begins the next one.

    Lanes begin within `ramp_s` seconds. The sessions are dealt in order, each to the lane with the fewest requests.
    """
    rng, dealt = random.Random(seed), [list[Request]() for _ in range(lanes)]
    for session in sessions:
        min(dealt, key=len).extend(session)
    return [Lane(rng.uniform(0, ramp_s), requests) for requests in dealt if requests]


def synthetic_agents(work: Agents, outputs: int = 300) -> list[list[Request]]:
    """The calls of synthetic agents at work, by the agent that waits for them; an answer has about `outputs` tokens.

    Pages have 64 tokens. The text of a call's blocks is laid end to end and cut into pages.
    """
    numbers, rng = PageNumbers(), random.Random(work.seed)
    sessions: dict[str, list[Request]] = {}
    times: dict[str, float] = {}
    names: dict[str, int] = {}
    for call in generate(work):
        seat = call.session.split()[0]
        ends = np.cumsum(call.blocks[:, 1])  # [blocks]
        starts = np.arange(0, int(ends[-1]) - AGENTX_PAGE + 1, AGENTX_PAGE)
        first, last = np.searchsorted(ends, starts, "right"), np.searchsorted(ends, starts + AGENTX_PAGE)
        ids = call.blocks[:, 0].tolist()
        contents = (tuple(ids[a : b + 1]) for a, b in zip(first.tolist(), last.tolist(), strict=True))
        pause = call.time_s - times.get(seat, call.time_s)
        times[seat] = call.time_s
        name = names.setdefault(call.session, len(names))
        output = max(1, round(rng.expovariate(1 / outputs)))
        request = Request(name, numbers.chained(contents), int(ends[-1]), output, pause)
        sessions.setdefault(seat, []).append(request)
    return [sessions[seat] for seat in sorted(sessions, key=int)]


def read_open_loop(path: Path, speed: float = 1.0, requests: int | None = None) -> list[Lane]:
    """The calls of a file in Mooncake's format, each a lane that comes at its time, `speed` times as fast.

    The format names no agents: a request is taken to belong to the agent of the latest one that it extends by most.
    Pages have 512 tokens. The last id of a prompt stands for less text and is left out.
    """
    lanes, owners, outputs = [], dict[int, int](), output_lengths(path)
    for number, call in enumerate(islice(read_mooncake(path), requests)):
        tokens = int(call.blocks[:, 1].sum())
        pages = call.blocks[: tokens // MOONCAKE_BLOCK, 0].copy()
        known = next((owners[page] for page in reversed(pages.tolist()[1:]) if page in owners), number)
        owners.update(dict.fromkeys(pages.tolist()[1:], known))
        lanes.append(Lane(call.time_s / speed, [Request(known, pages, tokens, outputs[number])]))
    return lanes


def output_lengths(path: Path) -> list[int]:
    """Tokens of each answer of a file in Mooncake's format, in the order of the requests' times."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [max(1, line["output_length"]) for line in sorted(lines, key=lambda line: line["timestamp"])]


def poisson(lanes: Sequence[Lane], seed: int) -> list[Lane]:
    """The same lanes at the same mean rate, at the times of a Poisson process."""
    return at_times(lanes, random.Random(seed).expovariate)


def bursty(lanes: Sequence[Lane], seed: int, shape: float = 0.1) -> list[Lane]:
    """The same lanes at the same mean rate, in bursts: gaps of a gamma distribution with this shape.

    The coefficient of variation of the gaps is 1 / sqrt(shape); a Poisson process has 1.
    """
    rng = random.Random(seed)
    return at_times(lanes, lambda rate: rng.gammavariate(shape, 1 / (rate * shape)))


def at_times(lanes: Sequence[Lane], gap: Callable[[float], float]) -> list[Lane]:
    """The lanes in their order, with gaps drawn by `gap(rate)`."""
    span = max(lane.start_s for lane in lanes) - min(lane.start_s for lane in lanes)
    rate, now, moved = len(lanes) / max(span, 1e-9), 0.0, []
    for lane in sorted(lanes, key=lambda lane: lane.start_s):
        now += gap(rate)
        moved.append(replace(lane, start_s=now))
    return moved


def in_order(workload: Workload) -> Iterator[Request]:
    """All requests, lane by lane in turns: about the order in which a fleet without queues would see them."""
    queues = [iter(lane.requests) for lane in sorted(workload.lanes, key=lambda lane: lane.start_s)]
    while queues:
        going = []
        for queue in queues:
            if (request := next(queue, None)) is not None:
                yield request
                going.append(queue)
        queues = going
