"""The protocol of the tiers, reads over several of them, and forgetting."""

import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache.tiers
from cache.disk import DiskTier
from cache.host import HostTier
from cache.keys import PageChain
from cache.remote import RemoteTier
from cache.tier import SEAL, SEARCH_STEP, TieredPages, seal
from cache.tiers import Tiers
from tests.helpers.storage_children import items, key_of, keys, page_of, right

MIB = 1 << 20
numbers = st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True)


def test_a_seal_covers_length_key_and_payload() -> None:
    first = seal(key_of(1), b"page")
    assert len(first) == SEAL.size
    assert seal(key_of(1), memoryview(b"page")) == first
    assert len({first, seal(key_of(2), b"page"), seal(key_of(1), b"Page"), seal(key_of(1), b"page\0")}) == 4


def test_seals_are_the_ones_that_earlier_versions_wrote_to_disk() -> None:
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
        assert sorted(tier.pages, key=tier.used.__getitem__) == keys(model)
        assert tier.stats().bytes == sum(model.values()) <= budget


def test_a_page_larger_than_host_memory_is_dropped_and_evicts_nothing() -> None:
    tier = HostTier(30_000)
    tier.put_many(items([0]))
    tier.put_many([(key_of(1), bytes(30_001))])
    assert tier.contains_many(keys([0, 1])) == [True, False]
    assert tier.stats().dropped == 1


def test_each_page_of_a_chain_is_located_in_its_fastest_tier_and_holes_are_none(tmp_path: Path) -> None:
    host, disk = HostTier(MIB), DiskTier(tmp_path, MIB)
    pages = TieredPages([host, disk])
    host.put_many(items([0, 1, 4]))
    disk.put_many(items([1, 2, 3, 6]))
    assert pages.locate(keys(range(8))) == ["host", "host", "disk", "disk", "host", None, "disk", None]
    assert pages.locate([]) == []
    pages.close()


def test_a_search_goes_on_as_long_as_its_last_step_found_anything() -> None:
    host = HostTier(MIB)
    pages = TieredPages([host])
    host.put_many([(key_of(i), b"x") for i in [*range(SEARCH_STEP + 1), 4 * SEARCH_STEP]])
    located = pages.locate(keys(range(5 * SEARCH_STEP)))
    assert located == ["host"] * (SEARCH_STEP + 1) + [None] * (4 * SEARCH_STEP - 1)
    pages.close()


def test_a_touched_page_outlives_pages_that_were_used_before_it(tmp_path: Path) -> None:
    for tier in (HostTier(100_000), DiskTier(tmp_path, 3 * MIB)):
        size = 10_000 if tier.name == "host" else 300_000
        tier.put_many([(key_of(i), bytes(size)) for i in range(8)])
        assert tier.touch_many(keys([6, 7, 99])) == [True, True, False]
        tier.put_many([(key_of(i), bytes(size)) for i in range(10, 16)])
        assert tier.contains_many(keys([6, 7])) == [True, True]
        assert not all(tier.contains_many(keys(range(6))))
        tier.close()


def test_a_fetch_takes_each_page_from_its_fastest_tier_and_keeps_it_in_memory(tmp_path: Path) -> None:
    host, disk = HostTier(MIB), DiskTier(tmp_path, MIB)
    pages = TieredPages([host, disk])
    stored = [(key_of(i), page_of(7 * i)) for i in range(3)]  # of one size
    host.put_many(stored[:1])
    disk.put_many(stored)
    rows = np.zeros((4, len(stored[0][1])), np.uint8)
    fetched = pages.fetch(keys([0, 1, 2, 3]), rows, lambda found: found).result(10)
    assert [row.tobytes() for row in rows[:3]] == [page for _, page in stored]
    assert fetched.sources == ["host", "disk", "disk", None]
    assert set(fetched.seconds) == {"host", "disk"}
    rows[:] = 0  # what host memory keeps is its own
    assert pages.fetch(keys([2, 1]), rows[:2], lambda found: found.sources).result(10) == ["host", "host"]
    assert [row.tobytes() for row in rows[:2]] == [stored[2][1], stored[1][1]]
    assert [stats.name for stats in pages.stats()] == ["host", "disk"]
    pages.close()


