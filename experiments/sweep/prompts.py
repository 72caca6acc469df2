"""The prompts that the arms of a sweep send.

An arm is one condition: a layout of parts, some of which are fresh in each request and the others always the same.
`tokens_of` makes token ids of them for an engine in this process, `messages` makes a chat of them for an endpoint. No
measuring and no I/O.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from experiments.workloads.sessions import billing_header
from experiments.workloads.synthetic import Json, prose

Arm = Literal["stable", "varying", "stripped", "tools-first", "relocated", "restarted", "evicted", "mutated-thinking"]
# Arms whose header stands where the axis `position` says; in the others the arm itself places it.
PLACED = ("varying", "mutated-thinking")
BASE_CHARS = 1_000_000  # of stable text before it repeats


@dataclass(frozen=True)
class Point:
    """One condition of a sweep: a value for each axis."""

    arm: Arm
    model: str
    page_size: int
    prompt_tokens: int
    header_tokens: int
    suffix_tokens: int
    place: str  # as in the config: `25%` of the stable tokens, or a count of tokens; empty if the arm places it

    @property
    def stable_tokens(self) -> int:
        """Tokens that are the same in every request."""
        return self.prompt_tokens - self.header_tokens - self.suffix_tokens

    @property
    def position(self) -> int:
        """Stable tokens before a header that the axis places."""
        if self.place.endswith("%"):
            return round(self.stable_tokens * float(self.place[:-1]) / 100)
        return int(self.place)


@dataclass(frozen=True)
class PromptPart:
    """A run of tokens: its text, its place in a chat, and whether each request has another one."""

    text: Literal["base", "header", "billing", "thought", "question"]
    tokens: int
    start: int = 0  # in the base text, for parts of it
    fresh: bool = True
    place: Literal["system", "assistant", "user"] = "system"


def layout(point: Point, tools_tokens: int = 0) -> list[PromptPart]:
    """The parts of an arm's prompt; the first `tools_tokens` of the stable text stand for the tools."""

    def base(start: int, stop: int, place: Literal["system", "user"] = "system") -> PromptPart:
        return PromptPart("base", stop - start, start, fresh=False, place=place)

    end, length = point.stable_tokens, point.header_tokens
    question = PromptPart("question", point.suffix_tokens, place="user")
    match point.arm:
        case "varying":
            parts = [base(0, point.position), PromptPart("header", length), base(point.position, end)]
        case "tools-first":
            parts = [base(0, tools_tokens), PromptPart("header", length), base(tools_tokens, end)]
        case "relocated":
            parts = [base(0, end), PromptPart("header", length, place="user")]
        case "stripped":
            parts = [PromptPart("billing", length), base(0, end)]
        case "mutated-thinking":
            thought = PromptPart("thought", length, place="assistant")
            parts = [base(0, point.position), thought, base(point.position, end, "user")]
        case _:
            parts = [PromptPart("header", length, fresh=False), base(0, end)]
    return [part for part in [*parts, question] if part.tokens]


def shared(parts: Sequence[PromptPart]) -> list[PromptPart]:
    """The parts before the first fresh one: what every request of the arm can find in the cache.

    A billing header that is stripped is not part of the prompt.
    """
    kept: list[PromptPart] = []
    for part in parts:
        if part.fresh and part.text != "billing":
            break
        kept.append(part)
    return kept


def expected_cached(parts: Sequence[PromptPart]) -> int:
    """The prompt's tokens that a cache of all earlier requests holds."""
    return sum(part.tokens for part in shared(parts) if part.text != "billing")


def tokens_of(parts: Sequence[PromptPart], vocab: int, seed: int, fresh: np.random.Generator) -> np.ndarray:
    """Random token ids, [tokens] int32; what a normaliser strips is left out.

    Costs do not depend on which tokens they are, so no tokenizer is needed.
    """
    runs = []
    for part in parts:
        if part.text == "billing":
            continue
        stop = part.start + part.tokens
        rng = fresh if part.fresh else np.random.default_rng([seed, part.text == "base"])
        runs.append(rng.integers(0, vocab, stop, dtype=np.int32)[part.start :])
    return np.concatenate([*runs, np.zeros(0, np.int32)])


@cache
def base_text(seed: int, chars: int = BASE_CHARS) -> str:
    """The stable text of a sweep."""
    return prose(random.Random(f"base {seed}"), chars)


def text_of(part: PromptPart, chars_per_token: float, seed: int, fresh: random.Random) -> str:
    """A part as text of about its tokens; a billing header is as long as clients write it."""
    chars = round(part.tokens * chars_per_token)
    rng = fresh if part.fresh else random.Random(f"fixed {seed}")
    match part.text:
        case "base":
            at, text = round(part.start * chars_per_token), base_text(seed)
            return (text * (1 + (at + chars) // len(text)))[at : at + chars]
        case "billing":
            return billing_header(rng) + "\n"
        case "header":  # a line that no rule strips
            line = f"Session context: {uuid.UUID(int=rng.getrandbits(128), version=4)} "
            return (line + prose(rng, max(1, chars)))[: max(chars, len(line))].replace("\n", " ") + "\n"
        case _:
            return f"{rng.getrandbits(32):08x}: {prose(rng, max(1, chars - 10))}"


def messages(parts: Sequence[PromptPart], chars_per_token: float, seed: int, fresh: random.Random) -> list[Json]:
    """The parts as chat messages, in OpenAI's form: system, assistant with `reasoning_content`, and user.

    An assistant's turn follows the system text and a word from the user.
    """
    texts: dict[str, list[str]] = {"system": [], "assistant": [], "user": []}
    for part in parts:
        texts[part.place].append(text_of(part, chars_per_token, seed, fresh))
    system, thought, user = ("".join(texts[place]) for place in ("system", "assistant", "user"))
    turns = [{"role": "system", "content": system}] if system else []
    if thought:
        turns += [
            {"role": "user", "content": "Go on."},
            {"role": "assistant", "reasoning_content": thought, "content": "Done."},
        ]
    return [*turns, {"role": "user", "content": user or "Go on."}]
