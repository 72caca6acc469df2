"""Every request of recorded sessions as a row: what an unlimited cache has of its prompt, and why it has not more.

The cache is one for each session and model, since the ids of two sessions cannot be compared and models share no keys
and values. Requests are played in the order of their times. Lengths are in blocks: the rest of a prompt, under one
block, has no id. An id stands for all before it too, so that what two prompts share is found by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from experiments.workloads.agentx import Trace, TraceRequest

COMPACTED = 0.6  # a prompt that is shorter than this share of the one before it follows a compaction
BEHIND_HEAD_TOKENS = 1_500  # from the end of tools and system text: about where the first user message begins


class Cause(IntEnum):
    """Why a request computes what it computes; in the order in which they are decided."""

    FIRST = 0  # of an agent
    MODEL = 1  # of an agent's requests to this model, whose text another model has seen
    APPEND = 2  # extends the prompt before it
    BRANCH = 3  # extends an older one
    COMPACTION = 4  # much shorter than the one before it
    HEAD = 5  # stops matching within tools and system text
    BEHIND_HEAD = 6  # stops matching about where they end
    LATER = 7  # stops matching after that


BREAKS = (Cause.HEAD, Cause.BEHIND_HEAD, Cause.LATER)
NAMES = {
    Cause.FIRST: "first request",
    Cause.MODEL: "model switch",
    Cause.APPEND: "append",
    Cause.BRANCH: "branch",
    Cause.COMPACTION: "compaction",
    Cause.HEAD: "break in the head",
    Cause.BEHIND_HEAD: "break behind the head",
    Cause.LATER: "later break",
}

ROW = np.dtype(
    [
        ("session", np.int32),
        ("number", np.int32),  # among the session's requests
        ("cause", np.int8),
        ("tokens", np.int32),  # of the whole prompt
        ("output", np.int32),
        ("blocks", np.int32),
        ("reused", np.int32),  # blocks that this model has seen
        ("reused_text", np.int32),  # blocks that any model has seen
        ("before_tokens", np.int32),  # of the agent's latest prompt to this model
        ("before", np.int32),  # blocks of it; -1: there is none
        ("shared", np.int32),  # blocks of it that this prompt begins with
        ("head", np.int32),  # tokens of tools and system text
        ("idle_s", np.float32),  # from the agent's answer before it, by the times of both; nan for its first request
        ("think_s", np.float32),  # the same as recorded, nan where it is not
        ("waits_for_person", np.int8),  # 1: the answer before it ended the turn, 0: it called a tool, -1: not known
        ("subagent", np.bool_),
    ]
)


@dataclass
class Seen:
    """What one model has seen of a session."""

    ids: np.ndarray  # [ids] bool
    ends: np.ndarray  # [ids] bool: the last block of a prompt, or the one before it
    latest: dict[str, TraceRequest] = field(default_factory=dict)  # by agent


def common_blocks(a: np.ndarray, b: np.ndarray) -> int:
    """Leading ids that two prompts ([n] int32, [m] int32) share, by bisection: chained ids differ from there on."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[middle - 1] == b[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def leading(flags: np.ndarray, ids: np.ndarray) -> int:
    """Leading ids ([blocks] int32) whose flag ([ids] bool) is set; a set flag must mean that all before it are set."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if flags[ids[middle - 1]]:
            low = middle
        else:
            high = middle - 1
    return low


def by_time(trace: Trace) -> list[TraceRequest]:
    """The requests that have ids, in the order of their times."""
    return sorted((r for r in trace.requests if len(r.hash_ids)), key=lambda r: r.t_s)


def ids_of(trace: Trace) -> int:
    """One more than the highest id."""
    return 1 + max((int(r.hash_ids.max(initial=0)) for r in trace.requests), default=0)


def rows(trace: Trace, session: int) -> np.ndarray:
    """The rows of one session, [requests] ROW."""
    size, block = ids_of(trace), trace.block_size
    any_model = np.zeros(size, bool)
    models: dict[str, Seen] = {}
    answered: dict[str, TraceRequest] = {}
    made = np.zeros(len(requests := by_time(trace)), ROW)
    for number, (row, asked) in enumerate(zip(made, requests, strict=True)):
        ids, agent = asked.hash_ids, asked.agent.id
        seen = models.setdefault(asked.model, Seen(np.zeros(size, bool), np.zeros(size, bool)))
        before = seen.latest.get(agent)
        row["session"], row["number"], row["head"] = session, number, asked.agent.head_tokens
        row["tokens"], row["output"], row["blocks"] = asked.input_tokens, asked.output_tokens, len(ids)
        row["reused"], row["reused_text"] = leading(seen.ids, ids), leading(any_model, ids)
        row["before"] = -1
        if before is not None:
            row["before"], row["before_tokens"] = len(before.hash_ids), before.input_tokens
            row["shared"] = common_blocks(before.hash_ids, ids)
        row["idle_s"] = idle_s(asked, answered.get(agent))
        row["think_s"] = np.nan if asked.think_time_s is None else asked.think_time_s
        row["waits_for_person"] = waits_for_person(answered.get(agent))
        row["subagent"] = asked.agent.parent is not None
        extends = bool(row["reused"]) and bool(seen.ends[ids[row["reused"] - 1]])
        row["cause"] = cause(row, extends, block)
        any_model[ids] = seen.ids[ids] = seen.ends[ids[-2:]] = True
        seen.latest[agent] = answered[agent] = asked
    return made


def cause(row: np.void, extends: bool, block: int) -> Cause:
    """Why a request computes what it computes; `extends`: it begins with the whole of an earlier prompt."""
    if row["before"] < 0:
        known = row["reused_text"] >= row["blocks"] / 2 and row["reused"] < row["reused_text"] / 2
        return Cause.MODEL if known else Cause.FIRST
    # The last block of the prompt before may have ended with what each prompt ends with.
    if row["shared"] >= row["before"] - 1:
        return Cause.APPEND
    if extends:
        return Cause.BRANCH
    if row["blocks"] < COMPACTED * row["before"]:
        return Cause.COMPACTION
    behind = row["reused"] * block - row["head"]
    if behind < -BEHIND_HEAD_TOKENS:
        return Cause.HEAD
    return Cause.BEHIND_HEAD if behind <= BEHIND_HEAD_TOKENS else Cause.LATER


def idle_s(asked: TraceRequest, before: TraceRequest | None) -> float:
    """Seconds from the answer before a request to the request; nan without one.

    By the times of both: the recorded think time counts from the last answer whose duration is known, which for a tenth
    of the requests is an older one. Where the duration is not known, the answer is taken to be there at once.
    """
    return max(0.0, asked.t_s - before.t_s - (before.api_time_s or 0.0)) if before else float("nan")


def waits_for_person(before: TraceRequest | None) -> int:
    """Whether the answer before a request ended its turn: 1, 0, or -1 where that is not known."""
    return {"end_turn": 1, "tool_use": 0}.get(before.stop, -1) if before else -1
