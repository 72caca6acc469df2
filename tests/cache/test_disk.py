"""The disk tier: budgets, several processes, and every way in which a disk or a file can fail."""

import logging
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache.lmdb_env
from cache.disk import DiskTier
from cache.lmdb_env import FORMAT, OLD_FORMATS, RECORDS, StoreError, check_tree, file_bytes
from tests.helpers.storage_children import items, key_of, keys, page_of, right

MIB = 1 << 20


@pytest.fixture
def impatient(monkeypatch):
    """Failures are tried again at once."""
    monkeypatch.setattr(cache.lmdb_env, "RETRY_SECONDS", 0.0)


def flip_bit(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def snapshot(directory: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns) for p in directory.rglob("*")}


def test_pages_come_back_after_reopening(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "new" / "store", 10 * MIB)
    tier.put_many(items(range(5)))
    assert right(tier, range(6)) == [True] * 5 + [False]
    tier.close()
    tier = DiskTier(tmp_path / "new" / "store", 10 * MIB)
    assert tier.contains_many(keys(range(6))) == [True] * 5 + [False]
    assert right(tier, range(6)) == [True] * 5 + [False]
    stats = tier.stats()
    assert (stats.pages, stats.hits, stats.misses, stats.corrupt) == (5, 5, 1, 0)
    tier.delete(keys([0, 9]))
    assert right(tier, range(5)) == [False] + [True] * 4
    tier.close()


def test_any_contiguous_buffer_is_a_payload(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 10 * MIB)
    tier.put_many([(key_of(0), memoryview(page_of(0))), (key_of(1), bytearray(page_of(1)))])
    assert all(right(tier, range(2)))
    tier.close()


def test_the_budget_bounds_the_pages_and_the_file(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2 * MIB)
    for start in range(0, 1000, 10):
        tier.put_many(items(range(start, start + 10)))
        assert tier.stats().bytes <= 2 * MIB
    assert file_bytes(tmp_path / FORMAT) < 3.5 * MIB
    stats = tier.stats()
    assert stats.evicted == 1000 - stats.pages
    assert all(right(tier, range(960, 1000)))
    tier.close()


def test_putting_what_is_there_evicts_nothing_and_counts_as_a_use(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2 * MIB)
    while tier.stats().bytes + 60_000 < 2 * MIB:
        count = tier.stats().pages
        tier.put_many(items([count]))
    for _ in range(3):
        tier.put_many(items(range(count + 1)))
    assert tier.stats().evicted == 0
    tier.put_many(items([0]))
    tier.prune(100_000)
    assert tier.contains_many(keys([0]))[0]
    tier.close()


def test_what_exceeds_the_whole_budget_is_dropped_tail_first(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, MIB)
    tier.put_many(items(range(100)))
    there = right(tier, range(100))
    assert there.count(True) > 30
    assert there == sorted(there, reverse=True), "a chain without its head"
    assert tier.stats().dropped == there.count(False)
    tier.close()


def test_one_use_of_a_chain_lets_its_tail_go_first(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2 * MIB)
    for i in (3, 1, 0, 2):
        tier.put_many(items([i]))
    right(tier, range(4))
    tier.put_many(items(range(10, 70)))
    tier.prune(tier.stats().bytes - 1)
    for _ in range(100):
        there = tier.contains_many(keys(range(4)))
        assert there == sorted(there, reverse=True)
        tier.prune(tier.stats().bytes - 30_000)
    assert tier.stats().pages == 0
    tier.close()


class Clock:
    """What the tier should know: when each page was used last."""

    def __init__(self) -> None:
        self.now, self.used = 0, {}

    def use(self, numbers) -> None:
        for i in reversed(numbers):
            self.now += 1
            self.used[i] = self.now


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pgds"), st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True))))
def test_what_is_evicted_was_used_less_recently_than_what_stays(tmp_path_factory, steps):
    tier = DiskTier(tmp_path_factory.mktemp("lru"), 500_000)
    model = Clock()
    for step, numbers in steps:
        if step == "p":
            tier.put_many(items(numbers))
            model.use(numbers)
        elif step == "g":
            there = right(tier, numbers)
            model.use([i for i, found in zip(numbers, there, strict=True) if found])
        elif step == "d":
            tier.delete(keys(numbers))
            for i in numbers:
                model.used.pop(i, None)
        else:
            tier.sync()
        there = dict(zip(model.used, tier.contains_many(keys(model.used)), strict=True))
        kept = [model.used[i] for i in there if there[i]]
        gone = [model.used[i] for i in there if not there[i]]
        assert not gone or not kept or max(gone) < min(kept)
        model.used = {i: model.used[i] for i in there if there[i]}
        assert tier.stats().pages == len(model.used)
        assert tier.stats().bytes <= tier.budget_bytes
    tier.close()
    assert not tier.stats().errors


