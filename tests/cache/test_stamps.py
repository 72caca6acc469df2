"""Pages go in the order of their stamps, so that of every chain the tail goes first, whoever uses it, however late."""

import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from cache.disk import DiskTier
from cache.host import HostTier
from tests.helpers.storage_children import chain_keys, items, key_of, keys

MIB = 1 << 20
SECOND = 10**9


def tier_of(kind: str, directory, budget: int):
    return DiskTier(directory, budget) if kind == "disk" else HostTier(budget)


@pytest.fixture(params=["disk", "host"])
def tier(request, tmp_path):
    tier = tier_of(request.param, tmp_path, 1_000_000)
    yield tier
    tier.close()


def stamps_of(used: int, numbers) -> list[int]:
    return [used - i for i in numbers]


def put(tier, numbers, used: int) -> None:
    tier.put_many([(key_of(i), bytes(40_000)) for i in numbers], stamps_of(used, numbers))


def test_a_conversation_of_turns_seconds_apart_loses_its_tail_first(tier):
    now = 1_700_000_000 * SECOND
    for turn in range(5):
        pages = range(4 * turn)
        tier.touch_many(keys(pages), stamps_of(now, pages))
        put(tier, range(4 * turn, 4 * turn + 4), now)
        tier.sync()
        now += 5 * SECOND
    for other in range(100, 126):
        put(tier, [other], now)
        there = tier.contains_many(keys(range(20)))
        assert there == sorted(there, reverse=True), "a tail without its head"
    assert not any(there)


def test_a_newer_stamp_wins_whatever_the_order_of_the_calls(tier):
    put(tier, range(3), 1000)
    for used in (5000, 2000):
        tier.touch_many(keys([0]), [used])
        tier.get_many(keys([1]), None, [used])
        put(tier, [2], used + 2)
        tier.sync()
    put(tier, range(10, 31), 4000)
    assert tier.contains_many(keys(range(3))) == [True] * 3, "they were used after what came"


def test_a_page_that_is_written_late_takes_no_newer_pages_place(tier):
    put(tier, range(10), 1000)
    put(tier, range(100, 130), 9000)
    there = tier.contains_many(keys(range(100, 130)))
    assert not any(tier.contains_many(keys(range(10))))
    put(tier, range(10, 12), 1000)
    assert tier.contains_many(keys(range(10, 12))) == [False] * 2
    assert tier.contains_many(keys(range(100, 130))) == there


def test_a_use_is_on_record_before_what_is_written_behind_it(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, MIB)
    put(tier, range(3), 1000)
    tier.touch_many(keys(range(3)), stamps_of(2000, range(3)))
    put(tier, [3], 2000)  # and no sync after it: the process might end here
    used = {entry.key: round(entry.last_used * 1e9) for entry in tier.entries()}
    assert [used[key] for key in keys(range(4))] == stamps_of(2000, range(4))
    tier.close()


def test_stamps_of_a_clock_that_was_ahead_keep_no_page_out(tier):
    put(tier, range(24), 4 * 10**18)  # the year 2096
    tier.put_many(items(range(100, 110)))
    assert all(tier.contains_many(keys(range(100, 110))))


