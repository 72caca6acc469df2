"""What the arms of a sweep send: a prompt as a row of pieces, some the same in every request, some fresh in each.

An arm is nothing but a layout of pieces. `tokens_of` makes token ids of them for an engine in this process, `messages`
makes a chat of them for an endpoint. No measuring and no I/O.
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
# Arms in which the header stands where the axis `position` says; in the others the arm itself says it.
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
    place: str  # as the config wrote it: `25%` of the stable tokens, or a count of tokens; empty if the arm says it

    @property
    def stable_tokens(self) -> int:
        """Tokens that are the same in every request."""
        return self.prompt_tokens - self.header_tokens - self.suffix_tokens

    @property
    def position(self) -> int:
        """Stable tokens in front of a header that the axis places."""
        if self.place.endswith("%"):
            return round(self.stable_tokens * float(self.place[:-1]) / 100)
        return int(self.place)


@dataclass(frozen=True)
class PromptPart:
    """A run of tokens: its text, where it stands in a chat, and whether each request brings another one."""

    text: Literal["base", "header", "billing", "thought", "question"]
    tokens: int
    start: int = 0  # in the base text, for pieces of it
    fresh: bool = True
    place: Literal["system", "assistant", "user"] = "system"


def layout(point: Point, tools_tokens: int = 0) -> list[PromptPart]:
    """The pieces of an arm's prompt; the first `tools_tokens` of the stable text stand for the tools."""

    def base(start: int, stop: int, place: Literal["system", "user"] = "system") -> PromptPart:
        return PromptPart("base", stop - start, start, fresh=False, place=place)

    end, length = point.stable_tokens, point.header_tokens
    question = PromptPart("question", point.suffix_tokens, place="user")
    match point.arm:
        case "varying":
            pieces = [base(0, point.position), PromptPart("header", length), base(point.position, end)]
        case "tools-first":
            pieces = [base(0, tools_tokens), PromptPart("header", length), base(tools_tokens, end)]
        case "relocated":
            pieces = [base(0, end), PromptPart("header", length, place="user")]
        case "stripped":
            pieces = [PromptPart("billing", length), base(0, end)]
        case "mutated-thinking":
            thought = PromptPart("thought", length, place="assistant")
            pieces = [base(0, point.position), thought, base(point.position, end, "user")]
        case _:
            pieces = [PromptPart("header", length, fresh=False), base(0, end)]
    return [piece for piece in [*pieces, question] if piece.tokens]


def shared(pieces: Sequence[PromptPart]) -> list[PromptPart]:
    """The pieces in front of the first fresh one: what every request of the arm can find in the cache.

    A billing header is no piece of the prompt where it is stripped.
    """
    kept: list[PromptPart] = []
    for piece in pieces:
        if piece.fresh and piece.text != "billing":
            break
        kept.append(piece)
    return kept


def expected_cached(pieces: Sequence[PromptPart]) -> int:
    """Tokens that a cache of all that came before holds of a prompt."""
    return sum(piece.tokens for piece in shared(pieces) if piece.text != "billing")


def tokens_of(pieces: Sequence[PromptPart], vocab: int, seed: int, fresh: np.random.Generator) -> np.ndarray:
    """Random token ids, [tokens] int32; what a normaliser strips is left out.

    Costs do not depend on which tokens they are, so no tokenizer has a part in it.
    """
    parts = []
    for piece in pieces:
        if piece.text == "billing":
            continue
        stop = piece.start + piece.tokens
        rng = fresh if piece.fresh else np.random.default_rng([seed, piece.text == "base"])
        parts.append(rng.integers(0, vocab, stop, dtype=np.int32)[piece.start :])
    return np.concatenate([*parts, np.zeros(0, np.int32)])


@cache
def base_text(seed: int, chars: int = BASE_CHARS) -> str:
    """The stable text of a sweep."""
    return prose(random.Random(f"base {seed}"), chars)


def text_of(piece: PromptPart, chars_per_token: float, seed: int, fresh: random.Random) -> str:
    """A piece as text of about its tokens; a billing header is as long as clients write it."""
    chars = round(piece.tokens * chars_per_token)
    rng = fresh if piece.fresh else random.Random(f"fixed {seed}")
    match piece.text:
        case "base":
            at, text = round(piece.start * chars_per_token), base_text(seed)
            return (text * (1 + (at + chars) // len(text)))[at : at + chars]
        case "billing":
            return billing_header(rng) + "\n"
        case "header":  # a line that no rule knows
            line = f"Session context: {uuid.UUID(int=rng.getrandbits(128), version=4)} "
            return (line + prose(rng, max(1, chars)))[: max(chars, len(line))].replace("\n", " ") + "\n"
        case _:
            return f"{rng.getrandbits(32):08x}: {prose(rng, max(1, chars - 10))}"


def messages(pieces: Sequence[PromptPart], chars_per_token: float, seed: int, fresh: random.Random) -> list[Json]:
    """The pieces as chat messages, in OpenAI's form: system, assistant with `reasoning_content`, and user.

    What stands in front of an assistant's turn is the system text and a word from the user.
    """
    texts: dict[str, list[str]] = {"system": [], "assistant": [], "user": []}
    for piece in pieces:
        texts[piece.place].append(text_of(piece, chars_per_token, seed, fresh))
    system, thought, user = ("".join(texts[place]) for place in ("system", "assistant", "user"))
    turns = [{"role": "system", "content": system}] if system else []
    if thought:
        turns += [
            {"role": "user", "content": "Go on."},
            {"role": "assistant", "reasoning_content": thought, "content": "Done."},
        ]
    return [*turns, {"role": "user", "content": user or "Go on."}]