def test_a_flipped_bit_in_a_payload_is_a_miss_that_is_removed_and_can_be_put_again(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 10 * MIB)
    tier.put_many(items(range(10)))
    data = tmp_path / FORMAT / "data.mdb"
    flip_bit(data, data.read_bytes().index(page_of(3)[1000:2000]) + 17)
    assert right(tier, range(10)) == [True] * 3 + [False] + [True] * 6
    assert not tier.contains_many(keys([3]))[0]
    tier.put_many(items([3]))
    assert all(right(tier, range(10)))
    assert (tier.stats().corrupt, tier.stats().errors) == (1, 0)
    tier.close()


def test_flipped_bits_anywhere_give_no_wrong_page_and_no_crash(tmp_path, child):
    tier = DiskTier(tmp_path, 4_000_000)
    for start in range(0, 120, 4):
        tier.put_many(items(range(start, start + 4)))  # evicts at last, so that there is a free list
    tier.close()
    flips = child("flip", tmp_path, 0, 80)
    out, err = flips.communicate(timeout=300)
    assert flips.returncode == 0, err.decode()[-2000:]
    damaged_trees, corrupt = map(int, out.split())
    assert damaged_trees > 5
    assert corrupt > 5


def test_payload_bits_that_flip_under_a_running_process_give_no_wrong_page(tmp_path, child):
    flips = child("flip_live", tmp_path, 0, 150)
    out, err = flips.communicate(timeout=300)
    assert flips.returncode == 0, err.decode()[-2000:]
    _, corrupt = map(int, out.split())
    assert corrupt > 10


@pytest.mark.slow
def test_a_thousand_flipped_bits_give_no_wrong_page_and_no_crash(tmp_path, child):
    tier = DiskTier(tmp_path, 4_000_000)
    for start in range(0, 120, 4):
        tier.put_many(items(range(start, start + 4)))
    tier.close()
    flips = child("flip", tmp_path, 1000, 1000)
    _, err = flips.communicate(timeout=600)
    assert flips.returncode == 0, err.decode()[-2000:]


def test_a_tree_that_takes_too_long_to_check_is_used_unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, MIB)
    tier.put_many(items([1]))
    tier.close()
    monkeypatch.setattr(cache.lmdb_env, "CHECK_SECONDS", 0.001)
    tier = DiskTier(tmp_path, MIB)
    assert right(tier, [1]) == [True]
    tier.close()


def kill_writers(directory: Path, child, times: int) -> None:
    """Kill a writer that evicts all the time, at random moments; nothing acknowledged may be lost, nothing torn."""
    rng, budget, start = random.Random(0), 2 * MIB, 0
    for _ in range(times):
        writer = child("write_forever", directory, budget, start)
        last = int(writer.stdout.readline())
        time.sleep(rng.random() * 0.1)
        writer.send_signal(signal.SIGKILL)
        out, _ = writer.communicate()
        acknowledged = [int(line) for line in out.split(b"\n")[:-1]]
        last = max([last, *acknowledged])
        tier = DiskTier(directory, budget)
        assert all(right(tier, range(max(start, last - 39), last + 1))), "an acknowledged page was lost"
        assert all(tier.check(remove=False))
        assert (tier.stats().errors, tier.stats().corrupt) == (0, 0)
        assert tier.stats().bytes <= budget
        tier.close()
        assert check_tree(directory / FORMAT, 60) == ""
        start = last + 10


def test_a_writer_killed_twenty_times_loses_nothing_that_it_acknowledged(tmp_path, child):
    kill_writers(tmp_path, child, 20)