@pytest.mark.parametrize("error", [OSError("bad disk"), MemoryError("no room"), ValueError("a fault")])
def test_a_tier_that_raises_has_nothing_and_the_others_still_serve(tmp_path, caplog, error):
    def fail(*_):
        raise error

    host, disk = HostTier(MIB), DiskTier(tmp_path, MIB)
    pages = TieredPages([host, disk])
    disk.put_many(items([0, 7]))
    rows = np.zeros((2, len(page_of(0))), np.uint8)
    for method in ("contains_many", "get_many", "touch_many", "put_many"):
        setattr(host, method, fail)
    for _ in range(3):
        assert pages.locate(keys([0, 7, 1])) == ["disk", "disk", None]
        assert pages.read(keys([0, 7]), rows).sources == ["disk", "disk"]
        assert [row.tobytes() for row in rows] == [page_of(0), page_of(7)]
        assert pages.touch(keys([0, 1])) == [True, False]
    assert pages.failures.count == 12
    assert len([record for record in caplog.records if record.name == "tokenzero.cache.worker"]) == 1
    assert pages.close()


@pytest.mark.parametrize("kind", ["host", "disk", "remote"])
def test_a_page_is_read_into_its_buffer_and_one_of_another_size_is_a_miss_that_stays(tmp_path, kind):
    tier = {
        "host": lambda: HostTier(MIB),
        "disk": lambda: DiskTier(tmp_path, MIB),
        "remote": lambda: RemoteTier(f"file://{tmp_path}/shared"),
    }[kind]()
    tier.put_many(items([0, 1, 7]))
    buffers = np.zeros((4, len(page_of(0))), np.uint8)
    found = tier.get_many(keys([7, 1, 99, 0]), buffers)
    assert [payload is not None for payload in found] == [True, False, False, True]
    assert [buffers[0].tobytes(), buffers[3].tobytes()] == [page_of(7), page_of(0)]
    stats = tier.stats()
    assert (stats.hits, stats.misses, stats.corrupt, stats.bytes_read) == (2, 2, 0, 2 * len(page_of(0)))
    assert right(tier, [1]) == [True]
    tier.close()


def test_host_memory_serves_many_threads() -> None:
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


def test_copies_come_from_each_tier_are_kept_nowhere_and_are_no_use(tmp_path: Path) -> None:
    host, disk = HostTier(MIB), DiskTier(tmp_path, MIB)
    pages = TieredPages([host, disk])
    host.put_many(items([0]))
    disk.put_many(items([0, 1]))
    before = dict(host.used), [entry.last_used for entry in disk.entries()]
    found = pages.copies(keys([0, 1, 2])).result(60)
    assert {name: [page and bytes(page) for page in each] for name, each in found.items()} == {
        "host": [page_of(0), None, None],
        "disk": [page_of(0), page_of(1), None],
    }
    disk.sync()
    assert (dict(host.used), [entry.last_used for entry in disk.entries()]) == before
    pages.close()


