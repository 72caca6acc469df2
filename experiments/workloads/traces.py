"""Traces of calls: agents at work, made from synthetic sessions, or read from a file in Mooncake's format.

A prompt is a sequence of blocks, each an id and a length in tokens; equal ids stand for equal text. As tokens, a block
is its id, repeated: blocks that differ do so from their first token on.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from experiments.workloads.sessions import Session, request, session_header, turn_messages
from experiments.workloads.synthetic import Json, prose

CHARS_PER_TOKEN = 4  # of prose, code and JSON together, about
CALLS_PER_TASK = 8  # on average; then a person reads the answer and thinks
MOONCAKE_BLOCK = 512  # tokens
NO_BLOCKS = np.zeros((0, 2), np.int32)  # [0, 2] int32


@dataclass(frozen=True, eq=False)
class Call:
    """One request: who sends it, when, and its prompt as blocks."""

    session: str
    time_s: float  # since the trace began
    blocks: np.ndarray  # [blocks, 2] int32: id, tokens
    # [blocks, 2] int32, the preamble that the client puts before the prompt
    header: np.ndarray = field(default_factory=lambda: NO_BLOCKS)

    def tokens(self, header: bool = False) -> np.ndarray:
        """The prompt, [tokens] int32, with its header or with that stripped."""
        blocks = np.concatenate([self.header, self.blocks]) if header else self.blocks
        return np.repeat(blocks[:, 0], blocks[:, 1])

    def text(self) -> str:
        """The prompt without its header as text of about as many tokens; equal blocks are equal lines."""
        return "\n".join(block_text(number, tokens) for number, tokens in self.blocks.tolist())


@dataclass(frozen=True)
class Agents:
    """Coding agents at work, each for hundreds of calls, with sub-agents and side requests between."""

    seed: int = 0
    agents: int = 4
    calls: int = 300  # of an agent, without those of its sub-agents
    projects: int = 2  # agents of one project share folder, tools and prompt
    release: str = "2.1.179"
    window: int = 160_000  # tokens; a longer history gives way to a summary
    subagents: float = 0.04  # a call, on average; the agent waits for their end
    subagent_calls: int = 12
    sides: float = 0.1  # small requests without tools, such as for a title, a call
    call_s: float = 8.0  # from call to call, on average
    think_s: float = 120.0  # from an answer to a person's next task, on average
    start_s: float = 600.0  # within which the agents begin


def generate(work: Agents) -> list[Call]:
    """All agents' calls in the order of their times; equal fields give equal calls."""
    return sorted((call for number in range(work.agents) for call in agent(work, number)), key=lambda c: c.time_s)


def agent(work: Agents, number: int) -> Iterator[Call]:
    """One agent's calls, with those of its sub-agents and its side requests."""
    project = number % work.projects
    session = Session(
        seed=work.seed * 10_000 + number,
        folder=f"/home/dev/project-{project}",
        release=work.release,
        group=f"project {project}",
    )
    rng = session.rng("pace")
    aside = blocks([prose(session.group_rng("side"), 1500)])
    time_s = rng.uniform(0, work.start_s)
    for turn, prompt in enumerate(prompts(session, work.calls, work.window)):
        yield Call(f"{number}", time_s, prompt, header_blocks(session, turn))
        time_s += rng.expovariate(1 / (work.think_s if rng.random() < 1 / CALLS_PER_TASK else work.call_s))
        if rng.random() < work.sides:
            small = np.concatenate([aside, prompt[-1:]])
            yield Call(f"{number} side {turn}", time_s, small, header_blocks(session, -1 - turn))
        if rng.random() < work.subagents:
            seed, group = session.rng("sub", turn).getrandbits(32), f"{session.group} sub-agents"
            own = replace(session, seed=seed, group=group, subagent=True, num_tools=10)
            for step, part in enumerate(prompts(own, work.subagent_calls, work.window)):
                yield Call(f"{number} sub {turn}", time_s, part, header_blocks(own, step))
                time_s += rng.expovariate(1 / work.call_s)


