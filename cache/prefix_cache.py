"""PrefixCache: match, extend, insert, release; how the engine finds and keeps prefixes on the device.

Not thread-safe: only the engine's thread calls it, except `stats`, which any thread may read; its figures may then be
from different moments. It returns which device page to copy where and never touches the device.

A request calls match(prompt[:-1]), extend(lease, len(prompt)), insert after every chunk whose KV is computed, extend as
it decodes, insert at the end, release. The rule: **only the lease that allocated a page writes it**, and never what it
has inserted already; all others only read. A pool needs one page more than its longest sequence, because a page copy
holds its source and its target at the same time.

Reuse by a radix tree is SGLang's RadixAttention (Zheng et al., 2023, https://arxiv.org/abs/2312.07104).
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cache.agents import Agents
from cache.eviction import Rule, State, agent_aware, demotion_s
from cache.keys import PageChain
from cache.nodes import NO_PAGES, Agent, Dropped, Use
from cache.pool import PagePool, pages_for
from cache.preloaded import PreloadedPages
from cache.radix_tree import RadixTree

MOST_DEMOTED = 1024


@dataclass(frozen=True, eq=False)
class Lease:
    """Pages that a running request holds. Every extend makes a new lease and ends the one it was given."""

    number: int  # which request's lease this is; the same after extend
    pages: np.ndarray  # [pages] int32, the block table, in order of position; do not change it
    length: int  # tokens it has room for: the match at first, whole pages after extend
    reused: int  # tokens whose KV was found, from the first token on
    salt: bytes
    head: int = 0  # tokens from the first on that leases of all salts share
    use: Use | None = None


@dataclass(frozen=True)
class PageCopy:
    """Copy device page `source` to device page `target`, over all layers."""

    source: int
    target: int


@dataclass(frozen=True)
class PrefixCacheStats:
    """Pages now (total = free + cached + in use), and how many were evicted since the start."""

    pages_total: int
    pages_free: int
    pages_cached: int  # held by the tree alone, or preloaded: what eviction may free
    pages_in_use: int  # held by a live lease, whether cached or not
    pages_evicted: int


class PrefixCache:
    """The prefix cache over `num_pages` device pages of `page_size` tokens each.

    `fingerprint` names the model and its weights in the keys of pages. `rule` says what is evicted first, by the
    seconds of `clock`; `page_cost` is how many seconds the page takes that ends at a position. Preloaded pages with a
    key in `kept` stay.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        fingerprint: bytes = b"",
        rule: Rule = agent_aware,
        clock: Callable[[], float] = time.monotonic,
        page_cost: Callable[[int], float] = lambda position: 0.0,
        kept: Container[bytes] = (),
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, expected at least 1 token: pass the pool's page size")
        self.page_size = page_size
        self.fingerprint = fingerprint
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(self.pool, page_size, rule, clock, page_cost)
        self.agents = Agents()
        self.demoted: deque[Use] = deque(maxlen=MOST_DEMOTED)  # for whoever demotes them on other tiers, too
        self.preloaded = PreloadedPages(self.pool, kept)
        self.live: dict[int, Lease] = {}
        self.numbers = itertools.count()

    def match(self, tokens: np.ndarray, salt: bytes = b"", head: int = 0, use: Use | None = None) -> Lease:
        """A lease on the longest cached prefix of `tokens` ([tokens] int32) under `salt`, token by token.

        All salts share the first `head` tokens, which are whole pages, here and in the methods below. The last page
        may be matched only in part. Match one token less than the prompt: its last token has to run through the model
        for the first logits. `use` is one of `begin`, the same for all leases of a request.
        """
        tokens = np.asarray(tokens, np.int32)
        use = use or self.begin(tokens, salt, head)
        pages, reused = self.tree.match(tokens, salt, head, use)
        self.pool.retain(pages)
        use.leases += 1
        self._set(use, State.RUNNING)
        return self._enter(Lease(next(self.numbers), pages, reused, reused, salt, head, use))

    def begin(
        self, tokens: np.ndarray, salt: bytes = b"", head: int = 0, agent: Agent | None = None, priority: int = 0
    ) -> Use:
        """A new request's use of pages. Without an `agent` it is that of the conversation that `tokens` extend.

        A head that all salts share is nobody's conversation.
        """
        last, matched, extended = self.tree.last_use(np.asarray(tokens, np.int32), salt, head)
        agent = agent or Agent()
        if last and extended and matched > head and not agent.id and not last.agent.id:
            agent = last.agent
        now = self.tree.now()
        use = Use(agent, priority, now, tokens=len(tokens))
        if last and last.agent is agent and last.state is State.ENDED:
            agent.branches = True
        if agent.uses and use.supersedes(agent.uses[-1], matched):
            self._set(agent.uses[-1], State.ENDED)
        agent.begins(use, now)
        return use

    def answered(self, use: Use, state: State) -> None:
        """Note how a request's answer ended, and so what its agent does now."""
        use.used = self.tree.now()
        self._set(use, state)

    def end(self, agent: Agent) -> None:
        """An agent will ask for nothing more: what only it has used is evicted first."""
        for use in agent.uses:
            if use.state is not State.RUNNING:
                self._set(use, State.ENDED)

    def hold(self, tokens: np.ndarray, salt: bytes = b"", head: int = 0) -> Lease:
        """A lease as of `match` that is no use of what it holds: to keep it, not to go on from it."""
        pages, reused = self.tree.find(np.asarray(tokens, np.int32), salt, head)
        self.pool.retain(pages)
        return self._enter(Lease(next(self.numbers), pages, reused, reused, salt, head))

    def peek(self, tokens: np.ndarray, salt: bytes = b"", head: int = 0) -> int:
        """How many of `tokens` ([tokens] int32) `match` would find; takes no lease and does not count as a use."""
        return self.tree.length(np.asarray(tokens, np.int32), salt, head)

    def find(self, tokens: np.ndarray, salt: bytes = b"", head: int = 0) -> tuple[np.ndarray, int]:
        """The pages ([pages] int32) that hold the longest cached prefix of `tokens`, and its length.

        Takes no lease and does not count as a use: valid until the next call that changes the cache.
        """
        return self.tree.find(np.asarray(tokens, np.int32), salt, head)

    def drop(self, tokens: np.ndarray, start: int, salt: bytes = b"", head: int = 0) -> list[Dropped]:
        """Forget position `start` and later of all sequences that begin with `tokens[: start + 1]`.

        `start` is a multiple of the page size. Returns those sequences, whole; from within a head, those of all salts.
        A live lease keeps its pages and would publish them again: call it only while no such lease is live.
        """
        return self.tree.drop(np.asarray(tokens, np.int32), start, salt, head)

    def extend(self, lease: Lease, length: int) -> tuple[Lease, list[PageCopy]]:
        """Make room for `length` tokens in total, evicting cached pages as needed.

        Returns the lease that replaces this one, and the page copies, which the caller enqueues on the device before
        anything else. Raises PoolExhausted if too little can be evicted; then the given lease is still valid.
        """
        self._assert_live(lease)
        if length <= lease.length:
            return lease, []
        # Only a match may end inside a page. Another lease may write that page, so this one continues in a copy.
        kept, partial = np.split(lease.pages, [lease.length // self.page_size])
        needed = pages_for(length, self.page_size) - len(kept)
        short = needed - self.pool.free_pages
        # A request that cannot be served even then must not empty the cache.
        if 0 < short <= self._evictable():
            self.tree.evict(short - self.preloaded.evict(short))
        fresh = self.pool.allocate(needed)
        copies = [PageCopy(int(source), int(target)) for source, target in zip(partial, fresh, strict=False)]
        # The device runs in the order of enqueueing, so the copy reads its source before any later owner can write it.
        self.pool.release(partial)
        pages = np.concatenate([kept, fresh])
        return self._enter(replace(lease, pages=pages, length=len(pages) * self.page_size)), copies

    def adopt(self, lease: Lease, first: int, keys: Sequence[bytes]) -> tuple[Lease, list[str]]:
        """Make preloaded pages the lease's own, from its page `first` on, in the place of those that it has there.

        `keys` are the keys of the lease's tokens, all of them preloaded, and none of the pages replaced is published by
        this lease. Returns the lease that replaces this one, and the tier that each page came from.
        """
        self._assert_live(lease)
        assert first <= len(lease.pages), "pages are adopted in the order of position"
        pages, tiers = self.preloaded.take(keys)
        before, replaced, after = np.split(lease.pages, [first, first + len(pages)])
        self.pool.release(replaced)
        table = np.concatenate([before, pages, after])
        return self._enter(replace(lease, pages=table, length=len(table) * self.page_size)), tiers

    def insert(self, lease: Lease, tokens: np.ndarray) -> None:
        """Publish `tokens` ([tokens] int32), the whole sequence so far, with its KV computed or enqueued in
        lease.pages.

        Call it each time the sequence has grown. Raises ValueError for more tokens than the lease has room for.
        """
        self._assert_live(lease)
        tokens = np.asarray(tokens, np.int32)
        if len(tokens) > lease.length:
            raise ValueError(f"{len(tokens)} tokens inserted, the lease has room for {lease.length}: extend it first")
        pages = lease.pages[: pages_for(len(tokens), self.page_size)]
        self.tree.insert(tokens, pages, lease.salt, lease.head, lease.use)

    def release(self, lease: Lease) -> None:
        """End the lease. Pages that were inserted stay cached until they are evicted; the others become free."""
        self._assert_live(lease)
        del self.live[lease.number]
        self.pool.release(lease.pages)
        if (use := lease.use) is not None:
            use.leases -= 1
            if not use.leases and use.state is State.RUNNING:
                use.used = self.tree.now()
                self._set(use, State.UNKNOWN)

    def keys(self, tokens: np.ndarray, salt: bytes = b"", head: int = 0) -> list[bytes]:
        """Content keys of the full pages of `tokens` ([tokens] int32), 32 bytes each."""
        return PageChain(self.fingerprint, self.page_size, salt, head).keys(tokens)

    def stats(self) -> PrefixCacheStats:
        """Page counts now, and how many were evicted since the start."""
        cached = self._evictable()
        return PrefixCacheStats(
            pages_total=self.pool.num_pages,
            pages_free=self.pool.free_pages,
            pages_cached=cached,
            pages_in_use=self.pool.num_pages - self.pool.free_pages - cached,
            pages_evicted=self.tree.evicted_pages,
        )

    def check(self) -> None:
        """Assert all invariants of pool, tree, preloaded pages and leases; slow, for tests."""
        self.pool.check()
        self.tree.check()
        held = [node.pages for node in self.tree.nodes()] + [lease.pages for lease in self.live.values()]
        held.append(self.preloaded.pages)
        counts = np.bincount(np.concatenate([NO_PAGES, *held]), minlength=self.pool.num_pages)  # [pages] int64
        assert np.array_equal(counts, self.pool.ref_counts), "reference counts differ from what is held"
        assert (counts[self.preloaded.pages] == 1).all(), "a preloaded page has another holder"

    def _set(self, use: Use, state: State) -> None:
        use.state = state
        self.tree.rank_again(use)
        if demotion_s(state):
            self.demoted.append(use)

    def _evictable(self) -> int:
        """Pages that only the tree holds, or that were preloaded and may go."""
        return self.tree.idle_pages() + self.preloaded.evictable

    def _enter(self, lease: Lease) -> Lease:
        assert len(lease.pages) == pages_for(lease.length, self.page_size)
        self.live[lease.number] = lease
        return lease

    def _assert_live(self, lease: Lease) -> None:
        assert self.live.get(lease.number) is lease, (
            f"lease {lease.number} was released or extended before: go on with the lease that extend() returned"
        )
