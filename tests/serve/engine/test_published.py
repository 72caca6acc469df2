"""What an engine tells a router of its cache is what its prefix cache holds, page by page."""

import numpy as np

from cache.prefix_cache import PrefixCache
from serve.engine.engine import Engine
from tests.helpers.tiny_engine import PAGE, SMALL, generate


class Pages:
    """A listener that keeps the keys."""

    def __init__(self):
        self.held = set()

    def added(self, keys):
        assert not self.held & set(keys.tolist()), "told twice"
        self.held |= set(keys.tolist())

    def removed(self, keys):
        assert self.held >= set(keys.tolist()), "never told"
        self.held -= set(keys.tolist())

    def cleared(self):
        self.held = set()


def full_pages(cache: PrefixCache) -> set[int]:
    """The short keys of all full pages in the tree."""
    found = set()

    def visit(node, before):
        tokens = np.concatenate([before, node.tokens])
        keys = cache.keys(tokens[: len(tokens) // PAGE * PAGE])
        found.update(int.from_bytes(key[:8], "little") for key in keys)
        for child in node.children.values():
            visit(child, tokens)

    for root in cache.tree.top.children.values():
        for child in root.children.values():
            visit(child, np.zeros(0, np.int32))
    return found


def test_a_listener_knows_the_pages_of_prompts_and_answers_as_they_come_and_are_evicted(model):
    config, params = model
    engine, pages, rng = Engine(params, config, SMALL, b"fingerprint", None), Pages(), np.random.default_rng(0)
    engine.core.memory.listen(pages)
    engine.start()
    first = rng.integers(0, 100, 100)
    try:
        generate(engine, first, 12)
        assert len(pages.held) == (100 + 12 - 1) // PAGE
        for start in (0, 50, 77, 0, 0, 50, 33, 0):  # 96 pages have room for about 700 tokens
            generate(engine, np.concatenate([first[:start], rng.integers(0, 100, 150 - start)]), 6)
    finally:
        engine.stop()
    cache = engine.core.memory.prefix_cache
    assert cache.stats().pages_evicted > 0
    assert pages.held == full_pages(cache)
