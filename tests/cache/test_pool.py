"""The page pool: allocation and reference counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.pool import PagePool, PoolExhausted, pages_for


def test_a_fresh_pool_hands_out_every_page_once() -> None:
    pool = PagePool(5)
    pages = np.concatenate([pool.allocate(2), pool.allocate(3)])
    assert sorted(pages.tolist()) == [0, 1, 2, 3, 4]
    assert pages.dtype == np.int32
    assert pool.free_pages == 0


def test_exhaustion_names_needed_and_free_pages_and_takes_none() -> None:
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(PoolExhausted, match="3 pages needed, 2 of 3 free"):
        pool.allocate(3)
    assert pool.free_pages == 2
    pool.check()


def test_a_retained_page_survives_one_release() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    pool.retain(pages[:1])
    pool.release(pages)
    assert pool.ref_counts[pages].tolist() == [1, 0]
    assert pool.free_pages == 1
    pool.check()


def test_a_page_listed_twice_in_one_call_counts_twice() -> None:
    pool = PagePool(2)
    page = pool.allocate(1)
    pool.retain(np.repeat(page, 2))
    assert pool.ref_counts[page[0]] == 3
    pool.release(np.repeat(page, 3))
    assert pool.free_pages == 2
    pool.check()


def test_a_double_free_is_an_error() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often than retained"):
        pool.release(pages)


def test_a_free_page_cannot_be_retained() -> None:
    with pytest.raises(AssertionError, match="free page"):
        PagePool(2).retain(np.array([1], np.int32))


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)


def test_a_partly_filled_page_counts_as_a_whole_page() -> None:
    assert [pages_for(n, 4) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 7)), max_size=60))
def test_the_counts_are_those_of_a_plain_dict(steps):
    pool, model = PagePool(8), {}
    for step, n in steps:
        held = np.array(sorted(model), np.int32)[:n]
        if step == "allocate" and n <= 8 - len(model):
            model |= dict.fromkeys(pool.allocate(n).tolist(), 1)
        elif step == "retain":
            pool.retain(held)
            model |= {page: model[page] + 1 for page in held.tolist()}
        elif step == "release":
            pool.release(held)
            model |= {page: model[page] - 1 for page in held.tolist()}
            model = {page: count for page, count in model.items() if count}
        assert pool.free_pages == 8 - len(model)
        assert {page: int(pool.ref_counts[page]) for page in np.flatnonzero(pool.ref_counts).tolist()} == model
        pool.check()
