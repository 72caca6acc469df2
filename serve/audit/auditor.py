"""The auditor: in the engine's idle moments it recomputes a sample of what requests reused, and compares.

A request that reused a prefix leaves a record: its tokens, and its first token where that was greedy. Once nothing has
run or waited for a moment, and the budget of device time allows, the prefix of one record is computed again into pages
that the prefix store knows nothing of, one chunk at a time, so that a request waits for one chunk at most. Each page is
compared with the cached one; where the device has it no longer, with what the tiers hold under its key. Then the logits
of the next token, behind the cached pages and behind the recomputed ones, are compared, and the recorded token with the
latter where something else could not be.

A prefix longer than the auditor's pages is audited in part: a window of it, at a random place, behind the cached pages
before it. A page that is right behind those that were used is right if they are, and they are audited as often.

What differs by more than TOLERANCE is wrong: the pages of that place and all behind it leave tree and tiers, and the
sequence is written to a file (serve.audit.case). The other way round nothing is assumed: whatever the tree lists under
some tokens by now, and whoever computed it, has to equal what the model computes of them.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cache.keys import page_keys, root_key, tail_key
from cache.pool import pages_for
from cache.tier import Payload
from model.kv import KVPool, gather_pages
from serve.audit.case import Case, keep
from serve.audit.findings import Mismatch, Reuse
from serve.engine.engine import Engine
from serve.engine.sequence import Sequence as Running
from serve.engine.steps import GREEDY, SequenceInput
from serve.limits.bounds import DEFAULT_BOUNDS

log = logging.getLogger("tokenzero.audit")

# The largest difference, as a share of the largest value beside it: in a page's keys or values of one layer, or in the
# logits. In float32 it is the project's bound on exactness; in bfloat16, whose steps are 2^-8 of a value, what chunks
# of different lengths make of one prompt stays below a quarter of this (two layers, on a CPU).
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
# Pages that are compared at once, and read from the tiers at once.
COMPARED = 4
# Of the device pool's pages, one in so many is the auditor's, but no more than it needs.
SHARE_OF_PAGES = 64
LEAST_PAGES = 4
# After an error of its own, the auditor rests.
REST_SECONDS = 600.0
# A tier may take so long for the pages of one step.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class AuditSettings:
    """What the auditor may use."""

    share: float = 0.01  # of the device seconds that requests took
    folder: Path | None = None  # for the sequences that were wrong; None keeps none
    quiet_s: float = 0.2  # since anything ran or waited
    max_tokens: int = 8192  # of one prefix
    sample_bytes: int = DEFAULT_BOUNDS.audits  # of records


def audit_pages(pages: int, page_size: int, settings: AuditSettings) -> int:
    """How many of a pool's pages the auditor takes; 0 where it is off, or the pool too small for it."""
    most = settings.max_tokens // page_size + 2
    found = min(pages // SHARE_OF_PAGES, most)
    return found if settings.share > 0 and found >= LEAST_PAGES else 0


Audit = Generator[Future[Any] | None, None, Mismatch | None]


@dataclass(frozen=True)
class Comparison:
    """Compiled: `gather(pool, pages)` copies COMPARED pages, `measure(ours, theirs)` is `distances` of such copies."""

    gather: Callable[..., jax.Array]
    measure: Callable[..., jax.Array]
    shape: tuple[int, ...]  # COMPARED, k and v, layers, kv_heads, page_size, head_dim
    dtype: np.dtype


def distances(
    ours: jax.Array,  # [pages, k and v, layers, kv_heads, page_size, head_dim]
    theirs: jax.Array,  # the same
) -> tuple[jax.Array, jax.Array]:
    """Each token's largest difference, and its largest value in `ours`: [pages, k and v, layers, page_size] float32."""
    a, b = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    return jnp.abs(a - b).max((3, 5)), jnp.abs(a).max((3, 5))


def compile_comparison(pool: KVPool) -> Comparison:
    """Compile what compares pages of a pool of this shape."""
    layers, _, *tile = pool.k.shape
    shape = (COMPARED, 2, layers, *tile)
    pages, data = jax.ShapeDtypeStruct((COMPARED,), jnp.int32), jax.ShapeDtypeStruct(shape, pool.k.dtype)
    gather = jax.jit(gather_pages).lower(pool, pages).compile()
    measure = jax.jit(distances).lower(data, data).compile()
    return Comparison(gather, measure, shape, np.dtype(pool.k.dtype))


def attach(engine: Engine, settings: AuditSettings) -> None:
    """Give an engine that is not started yet an auditor, if it has pages for one."""
    sizes = engine.settings
    if sizes.audit_pages:
        engine.idle_work = Auditor(
            settings, engine.pool, sizes.audit_pages, sizes.dtype, sizes.max_mixed_prefill_tokens
        )


def auditor_of(engine: Engine) -> Auditor | None:
    """The engine's auditor, or None where nothing is audited."""
    return engine.idle_work if isinstance(engine.idle_work, Auditor) else None


class Auditor:
    """Audits for one engine, on the engine's thread."""

    def __init__(self, settings: AuditSettings, pool: KVPool, own: int, dtype: str, chunk: int, seed: int = 0) -> None:
        """`own`: the pool's last so many pages are the auditor's; `chunk`: tokens that it computes at once."""
        assert own >= 2, "the auditor needs a page to compute in and one for a copy"
        self.settings, self.chunk, self.bound = settings, chunk, TOLERANCE[dtype]
        *pages, self.spare = range(pool.num_pages - own, pool.num_pages)
        self.pages = np.asarray(pages, np.int32)
        # One token more runs behind the prefix, for its logits.
        self.window = min(settings.max_tokens, len(pages) * pool.page_size - 1)
        self.page_size = pool.page_size
        self.compare = compile_comparison(pool)
        self.records: deque[Reuse] = deque()
        self.record_bytes = 0
        self.random = random.Random(seed)
        self.audit: Audit | None = None
        self.auditing: Reuse | None = None
        self.start = 0  # of the window under way
        self.waits: Future[Any] | None = None  # what the audit under way waits for
        self.waits_since = 0.0  # by `time.perf_counter`
        self.quiet_since: float | None = None
        self.submitted = 0  # requests that the engine had been given when it was last looked at
        self.store: object = None  # the store that the audit under way began with
        self.rests_until = 0.0
        self.latest: Mismatch | None = None  # what the audit before found
        self.keeping: threading.Thread | None = None  # writes what the latest wrong sequence was
        self.requests = 0
        self.tokens = 0
        self.mismatches = 0
        self.failures = 0
        self.seconds = 0.0

    def reused(self, sequence: Running, first: int) -> None:
        """Remember a request that has its first token now, if it reused anything."""
        try:
            self.remember(sequence, first)
        except Exception:
            self.failed(None)

    def remember(self, sequence: Running, first: int) -> None:
        """See `reused`."""
        request, lease, reused = sequence.request, sequence.lease, sequence.taken_over
        if not reused or lease is None or self.settings.share <= 0:
            return
        known = request.sampling.temperature == 0 and request.constraint is None
        reuse = Reuse(
            sequence.tokens[: sequence.length].copy(),
            reused,
            request.salt,
            lease.salt,
            tuple(sequence.keys[: reused // self.page_size]),
            first if known else None,
        )
        self.records.append(reuse)
        self.record_bytes += reuse.size
        while self.record_bytes > self.settings.sample_bytes:
            self.record_bytes -= self.records.popleft().size

    def nap(self, engine: Engine) -> float | None:
        """Seconds that an engine without requests may sleep before there is something to audit; None for ever."""
        now = time.perf_counter()
        try:
            if self.waits is not None and not self.waits.done():
                return None  # it wakes the engine
            if now < self.rests_until or not (self.audit or self.affordable(engine)):
                return None
        except Exception:
            self.failed(None)
            return None
        return max(0.0, self.quiet_since + self.settings.quiet_s - now) if self.quiet_since is not None else 0.0

    def affordable(self, engine: Engine) -> bool:
        """Whether there are records, and the budget allows to audit the longest one."""
        if not self.records:
            return False
        longest = max(reuse.reused for reuse in self.records)
        cost = engine.cost.prefill_s(max(0, longest - self.window), longest)
        return self.seconds + cost <= self.settings.share * engine.device_s

    def turn(self, engine: Engine) -> None:
        """Do one step of an audit, unless a request is in the engine, or was a moment ago. Never raises."""
        begun = time.perf_counter()
        try:
            if self.due(engine, begun):
                self.go_on(engine)
                self.seconds += time.perf_counter() - begun
        except Exception:
            self.seconds += time.perf_counter() - begun
            self.failed(engine)

    def due(self, engine: Engine, now: float) -> bool:
        """Whether there is something to audit, and nothing else to do."""
        disturbed = not engine.quiet or engine.numbers != self.submitted
        self.submitted = engine.numbers
        if engine.store is not self.store or (disturbed and self.start):
            # The pool is a new one, or the cached pages in front of the window may be others by now.
            self.drop_audit()
            self.store = engine.store
        if not engine.quiet:
            self.quiet_since = None
            return False
        if disturbed or self.quiet_since is None:
            self.quiet_since = now
        if now < max(self.quiet_since + self.settings.quiet_s, self.rests_until):
            return False
        if self.waits is not None and not self.waits.done():
            if now - self.waits_since > PATIENCE_SECONDS:
                self.drop_audit()  # a tier hangs
            return False
        return self.audit is not None or self.affordable(engine)

    def failed(self, engine: Engine | None) -> None:
        """After an error of the auditor's own: rest, and see that the engine goes on."""
        log.exception("an audit failed: the next one begins in %d s at the earliest", REST_SECONDS)
        self.failures += 1
        self.rests_until = time.perf_counter() + REST_SECONDS
        self.audit, self.auditing, self.waits, self.start = None, None, None, 0
        self.records.clear()
        self.record_bytes = 0
        if engine:
            engine.check_pool()

    def go_on(self, engine: Engine) -> None:
        """Begin an audit, or do the next step of the one under way, and see to what it found."""
        if self.audit is None:
            self.audit = self.begin(engine)
        assert self.auditing is not None
        try:
            self.waits = next(self.audit)
            if self.waits is not None:
                self.waits_since = time.perf_counter()
                self.waits.add_done_callback(lambda _: engine.inbox.wake())
            return
        except StopIteration as end:
            mismatch: Mismatch | None = end.value
        reuse = self.auditing
        self.drop_audit()
        self.requests += 1
        self.latest = mismatch
        if mismatch is not None:
            self.mismatches += 1
            self.report(engine, reuse, mismatch)

    def drop_audit(self) -> None:
        """End the audit under way."""
        if self.audit is not None:
            self.audit.close()
        self.audit, self.auditing, self.waits, self.start = None, None, None, 0

    def begin(self, engine: Engine) -> Audit:
        """Take a record by chance, and of its prefix as much as there are pages for."""
        at = self.random.randrange(len(self.records))
        reuse = self.auditing = self.records[at]
        del self.records[at]
        self.record_bytes -= reuse.size
        more = pages_for(max(0, reuse.reused - self.window), self.page_size)
        start = self.random.randint(0, more) * self.page_size
        held = engine.store.find(reuse.tokens[: reuse.reused], reuse.salt)[1]
        self.start = start if start <= held else 0
        return self.steps(engine, reuse, self.start)

    def steps(self, engine: Engine, reuse: Reuse, start: int) -> Audit:
        """Audit the window of a reused prefix from `start` on.

        A generator with a step of the device between two yields, or a future that is to be done before it goes on.
        """
        if misnamed := self.misnamed(engine, reuse):
            return misnamed
        tokens, prefix = reuse.tokens, reuse.tokens[: reuse.reused]
        stop = min(reuse.reused, start + self.window)
        unseen: set[int] = set()  # pages of which the device has lost something
        at, cached, held = start, *engine.store.find(prefix, reuse.salt)
        while at < stop:
            front = cached[: start // self.page_size]  # it stays as it is while the audit is not dropped
            count = min(self.chunk, stop - at)
            self.compute(engine, tokens, at, at + count, front)
            self.tokens += count
            cached, held = engine.store.find(prefix, reuse.salt)
            if wrong := self.differs_from_device(engine, cached, start, at, min(at + count, held)):
                return wrong
            if held < at + count:
                unseen.update(range(max(held, at) // self.page_size, pages_for(at + count, self.page_size)))
            at += count
            yield None
        if unseen and engine.pager:
            root = root_key(engine.fingerprint, self.page_size, reuse.salt)
            keys = self.stored_keys(root, prefix, unseen)
            for step in range(0, len(keys), COMPARED):
                some = keys[step : step + COMPARED]
                reading = engine.pager.tiers.pages.copies([key for _, key in some])
                yield reading
                for tier, payloads in reading.result().items():
                    if wrong := self.differs_from_tier(engine, tier, some, payloads, start, stop):
                        return wrong
        if stop < reuse.reused:
            return None
        cached, held = engine.store.find(prefix, reuse.salt)
        front = cached[: start // self.page_size]
        logits = self.compute(engine, tokens, stop, stop + 1, front)
        if held == stop:
            yield None
            cached, held = engine.store.find(prefix, reuse.salt)
        if held == stop:
            full = stop // self.page_size
            if stop % self.page_size:
                engine.copy_page(int(cached[full]), self.spare)
            behind = np.append(cached[:full], self.spare).astype(np.int32)
            found = engine.compute(SequenceInput(tokens[stop : stop + 1], stop, behind, GREEDY))
            error, scale = float(np.abs(found - logits).max()), float(np.abs(logits).max())
            if self.beyond(error, scale):
                return Mismatch("logits", "device", stop, 0, error=error, scale=scale)
        rest = len(tokens) - stop
        if reuse.first is None or len(tokens) > start + self.window or not (unseen or rest <= self.chunk):
            return None
        at = stop
        while at < len(tokens) and (rest > 1 or at > stop):
            count = min(self.chunk, len(tokens) - at)
            logits = self.compute(engine, tokens, at, at + count, front)
            at += count
            yield None
        error, scale = float(logits.max() - logits[reuse.first]), float(np.abs(logits).max())
        if self.beyond(error, scale):
            first = min(unseen, default=0) * self.page_size
            return Mismatch("token", "device", len(tokens), first, error=error, scale=scale)
        return None

    def beyond(self, error: float, scale: float) -> bool:
        """Whether a difference of logits is too large; what is not finite by itself says nothing."""
        return math.isfinite(scale) and not error <= self.bound * scale

    def compute(self, engine: Engine, tokens: np.ndarray, at: int, stop: int, front: np.ndarray) -> np.ndarray:
        """Run tokens [at, stop) in the own pages, behind cached ones ([pages] int32): logits [vocab] float32."""
        table = np.concatenate([front, self.pages])[: pages_for(stop, self.page_size)].astype(np.int32)
        return engine.compute(SequenceInput(tokens[at:stop], at, table, GREEDY))

    def misnamed(self, engine: Engine, reuse: Reuse) -> Mismatch | None:
        """Whether a request's pages were found under another salt's name, or under names of other tokens."""
        right = tuple(engine.store.keys(reuse.tokens[: reuse.reused], reuse.salt))
        wrong = [i for i, (a, b) in enumerate(zip(reuse.keys, right, strict=False)) if a != b]
        if reuse.leased == reuse.salt and not wrong:
            return None
        position = wrong[0] * self.page_size if wrong else 0
        return Mismatch("name", "device", position, position)

    def differs_from_device(
        self, engine: Engine, cached: np.ndarray, start: int, low: int, high: int
    ) -> Mismatch | None:
        """Compare the tokens [low, high) of the cached pages ([slots] int32) with those of the own ones."""
        size = self.page_size
        if high <= low:  # the device has lost what was computed here
            return None
        for first in range(low // size, pages_for(high, size), COMPARED):
            indices = range(first, min(first + COMPARED, pages_for(high, size)))
            ours = self.gather(engine.pool, [int(self.pages[i - start // size]) for i in indices])
            theirs = self.gather(engine.pool, [int(cached[i]) for i in indices])
            if wrong := self.differs("device", indices, ours, theirs, start, low, high):
                return wrong
        return None

    def differs_from_tier(
        self,
        engine: Engine,
        tier: str,
        some: Sequence[tuple[int, bytes]],  # index and key of each page
        payloads: Sequence[Payload | None],
        start: int,
        stop: int,
    ) -> Mismatch | None:
        """Compare pages that a tier holds with the own ones."""
        one, dtype = self.compare.shape[1:], self.compare.dtype
        size = math.prod(one) * dtype.itemsize
        there = [
            (index, np.frombuffer(data, dtype).reshape(one))
            for (index, _), data in zip(some, payloads, strict=True)
            if data is not None and memoryview(data).nbytes == size
        ]
        if not there:
            return None
        indices = [index for index, _ in there]
        ours = self.gather(engine.pool, [int(self.pages[i - start // self.page_size]) for i in indices])
        stored = np.zeros(self.compare.shape, self.compare.dtype)
        stored[: len(there)] = [array for _, array in there]
        return self.differs(tier, indices, ours, jnp.asarray(stored), start, start, stop)

    def gather(self, pool: KVPool, pages: Sequence[int]) -> jax.Array:
        """Copies of up to COMPARED pages, as many of the last one as there are fewer."""
        padded = [*pages, *[pages[-1]] * (COMPARED - len(pages))]
        return self.compare.gather(pool, np.asarray(padded, np.int32))

    def differs(
        self,
        source: str,
        indices: Sequence[int],  # of the pages in their sequence
        ours: jax.Array,  # [COMPARED, k and v, layers, kv_heads, page_size, head_dim]
        theirs: jax.Array,  # the same
        start: int,
        low: int,
        high: int,
    ) -> Mismatch | None:
        """The first page whose tokens within [low, high) are not as they should be."""
        errors, sizes = (np.asarray(each) for each in self.compare.measure(ours, theirs))
        for index, error, size in zip(indices, errors, sizes, strict=False):  # [k and v, layers, page_size]
            first = index * self.page_size
            filled = slice(max(0, low - first), min(self.page_size, high - first))
            scale = size[..., filled].max(-1, keepdims=True)
            wrong = ~(error[..., filled] <= self.bound * scale) & np.isfinite(scale)
            if wrong.any():
                slot, layer, part = np.argwhere(wrong.transpose(2, 1, 0))[0]
                position = first + filled.start + int(slot)
                return Mismatch(
                    "page",
                    source,
                    position,
                    # Behind cached pages that are not audited here, it may be one of these that is wrong.
                    0 if start else position // self.page_size * self.page_size,
                    int(layer),
                    ("keys", "values")[part],
                    float(error[part, layer, filled][slot]),
                    float(scale[part, layer, 0]),
                )
        return None

    def stored_keys(self, root: bytes, prefix: np.ndarray, pages: set[int]) -> list[tuple[int, bytes]]:
        """Index and key of each of these pages of a prefix, the last one of which may be partly filled."""
        keys = page_keys(root, prefix, self.page_size)
        if rest := len(prefix) % self.page_size:
            keys.append(tail_key(keys[-1] if keys else root, prefix[-rest:]))
        return [(index, keys[index]) for index in sorted(pages)]

    def report(self, engine: Engine, reuse: Reuse, wrong: Mismatch) -> None:
        """Drop what is wrong from tree and tiers, keep the sequence in a file, and say so once."""
        for salt in {reuse.salt, reuse.leased}:
            gone = engine.store.drop(reuse.tokens, wrong.drop, salt)
            if engine.pager:
                root = root_key(engine.fingerprint, self.page_size, salt)
                forgotten = engine.pager.tiers.forget(root, [reuse.tokens, *gone], wrong.drop, self.page_size)
                forgotten.add_done_callback(complain)
        # In a thread of its own: the folder's disk may be the one that hangs.
        told = (self.settings.folder, Case.of(engine, reuse, wrong), wrong)
        self.keeping = threading.Thread(target=keep_and_tell, args=told, name="audit-case", daemon=True)
        self.keeping.start()


def keep_and_tell(folder: Path | None, case: Case, wrong: Mismatch) -> None:
    """Write a wrong sequence to a file, and say so in the log."""
    try:
        kept = keep(folder, case)
    except Exception:
        log.exception("the sequence that an audit found wrong cannot be kept")
        kept = None
    log.error(
        "an audit found a cached page that is not what the model computes: %s. What was cached from token %d on is "
        "dropped; the sequence of %d tokens is in %s",
        wrong,
        wrong.drop,
        len(case.tokens),
        kept or "no file",
    )


def complain(forgotten: Future[int]) -> None:
    """Log what went wrong on the thread that was to delete pages."""
    problem = "the server stops" if forgotten.cancelled() else forgotten.exception()
    if problem:
        log.error("pages that an audit found wrong are still in a tier: %s", problem)