@pytest.mark.slow
def test_a_writer_killed_two_hundred_times_loses_nothing_that_it_acknowledged(tmp_path, child):
    kill_writers(tmp_path, child, 200)


def share(directory: Path, child, seconds: float) -> None:
    sharers = [child("share", directory, 2 * MIB, seconds, seed) for seed in range(2)]
    for sharer in sharers:
        _, err = sharer.communicate(timeout=seconds + 60)
        assert sharer.returncode == 0, err.decode()[-2000:]
    tier = DiskTier(directory, 2 * MIB)
    assert all(tier.check(remove=False))
    assert tier.stats().bytes <= 2.2 * MIB
    assert not tier.stats().errors
    tier.close()


def test_two_processes_read_write_and_prune_one_directory(tmp_path, child):
    share(tmp_path, child, 4)


@pytest.mark.slow
def test_two_processes_read_write_and_prune_one_directory_for_a_minute(tmp_path, child):
    share(tmp_path, child, 60)


def test_a_second_process_reads_what_the_first_has_open(tmp_path, child):
    writer = child("write_forever", tmp_path, 4 * MIB, 0)
    last = int(writer.stdout.readline())
    tier = DiskTier(tmp_path, 4 * MIB)
    assert all(right(tier, range(last + 1)))
    tier.close()


def test_files_at_their_size_limit_make_room_by_eviction(tmp_path, child):
    full = child("fill_up", tmp_path, 2 * MIB)
    _, err = full.communicate(timeout=60)
    assert full.returncode == 0, err.decode()[-2000:]
    tier = DiskTier(tmp_path, 1 << 30)
    assert all(tier.check(remove=False))
    tier.close()


def test_a_full_disk_costs_pages_and_one_warning_until_there_is_room(small_disk, impatient, caplog):
    tier = DiskTier(small_disk / "store", 1 << 30)
    tier.put_many(items(range(20)))
    (small_disk / "ballast").write_bytes(bytes(8 * MIB - sum(f.stat().st_size for f in small_disk.rglob("*.mdb"))))
    for i in range(20, 26):
        tier.put_many([(key_of(i), bytes(2 * MIB))])
    stats = tier.stats()
    assert stats.dropped > 0
    assert stats.errors > 0
    assert len(warnings_in(caplog)) == 1
    (small_disk / "ballast").unlink()
    tier.put_many(items(range(30, 50)))
    assert all(right(tier, range(30, 50)))
    assert len(warnings_in(caplog)) == 1
    tier.close()


def test_a_read_only_directory_is_read_and_not_written(small_disk, impatient, caplog):
    tier = DiskTier(small_disk, 4 * MIB)
    tier.put_many(items(range(5)))
    tier.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    tier = DiskTier(small_disk, 4 * MIB)
    assert all(right(tier, range(5)))
    for i in range(5, 8):
        tier.put_many(items([i]))
    assert right(tier, range(8)) == [True] * 5 + [False] * 3
    assert tier.stats().dropped == 3
    assert len(warnings_in(caplog)) == 1
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    tier.put_many(items([8]))
    tier.put_many(items([9]))
    assert all(right(tier, [0, 9]))
    tier.close()


def test_a_directory_that_cannot_be_made_costs_hits_and_one_warning(small_disk, caplog):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    tier = DiskTier(small_disk / "new", 4 * MIB)
    tier.put_many(items([1]))
    assert right(tier, [1]) == [False]
    assert tier.contains_many(keys([1])) == [False]
    assert tier.stats().dropped == 1
    assert len(warnings_in(caplog)) == 1
    tier.close()


def test_a_vanished_directory_costs_hits_and_one_warning_until_it_is_back(tmp_path, impatient, caplog):
    caplog.set_level(logging.INFO)
    directory = tmp_path / "store"
    tier = DiskTier(directory, 4 * MIB)
    tier.put_many(items(range(5)))
    shutil.rmtree(directory)
    for i in range(5):
        assert right(tier, [i]) == [False]
        tier.put_many(items([10 + i]))
        tier.sync()
    assert not directory.exists(), "what vanished is not ours to make again"
    assert tier.stats().errors > 0
    assert len(warnings_in(caplog)) == 1
    directory.mkdir()
    tier.put_many(items([1]))
    assert all(right(tier, [1]))
    assert (directory / FORMAT / "data.mdb").exists()
    assert len(warnings_in(caplog)) == 1
    tier.close()


