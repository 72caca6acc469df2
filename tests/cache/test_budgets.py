"""A store under budgets of any size, in any order, in one process or two, and on a disk that is full."""

import random
import subprocess
from pathlib import Path

import pytest

from cache.disk import DiskTier
from cache.lmdb_env import FORMAT, RECORDS, file_bytes
from tests.helpers.storage_children import items, right

MIB = 1 << 20


def test_a_smaller_budget_on_a_store_that_never_evicted_is_kept_to_and_writes_go_on(tmp_path: Path) -> None:
    pages = [(i.to_bytes(32, "big"), bytes(65_536)) for i in range(1900)]
    tier = DiskTier(tmp_path, 150 * MIB)
    for at in range(0, 1600, 16):
        tier.put_many(pages[at : at + 16])
    tier.close()
    for budget, at in ((20 * MIB, 1600), (4 * MIB, 1700)):
        tier = DiskTier(tmp_path, budget)
        tier.put_many(pages[at : at + 10])
        stats = tier.stats()
        assert (stats.errors, stats.dropped) == (0, 0)
        assert stats.bytes <= budget
        assert tier.contains_many([key for key, _ in pages[at : at + 10]]) == [True] * 10
        tier.close()


def test_a_small_server_reads_and_writes_beside_a_large_one_that_lets_the_file_grow(tmp_path, partners):
    small, large = partners
    small.open(str(tmp_path), 2 * MIB, MIB)
    small.put(0, 10)
    large.open(str(tmp_path), 40 * MIB, MIB)
    for start in range(1000, 1500, 50):
        large.put(start, 50)
    assert file_bytes(tmp_path / FORMAT) > 5 * MIB, "more than the small one has mapped"
    assert small.find(0, 10) == [True] * 10
    assert small.find(1490, 10) == [True] * 10
    small.put(20, 10)
    stats = small.stats()
    assert (stats["errors"], stats["dropped"]) == (0, 0)
    assert stats["bytes"] <= 2 * MIB
    assert small.find(20, 10) == large.find(20, 10) == [True] * 10
    assert large.stats()["errors"] == 0


def take_turns(directory, partners, seed: int) -> None:
    """Two processes open a store again and again under budgets of any size, and put, read and sync by turns."""
    rng, budgets, wrote, latest = random.Random(seed), {}, set(), 0
    for _ in range(40):
        number = rng.randrange(2)
        partner = partners[number]
        if number not in budgets:
            budgets[number] = int(2 ** rng.uniform(19, 24))
            partner.open(str(directory), budgets[number], MIB)
            wrote.discard(number)
            continue
        match rng.choice(["put", "put", "find", "sync", "close"]):
            case "put":
                latest += 100
                partner.put(latest, rng.randrange(1, 16))
                wrote.add(number)
                assert partner.find(latest, 1) == [True]
                assert partner.stats()["bytes"] <= budgets[number]
            case "find":
                partner.find(latest, 5)
            case "sync":
                partner.sync()
            case "close":
                partner.close()
                del budgets[number]
                continue
        stats = partner.stats()
        assert (stats["errors"], stats["dropped"], stats["corrupt"], stats["open"]) == (0, 0, 0, True)
    for _ in range(2):
        for number in budgets:
            partners[number].sync()
    for number in budgets:
        assert partners[number].stats()["bytes"] <= min((budgets[n] for n in budgets if n in wrote), default=1 << 40)
        partners[number].close()
    tier = DiskTier(directory, 64 * MIB)
    assert all(tier.check(remove=False))
    tier.close()


def test_budgets_of_any_size_in_any_order_keep_every_write(tmp_path, partners):
    for seed in range(12):
        take_turns(tmp_path / str(seed), partners, seed)


@pytest.mark.slow
def test_budgets_of_any_size_in_any_order_keep_every_write_four_hundred_times(tmp_path, partners):
    for seed in range(1000, 1400):
        take_turns(tmp_path / str(seed), partners, seed)


@pytest.mark.parametrize("name", [FORMAT, RECORDS])
def test_a_disk_that_is_full_when_a_store_is_opened_costs_the_store_until_there_is_room(small_disk, child, name):
    opener = child("open_full", small_disk, name)
    _, err = opener.communicate(timeout=60)
    assert opener.returncode == 0, f"{opener.returncode} {err.decode()[-2000:]}"
    assert err.decode().count("open fails, going on without") <= 40, "one warning a store"
    assert "damaged" not in err.decode()


def test_a_disk_that_fills_up_while_a_store_is_open_costs_pages_and_no_process(small_disk, child):
    user = child("fill_while_open", small_disk)
    _, err = user.communicate(timeout=60)
    assert user.returncode == 0, f"{user.returncode} {err.decode()[-2000:]}"
    subprocess.run(["rm", small_disk / "ballast"], check=True)
    tier = DiskTier(small_disk / "store", MIB)
    assert all(right(tier, range(10)))
    tier.put_many(items([20]))
    assert right(tier, [20]) == [True]
    tier.close()
