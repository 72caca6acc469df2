"""The index of cached prefixes: it says what a dictionary of sets would say, in bounded memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.router.index import PrefixIndex, hashed


def chain(seed: int, pages: int) -> np.ndarray:
    """Keys of a prompt's pages as a chain of hashes has them: all different, [pages] uint64."""
    return np.random.default_rng(seed).integers(0, 1 << 64, pages, dtype=np.uint64)


def depth(held: set[int], keys: np.ndarray) -> int:
    """How many of `keys` are held from the first one on, page by page."""
    return next((i for i, key in enumerate(keys.tolist()) if key not in held), len(keys))


PROMPTS = [chain(seed, 120) for seed in range(3)]
REPLICAS = ("a", "b", "c")
STEP = st.tuples(
    st.sampled_from(["insert", "predict", "withdraw", "cut", "clear", "again"]),
    st.sampled_from(REPLICAS),
    st.integers(0, 2),
    st.integers(0, 120),
)


class Sets:
    """The pages of each replica as two plain sets."""

    def __init__(self):
        self.confirmed = {name: set() for name in REPLICAS}
        self.predicted = {name: set() for name in REPLICAS}

    def held(self, name):
        return self.confirmed[name] | self.predicted[name]

    def apply(self, what, name, number, length):
        start = set(PROMPTS[number][:length].tolist())
        rest = set(PROMPTS[number][length:].tolist())
        if what == "insert":
            self.confirmed[name] |= start
            self.predicted[name] -= start
        elif what == "predict":
            self.predicted[name] |= start - self.confirmed[name]
        elif what == "withdraw":
            self.predicted[name] -= rest
        elif what == "cut":
            self.confirmed[name] -= rest
            self.predicted[name] -= rest
        else:
            self.confirmed[name], self.predicted[name] = set(), set()


def apply(index, what, name, number, length):
    """One step on the index, as `Sets.apply`."""
    start, rest = PROMPTS[number][:length], PROMPTS[number][length:]
    if what in ("insert", "predict"):
        index.insert(name, start, predicted=what == "predict")
    elif what in ("withdraw", "cut"):  # from the end of a prompt on, as caches evict
        index.remove(name, rest, predicted_only=what == "withdraw")
    elif what == "clear":
        index.clear(name)
    else:
        index.drop(name)
        index.add(name, 400)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_overlaps_are_those_of_sets(steps):
    index, sets = PrefixIndex(), Sets()
    for name in REPLICAS:
        index.add(name, 400)
    for step in steps:
        apply(index, *step)
        sets.apply(*step)
        for prompt in PROMPTS:
            found = dict(zip(index.names, index.overlap(prompt).tolist(), strict=True))
            for name in REPLICAS:
                held = sets.held(name)
                # A page may be confirmed after one that is withdrawn. The depth is then that of any such gap.
                gaps = [i for i, key in enumerate(prompt.tolist()) if key not in held]
                assert found[name] in (*gaps, len(prompt))
                if depth(held, prompt) + len(gaps) == len(prompt):
                    assert found[name] == depth(held, prompt)
        assert index.pages == {name: len(sets.held(name)) for name in REPLICAS}
        index.check()


def test_a_region_holds_all_the_pages_that_it_was_added_for():
    index = PrefixIndex()
    index.add("a", 100_000)
    keys = chain(0, 100_000)
    for part in np.split(keys, 100):
        index.insert("a", part)
    assert index.pages["a"] == 100_000
    assert index.overlap(keys).tolist() == [100_000]
    assert index.nbytes < 64 * 100_000


def test_memory_stays_where_more_and_more_pages_come_and_the_latest_are_known():
    index = PrefixIndex()
    index.add("a", 2_000)
    size = index.nbytes
    for seed in range(50):
        prompt = chain(seed, 500)
        index.insert("a", prompt)
        index.insert("a", chain(1000, 200))  # used all the time
        assert index.overlap(prompt).tolist() == [500]
    assert index.nbytes == size
    assert index.pages["a"] <= index.slots.size
    assert index.overlap(chain(1000, 200)).tolist() == [200]
    assert index.overlap(chain(0, 500)).tolist() == [0]


def test_more_pages_at_once_than_there_is_room_for_are_cut_off():
    index = PrefixIndex()
    index.add("a", 10)
    index.insert("a", chain(0, 1000))
    assert 0 < index.pages["a"] <= index.slots.size
    index.check()


def test_replicas_come_and_go_without_taking_new_memory():
    index = PrefixIndex()
    index.add("stays", 1000)
    index.insert("stays", chain(1, 300))
    index.add("other", 1000)
    size = index.nbytes
    for i in range(20):
        index.drop("other" if not i else f"other{i - 1}")
        index.add(f"other{i}", 500 if i % 2 else 1000)
        index.insert(f"other{i}", chain(1, 100 + i))
        assert index.overlap(chain(1, 300)).tolist() == [300, 100 + i]
    assert index.nbytes == size


def test_confirmed_pages_outlive_the_prediction():
    index = PrefixIndex()
    index.add("a", 100)
    keys = chain(0, 10)
    index.insert("a", keys, predicted=True)
    index.insert("a", keys[:4])
    index.insert("a", keys[:6], predicted=True)  # predicted again: no page is less certain for it
    index.remove("a", keys, predicted_only=True)
    assert index.overlap(keys).tolist() == [4]


def test_a_prompt_without_a_full_page_overlaps_nowhere():
    index = PrefixIndex()
    assert index.overlap(chain(0, 0)).tolist() == []
    index.add("a", 10)
    index.insert("a", chain(0, 0))
    index.remove("a", chain(0, 0))
    assert index.overlap(chain(0, 0)).tolist() == [0]


def test_no_key_is_taken_for_an_empty_slot():
    keys = np.arange(1 << 16, dtype=np.uint64)
    found = hashed(keys)
    assert found.min() > 0
    assert not (found % 2).any()
    assert len(np.unique(found)) == len(keys)


@pytest.mark.parametrize(("name", "pages", "message"), [("a", 5, "in the index already"), ("b", 0, "room for 0 pages")])
def test_a_replica_that_cannot_be_added_is_refused(name, pages, message):
    index = PrefixIndex()
    index.add("a", 10)
    with pytest.raises(ValueError, match=message):
        index.add(name, pages)
