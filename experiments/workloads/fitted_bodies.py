"""Fitted sessions as bodies for `POST /v1/messages`: a trace's lengths and breaks in the shape that coding agents send.

What a request adds becomes a tool call and its result; text is a function of its blocks' ids, so that prompts share
what their ids share. `experiments.workloads.sessions` has the frame around it: system text, tools, fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from experiments.workloads.agentx import BLOCK, Agent, Trace, TraceRequest
from experiments.workloads.sessions import RELEASES, Session, extend, request
from experiments.workloads.synthetic import Json, prose

CHARS_PER_TOKEN = 4.5


@dataclass
class Messages:
    """One agent's messages: the ids that each of them stands for, after those of tools and system text."""

    session: Session
    frame: Json  # without messages
    head: int  # blocks of tools and system text
    parts: list[np.ndarray] = field(default_factory=list)  # [blocks] int32 each

    def follow(self, ids: np.ndarray) -> None:
        """Keep the messages that a prompt's ids ([blocks] int32) begin with, and put the rest of them behind."""
        ids, kept = ids[self.head :], list[np.ndarray]()
        for part in self.parts:
            if not np.array_equal(part, ids[: len(part)]):
                break
            kept.append(part)
            ids = ids[len(part) :]
        self.parts = [*kept, ids] if len(ids) or not kept else kept

    def body(self) -> Json:
        """The body of the latest prompt."""
        first, *others = self.parts
        messages: list[Json] = [{"role": "user", "content": self.text(first)}]
        for part in others:
            call = f"toolu_{int(part[0]):024x}"
            use = {"type": "tool_use", "id": call, "name": "Bash", "input": {"command": f"cat part-{part[0]}"}}
            result = {"type": "tool_result", "tool_use_id": call, "content": self.text(part)}
            messages += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        return extend(self.frame | {"messages": messages[:1]}, *messages[1:])

    def text(self, ids: np.ndarray) -> str:
        """The text of blocks, a line for each."""
        return "\n".join(block_text(self.session, number) for number in ids.tolist()) or "Go on."


@lru_cache(2**15)
def block_text(session: Session, number: int) -> str:
    """The text of a block of a session."""
    return prose(session.rng("block", number), round(BLOCK * CHARS_PER_TOKEN))


def bodies(trace: Trace, session: Session) -> Iterator[tuple[TraceRequest, Json]]:
    """The requests of a trace with their bodies, in the trace's order; each of its agents has its own prompt and tools.

    Equal traces and sessions give equal bytes. Lengths are estimated by characters. A break within tools and system
    text shows in the first message, since the frame stays.
    """
    talks: dict[str, Messages] = {}
    for asked in trace.requests:
        if asked.agent.id not in talks:
            talks[asked.agent.id] = Messages(session, frame(session, asked.agent), asked.agent.head_tokens // BLOCK)
        talk = talks[asked.agent.id]
        talk.follow(asked.hash_ids)
        yield asked, talk.body()


def frame(session: Session, agent: Agent) -> Json:
    """A body without messages, whose tools and system text have about as many tokens as the agent's."""
    release = RELEASES[session.release]
    scale = agent.head_tokens * CHARS_PER_TOKEN / (release.system + release.tool_chars)
    subagent = agent.parent is not None
    own = replace(session, scale=max(0.1, scale), subagent=subagent, num_tools=10 if subagent else None)
    return request(own, header=False) | {"messages": []}
