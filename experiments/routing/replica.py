"""One simulated engine replica: who runs in a step as our scheduler decides it, and how long steps take.

Requests wait, are admitted by the engine's own order (`serve.engine.scheduler`), prefill in chunks that share their
steps with decoding sequences, and decode. Steps in which nobody comes or goes are one event: `Run`. Left out are
preemption (a request is admitted with the pages of its answer), drafts, and the reuse of answers by the next prompt,
whose pages count as new.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from experiments.routing.cache import Lease, PoolExhausted, ReplicaCache, known_depth
from experiments.routing.workload import Request
from serve.cost.model import Constants, CostModel
from serve.engine.scheduler import CHOSEN_FROM, most_urgent

# While others prefill or wait, a prompt's pages are published each time so many tokens were added.
SHARED_TOKENS = 4096


@dataclass(frozen=True)
class Engine:
    """What a replica is: the seconds that its work takes, and its sizes."""

    constants: Constants
    step_s: float  # the least that a step takes: every weight is read once
    decode_pair_s: float  # a decoded token, for each token before it
    num_pages: int
    page_size: int = 64  # tokens
    max_num_seqs: int = 16
    max_prefill_tokens: int = 1024
    max_mixed_prefill_tokens: int = 256
    keeps_states: bool = True  # without the states of recurrent layers, cached pages cannot be reused
    restore_s: float = 0.0  # a token that is read from the shared store; 0 without a store

    def slowed(self, factor: float) -> Engine:
        """The same on a machine that takes `factor` times as long for all but reading from the store."""
        c = self.constants
        slower = Constants(c.fixed * factor, c.linear * factor, c.attention * factor, c.match * factor, c.restore)
        step_s, decode_pair_s = self.step_s * factor, self.decode_pair_s * factor
        return replace(self, constants=slower, step_s=step_s, decode_pair_s=decode_pair_s)

    def steps_s(self, start: int, chunk: int, steps: int, decoding: int, context: int) -> float:
        """Seconds of `steps` steps, each with a chunk of a prefill that begins at `start`, and `decoding` sequences.

        `context` is the sum of the tokens before these sequences' next tokens.
        """
        c = self.constants
        each = max(self.step_s, c.linear * (chunk + decoding))
        stop = start + chunk * steps
        pairs = context * steps + decoding * steps * (steps - 1) // 2
        return each * steps + c.attention * (stop**2 - start**2) / 2 + self.decode_pair_s * pairs


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on a replica. Its replica is the only writer."""

    request: Request
    ticket: int  # names the request in the fleet
    submitted: float
    computed: int = 0  # tokens of its prompt
    reused: int = 0  # tokens, from the cache or the store
    restored: int = 0  # tokens of these, from the store
    ready_at: float = 0.0  # when its pages have come from the store
    left: int = 0  # tokens of its answer
    lease: Lease | None = None
    told: int = 0  # tokens of its prompt that others can find
    checked: int = -1  # the version of the cache that it was matched with

    @property
    def prefills(self) -> bool:
        """Whether its prompt is not computed yet."""
        return self.computed < self.request.tokens


@dataclass(frozen=True, slots=True)
class Run:
    """Equal steps in a row: a prefill's chunks, if there is one, and a token of each sequence that decodes."""

    began: float
    prefill: Sequence | None
    chunk: int
    steps: int
    decoding: tuple[Sequence, ...]
    context: int

    def ends(self, engine: Engine, steps: int | None = None) -> float:
        """When its steps, or the first `steps` of them, are done."""
        start = self.prefill.computed if self.prefill else 0
        count = self.steps if steps is None else steps
        return self.began + engine.steps_s(start, self.chunk, count, len(self.decoding), self.context)


@dataclass(frozen=True, slots=True)
class Happened:
    """What the end of a run brought."""

    prefilled: list[Sequence]  # their first token is there
    finished: list[Sequence]


