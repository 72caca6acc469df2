"""What a request will find in the cache, and how long its first token will take: told as it arrives.

`Forecaster.arrival` is the engine as a request finds it, and all that follows from it is a pure function of that, and
of what the tiers have. The order of prefills is the scheduler's, and their steps take what `serve.cost.steps` has
learned. What comes later is not foreseen: requests that overtake, answers that end.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache

from cache.radix_tree import common_prefix
from cache.tiers import StoredPage
from serve.cost.model import CostModel, Rate
from serve.cost.steps import Step, StepCosts
from serve.engine.core import EngineCore
from serve.engine.request import Forecast
from serve.engine.restore import attempted, has_failed
from serve.engine.scheduler import most_urgent
from serve.engine.sequence import DECODING
from serve.engine.sequence import Sequence as RunningSequence

log = logging.getLogger("tokenzero.forecast")

DEVICE = "device"
MOST_STEPS = 256  # that are foreseen one by one; of more work, several steps at a time
MOST_CHOICES = 1024  # among requests, over all steps: the engine waits meanwhile
MOST_OTHERS = 64  # before a request of which anything is foreseen
# A request that has waited longer says nothing about a tier's speed: its pages were read meanwhile.
QUEUED_SECONDS = 0.005


@dataclass(frozen=True, eq=False)
class Prefill:
    """Tokens [start, stop) of a prompt that are to be computed, and the seconds since the request came."""

    start: int
    stop: int
    waited_s: float = 0.0


@dataclass(frozen=True)
class Timetable:
    """How an engine goes about its steps, and what they take."""

    costs: StepCosts
    prefill_s: Callable[[int, int], float]  # by which the scheduler ranks prefills
    shape: Callable[[int, int], int]  # tokens of the compiled shape for a chunk, and so many sequences that decode
    most: int  # tokens of a chunk
    most_mixed: int  # while others decode

    def seconds(self, prefill: Prefill, contexts: Sequence[int], steps: int = 1) -> tuple[float, int]:
        """Seconds of the next `steps` steps of a prefill, and where it is then; `contexts` are of those that decode."""
        most = self.most_mixed if contexts else self.most
        stop = min(prefill.stop, prefill.start + steps * most)
        count = -(-(stop - prefill.start) // most)
        chunk = -(-(stop - prefill.start) // count)
        middle = (prefill.start + stop - chunk) // 2
        step = Step(self.shape(chunk, len(contexts)), middle, sum(contexts))
        return count * self.costs.seconds(step), stop

    def alone(self, prefill: Prefill, contexts: Sequence[int] = ()) -> float:
        """Seconds of all steps of a prefill that nothing overtakes."""
        return self.first_token(prefill, (), contexts)[1]

    def first_token(self, own: Prefill, others: Sequence[Prefill], contexts: Sequence[int]) -> tuple[float, float]:
        """Seconds for the steps of others that come before the end of `own`, and for its own."""
        left, decoding = [*others, own], list(contexts)
        spent = {True: 0.0, False: 0.0}
        steps = max(1, min(MOST_STEPS, MOST_CHOICES // len(left)))
        at_once = 1 + sum(each.stop - each.start for each in left) // (self.most * steps)
        while True:
            now = sum(spent.values())
            chosen = self.next(left, now) if len(left) > 1 else left[0]
            seconds, stop = self.seconds(chosen, decoding, at_once)
            spent[chosen is own] += seconds
            left.remove(chosen)
            if stop < chosen.stop:
                going_on = replace(chosen, start=stop)
                own = going_on if chosen is own else own
                left.append(going_on)
            elif chosen is own:
                return spent[False], spent[True]
            else:
                decoding.append(stop)

    def next(self, left: Sequence[Prefill], now: float) -> Prefill:
        """Whose turn it is after `now` seconds."""
        return most_urgent(left, lambda p: p.waited_s + now, lambda p: self.prefill_s(p.start, p.stop))


@dataclass(frozen=True, eq=False)
class Arrival:
    """The engine as a request finds it."""

    tokens: int  # of its prompt
    cached: Mapping[str, int]  # of these, on the device: computed, or being computed for another; or preloaded
    others: tuple[Prefill, ...]  # before it
    sibling_s: float  # until another has computed what both share
    contexts: tuple[int, ...]  # tokens of the sequences that decode
    place_s: float  # until there is a place for it
    timetable: Timetable
    reads: CostModel
    brought: Mapping[str, Rate]  # bytes a second from a tier to the device, as requests have waited for them
    page_size: int
    page_bytes: int

    def forecast(self, pages: Iterable[StoredPage] = ()) -> Forecast:
        """What is expected, where the tiers have these pages of the prompt."""
        cached, at = Counter(self.cached), sum(self.cached.values())
        size: Counter[str] = Counter()
        for page in pages:
            start = page.index * self.page_size
            stop = min(start + page.tokens, self.tokens - 1)
            if stop > at and self.reads.worth_restoring(page.tier, start, stop, self.page_bytes):
                cached[page.tier] += stop - max(at, start)
                size[page.tier] += self.page_bytes
                at = stop
        read = min(cached.total(), self.tokens - 1)
        wait_s, prefill_s = self.timetable.first_token(Prefill(read, self.tokens), self.others, self.contexts)
        restore_s = sum(self.read_s(tier, count) for tier, count in size.items())
        found = {DEVICE: cached.pop(DEVICE, 0)} | {name: count for name, count in cached.items() if count}
        return Forecast(self.tokens, found, wait_s + self.sibling_s + self.place_s, restore_s, prefill_s)

    def read_s(self, tier: str, size: int) -> float:
        """Seconds until `size` bytes of a tier are on the device."""
        measured = self.brought.get(tier, Rate()).per_second
        return size / measured if measured else self.reads.read_s(tier, size)


class Forecaster:
    """Tells what requests will find in one engine, and learns from what they found. The engine's thread calls it."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.brought: dict[str, Rate] = {}  # by tier

    def arrived(self, sequence: RunningSequence) -> None:
        """Note what a new request finds, which is not in the queue yet; no fault here is the request's."""
        try:
            arrival = self.arrival(sequence)
            sequence.arrive(arrival.forecast if arrival else None)
        except Exception:
            log.exception("request %d: nothing is foreseen of it", sequence.number)

    def arrival(self, sequence: RunningSequence) -> Arrival | None:
        """The engine as this request finds it, which is not a use of what is cached.

        None until a prefill was measured, and where more than MOST_OTHERS are to be computed before it.
        """
        core = self.core
        model, settings = core.costs.model, core.settings
        if (costs := core.runner.tracker.costs(model.known)) is None:
            return None
        timetable = Timetable(
            costs, model.prefill_s, self.shape(), settings.max_prefill_tokens, settings.max_mixed_prefill_tokens
        )
        before, now = [*core.running, *core.waiting], time.perf_counter()
        contexts = tuple(each.length for each in before if each.state is DECODING)
        if len(before) - len(contexts) > MOST_OTHERS:
            return None
        others = {
            each: Prefill(self.computed(each), each.length, now - each.submitted)
            for each in before
            if each.state is not DECODING
        }
        cached, sibling_s = self.cached(sequence), 0.0
        held = sum(cached.values())
        if found := self.sibling(sequence, others, held):
            sibling, shared = found
            work = replace(others[sibling], stop=shared)
            sibling_s = timetable.alone(work, contexts)
            others[sibling] = replace(work, start=shared, stop=sibling.length)
            cached[DEVICE] += shared - held
        over = len(before) + 1 - settings.max_num_seqs
        return Arrival(
            tokens=sequence.length,
            cached=cached,
            others=tuple(others.values()),
            sibling_s=sibling_s,
            contexts=contexts,
            place_s=max(0, over) * core.answer_s / settings.max_num_seqs,
            timetable=timetable,
            reads=model,
            brought=dict(self.brought),
            page_size=settings.page_size,
            page_bytes=core.restorer.page_bytes if core.restorer else 0,
        )

    def shape(self) -> Callable[[int, int], int]:
        """The tokens of the compiled shape that a chunk takes beside so many sequences that decode."""
        runner, most = self.core.runner, self.core.settings.max_num_seqs - 1

        @cache
        def tokens(count: int, decoding: int) -> int:
            return runner.choose([count, *[1] * min(decoding, most)]).tokens

        return tokens

    def cached(self, sequence: RunningSequence) -> Counter[str]:
        """How many of a new request's tokens are on the device: in the cache, or preloaded from a tier."""
        core = self.core
        cached = Counter({DEVICE: core.memory.cached_tokens(sequence)})
        preloaded, size = core.memory.prefix_cache.preloaded, core.settings.page_size
        if core.restorer and len(preloaded):
            first, full = cached[DEVICE] // size, len(sequence.matchable_tokens) // size
            core.restorer.names.extend(sequence, full)
            for index, key in enumerate(preloaded.run(sequence.keys[first:full]), first):
                cached[preloaded.by_key[key][1]] += (index + 1) * size - max(cached.total(), index * size)
        return cached

    def computed(self, sequence: RunningSequence) -> int:
        """The tokens that a sequence which waits or prefills does not have to compute."""
        return sequence.computed if sequence.lease else self.core.memory.cached_tokens(sequence)

    @staticmethod
    def sibling(
        sequence: RunningSequence, others: Collection[RunningSequence], held: int
    ) -> tuple[RunningSequence, int] | None:
        """Of others, the one that computes most of what a request shares with it, and how much that is; None if none.

        It is more than the `held` tokens that are there already.
        """
        shared = [
            (common_prefix(sequence.matchable_tokens, other.tokens[: other.length]), other)
            for other in others
            if (other.request.salt, other.request.head) == (sequence.request.salt, sequence.request.head)
        ]
        most, other = max(shared, key=lambda each: each[0], default=(0, sequence))
        return (other, most) if most > held else None

    def answered(self, sequence: RunningSequence) -> None:
        """Learn from a request that has its first token how fast its pages came."""
        restored = sequence.restored
        if not restored or sequence.restoring_s <= 0 or sequence.started - sequence.submitted > QUEUED_SECONDS:
            return
        assert self.core.restorer is not None
        tier, _ = restored.most_common(1)[0]
        size = restored.total() * self.core.restorer.page_bytes / self.core.settings.page_size
        self.brought[tier] = self.brought.get(tier, Rate()).observed(size, sequence.restoring_s)


