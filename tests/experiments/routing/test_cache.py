"""A replica's cache in the simulation is the real prefix cache: same matches, same leases, same evictions."""

from __future__ import annotations

import numpy as np
import pytest

from cache.pool import PoolExhausted
from cache.prefix_cache import PrefixCache
from experiments.routing.cache import ReplicaCache, infinite_hits, known_depth

PAGE = 4


def prompts(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Prompts that extend, branch from, or repeat earlier ones, as the numbers of their pages."""
    made: list[list[int]] = [[0]]
    for _ in range(count):
        base = made[int(rng.integers(len(made)))]
        kept = base[: int(rng.integers(1, len(base) + 1))]
        fresh = 1000 * len(made)
        made.append([*kept, *range(fresh, fresh + int(rng.integers(0, 6)))])
    return made


@pytest.mark.parametrize("seed", range(5))
def test_it_matches_and_evicts_as_the_real_cache_does_page_by_page(seed: int) -> None:
    rng = np.random.default_rng(seed)
    real, simulated = PrefixCache(24, PAGE), ReplicaCache(24)
    running: list[tuple] = []
    for pages in prompts(rng, 200):
        listed = np.array(pages, np.int32)
        a, b = real.match(np.repeat(listed, PAGE)), simulated.match(listed)
        assert a.reused == PAGE * b.reused
        try:
            a, _ = real.extend(a, PAGE * (len(pages) + 1))
        except PoolExhausted:
            with pytest.raises(PoolExhausted):
                simulated.extend(b, len(pages) + 1)
            real.release(a)
            simulated.release(b)
        else:
            b, _ = simulated.extend(b, len(pages) + 1)
            real.insert(a, np.repeat(listed, PAGE))
            simulated.insert(b, listed)
            running.append((a, b))
        while running and (len(running) > 3 or rng.random() < 0.5):
            a, b = running.pop(int(rng.integers(len(running))))
            real.release(a)
            simulated.release(b)
        assert real.stats() == simulated.stats()
        simulated.check()


def test_its_ledger_lists_what_others_can_find() -> None:
    rng = np.random.default_rng(0)
    cache, known = ReplicaCache(24), set[int]()
    for pages in prompts(rng, 200):
        listed = np.array(pages, np.int32)
        lease = cache.match(listed)
        if len(pages) < 24:
            lease, _ = cache.extend(lease, len(pages))
            cache.insert(lease, listed)
        cache.release(lease)
        gained, lost = cache.ledger.take()
        assert not known & set(gained.tolist())
        assert known >= set(lost.tolist())
        known = known - set(lost.tolist()) | set(gained.tolist())
        held = np.concatenate([node.tokens for node in cache.tree.nodes()])
        assert known == cache.ledger.held == set(held.tolist())


def test_one_cache_without_a_limit_finds_every_page_that_was_asked_for_before() -> None:
    first, second, third = np.arange(5), np.array([0, 1, 2, 9]), np.array([0, 1, 2, 9, 10])
    assert infinite_hits([(first, 4), (second, 4), (third, 5), (third, 3)]).tolist() == [0, 3, 4, 3]


def test_the_known_depth_is_counted_from_the_first_page() -> None:
    assert [known_depth(list(range(6)), set(range(depth))) for depth in range(7)] == list(range(7))
