"""Who is admitted, who runs in the next step, and who gives way: pure functions, with no device, store or clock.

The order is highest response ratio next (Brinch Hansen, 1971): (time waited + time left) / time left. A short request
passes a long one, the ratio of a long one grows until it is chosen, and of equals the earlier one comes first. The time
left counts only what the cache does not have, so a request whose prefix is cached, or is being computed for another,
comes soon after it. The time of an answer is added for admission: it takes a place in the batch as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from serve.engine.prompt_lookup import propose_draft
from serve.engine.sequence import PREFILLING, Sequence
from serve.engine.settings import EngineSettings

T = TypeVar("T")

# The next request is chosen among this many, those that have waited longest.
CHOSEN_FROM = 8


@dataclass(frozen=True)
class ScheduledSequence:
    """What a sequence runs in the next step: its next `count` tokens, and draft tokens after them."""

    sequence: Sequence
    count: int
    draft_tokens: tuple[int, ...] = ()


def response_ratio(waited_s: float, takes_s: float) -> float:
    """(waited + takes) / takes, both in seconds; 1 for a request that takes an unknown, infinite time."""
    return 1 + waited_s / takes_s if takes_s > 0 else float("inf")


def most_urgent(requests: Iterable[T], waited_s: Callable[[T], float], takes_s: Callable[[T], float]) -> T:
    """The request with the highest response ratio, the first of equals. Raises ValueError without requests."""
    return max(requests, key=lambda request: response_ratio(waited_s(request), takes_s(request)))


def by_urgency(requests: Iterable[T], waited_s: Callable[[T], float], takes_s: Callable[[T], float]) -> list[T]:
    """The requests, the highest response ratio first, and equals in the order given."""
    return sorted(requests, key=lambda request: -response_ratio(waited_s(request), takes_s(request)))


def admission_order(waiting: Iterable[Sequence], now: float, takes_s: Callable[[Sequence], float]) -> list[Sequence]:
    """The requests to admit next, in this order, of the CHOSEN_FROM that have waited longest.

    `now` is in seconds of `time.perf_counter`; `takes_s` is how many seconds a request's prompt and answer take.
    """
    chosen = list(islice(waiting, CHOSEN_FROM))
    return by_urgency(chosen, lambda s: now - s.submitted, takes_s) if len(chosen) > 1 else chosen


def fits(new_tokens: int, running: Iterable[Sequence], free_tokens: int) -> bool:
    """Whether `new_tokens` of a prompt fit into free pages, together with what the running prompts still need.

    A sequence that runs alone always fits.
    """
    others = [s for s in running if s.lease]
    promised = sum(max(0, s.length - s.lease.length) for s in others if s.lease)
    return not others or new_tokens + promised <= free_tokens


def next_prefill(running: Iterable[Sequence], now: float, prefill_s: Callable[[int, int], float]) -> Sequence | None:
    """The sequence that prefills in the next step; None if none can.

    `prefill_s(start, stop)` is the time in seconds that tokens [start, stop) take.
    """
    prefilling = [s for s in running if s.state is PREFILLING]
    if not prefilling:
        return None
    return most_urgent(prefilling, lambda s: now - s.submitted, lambda s: prefill_s(s.computed, s.length))


def plan_step(
    decoding: list[Sequence],
    prefill: Sequence | None,
    tokens_before_page: int,
    settings: EngineSettings,
) -> list[ScheduledSequence]:
    """Who runs in the next step, and what: one chunk of the sequence that prefills, then one token of all that decode.

    The chunk ends `tokens_before_page` tokens on, where a page begins that a tier brings; 0 if there is none before it.
    Draft tokens run in steps without a chunk.
    """
    if prefill is None:
        return [ScheduledSequence(s, 1, draft(s, settings.speculative_tokens)) for s in decoding]
    most = settings.max_mixed_prefill_tokens if decoding else settings.max_prefill_tokens
    count = min(prefill.pending, most, tokens_before_page or prefill.pending)
    return [ScheduledSequence(prefill, count), *(ScheduledSequence(s, 1) for s in decoding)]


def narrowed(
    plan: list[ScheduledSequence], runs_at_once: Callable[[list[ScheduledSequence]], bool], chunk_was_last: bool
) -> list[ScheduledSequence]:
    """A plan, or the part of it that has a compiled shape; `runs_at_once` says whether a plan has one.

    Drafts are left out first. A chunk and the sequences that decode take turns, so that neither waits for long. What
    cannot be narrowed waits for its shape.
    """
    if not plan or runs_at_once(plan):
        return plan
    if any(each.draft_tokens for each in plan):
        return [replace(each, draft_tokens=()) for each in plan]
    if plan[0].sequence.state is not PREFILLING or len(plan) == 1:
        return plan
    return plan[1:] if chunk_was_last else plan[:1]


def draft(sequence: Sequence, most: int) -> tuple[int, ...]:
    """Up to `most` draft tokens, which may come after the next token; none where a constraint has to be asked first."""
    if not most or sequence.request.constraint:
        return ()
    count = min(most, sequence.remaining_tokens - 1)
    return tuple(propose_draft(sequence.tokens[: sequence.length], count).tolist())