@dataclass(eq=False)
class Replica:
    """A replica: its cache, its requests and its current run. `Fleet` tells it what happens, and when."""

    number: int
    engine: Engine
    cache: ReplicaCache
    store: set[int] | None = None  # the pages that the shared store holds
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    run: Run | None = None
    version: int = 0  # of the cache: how often something was published
    store_free_at: float = 0.0  # when the next read from the store can begin
    busy_s: float = 0.0

    def __post_init__(self) -> None:
        """Its costs are those of a sweep; what decodes beside a prefill is measured."""
        self.costs = CostModel(0.0, 0.0, constants=self.engine.constants)

    @property
    def pages_in_use(self) -> int:
        """Pages that running requests hold."""
        return sum(len(s.lease.pages) for s in self.running if s.lease)

    def submit(self, request: Request, ticket: int, now: float) -> None:
        """A request has come. What is cut short by it is the current run, after its current step."""
        self.waiting.append(Sequence(request, ticket, now))
        run = self.run
        if run and run.steps > 1 and len(self.running) < self.engine.max_num_seqs:
            low, high = 1, run.steps  # the first step that ends at or after now
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if run.ends(self.engine, middle) >= now else (middle + 1, high)
            self.run = Run(run.began, run.prefill, run.chunk, low, run.decoding, run.context)

    def finish_run(self, now: float) -> Happened:
        """End the current run: its tokens are computed."""
        run, prefilled, finished = self.run, [], []
        assert run is not None
        self.run = None
        self.busy_s += now - run.began
        if run.prefill:
            start = run.prefill.computed
            run.prefill.computed += run.chunk * run.steps
            if run.decoding:
                self.costs = self.costs.prefilled(start, run.prefill.computed, now - run.began, len(run.decoding))
            if not run.prefill.prefills:
                prefilled.append(run.prefill)
                run.prefill.left -= 1
            shared = len(self.running) - len(run.decoding) > 1 or self.waiting
            if not run.prefill.prefills or (shared and run.prefill.computed - run.prefill.told >= SHARED_TOKENS):
                self.publish(run.prefill)
        for sequence in run.decoding:
            sequence.left -= run.steps
        finished += [s for s in (*run.decoding, *prefilled) if s.left <= 0]
        if finished:
            gone = set(map(id, finished))
            self.running = [s for s in self.running if id(s) not in gone]
        for sequence in finished:
            self.release(sequence)
        return Happened(prefilled, finished)

    def publish(self, sequence: Sequence) -> None:
        """Let others find what a sequence has computed."""
        assert sequence.lease is not None
        full = min(sequence.computed // self.engine.page_size, len(sequence.request.pages))
        self.cache.insert(sequence.lease, sequence.request.pages[:full])
        sequence.told = sequence.computed
        self.version += 1
        sequence.checked = self.version

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's pages back."""
        if sequence.lease is not None:
            self.cache.release(sequence.lease)
            sequence.lease = None

    def next_run(self, now: float) -> Run | None:
        """Admit who fits, and begin the next run; None if there is nothing to run before something happens."""
        self.admit(now)
        decoding, prefilling, restoring = [], [], False
        for sequence in self.running:
            if sequence.computed >= sequence.request.tokens:
                decoding.append(sequence)
            elif sequence.ready_at <= now:
                prefilling.append(sequence)
            else:
                restoring = True
        if not decoding and not prefilling:
            return None
        prefill, chunk, steps = None, 0, min([s.left for s in decoding], default=1 << 30)
        if prefilling:
            alone = len(prefilling) == 1
            prefill = prefilling[0] if alone else most_urgent(prefilling, lambda s: now - s.submitted, self.left_s)
            self.refresh(prefill)
            most = self.engine.max_mixed_prefill_tokens if decoding else self.engine.max_prefill_tokens
            left = prefill.request.tokens - prefill.computed
            chunk = min(left, most)
            # Of several, who comes next is looked at again after as many tokens as the longest chunk has.
            steps = min(steps, left // chunk if alone else min(left, self.engine.max_prefill_tokens) // chunk)
        if restoring:  # look again soon after its pages have come
            steps = min(steps, 4)
        context = sum([s.request.tokens + s.request.output - s.left for s in decoding])
        self.run = Run(now, prefill, chunk, steps, tuple(decoding), context)
        return self.run

    def wakes_at(self) -> float | None:
        """When the next pages come from the store, if some are on their way."""
        return min((s.ready_at for s in self.running if s.prefills and s.lease), default=None)

    def left_s(self, sequence: Sequence) -> float:
        """Seconds of prefill that a sequence has left."""
        return self.engine.constants.compute_s(sequence.computed, sequence.request.tokens)

    def takes_s(self, sequence: Sequence) -> float:
        """Seconds that a waiting request's prompt and answer take."""
        request, page = sequence.request, self.engine.page_size
        if sequence.checked != self.version:
            sequence.reused = min(self.cache.peek(self.matchable(request)) * page, request.tokens - 1)
            sequence.checked = self.version
        prefill = self.engine.constants.compute_s(sequence.reused, request.tokens)
        return prefill + request.output * self.engine.step_s

    def matchable(self, request: Request) -> np.ndarray:
        """The pages of a prompt that may be reused, [pages] int32: its last token is always computed."""
        most = (request.tokens - 1) // self.engine.page_size
        return request.pages[: most if self.engine.keeps_states else 0]

    def admit(self, now: float) -> None:
        """Let waiting requests run, as long as there is a place and there are pages."""
        while self.waiting and len(self.running) < self.engine.max_num_seqs:
            longest = islice(self.waiting, CHOSEN_FROM)
            chosen = most_urgent(longest, lambda s: now - s.submitted, self.takes_s)
            if not self.start(chosen, now):
                return
            self.waiting.remove(chosen)
            self.running.append(chosen)

    def start(self, sequence: Sequence, now: float) -> bool:
        """Match a request and take its pages; False if there are too few."""
        request, page = sequence.request, self.engine.page_size
        lease = self.cache.match(self.matchable(request))
        try:
            sequence.lease, _ = self.cache.extend(lease, -(-(request.tokens + request.output) // page))
        except PoolExhausted:
            self.cache.release(lease)
            return False
        sequence.computed = sequence.reused = lease.reused * page
        sequence.left, sequence.checked, sequence.ready_at = request.output, self.version, now
        if self.store is not None and self.engine.restore_s:
            self.restore(sequence, now)
        return True

    def restore(self, sequence: Sequence, now: float) -> None:
        """Read what the store has beyond the cache, where that is sooner than computing it."""
        request, page, engine = sequence.request, self.engine.page_size, self.engine
        assert self.store is not None
        found = known_depth(self.matchable(request), self.store) * page
        count = found - sequence.computed
        began = max(now, self.store_free_at)
        if count > 0 and began - now + engine.restore_s * count < engine.constants.compute_s(sequence.computed, found):
            sequence.ready_at = self.store_free_at = began + engine.restore_s * count
            sequence.computed = sequence.reused = found
            sequence.restored = count

    def refresh(self, sequence: Sequence) -> None:
        """Use what another request has computed of the same prompt meanwhile."""
        if sequence.checked == self.version:
            return
        sequence.checked, page = self.version, self.engine.page_size
        if self.cache.peek(self.matchable(sequence.request)) * page <= sequence.computed:
            return
        assert sequence.lease is not None
        length = sequence.lease.length
        lease = self.cache.match(self.matchable(sequence.request))
        self.cache.release(sequence.lease)
        sequence.lease, _ = self.cache.extend(lease, length)
        sequence.reused += lease.reused * page - sequence.computed
        sequence.computed = lease.reused * page

    def requests(self) -> list[Sequence]:
        """All that it runs and that wait."""
        return [*self.running, *self.waiting]
