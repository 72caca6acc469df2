"""What a tree lists, as its journal tells it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cache.journal import Journal, Listed, ListedPages
from cache.keys import PageChain
from cache.nodes import Node
from cache.pool import PoolExhausted
from cache.prefix_cache import PrefixCache

PAGE, PAGES, FINGERPRINT = 4, 24, b"a model"


def keys_in(cache: PrefixCache) -> set[int]:
    """The first 8 bytes of the key of every full page that the tree lists, by walking it."""
    found: set[int] = set()

    def walk(node: Node, before: np.ndarray, salt: bytes, head: int) -> None:
        tokens = np.concatenate([before, node.tokens])
        keys = PageChain(FINGERPRINT, PAGE, salt, head).keys(tokens)
        first = node.start // PAGE
        found.update(int.from_bytes(key[:8], "little") for key in keys[first : first + len(node.pages)])
        for child in node.children.values():
            ends_head = isinstance(child.key, bytes)
            walk(child, tokens, child.key if ends_head else salt, child.start if ends_head else head)

    for root in cache.tree.top.children.values():
        assert isinstance(root.key, bytes)
        walk(root, np.zeros(0, np.int32), root.key, 0)
    return found


def watched() -> tuple[PrefixCache, Journal, ListedPages]:
    cache = PrefixCache(PAGES, PAGE, FINGERPRINT)
    cache.tree.journal = Journal()
    return cache, cache.tree.journal, ListedPages(PAGES, PAGE, FINGERPRINT)


@pytest.mark.parametrize("seed", range(20))
def test_gains_and_losses_add_up_to_what_the_tree_lists(seed: int) -> None:
    rng = random.Random(seed)
    cache, journal, listed = watched()
    told: set[int] = set()
    for _ in range(120):
        tokens = np.asarray([rng.randrange(2) for _ in range(rng.randrange(1, 30))], np.int32)
        salt, head = rng.choice([b"", b"other"]), min(rng.choice([0, 4, 8]), (len(tokens) - 1) // PAGE * PAGE)
        lease = cache.match(tokens[:-1], salt, head)
        try:
            lease, _ = cache.extend(lease, len(tokens))
        except PoolExhausted:
            cache.release(lease)
            continue
        for end in sorted(rng.sample(range(1, len(tokens) + 1), min(2, len(tokens)))):
            if end > lease.reused:
                cache.insert(lease, tokens[:end])
        cache.release(lease)
        if rng.random() < 0.1 and len(tokens) > PAGE:
            cache.drop(tokens, PAGE, salt, head)
        if rng.random() < 0.6:
            gained, lost = (set(keys.tolist()) for keys in listed.take(journal))
            assert not gained & lost
            assert not gained & told
            assert lost <= told
            told = (told | gained) - lost
            assert told == keys_in(cache) == set(listed.held().tolist())
    assert cache.tree.evicted_pages, "some pages were evicted meanwhile"


def test_a_tree_that_starts_anew_has_lost_everything() -> None:
    cache, journal, listed = watched()
    tokens = np.arange(10, dtype=np.int32)
    lease, _ = cache.extend(cache.match(tokens), 10)
    cache.insert(lease, tokens)
    gained, lost = listed.take(journal)
    assert (len(gained), len(lost)) == (2, 0), "the last page is not full"
    journal.cleared()
    gained_again, lost = listed.take(journal)
    assert set(lost.tolist()) == set(gained.tolist())
    assert not len(gained_again)
    assert not len(listed.held())


def test_a_page_that_comes_and_goes_in_between_is_in_neither() -> None:
    journal, pages = Journal(), np.array([1, 2], np.int32)
    journal.listed(Listed(b"", np.arange(8, dtype=np.int32), pages, 0, -1))
    journal.unlisted(pages)
    gained, lost = ListedPages(4, 4, b"f").take(journal)
    assert not len(gained)
    assert not len(lost)