def prompts(session: Session, calls: int, window: int) -> list[np.ndarray]:
    """The prompts of a session's calls as blocks, [blocks, 2] int32 each, without header.

    Each extends the one before it, up to the call whose prompt would have over `window` tokens: that one starts again
    with a summary. Prompts that extend each other are views of one array.
    """
    frame = blocks(texts(request(session, header=False)))
    parts, ends, made = [frame], [len(frame)], list[np.ndarray]()
    size = frame[:, 1].sum()
    for turn in range(1, calls):
        new = blocks(spoken(turn_messages(session, turn)))
        size += new[:, 1].sum()
        if size > window:
            made += views(parts, ends)
            summary = blocks([prose(session.rng("summary", turn), 6000)])
            parts, ends, new = [frame], [], np.concatenate([summary, new[-1:]])
            size = frame[:, 1].sum() + new[:, 1].sum()
        parts.append(new)
        ends.append(sum(map(len, parts)))
    return made + views(parts, ends)


def views(parts: list[np.ndarray], ends: list[int]) -> list[np.ndarray]:
    """The joined parts, up to each of the ends."""
    joined = np.concatenate(parts)
    return [joined[:end] for end in ends]


def texts(body: Json) -> Iterator[str]:
    """The texts of a body in the order of most templates: system text by paragraphs, tools, messages."""
    for block in body["system"]:
        yield from block["text"].split("\n\n")
    yield from map(json.dumps, body["tools"])
    yield from spoken(body["messages"])


def spoken(messages: Iterable[Json]) -> Iterator[str]:
    """The text of each block of the messages."""
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
            continue
        for block in message["content"]:
            match block["type"]:
                case "tool_use":
                    yield json.dumps(block["input"])
                case "tool_result":
                    yield block["content"]
                case kind:
                    yield block[kind]


def header_blocks(session: Session, number: int) -> np.ndarray:
    """The preamble of the session's request `number`, [blocks, 2] int32: a constant and a changing block."""
    stays, mark, changes = session_header(session, number).partition("cch=")
    return blocks(part for part in (stays + mark, changes) if part)


def blocks(texts: Iterable[str]) -> np.ndarray:
    """Each text as a block, [blocks, 2] int32: a hash as its id, and its tokens, estimated from its length."""
    rows = [(block_id(text), max(1, round(len(text) / CHARS_PER_TOKEN))) for text in texts]
    return np.array(rows, np.int32).reshape(-1, 2)


def block_id(text: str) -> int:
    """A hash of 31 bits: two texts that follow the same prefix in a trace hardly ever collide."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1


@lru_cache(4096)
def block_text(number: int, tokens: int) -> str:
    """Text of about `tokens` tokens for the block with this id; other ids differ from the first word on."""
    return f"{number:08x} {prose(random.Random(number), tokens * CHARS_PER_TOKEN)}"


class MooncakeLine(msgspec.Struct, frozen=True):
    """One request of a trace in Mooncake's format.

    https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release/traces

    An id stands for 512 tokens and all before them; the last one for the tokens that are left.
    """

    timestamp: Annotated[float, msgspec.Meta(ge=0)]  # milliseconds
    input_length: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]


def read_mooncake(path: Path) -> list[Call]:
    """The calls of a JSONL file in Mooncake's format, in the order of their times.

    The format names no sessions, so all calls belong to one. It has no ids for answers, which are part of the next
    prompt. Raises ValueError with file and line for a line that is not such a call, and for an empty file.
    """
    calls = []
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = msgspec.json.decode(text, type=MooncakeLine)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}, line {number}: {error}; expected a line of a Mooncake trace") from None
            wanted = math.ceil(line.input_length / MOONCAKE_BLOCK)
            if len(line.hash_ids) != wanted:
                raise ValueError(
                    f"{path}, line {number}: {len(line.hash_ids)} hash_ids, expected {wanted} for an input_length of "
                    f"{line.input_length}: one for every {MOONCAKE_BLOCK} tokens"
                )
            prompt = np.full((wanted, 2), MOONCAKE_BLOCK, np.int32)
            prompt[:, 0] = line.hash_ids
            prompt[-1, 1] = line.input_length - MOONCAKE_BLOCK * (wanted - 1)
            calls.append(Call(path.name, line.timestamp / 1000, prompt))
    if not calls:
        raise ValueError(f"{path} is empty: expected one call a line")
    return sorted(calls, key=lambda call: call.time_s)
