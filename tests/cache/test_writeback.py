import threading
import time

import pytest
from storage_children import items, keys, page_of, right

from cache.disk import DiskTier
from cache.tiers import HostTier
from cache.writeback import WriteBack

MIB = 1 << 20


def load(numbers):
    return lambda: [page_of(i) for i in numbers]


@pytest.fixture
def disk(tmp_path):
    tier = DiskTier(tmp_path, 10 * MIB)
    yield tier
    tier.close()


def test_pages_are_on_disk_within_the_flush_time_without_being_asked(disk):
    host = HostTier(10 * MIB)
    writer = WriteBack([host, disk], flush_seconds=0.2)
    assert writer.submit(keys(range(3)), 60_000, load(range(3)))
    deadline = time.monotonic() + 5  # generous: the machine may be busy
    while not all(disk.contains_many(keys(range(3)))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(right(disk, range(3)))
    assert all(right(host, range(3)))
    writer.close()


def test_a_flush_returns_once_everything_is_written(disk):
    writer = WriteBack([disk], flush_seconds=60)
    for i in range(20):
        writer.submit(keys([i]), 20_000, load([i]))
    start = time.monotonic()
    assert writer.flush(30)
    assert time.monotonic() - start < 30
    assert all(right(disk, range(20)))
    assert writer.flush(30), "nothing to do is done at once"
    writer.close()


def test_closing_writes_what_is_queued_and_drops_what_comes_later(disk):
    writer = WriteBack([disk], flush_seconds=60)
    writer.submit(keys([0]), 20_000, load([0]))
    writer.close()
    assert not writer.submit(keys([1]), 20_000, load([1]))
    assert right(disk, range(2)) == [True, False]
    assert writer.dropped == 1


def test_a_full_queue_drops_newcomers_and_never_blocks():
    gate, tier = threading.Event(), HostTier(10 * MIB)
    writer = WriteBack([tier], flush_seconds=0, queue_bytes=50_000)

    def slow():
        gate.wait(30)
        return [page_of(0)]

    assert writer.submit(keys([0]), 20_000, slow)
    assert writer.submit(keys([1]), 20_000, load([1]))
    start = time.monotonic()
    assert not writer.submit(keys([2, 3]), 40_000, load([2, 3]))
    assert time.monotonic() - start < 1
    assert not writer.flush(0.05), "a flush in vain says so"
    gate.set()
    assert writer.flush(30)
    assert right(tier, range(4)) == [True, True, False, False]
    assert writer.dropped == 2
    writer.close()


def test_payloads_that_cannot_be_loaded_cost_their_pages_only(caplog):
    tier = HostTier(10 * MIB)
    writer = WriteBack([tier], flush_seconds=0)
    writer.submit(keys([0]), 20_000, lambda: 1 / 0)
    writer.submit(keys([1]), 20_000, load([1]))
    assert writer.flush(30)
    assert right(tier, range(2)) == [False, True]
    assert writer.failed == 1
    assert "could not be loaded" in caplog.text
    writer.close()


def test_the_disk_learns_of_uses_even_when_nothing_is_written(tmp_path):
    disk = DiskTier(tmp_path, 10 * MIB)
    disk.put_many(items([0, 1]))
    written = {entry.key: entry.last_used for entry in disk.entries()}
    writer = WriteBack([disk], flush_seconds=0.05)
    right(disk, [1])
    deadline = time.monotonic() + 5
    while {e.key: e.last_used for e in disk.entries()} == written and time.monotonic() < deadline:
        time.sleep(0.01)
    used = {entry.key: entry.last_used for entry in disk.entries()}
    assert used[keys([1])[0]] > written[keys([1])[0]]
    writer.close()
    disk.close()
