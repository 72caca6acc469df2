"""The auditor: in the engine's idle moments it recomputes a sample of what requests reused, and compares.

A request that reused a prefix leaves a record: its tokens, and its first token where that was greedy. Once nothing has
run or waited for a moment, and the budget of device time allows it, the prefix of one record is computed again
(serve.audit.window), one chunk at a time, so that a request waits for one chunk at most.

A prefix longer than the auditor's pages is audited in part: a window of it, at a random place. Nothing is assumed about
who computed a page: what the prefix cache lists for some tokens has to equal what the model computes of them.

After a difference of more than TOLERANCE, the pages from that place on leave the prefix cache and the tiers, and the
sequence is written to a file (serve.audit.case).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.keys import PageChain
from cache.pool import pages_for
from model.kv import KVPool
from serve.audit.case import Case, write_case
from serve.audit.comparison import TOLERANCE, make_comparison
from serve.audit.findings import Mismatch, Records, ReusedPrefix
from serve.audit.window import Audit, WindowAudit, Workspace
from serve.engine.engine import Engine
from serve.engine.programs import Programs
from serve.engine.sequence import Sequence
from serve.limits.bounds import DEFAULT_BOUNDS

log = logging.getLogger("tokenzero.audit")

# Of the device pool's pages, one in so many is the auditor's, but no more than it needs.
SHARE_OF_PAGES = 64
MIN_PAGES = 4
# After an error of its own, the auditor rests.
REST_SECONDS = 600.0
# A tier may take so long for the pages of one step.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class AuditSettings:
    """What the auditor may use."""

    share: float = 0.01  # of the device seconds that requests took
    folder: Path | None = None  # for the sequences that were wrong; None writes none
    quiet_s: float = 0.2  # since anything ran or waited
    max_tokens: int = 8192  # of one prefix
    sample_bytes: int = DEFAULT_BOUNDS.audits  # of records


def audit_pages(pages: int, page_size: int, settings: AuditSettings) -> int:
    """How many of a pool's pages the auditor takes; 0 where it is off, or the pool is too small for it."""
    most = settings.max_tokens // page_size + 2
    found = min(pages // SHARE_OF_PAGES, most)
    return found if settings.share > 0 and found >= MIN_PAGES else 0


def attach(engine: Engine, settings: AuditSettings) -> None:
    """Give an engine that is not started yet an auditor, if it has pages for one."""
    sizes = engine.settings
    if sizes.audit_pages:
        pool, chunk = engine.core.memory.pool, sizes.max_mixed_prefill_tokens
        engine.idle_work = Auditor(settings, engine.core.programs, pool, sizes.audit_pages, sizes.page_dtype, chunk)


def auditor_of(engine: Engine) -> Auditor | None:
    """The engine's auditor, or None where nothing is audited."""
    return engine.idle_work if isinstance(engine.idle_work, Auditor) else None


class Auditor:
    """Audits for one engine, on the engine's thread, as its idle work."""

    def __init__(
        self,
        settings: AuditSettings,
        programs: Programs,
        pool: KVPool,
        own: int,
        dtype: str,
        chunk: int,
        seed: int = 0,
    ) -> None:
        """`own`: the pool's last so many pages are the auditor's; `chunk`: tokens that it computes at once."""
        assert own >= 2, "the auditor needs a page to compute in and one for a copy"
        self.settings = settings
        *pages, spare = range(pool.num_pages - own, pool.num_pages)
        comparison = make_comparison(programs, pool, TOLERANCE[dtype])
        self.work = Workspace(np.asarray(pages, np.int32), spare, chunk, comparison, self._computed)
        # One token more runs after the prefix, for its logits.
        self.window = min(settings.max_tokens, len(pages) * pool.page_size - 1)
        self.page_size = pool.page_size
        self.random = random.Random(seed)
        self.records = Records(settings.sample_bytes, self.random)
        self.audit: Audit | None = None  # the one under way
        self.audited: WindowAudit | None = None  # what it looks at
        self.waits: Future[Any] | None = None  # what it waits for
        self.waits_since = 0.0  # seconds, `time.perf_counter`, like all times here
        self.quiet_since: float | None = None
        self.submitted = 0  # requests that the engine had been given at the last look
        self.prefix_cache: object = None  # the one that the audit under way began with
        self.rests_until = 0.0
        self.latest: Mismatch | None = None  # what the audit before found
        self.writing: threading.Thread | None = None  # writes the latest wrong sequence to a file
        self.requests = 0
        self.tokens = 0
        self.mismatches = 0
        self.failures = 0
        self.seconds = 0.0

    @property
    def start(self) -> int:
        """Where the window of the audit under way begins; 0 without one."""
        return self.audited.start if self.audited else 0

    # As `IdleWork`, see serve.engine.engine.

    def on_first_token(self, sequence: Sequence, token: int) -> None:
        """Remember a request that has its first token now, if it reused anything."""
        try:
            if record := self.record(sequence, token):
                self.records.add(record)
        except Exception:
            self.failed(None)

    def record(self, sequence: Sequence, token: int) -> ReusedPrefix | None:
        """The record of a request whose first token is `token`; None if it is not to be audited."""
        request, lease, reused = sequence.request, sequence.lease, sequence.reused_until
        if not reused or lease is None or self.settings.share <= 0:
            return None
        greedy = request.sampling.temperature == 0 and request.constraint is None
        return ReusedPrefix(
            sequence.tokens[: sequence.length].copy(),
            reused,
            request.salt,
            lease.salt,
            tuple(sequence.keys[: reused // self.page_size]),
            token if greedy else None,
            request.head,
        )

    def sleep_s(self, engine: Engine) -> float | None:
        """Seconds that an engine without requests may sleep before there is something to audit; None for no limit."""
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

    def step(self, engine: Engine) -> None:
        """Do one step of an audit, unless a request is in the engine, or was a moment ago. Never raises."""
        begun = time.perf_counter()
        try:
            if self.due(engine, begun):
                self.go_on(engine)
                self.seconds += time.perf_counter() - begun
        except Exception:
            self.seconds += time.perf_counter() - begun
            self.failed(engine)

    # When.

    def affordable(self, engine: Engine) -> bool:
        """Whether there are records, and the budget allows to audit the longest one."""
        if not self.records:
            return False
        longest = max(record.reused for record in self.records)
        cost = engine.cost.prefill_s(max(0, longest - self.window), longest)
        return self.seconds + cost <= self.settings.share * engine.core.runner.device_s

    def due(self, engine: Engine, now: float) -> bool:
        """Whether there is something to audit, and nothing else to do; drops an audit that cannot go on."""
        quiet, prefix_cache = engine.core.quiet, engine.core.memory.prefix_cache
        disturbed = not quiet or engine.submitted != self.submitted
        self.submitted = engine.submitted
        if prefix_cache is not self.prefix_cache or (disturbed and self.start):
            # The pool is a new one, or the cached pages before the window may be others by now.
            self.drop_audit()
            self.prefix_cache = prefix_cache
        if not quiet:
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
        """After an error of the auditor's own: rest, and see that the engine can go on."""
        log.exception("an audit failed: the next one begins in %d s at the earliest", REST_SECONDS)
        self.failures += 1
        self.rests_until = time.perf_counter() + REST_SECONDS
        self.audit, self.audited, self.waits = None, None, None
        self.records.clear()
        if engine:
            engine.core.check_pool()

    # What.

    def go_on(self, engine: Engine) -> None:
        """Begin an audit, or do the next step of the one under way, and report what it found."""
        if self.audit is None:
            self.audited = self.choose(engine)
            self.audit = self.audited.run()
        assert self.audited is not None
        try:
            self.waits = next(self.audit)
            if self.waits is not None:
                self.waits_since = time.perf_counter()
                self.waits.add_done_callback(lambda _: engine.inbox.wake())
            return
        except StopIteration as end:
            mismatch: Mismatch | None = end.value
        record = self.audited.record
        self.drop_audit()
        self.requests += 1
        self.latest = mismatch
        if mismatch is not None:
            self.mismatches += 1
            self.report(engine, record, mismatch)

    def drop_audit(self) -> None:
        """End the audit under way."""
        if self.audit is not None:
            self.audit.close()
        self.audit, self.audited, self.waits = None, None, None

    def choose(self, engine: Engine) -> WindowAudit:
        """A random record, and a random window of its prefix, as long as there are pages for."""
        record = self.records.take_random()
        pages_left = pages_for(max(0, record.reused - self.window), self.page_size)
        start = self.random.randint(0, pages_left) * self.page_size
        held = engine.core.memory.prefix_cache.find(record.tokens[: record.reused], record.salt, record.head)[1]
        return WindowAudit(engine, self.work, record, start if start <= held else 0, self.window)

    def _computed(self, tokens: int) -> None:
        self.tokens += tokens

    def report(self, engine: Engine, record: ReusedPrefix, wrong: Mismatch) -> None:
        """Drop what is wrong from prefix cache and tiers, write the sequence to a file, and log it once."""
        if engine.core.preloader:
            engine.core.preloader.forget()  # nobody knows of which tokens those pages are
        for salt in {record.salt, record.leased}:
            gone = engine.core.memory.prefix_cache.drop(record.tokens, wrong.drop, salt, record.head)
            if engine.core.tiers:
                named = {(salt, record.head): [record.tokens]}  # within a head, sequences of all salts are gone
                for each in gone:
                    named.setdefault((each.salt, each.head), []).append(each.tokens)
                for (of, head), sequences in named.items():
                    chain = PageChain(engine.fingerprint, self.page_size, of, head)
                    forgotten = engine.core.tiers.forget(chain, sequences, wrong.drop)
                    forgotten.add_done_callback(log_failed_deletion)
        engine.core.retainer.retentions.forget_unlisted()
        # In a thread of its own: the folder's disk may be the one that hangs.
        what = (self.settings.folder, Case.of(engine, record, wrong), wrong)
        self.writing = threading.Thread(target=write_and_log, args=what, name="audit-case", daemon=True)
        self.writing.start()


def write_and_log(folder: Path | None, case: Case, wrong: Mismatch) -> None:
    """Write a wrong sequence to a file, and log it."""
    try:
        path = write_case(folder, case)
    except Exception:
        log.exception("the sequence that an audit found wrong cannot be written to a file")
        path = None
    log.error(
        "an audit found a cached page that is not what the model computes: %s. What was cached from token %d on is "
        "dropped; the sequence of %d tokens is in %s",
        wrong,
        wrong.drop,
        len(case.tokens),
        path or "no file",
    )


def log_failed_deletion(forgotten: Future[int]) -> None:
    """Log what went wrong on the thread that was to delete pages."""
    problem = "the server stops" if forgotten.cancelled() else forgotten.exception()
    if problem:
        log.error("pages that an audit found wrong are still in a tier: %s", problem)
