import threading
from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st
from storage_children import items, key_of, keys, page_of, right

from cache.disk import DiskTier
from cache.tiers import SEAL, SEARCH_STEP, HostTier, TieredPages, seal

MIB = 1 << 20
numbers = st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True)


def test_a_seal_covers_length_key_and_payload():
    first = seal(key_of(1), b"page")
    assert len(first) == SEAL.size
    assert seal(key_of(1), memoryview(b"page")) == first
    assert len({first, seal(key_of(2), b"page"), seal(key_of(1), b"Page"), seal(key_of(1), b"page\0")}) == 4


def test_seals_are_the_ones_that_earlier_versions_wrote_to_disk():
    assert seal(b"k" * 32, b"page").hex() == "0400000000000000e4782f6cb55fd5dd"


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("pgd"), numbers)))
def test_host_memory_is_an_exact_lru_under_its_budget(steps):
    tier, model, budget = HostTier(150_000), OrderedDict(), 150_000
    for step, touched in steps:
        if step == "p":
            tier.put_many(items(touched))
            for i in reversed(touched):
                if i not in model:
                    model[i] = len(page_of(i))
                model.move_to_end(i)
                while sum(model.values()) > budget:
                    model.popitem(last=False)
        elif step == "g":
            assert right(tier, touched) == [i in model for i in touched]
            for i in reversed(touched):
                if i in model:
                    model.move_to_end(i)
        else:
            tier.delete(keys(touched))
            for i in touched:
                model.pop(i, None)
        assert list(tier.pages) == keys(model)
        assert tier.stats().bytes == sum(model.values()) <= budget


def test_a_page_larger_than_host_memory_is_dropped_and_evicts_nothing():
    tier = HostTier(30_000)
    tier.put_many(items([0]))
    tier.put_many([(key_of(1), bytes(30_001))])
    assert tier.contains_many(keys([0, 1])) == [True, False]
    assert tier.stats().dropped == 1


def test_a_prefix_is_found_across_tiers_and_ends_at_the_first_hole(tmp_path):
    host, disk = HostTier(MIB), DiskTier(tmp_path, MIB)
    pages = TieredPages([host, disk])
    host.put_many(items([0, 1, 4]))
    disk.put_many(items([1, 2, 3, 6]))
    assert pages.locate_prefix(keys(range(8))) == ["host", "host", "disk", "disk", "host"]
    assert pages.locate_prefix(keys([9, 0])) == []
    assert pages.locate_prefix([]) == []
    pages.close()


def test_a_prefix_may_be_longer_than_one_search_step():
    host = HostTier(MIB)
    host.put_many([(key_of(i), b"x") for i in range(3 * SEARCH_STEP)])
    pages = TieredPages([host])
    assert len(pages.locate_prefix(keys(range(4 * SEARCH_STEP)))) == 3 * SEARCH_STEP
    pages.close()


def test_a_fetch_takes_each_page_from_its_fastest_tier_and_keeps_it_in_memory(tmp_path):
    host, disk = HostTier(MIB), DiskTier(tmp_path, MIB)
    pages = TieredPages([host, disk])
    host.put_many(items([0]))
    disk.put_many(items([0, 1, 2]))
    fetched = pages.fetch(keys([0, 1, 2, 3])).result(10)
    assert fetched.payloads == [page_of(0), page_of(1), page_of(2), None]
    assert fetched.sources == ["host", "disk", "disk", None]
    assert set(fetched.seconds) == {"host", "disk"}
    assert pages.fetch(keys([2, 1])).result(10).sources == ["host", "host"]
    assert [stats.name for stats in pages.stats()] == ["host", "disk"]
    pages.close()


def test_host_memory_serves_many_threads():
    tier = HostTier(200_000)

    def work() -> None:
        for start in range(100):
            tier.put_many(items(range(start % 20, start % 20 + 3)))
            right(tier, range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tier.stats().bytes == sum(len(page) for page in tier.pages.values()) <= 200_000
    assert tier.stats().hits + tier.stats().misses == 4 * 100 * 20