def test_a_tier_that_raises_costs_the_copies_of_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, disk = HostTier(MIB), DiskTier(tmp_path, MIB)
    pages = TieredPages([host, disk])
    disk.put_many(items([0]))
    monkeypatch.setattr(host, "get_many", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(host, "contains_many", lambda *_, **__: 1 / 0)
    assert pages.copies(keys([0])).result(60)["disk"] == [page_of(0)]
    pages.forget(keys([0])).result(60)
    assert disk.contains_many(keys([0])) == [False]
    pages.close()


def test_what_is_forgotten_leaves_all_tiers_even_if_it_waits_to_be_written_and_no_later_lookup_finds_it(
    tmp_path: Path,
) -> None:
    tokens, chain = np.arange(30, dtype=np.int32), PageChain(b"", 4, b"")
    tiers = Tiers(str(tmp_path), 64 * MIB, MIB, flush_seconds=60.0)
    names = chain.keys(tokens)
    tails = [key for key in chain.all_keys(tokens) if key not in names]
    tiers.writer.submit([*names, *tails], 1000, lambda: [b"page"] * (len(names) + len(tails)))
    forgotten = tiers.forget(chain, [tokens], 8)
    found = tiers.look([chain.root, *names], names, tokens, 0, 4, 1).result(60)
    assert forgotten.result(60) == 22
    assert [(page.index, page.tokens) for page in found.pages] == [(0, 4), (1, 4)]
    for tier in tiers.pages.tiers:
        assert tier.contains_many(names) == [True] * 2 + [False] * 5
        assert tier.contains_many(tails) == [True] * 6 + [False] * 17
    tiers.close()


@pytest.mark.parametrize("late", ["a write", "a read", "a tier that fails"])
def test_what_is_forgotten_is_not_found_again_whatever_comes_late(tmp_path, monkeypatch, late):
    monkeypatch.setattr(cache.tiers, "FORGET_SECONDS", 0.05)
    monkeypatch.setattr(cache.tiers, "FORGET_AGAIN_SECONDS", 0.05)
    tokens, chain, go = np.arange(16, dtype=np.int32), PageChain(b"", 4, b""), threading.Event()
    tiers = Tiers(str(tmp_path), 64 * MIB, MIB, flush_seconds=0.01)
    host, disk = tiers.pages.tiers
    names = chain.keys(tokens)
    parents = [chain.root, *names]
    items_of = [(name, b"page") for name in names]
    if late == "a write":
        tiers.writer.submit([], 0, lambda: go.wait(60) and [])
        tiers.writer.submit(names, 16, lambda: [b"page"] * 4)
    elif late == "a read":
        disk.put_many(items_of)
        monkeypatch.setattr(disk, "get_many", lambda *args, get=disk.get_many: go.wait(60) and get(*args))
        tiers.pages.fetch(names, np.zeros((4, 4), np.uint8), lambda fetched: fetched)
    else:
        disk.put_many(items_of)
        monkeypatch.setattr(disk, "delete", lambda gone, delete=disk.delete: go.is_set() and delete(gone))
    tiers.forget(chain, [tokens], 0).result(60)
    assert tiers.look(parents, names, tokens, 0, 4, 1).result(60).pages == []
    go.set()
    deadline = time.monotonic() + 60
    while tiers.pages.hidden:
        assert time.monotonic() < deadline, "they are gone in the end"
        time.sleep(0.01)
    assert tiers.look(parents, names, tokens, 0, 4, 1).result(60).pages == []
    assert not any(host.contains_many(names) + disk.contains_many(names))
    tiers.close()


def test_no_pages_at_all_are_no_matter_to_any_tier(tmp_path: Path) -> None:
    for tier in (HostTier(1000), DiskTier(tmp_path, 1 << 20)):
        tier.put_many([])
        tier.put_many([], [])
        assert tier.get_many([]) == tier.touch_many([]) == tier.contains_many([]) == []
        tier.close()


def test_how_much_of_each_chain_a_tier_has_is_found_by_bisection_and_is_no_use(tmp_path: Path) -> None:
    tiers = Tiers(str(tmp_path), 64 * MIB, MIB)
    host, disk = tiers.pages.tiers
    chains = [keys(range(first, first + 100)) for first in (0, 100, 200)]
    try:
        host.put_many(items(range(40)), [10**9 - i for i in range(40)])
        disk.put_many(items([*range(70), *range(100, 200)]))
        used = dict(host.used)
        assert tiers.held(chains).result(10) == [
            {"host": 40, "disk": 70},
            {"host": 0, "disk": 100},
            {"host": 0, "disk": 0},
        ]
        assert dict(host.used) == used
    finally:
        tiers.close()


def test_a_store_over_a_network_is_not_asked_by_those_who_only_look(tmp_path: Path) -> None:
    tiers = Tiers(f"file://{tmp_path}", 0, MIB)
    try:
        assert tiers.held([keys(range(3))]).result(10) == [{"host": 0}]
    finally:
        tiers.close()
