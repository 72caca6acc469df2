"""One audit: a window of a reused prefix is computed again, and compared with what was cached.

The window is recomputed chunk by chunk into the auditor's own pages, of which the prefix cache knows nothing. Each page
is compared with the cached one; where the device has lost it, with what the tiers hold under its key.
Then the logits after the cached pages and after the recomputed ones are compared, and the recorded first token with the
latter where nothing else was left to compare.

The cached pages before the window are taken as they are: they are as likely to be audited as the window.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from cache.keys import PageChain, tail_key
from cache.pool import pages_for
from serve.audit.comparison import COMPARED, PageComparison
from serve.audit.findings import Mismatch, ReusedPrefix
from serve.engine.buckets import GREEDY, SequenceInput
from serve.engine.engine import Engine

# Yields after a step of the device, or a future that is to be done before it goes on.
Audit = Generator[Future[Any] | None, None, Mismatch | None]


@dataclass(frozen=True)
class Workspace:
    """What an auditor computes in, and how."""

    pages: np.ndarray  # [pages] int32, of the pool
    spare: int  # one more page, for a copy
    chunk: int  # tokens that are computed at once
    comparison: PageComparison
    computed: Callable[[int], None]  # called with the number of tokens of each chunk


@dataclass
class WindowAudit:
    """An audit of the tokens of `record` from `start` on, as many as the workspace has pages for."""

    engine: Engine
    work: Workspace
    record: ReusedPrefix
    start: int  # a multiple of the page size
    window: int  # tokens
    lost: set[int] = field(default_factory=set)  # pages of which the device has lost some tokens

    @property
    def prefix(self) -> np.ndarray:
        """The reused tokens, [tokens] int32."""
        return self.record.tokens[: self.record.reused]

    @property
    def stop(self) -> int:
        """The end of the window."""
        return min(self.record.reused, self.start + self.window)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.work.comparison.page_size

    def run(self) -> Audit:
        """The whole audit; returns the first mismatch."""
        if wrong := self.misnamed():
            return wrong
        # These stay as they are: the audit is dropped when a request comes between.
        before = self.cached()[0][: self.start // self.page_size]
        if wrong := (yield from self.compare_with_device(before)):
            return wrong
        if wrong := (yield from self.compare_with_tiers()):
            return wrong
        if self.stop < self.record.reused:
            return None
        logits = self.compute(self.stop, self.stop + 1, before)
        if wrong := (yield from self.compare_logits(logits)):
            return wrong
        return (yield from self.check_first_token(logits, before))

    def cached(self) -> tuple[np.ndarray, int]:
        """The pages ([pages] int32) that hold the longest cached part of the prefix now, and its length."""
        return self.engine.core.memory.prefix_cache.find(self.prefix, self.record.salt, self.record.head)

    def compute(self, start: int, stop: int, before: np.ndarray) -> np.ndarray:
        """Run tokens [start, stop) in the own pages, after cached ones ([pages] int32): logits [vocab] float32."""
        table = np.concatenate([before, self.work.pages])[: pages_for(stop, self.page_size)].astype(np.int32)
        row = SequenceInput(self.record.tokens[start:stop], start, table, GREEDY)
        return self.engine.core.runner.compute(row)

    def misnamed(self) -> Mismatch | None:
        """Whether the pages were found under the name of another salt, or of other tokens."""
        record = self.record
        right = self.engine.core.memory.prefix_cache.keys(self.prefix, record.salt, record.head)
        wrong = [i for i, (a, b) in enumerate(zip(record.keys, right, strict=False)) if a != b]
        if record.leased == record.salt and not wrong:
            return None
        position = wrong[0] * self.page_size if wrong else 0
        return Mismatch("name", "device", position, position)

    def compare_with_device(self, before: np.ndarray) -> Audit:
        """Recompute the window, and compare each chunk with the cached pages; notes which of them are lost."""
        at = self.start
        while at < self.stop:
            end = min(at + self.work.chunk, self.stop)
            self.compute(at, end, before)
            self.work.computed(end - at)
            cached, held = self.cached()
            if wrong := self.device_difference(cached, range(at, min(end, held))):
                return wrong
            if held < end:
                self.lost.update(range(max(held, at) // self.page_size, pages_for(end, self.page_size)))
            at = end
            yield None
        return None

    def device_difference(self, cached: np.ndarray, tokens: range) -> Mismatch | None:
        """Compare some tokens of the cached pages ([pages] int32) with those of the own ones."""
        if not tokens:
            return None  # the device has lost what was recomputed here
        end = pages_for(tokens.stop, self.page_size)
        for first in range(tokens.start // self.page_size, end, COMPARED):
            indices = range(first, min(first + COMPARED, end))
            theirs = self.work.comparison.copies(self.engine.core.memory.pool, [int(cached[i]) for i in indices])
            wrong = self.work.comparison.first_difference("device", indices, self.own(indices), theirs, tokens)
            if wrong:
                return self.blamed(wrong)
        return None

    def compare_with_tiers(self) -> Audit:
        """Compare what the tiers hold of the pages that the device has lost."""
        tiers = self.engine.core.tiers
        if not self.lost or tiers is None:
            return None
        keys = self.stored_keys()
        for step in range(0, len(keys), COMPARED):
            some = keys[step : step + COMPARED]
            reading = tiers.pages.copies([key for _, key in some])
            yield reading
            for tier, payloads in reading.result().items():
                found, stored = self.work.comparison.decode(payloads)
                indices, tokens = [some[i][0] for i in found], range(self.start, self.stop)
                if not indices:
                    continue
                wrong = self.work.comparison.first_difference(tier, indices, self.own(indices), stored, tokens)
                if wrong:
                    return self.blamed(wrong)
        return None

    def stored_keys(self) -> list[tuple[int, bytes]]:
        """Index and key of each page that the device has lost, the last one perhaps partly filled."""
        chain = PageChain(self.engine.fingerprint, self.page_size, self.record.salt, self.record.head)
        keys = chain.keys(self.prefix)
        if rest := len(self.prefix) % self.page_size:
            keys.append(tail_key(chain.parent(keys, len(keys)), self.prefix[-rest:]))
        return [(index, keys[index]) for index in sorted(self.lost)]

    def own(self, indices: range | list[int]) -> jax.Array:
        """Copies of the recomputed pages of these indices."""
        first = self.start // self.page_size
        pages = [int(self.work.pages[i - first]) for i in indices]
        return self.work.comparison.copies(self.engine.core.memory.pool, pages)

    def blamed(self, wrong: Mismatch) -> Mismatch:
        """The mismatch, where one of the cached pages before the window may be the wrong one."""
        return replace(wrong, drop=0) if self.start else wrong

    def compare_logits(self, logits: np.ndarray) -> Audit:
        """Compare logits after the recomputed pages ([vocab] float32) with those after the cached ones."""
        stop, (cached, held) = self.stop, self.cached()
        if held == stop:
            yield None
            cached, held = self.cached()
        if held < stop:
            return None
        full = stop // self.page_size
        if stop % self.page_size:
            self.engine.core.memory.copy_page(int(cached[full]), self.work.spare)
        table = np.append(cached[:full], self.work.spare).astype(np.int32)
        row = SequenceInput(self.record.tokens[stop : stop + 1], stop, table, GREEDY)
        found = self.engine.core.runner.compute(row)
        error, scale = float(np.abs(found - logits).max()), float(np.abs(logits).max())
        if self.work.comparison.too_large(error, scale):
            return Mismatch("logits", "device", stop, 0, error=error, scale=scale)
        return None

    def check_first_token(self, logits: np.ndarray, before: np.ndarray) -> Audit:
        """Compare the recorded first token with the logits of the recomputed prompt.

        Only where the whole prompt fits into the window, and where the pages are lost, or the rest is one chunk.
        `logits` ([vocab] float32) are those after the token at the end of the window.
        """
        record, chunk = self.record, self.work.chunk
        length, rest = len(record.tokens), len(record.tokens) - self.stop
        if record.first is None or length > self.start + self.window or not (self.lost or rest <= chunk):
            return None
        at = self.stop if rest > 1 else length
        while at < length:
            end = min(at + chunk, length)
            logits = self.compute(at, end, before)
            at = end
            yield None
        error, scale = float(logits.max() - logits[record.first]), float(np.abs(logits).max())
        if self.work.comparison.too_large(error, scale):
            drop = min(self.lost, default=0) * self.page_size
            return Mismatch("token", "device", length, drop, error=error, scale=scale)
        return None