def test_a_directory_swapped_for_another_store_is_read_anew(tmp_path, impatient):
    tier = DiskTier(tmp_path / "a", 4 * MIB)
    tier.put_many(items([1]))
    other = DiskTier(tmp_path / "b", 4 * MIB)
    other.put_many(items([2]))
    other.close()
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "b").rename(tmp_path / "a")
    assert right(tier, [1, 2]) == [False, False], "what a read cannot open is a miss"
    tier.sync()
    assert right(tier, [1, 2]) == [False, True]
    tier.close()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data.mdb": b"x", "lock.mdb": b""}, "another program (data.mdb, lock.mdb)"),
        ({"tokenzero-pages-v9/data.mdb": b"x"}, f"found tokenzero-pages-v9, expected a folder {FORMAT}"),
        ({FORMAT: b"a file"}, FORMAT),
    ],
)
def test_a_directory_of_another_program_or_version_is_refused_and_left_as_it_was(tmp_path, content, expected):
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = snapshot(tmp_path)
    with pytest.raises(StoreError) as refused:
        DiskTier(tmp_path, MIB)
    assert str(tmp_path) in str(refused.value)
    assert expected in str(refused.value)
    assert snapshot(tmp_path) == before


def test_while_a_store_is_checked_reads_miss_at_once_and_stats_are_the_last_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(tmp_path, 4 * MIB)
    tier.put_many(items(range(3)))
    known, checking, go = tier.stats(), threading.Event(), threading.Event()
    monkeypatch.setattr(cache.lmdb_env, "check_tree", lambda *_: (checking.set(), go.wait(60), "")[2])
    tier.store.stale = True  # as after an error of LMDB's
    writer = threading.Thread(target=tier.sync)
    writer.start()
    assert checking.wait(60)
    buffers = np.zeros((3, len(page_of(0))), np.uint8)
    assert tier.get_many(keys(range(3)), buffers) == [None] * 3
    assert tier.contains_many(keys(range(3))) == [False] * 3
    stats = tier.stats()
    assert (stats.pages, stats.bytes, stats.open) == (known.pages, known.bytes, False)
    assert writer.is_alive(), "nothing of this waited for the check"
    go.set()
    writer.join(60)
    assert tier.stats().open
    assert all(right(tier, range(3)))
    tier.close()


@pytest.mark.parametrize("lost", ["data.mdb", "lock.mdb"])
def test_a_store_that_lost_a_file_while_two_processes_use_it_is_made_again_by_one_of_them(
    tmp_path, partners, impatient, caplog, lost
):
    first, second = partners
    for partner in partners:
        partner.open(str(tmp_path), 4 * MIB, MIB)
        partner.put(0, 5)
    tier = DiskTier(tmp_path, 4 * MIB)
    assert all(right(tier, range(5)))
    (tmp_path / FORMAT / lost).unlink()
    tier.put_many(items([20]))
    assert not tier.stats().open, "others still use the old files"
    assert tier.stats().dropped == 1
    assert len(warnings_in(caplog)) == 1
    assert lost in warnings_in(caplog)[0]
    first.sync()
    second.sync()
    tier.sync()
    assert tier.stats().open
    tier.put_many(items([21]))
    assert right(tier, [21]) == [True]
    assert right(tier, range(5)) == [lost == "lock.mdb"] * 5
    tier.close()
    assert check_tree(tmp_path / FORMAT, 60) == ""


@pytest.mark.parametrize("lost", ["data.mdb", "lock.mdb"])
def test_a_store_that_has_lost_a_file_is_opened(tmp_path, lost, caplog):
    tier = DiskTier(tmp_path, 4 * MIB)
    tier.put_many(items(range(5)))
    tier.close()
    (tmp_path / FORMAT / lost).unlink()
    tier = DiskTier(tmp_path, 4 * MIB)
    assert right(tier, range(5)) == [lost == "lock.mdb"] * 5
    tier.put_many(items([9]))
    assert right(tier, [9]) == [True]
    assert not warnings_in(caplog)
    tier.close()