def asked(
    forecaster: Forecaster, sequence: RunningSequence, ask: Callable[[Callable[[], None]], None]
) -> Future[Forecast | None]:
    """What a sequence would find that is not submitted; `ask` has a question answered on the engine's thread.

    The tiers are searched on their own thread. Neither is a use of a page. Raises what `ask` raises.
    """
    restorer, result = forecaster.core.restorer, Future[Forecast | None]()
    full = len(sequence.matchable_tokens) // sequence.page_size
    if restorer:
        restorer.names.extend(sequence, full)

    def settle(looking: Future[list[StoredPage]] | None) -> None:
        if looking and not has_failed(looking):
            sequence.note_stored(looking.result())
        result.set_result(sequence.forecast)

    def answer() -> None:
        if not result.set_running_or_notify_cancel():
            return
        forecaster.arrived(sequence)
        if restorer is None or (found := sequence.forecast) is None:
            settle(None)
            return
        first = sum(found.cached.values()) // sequence.page_size
        names, tiers, tokens = restorer.names, restorer.tiers, sequence.matchable_tokens
        keys, parents = sequence.keys[:full], names.parents(sequence, full)
        attempted(lambda: tiers.find(parents, keys, tokens, first, sequence.page_size)).add_done_callback(settle)

    ask(answer)
    return result