def test_a_page_of_a_clock_that_was_ahead_counts_as_used_once_it_is(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 8 * MIB)
    now = time.time_ns()
    put(tier, range(10), now + 3600 * 10**9)  # the chain's head, an hour from now
    put(tier, range(100, 140), now - 600 * 10**9)
    tier.touch_many(keys(range(10)), stamps_of(now, range(10)))
    put(tier, range(10, 12), now)
    tier.prune(tier.stats().bytes * 2 // 3)
    assert all(tier.contains_many(keys(range(12))))
    tier.close()


def test_an_eviction_ends_though_a_scan_lists_what_no_search_finds(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 8 * MIB)
    put(tier, range(200), 10**18)
    tier.sync()
    (victim,) = keys([199])
    with (tier.store.path / "data.mdb").open("r+b") as file:
        data, at, flipped = file.read(), -1, 0
        while (at := data.find(victim, at + 1)) >= 0:
            file.seek(at)
            file.write(bytes([data[at] ^ 0x80]))
            flipped += 1
    assert flipped
    pruned = threading.Thread(target=tier.prune, args=(tier.stats().bytes - 30_000,), daemon=True)
    pruned.start()
    pruned.join(30)
    assert not pruned.is_alive()
    tier.close()


def chains(rng: random.Random) -> list[list[int]]:
    """Conversations in tokens, some of which begin as others do; each is longer than it ever gets in the test."""
    trunk = [rng.randrange(1000) for _ in range(60)]
    return [trunk[: 4 * rng.randrange(15)] + [rng.randrange(1000) for _ in range(80)] for _ in range(6)]


def stamps_in(partners) -> dict[str, dict[str, int]]:
    """What is on record in two host tiers and the disk that they share: stamps by key."""
    (host_a, disk), (host_b, _) = (partner.stamps() for partner in partners)
    return {"host a": host_a, "host b": host_b, "disk": disk}


def converse(directory, partners, seed: int) -> Counter:
    """Requests of several conversations in two processes, which read and write in slices, late and interleaved."""
    rng = random.Random(seed)
    conversations, lengths, running = chains(rng), Counter(), {}
    names = [[key.hex() for key in chain_keys(tokens)] for tokens in conversations]
    budget = rng.randrange(150_000, 400_000)
    evicted: Counter[str] = Counter()
    newest: Counter[str] = Counter()  # the latest stamp that any request has for a page
    # Pages that were missing when the latest request began, and that an earlier one has brought since: they look older
    # than what follows until the latest one gets there.
    late: set[tuple[str, str]] = set()
    for partner in partners:
        partner.start(str(directory), budget, rng.randrange(60_000, 250_000))
    before = stamps_in(partners)
    for number in range(200):
        if rng.random() < 0.4 or not running:
            chosen = rng.randrange(len(conversations))
            lengths[chosen] = min(lengths[chosen] + rng.randrange(1, 4), 20)
            partner = rng.choice(partners)
            tokens = conversations[chosen][: 4 * lengths[chosen]]
            used = partner.begin(number, tokens, rng.randrange(lengths[chosen]))
            newest |= Counter({key: used - i for i, key in enumerate(names[chosen][: lengths[chosen]])})
            running[number] = [partner, 0, lengths[chosen]]
        else:
            chosen = rng.choice(list(running))
            partner, first, length = running[chosen]
            stop = min(length, first + rng.randrange(1, 5))
            partner.step(chosen, first, stop, rng.random() < 0.7)
            running[chosen][1] = stop
            if stop == length:
                del running[chosen]
        if restarted := rng.random() < 0.03:
            partner.end()  # writes what is queued
            partner.start(str(directory), budget, rng.randrange(60_000, 250_000))
            running = {n: state for n, state in running.items() if state[0] is not partner}
        after = stamps_in(partners)
        for tier, stamps in after.items():
            gone, came = before[tier].keys() - stamps.keys(), stamps.keys() - before[tier].keys()
            evicted[tier] += 0 if restarted else len(gone)
            for chain in names:
                had = [key for key in chain if key in before[tier] and (tier, key) not in late]
                lost = [key for key in had if key in gone]
                assert lost == had[len(had) - len(lost) :], f"seed {seed}, {tier}: not the tail of a chain went"
            late |= {(tier, key) for key in came}
            late -= {(tier, key) for _, key in late if stamps.get(key, newest[key]) >= newest[key]}
            for chain in names:
                on_record = [stamps[key] for key in chain if key in stamps and (tier, key) not in late]
                assert on_record == sorted(on_record, reverse=True), f"seed {seed}, {tier}: a page older than the next"
        before = after
    for partner in partners:
        partner.end()
    return evicted


def test_what_is_evicted_is_the_tail_of_a_chain_in_two_tiers_and_two_processes(tmp_path, partners):
    evicted = sum((converse(tmp_path / str(seed), partners, seed) for seed in range(8)), Counter())
    assert min(evicted[tier] for tier in ("host a", "host b", "disk")) > 10, f"the tiers were too large: {evicted}"


@pytest.mark.slow
def test_what_is_evicted_is_the_tail_of_a_chain_three_hundred_times(tmp_path, partners):
    for seed in range(1000, 1300):
        converse(tmp_path / str(seed), partners, seed)
