"""The prefix cache: leases, page copies and eviction, and a state machine over a simulated device pool."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.keys import page_keys, root_key
from cache.pool import PoolExhausted, pages_for
from cache.prefix_cache import Lease, PageCopy, PrefixCache


def ids(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], np.int32)


def serve(cache: PrefixCache, text: str, salt: bytes = b"") -> int:
    """Run one whole request; returns the tokens it reused."""
    lease = cache.match(ids(text[:-1]), salt)
    lease, _ = cache.extend(lease, len(text))
    cache.insert(lease, ids(text))
    cache.release(lease)
    cache.check()
    return lease.reused


def test_the_second_request_reuses_all_but_the_token_that_it_must_compute() -> None:
    cache = PrefixCache(16, 4)
    assert serve(cache, "abcdefghij") == 0
    assert serve(cache, "abcdefghij") == 9
    assert serve(cache, "abcdefgXij") == 7


def test_a_partly_matched_page_is_copied_and_its_source_let_go() -> None:
    cache = PrefixCache(16, 4)
    serve(cache, "abcdefgh")
    lease = cache.match(ids("abcdefXY"))
    source = lease.pages[1]
    extended, copies = cache.extend(lease, 9)
    assert copies == [PageCopy(source, extended.pages[1])]
    assert extended.pages[0] == lease.pages[0]
    assert (extended.length, extended.reused) == (12, 6)
    assert cache.pool.ref_counts[source] == 1
    cache.check()


def test_a_match_on_a_page_boundary_needs_no_copy() -> None:
    cache = PrefixCache(16, 4)
    serve(cache, "abcdefgh")
    assert cache.extend(cache.match(ids("abcdefgh")), 9)[1] == []


def test_extending_within_the_lease_changes_nothing() -> None:
    cache = PrefixCache(16, 4)
    lease, _ = cache.extend(cache.match(ids("abc")), 5)
    assert cache.extend(lease, 8) == (lease, [])
    assert cache.extend(lease, 9)[0] is not lease


def test_a_growing_sequence_is_published_while_its_last_page_is_still_being_filled() -> None:
    cache = PrefixCache(16, 4)
    lease, _ = cache.extend(cache.match(ids("")), 8)
    for end in range(1, 9):
        cache.insert(lease, ids("abcdefgh"[:end]))
        reader = cache.match(ids("abcdefgh"))
        assert reader.reused == end
        cache.release(reader)
        cache.check()


def test_a_reader_may_continue_a_page_that_its_owner_continues_differently() -> None:
    cache = PrefixCache(16, 4)
    owner, _ = cache.extend(cache.match(ids("")), 8)
    cache.insert(owner, ids("abcde"))
    reader, copies = cache.extend(cache.match(ids("abcdeX")), 8)
    assert len(copies) == 1
    cache.insert(reader, ids("abcdeXY"))
    cache.insert(owner, ids("abcdefgh"))
    cache.check()
    assert cache.match(ids("abcdeXY")).pages.tolist() == reader.pages.tolist()
    assert cache.match(ids("abcdefgh")).pages.tolist() == owner.pages.tolist()


def test_salts_are_isolated() -> None:
    cache = PrefixCache(16, 4)
    serve(cache, "abcdefgh", b"one")
    assert serve(cache, "abcdefgh", b"two") == 0
    assert serve(cache, "abcdefgh", b"two") == 7


def test_exhaustion_leaves_the_lease_valid_and_the_cache_in_place() -> None:
    cache = PrefixCache(4, 4)
    serve(cache, "abcdefgh")
    lease = cache.match(ids("abcdef"))
    with pytest.raises(PoolExhausted, match="needed"):
        cache.extend(lease, 17)
    cache.check()
    assert cache.stats().pages_evicted == 0
    cache.insert(lease, ids("abcdef"))
    cache.release(lease)
    assert cache.match(ids("abcdefgh")).reused == 8


def test_eviction_makes_room_but_never_takes_a_page_in_use() -> None:
    cache = PrefixCache(5, 4)
    serve(cache, "abcdefgh")
    reader = cache.match(ids("abcd"))
    lease, _ = cache.extend(cache.match(ids("")), 16)
    assert cache.stats().pages_evicted == 1
    assert not set(reader.pages.tolist()) & set(lease.pages.tolist())
    with pytest.raises(PoolExhausted):
        cache.extend(lease, 17)
    cache.release(reader)
    lease, _ = cache.extend(lease, 17)
    cache.check()


def test_a_lease_takes_preloaded_pages_over_in_the_place_of_its_own() -> None:
    cache = PrefixCache(8, 4)
    keys = cache.keys(ids("abcdefgh"))
    pages = cache.preloaded.add(dict.fromkeys(keys, "disk"))
    lease, _ = cache.extend(cache.match(ids("abcdefghij")), 10)
    free = cache.pool.free_pages
    lease, tiers = cache.adopt(lease, 0, keys)
    assert (lease.pages[:2].tolist(), tiers) == (pages.tolist(), ["disk", "disk"])
    assert (lease.length, cache.pool.free_pages, len(cache.preloaded)) == (12, free + 2, 0)
    cache.insert(lease, ids("abcdefgh"))
    cache.release(lease)
    cache.check()
    assert cache.find(ids("abcdefgh"))[0].tolist() == pages.tolist()


def test_preloaded_pages_are_evicted_before_cached_ones_the_last_read_first() -> None:
    cache = PrefixCache(6, 4)
    serve(cache, "abcdefgh")
    first, second, third = (bytes([i]) * 32 for i in range(3))
    cache.preloaded.add({first: "disk", second: "disk"})
    cache.preloaded.add({third: "host"})
    assert cache.stats().pages_cached == 5
    lease, _ = cache.extend(cache.match(ids("")), 12)
    assert (*cache.preloaded.by_key,) == (first,)
    assert cache.match(ids("abcdefgh")).reused == 8
    lease, _ = cache.extend(lease, 16)
    assert (len(cache.preloaded), cache.preloaded.evicted, cache.stats().pages_evicted) == (0, 3, 0)
    cache.check()


def test_a_store_without_leases_gives_up_every_page() -> None:
    cache = PrefixCache(12, 4)
    for text in ("abcdefgh", "abcdefXY", "abcQ", "other"):
        serve(cache, text)
    lease, _ = cache.extend(cache.match(ids("")), 48)
    assert len(lease.pages) == 12
    assert cache.stats().pages_cached == 0


def test_a_lease_cannot_be_used_after_it_was_extended_or_released() -> None:
    cache = PrefixCache(16, 4)
    old = cache.match(ids("a"))
    new, _ = cache.extend(old, 1)
    with pytest.raises(AssertionError, match="lease 0 was released or extended"):
        cache.release(old)
    cache.release(new)
    with pytest.raises(AssertionError, match="lease 0 was released or extended"):
        cache.release(new)


def test_more_tokens_than_the_lease_has_room_for_are_refused() -> None:
    cache = PrefixCache(16, 4)
    serve(cache, "abcdefgh")
    lease = cache.match(ids("abcde"))
    with pytest.raises(ValueError, match="6 tokens inserted, the lease has room for 5"):
        cache.insert(lease, ids("abcdeX"))


def test_the_stats_add_up() -> None:
    cache = PrefixCache(16, 4)
    serve(cache, "abcdefgh")
    cache.extend(cache.match(ids("abcdX")), 5)
    stats = cache.stats()
    assert (stats.pages_free, stats.pages_cached, stats.pages_in_use) == (13, 1, 2)
    assert stats.pages_total == stats.pages_free + stats.pages_cached + stats.pages_in_use


def test_the_keys_are_those_of_the_chain_under_the_stores_fingerprint() -> None:
    cache = PrefixCache(4, 2, fingerprint=b"model")
    assert cache.keys(ids("abcde"), b"s") == page_keys(root_key(b"model", 2, b"s"), ids("abcde"), 2)


def shared_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Request:
    lease: Lease
    tokens: list[int]
    written: int
    inserted: int


class StoreAgainstBruteForce(RuleBasedStateMachine):
    """Requests in any interleaving over a simulated device pool, where computing a token writes its id into its slot.

    Ids carry their salt, and those of a head that all salts share carry that, so that a page read across salts, or past
    a head, would show.
    """

    @initialize(page_size=st.integers(1, 4), num_pages=st.integers(2, 14))
    def start(self, page_size, num_pages):
        self.cache = PrefixCache(num_pages, page_size)
        self.device = np.full((num_pages, page_size), -1, np.int32)  # [pages, page_size] int32
        self.page_size = page_size
        self.requests: list[Request] = []
        self.published: list[list[int]] = []

    def contents(self, pages: np.ndarray, length: int) -> list[int]:
        return self.device[pages].reshape(-1)[:length].tolist()

    def extended(self, lease: Lease, length: int) -> Lease | None:
        before = self.cache.pool.ref_counts.copy()
        try:
            lease, copies = self.cache.extend(lease, length)
        except PoolExhausted:
            short = pages_for(length, self.page_size) - lease.length // self.page_size - self.cache.pool.free_pages
            assert short > self.cache.stats().pages_cached or self.cache.tree.evict(1) == len(self.cache.preloaded) == 0
            # Whatever the tree gave up on the way, every lease holds what it held.
            assert (before >= self.cache.pool.ref_counts).all()
            assert self.cache.live[lease.number] is lease
            return None
        for copy in copies:
            self.device[copy.target] = self.device[copy.source]
        return lease

    def named(self, tokens: list[int], salt: int, head_pages: int) -> tuple[list[int], bytes, int]:
        """The same tokens as those of a salt after a head, which ends before the last one."""
        head = min(head_pages, (len(tokens) - 1) // self.page_size) * self.page_size if tokens else 0
        return [token + (20 if at < head else 10 * salt) for at, token in enumerate(tokens)], bytes([salt]), head

    def name_of(self, tokens: list[int]) -> tuple[int, int]:
        """The salt, and the pages of the head, that tokens carry."""
        head = sum(token >= 20 for token in tokens)
        return int(any(10 <= token < 20 for token in tokens)), pages_for(head, self.page_size)

    def matched(self, tokens: list[int], salt: bytes, head: int = 0) -> Lease:
        lease = self.cache.match(np.array(tokens, np.int32), salt, head)
        best = max((shared_length(tokens, other) for other in self.published), default=0)
        assert lease.reused <= best
        if self.cache.stats().pages_evicted == 0:
            assert lease.reused == best
        assert len(lease.pages) == pages_for(lease.reused, self.page_size)
        assert self.contents(lease.pages, lease.reused) == tokens[: lease.reused]
        return lease

    def compute(self, request: Request, count: int) -> None:
        for at in range(request.written, min(request.written + count, len(request.tokens))):
            assert at // self.page_size >= request.lease.reused // self.page_size, "wrote a page it did not allocate"
            self.device[request.lease.pages[at // self.page_size], at % self.page_size] = request.tokens[at]
            request.written = at + 1

    def publish(self, request: Request) -> None:
        self.cache.insert(request.lease, np.array(request.tokens[: request.written], np.int32))
        self.published.append(request.tokens[: request.written])
        request.inserted = request.written

    @precondition(lambda self: len(self.requests) < 4)
    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14),
        salt=st.sampled_from([0, 0, 0, 1]),
        head_pages=st.sampled_from([0, 0, 1, 2]),
    )
    def admit(self, tokens, salt, head_pages):
        tokens, name, head = self.named(tokens, salt, head_pages)
        lease = self.matched(tokens[:-1], name, head)
        extended = self.extended(lease, len(tokens))
        if extended is None:
            self.cache.release(lease)
        else:
            self.requests.append(Request(extended, tokens, lease.reused, 0))

    @precondition(lambda self: self.published)
    @rule(data=st.data(), tail=st.lists(st.integers(0, 2), max_size=4))
    def admit_a_variation_of_what_was_published(self, data, tail):
        base = data.draw(st.sampled_from(self.published))
        base = base[: data.draw(st.integers(0, len(base)))]
        if len(self.requests) < 4 and base + tail:
            self.admit([token % 10 for token in base] + tail, *self.name_of(base))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(1, 6), publish=st.booleans())
    def prefill_a_chunk(self, data, count, publish):
        request = data.draw(st.sampled_from(self.requests))
        self.compute(request, count)
        if publish:
            self.publish(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), token=st.integers(0, 2), publish=st.booleans())
    def decode_a_token(self, data, token, publish):
        request = data.draw(st.sampled_from(self.requests))
        lease = self.extended(request.lease, len(request.tokens) + 1)
        if lease is None:
            return
        request.lease = lease
        request.tokens.append(token + 10 * lease.salt[0])
        self.compute(request, len(request.tokens))
        if publish:
            self.publish(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), publish=st.booleans())
    def finish(self, data, publish):
        request = data.draw(st.sampled_from(self.requests))
        if publish:
            self.publish(request)
        self.cache.release(request.lease)
        self.requests.remove(request)

    @rule(tokens=st.lists(st.integers(0, 2), max_size=14), salt=st.integers(0, 1), head_pages=st.integers(0, 2))
    def look_up(self, tokens, salt, head_pages):
        self.cache.release(self.matched(*self.named(tokens, salt, head_pages)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tail=st.lists(st.integers(0, 2), max_size=4), first=st.integers(0, 2), take=st.booleans())
    def preload(self, data, tail, first, take):
        """Full pages of what begins like a request."""
        request = data.draw(st.sampled_from(self.requests))
        salt = request.lease.salt[0]
        tokens = np.array(request.tokens + [token + 10 * salt for token in tail], np.int32)
        full = self.cache.keys(tokens, request.lease.salt, request.lease.head)
        chosen = [i for i, key in enumerate(full) if i >= first and key not in self.cache.preloaded]
        self.cache.tree.evict(len(chosen))
        chosen = chosen[: self.cache.pool.free_pages]
        if chosen:
            pages = self.cache.preloaded.add({full[i]: "disk" for i in chosen})
            self.device[pages] = tokens[: len(full) * self.page_size].reshape(-1, self.page_size)[chosen]
        if take and self.cache.preloaded:
            self.take_preloaded_pages_over(publish=True)

    @precondition(lambda self: self.requests and self.cache.preloaded)
    @rule(publish=st.booleans())
    def take_preloaded_pages_over(self, publish):
        for request in self.requests:
            first, inside = divmod(request.written, self.page_size)
            if inside and request.written > request.lease.reused:
                continue  # others may read what it has written in this page
            keys = self.cache.keys(np.array(request.tokens, np.int32), request.lease.salt, request.lease.head)[first:]
            if found := self.cache.preloaded.run(keys):
                request.lease, tiers = self.cache.adopt(request.lease, first, found)
                assert tiers == ["disk"] * len(found)
                request.written = (first + len(found)) * self.page_size
                if publish:
                    self.publish(request)

    @rule(count=st.integers(0, 3))
    def evict(self, count):
        before = self.cache.pool.free_pages
        freed = self.cache.tree.evict(count)
        assert self.cache.pool.free_pages == before + freed

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def drop(self, data):
        """From a page on, which takes along what begins as this sequence does up to there, and no other."""
        tokens = data.draw(st.sampled_from(self.published))
        if not tokens:
            return
        salt, head_pages = self.name_of(tokens)
        start = data.draw(st.integers(0, (len(tokens) - 1) // self.page_size)) * self.page_size
        head = head_pages * self.page_size
        dropped = self.cache.drop(np.array(tokens, np.int32), start, bytes([salt]), head)
        assert all(sequence.tokens[: start + 1].tolist() == tokens[: start + 1] for sequence in dropped)
        self.published = [p[:start] if p[: start + 1] == tokens[: start + 1] else p for p in self.published]

    @invariant()
    def everything_adds_up(self):
        self.cache.check()

    @invariant()
    def every_request_still_has_its_own_tokens(self):
        for request in self.requests:
            assert self.contents(request.lease.pages, request.written) == request.tokens[: request.written]

    @invariant()
    def every_path_of_the_tree_holds_its_tokens(self):
        for node in self.cache.tree.nodes():
            path = [node]
            while path[0].parent is not None:
                path.insert(0, path[0].parent)
            pages = np.concatenate([each.pages for each in path])
            tokens = np.concatenate([each.tokens for each in path])
            covered = min(len(tokens), len(pages) * self.page_size)
            assert self.contents(pages, covered) == tokens[:covered].tolist()

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for request in self.requests:
            self.cache.release(request.lease)
        self.cache.tree.evict(self.cache.pool.num_pages)
        self.cache.preloaded.evict(self.cache.pool.num_pages)
        assert self.cache.pool.free_pages == self.cache.pool.num_pages
        self.cache.check()


TestStoreAgainstBruteForce = StoreAgainstBruteForce.TestCase
TestStoreAgainstBruteForce.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