def test_a_store_of_an_older_format_is_left_alone_and_named_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (old,) = OLD_FORMATS
    tier = DiskTier(tmp_path, 4 * MIB, name=old)
    tier.put_many(items(range(5)))
    tier.close()
    before = snapshot(tmp_path / old)
    tier = DiskTier(tmp_path, 4 * MIB)
    assert right(tier, range(5)) == [False] * 5, "its pages may be wrong"
    tier.put_many(items([1]))
    tier.close()
    assert snapshot(tmp_path / old) == before
    (line,) = warnings_in(caplog)
    assert old in line
    assert f"python -m cache prune --old --store {tmp_path}" in line


def test_records_that_were_kept_under_an_older_name_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (old,) = OLD_FORMATS
    tier = DiskTier(tmp_path, 4 * MIB, name=old)
    tier.put_many(items(range(5)))
    tier.close()
    for _ in range(2):
        tier = DiskTier(tmp_path, 4 * MIB, name=RECORDS)
        assert all(right(tier, range(5)))
        tier.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [RECORDS]
    assert not warnings_in(caplog)


def test_stores_in_one_directory_may_be_opened_in_any_order(tmp_path: Path) -> None:
    for directory in (tmp_path / "replay", tmp_path, tmp_path / "segments"):
        tier = DiskTier(directory, MIB)
        tier.put_many(items([1]))
        assert right(tier, [1]) == [True]
        tier.close()
    (tmp_path / "letter.txt").write_bytes(b"mine")
    shutil.rmtree(tmp_path / FORMAT)
    with pytest.raises(StoreError, match=r"another program \(letter.txt\)"):
        DiskTier(tmp_path, MIB)


def test_a_file_in_place_of_the_directory_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    threads = {*threading.enumerate()}
    with pytest.raises(StoreError, match="found a file, expected a directory"):
        DiskTier(tmp_path / "file", MIB)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert not {*threading.enumerate()} - threads


def test_many_threads_may_use_one_tier(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 3 * MIB)

    def work(seed: int) -> int:
        rng, hits = random.Random(seed), 0
        for _ in range(30):
            start = rng.randrange(200)
            tier.put_many(items(range(start, start + 3)))
            hits += sum(right(tier, [rng.randrange(200) for _ in range(5)]))
        return hits

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 0
    stats = tier.stats()
    assert (stats.errors, stats.corrupt, stats.dropped) == (0, 0, 0)
    tier.close()


def test_closing_lets_another_process_check_the_tree(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, MIB)
    tier.close()
    assert tier.store.claim == -1
    assert not [fd for fd in os.listdir("/proc/self/fd") if FORMAT in os.path.realpath(f"/proc/self/fd/{fd}")]


def test_a_directory_may_vanish_and_come_back_under_many_threads(tmp_path, impatient):
    directory = tmp_path / "store"
    tier = DiskTier(directory, 3 * MIB)
    stop = threading.Event()

    def work(seed: int) -> int:
        rng, hits = random.Random(seed), 0
        while not stop.is_set():
            start = rng.randrange(20)
            tier.put_many(items(range(start, start + 3)))
            hits += sum(right(tier, range(start, start + 5)))
            tier.sync()
        return hits

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work, seed) for seed in range(4)]
        for _ in range(10):
            time.sleep(0.05)
            shutil.rmtree(directory, ignore_errors=True)
            time.sleep(0.01)
            directory.mkdir(exist_ok=True)
        time.sleep(0.1)
        stop.set()
        assert all(worker.result() > 0 for worker in workers)
    tier.put_many(items([1]))
    assert right(tier, [1]) == [True]
    tier.close()


def test_a_directory_that_another_user_owns_costs_hits_and_nothing_else(child):
    if os.getuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        tier = DiskTier(f"{name}/store", 4 * MIB)
        tier.put_many(items(range(3)))
        tier.close()
        nobody = child("as_nobody", f"{name}/store")
        _, err = nobody.communicate(timeout=60)
        assert nobody.returncode == 0, err.decode()[-2000:]
        assert err.decode().count("Permission denied") == 1, "one warning"
        tier = DiskTier(f"{name}/store", 4 * MIB)
        assert all(right(tier, range(3)))
        tier.close()
