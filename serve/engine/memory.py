"""The device's pages: the pool that holds keys and values, and the prefix cache that says who holds which page.

Both live and end together: where a step that failed took the pool along, nothing that was published is left either.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import jax
import numpy as np

from cache.nodes import Use
from cache.pool import PoolExhausted
from cache.prefix_cache import Lease, PrefixCache
from model.kv import KVPool
from serve.engine.inbox import Answered
from serve.engine.sequence import Sequence

log = logging.getLogger("tokenzero.engine")

MOST_UNANSWERED = 4096


class Memory:
    """Leases for sequences: match, extend, publish, give back.

    `pool` is donated to every step and every copy into it; the caller of one stores the returned pool here.
    """

    def __init__(
        self,
        pool: KVPool,
        new_pool: Callable[[], KVPool],
        copy: Callable[[KVPool, np.ndarray, np.ndarray], KVPool],  # as `Steps.copy`
        new_cache: Callable[[], PrefixCache],
    ) -> None:
        self.pool, self.new_pool, self.copy, self.new_cache = pool, new_pool, copy, new_cache
        self.prefix_cache = new_cache()
        self.unanswered: OrderedDict[str, Use] = OrderedDict()  # by request, until it is known how its answer ended

    @property
    def free_tokens(self) -> int:
        """Tokens for which there are pages that no lease holds, evictable ones included."""
        stats = self.prefix_cache.stats()
        return (stats.pages_free + stats.pages_cached) * self.prefix_cache.page_size

    def cached_tokens(self, sequence: Sequence) -> int:
        """How many tokens of a sequence are cached, from token zero on; this is not a use of them."""
        return self.prefix_cache.peek(sequence.matchable_tokens, sequence.request.salt, sequence.request.head)

    def match(self, sequence: Sequence) -> Lease:
        """A lease of the longest cached prefix of a sequence."""
        request, tokens = sequence.request, sequence.matchable_tokens
        if sequence.use is None:
            cache, agent = self.prefix_cache, None
            if request.agent:
                agent = cache.agents.named(request.salt, request.agent, request.session, request.parent)
            sequence.use = cache.begin(tokens, request.salt, request.head, agent, request.priority)
            if request.id:
                self.unanswered[request.id] = sequence.use
                if len(self.unanswered) > MOST_UNANSWERED:
                    self.unanswered.popitem(last=False)
        return self.prefix_cache.match(tokens, request.salt, request.head, sequence.use)

    def note(self, answer: Answered) -> None:
        """Take note of how an answer ended: what its agent does now decides what is evicted."""
        if (use := self.unanswered.pop(answer.id, None)) is None:
            return
        self.prefix_cache.answered(use, answer.state)
        if answer.ended_session:
            for agent in self.prefix_cache.agents.of_session(use.agent.salt, answer.ended_session):
                self.prefix_cache.end(agent)

    def refresh_match(self, sequence: Sequence) -> None:
        """Use what another request has computed of the same prompt since this sequence was matched last."""
        lease = self.match(sequence)
        shorter = sequence.refresh(lease) if lease.reused > sequence.computed else lease
        self.prefix_cache.release(shorter)

    def make_room(self, sequence: Sequence, length: int, reclaim: Callable[[], object]) -> bool:
        """Extend a sequence's lease to `length` tokens; while the pool is full, call `reclaim`, which frees some pages.

        False if `reclaim` took the sequence's own pages, or ended it.
        """
        while sequence.lease is not None:
            try:
                lease, copies = self.prefix_cache.extend(sequence.lease, length)
            except PoolExhausted:
                reclaim()
                continue
            sequence.hold(lease)
            for copy in copies:
                self.copy_page(copy.source, copy.target)
            return True
        return False

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of the pool to another, over all layers."""
        self.pool = self.copy(self.pool, np.asarray([source], np.int32), np.asarray([target], np.int32))

    def publish(self, sequence: Sequence) -> None:
        """Let other requests reuse what this one has computed so far."""
        assert sequence.lease is not None
        assert sequence.computed <= sequence.length, "nothing is published after the last known token"
        self.prefix_cache.insert(sequence.lease, sequence.tokens[: sequence.computed])

    def publish_last(self, sequence: Sequence) -> None:
        """Publish what a sequence that gives its pages back has computed itself."""
        assert sequence.lease is not None
        sequence.forget_unknown()
        # A lease that only matched has nothing of its own to publish.
        if sequence.computed > sequence.lease.reused:
            self.publish(sequence)

    def release(self, lease: Lease) -> None:
        """End a lease. Its published pages stay cached until they are evicted."""
        self.prefix_cache.release(lease)

    def replace_if_lost(self) -> bool:
        """Start from an empty pool and an empty cache if the pool did not outlive the last step. Whether it was done.

        Where there is no memory for one now, steps go on failing, and after the next one it is tried again.
        """
        if usable(self.pool):
            return False
        for lost in jax.tree.leaves(self.pool):
            lost.delete()  # before the new pool is made: the device may have no room for two
        try:
            self.pool = self.new_pool()
        except Exception:
            log.exception("no new KV pool can be made now: requests fail until one can")
            return False
        journal, self.prefix_cache = self.prefix_cache.tree.journal, self.new_cache()
        if journal is not None:
            self.prefix_cache.tree.journal = journal
            journal.cleared()
        return True


def usable(pool: KVPool) -> bool:
    """Whether the pool outlived the last step: neither donated and lost, nor the result of a step that failed."""
    try:
        jax.block_until_ready(pool)
    except RuntimeError:
        return False
    return True
