"""Write-back: what is queued is written in time, and what fails or hangs costs nothing else."""

import threading
from pathlib import Path

import pytest

from cache.disk import DiskTier
from cache.host import HostTier
from cache.writeback import WriteBack
from tests.helpers.storage_children import items, keys, page_of, right

MIB = 1 << 20


def load(numbers):
    return lambda: [page_of(i) for i in numbers]


@pytest.fixture
def disk(tmp_path):
    tier = DiskTier(tmp_path, 10 * MIB)
    yield tier
    tier.close()


def watched(tier, method: str) -> threading.Event:
    """An event that is set each time a method of a tier returns."""
    done, call = threading.Event(), getattr(tier, method)

    def run(*arguments):
        try:
            return call(*arguments)
        finally:
            done.set()

    setattr(tier, method, run)
    return done


def test_pages_are_written_without_being_asked(disk):
    host, written = HostTier(10 * MIB), watched(disk, "put_many")
    writer = WriteBack([host, disk], flush_seconds=0.2)
    assert writer.submit(keys(range(3)), 60_000, load(range(3)))
    assert written.wait(60)
    assert all(right(disk, range(3)))
    assert all(right(host, range(3)))
    writer.close()


def test_a_flush_returns_once_everything_is_written(disk):
    writer = WriteBack([disk], flush_seconds=60)
    for i in range(20):
        writer.submit(keys([i]), 20_000, load([i]))
    assert writer.flush(30), "it does not wait for the flush time"
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


def test_a_full_queue_drops_newcomers_and_never_blocks() -> None:
    gate, begun, tier = threading.Event(), threading.Event(), HostTier(10 * MIB)
    writer = WriteBack([tier], flush_seconds=0, queue_bytes=50_000)

    def slow():
        begun.set()
        gate.wait(60)
        return [page_of(0)]

    assert writer.submit(keys([0]), 20_000, slow)
    assert begun.wait(60)
    assert writer.submit(keys([1]), 20_000, load([1]))
    assert not writer.submit(keys([2, 3]), 40_000, load([2, 3])), "it returns while the writer is still busy"
    assert not writer.flush(0.05), "a flush in vain says so"
    gate.set()
    assert writer.flush(30)
    assert right(tier, range(4)) == [True, True, False, False]
    assert writer.dropped == 2
    writer.close()


def test_payloads_that_cannot_be_loaded_cost_their_pages_only(caplog: pytest.LogCaptureFixture) -> None:
    tier = HostTier(10 * MIB)
    writer = WriteBack([tier], flush_seconds=0)
    writer.submit(keys([0]), 20_000, lambda: 1 / 0)
    writer.submit(keys([1]), 20_000, load([1]))
    assert writer.flush(30)
    assert right(tier, range(2)) == [False, True]
    assert writer.failed == 1
    assert "could not be loaded" in caplog.text
    writer.close()


def test_the_disk_learns_of_uses_even_when_nothing_is_written(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 10 * MIB)
    disk.put_many(items([0, 1]), [1000, 999])
    right(disk, [1])
    synced = watched(disk, "sync")
    writer = WriteBack([disk], flush_seconds=0.05)
    assert synced.wait(60)
    used = {entry.key: entry.last_used for entry in disk.entries()}
    assert used[keys([1])[0]] > used[keys([0])[0]]
    writer.close()
    disk.close()


def test_uses_are_recorded_before_what_is_submitted_after_them(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 10 * MIB)
    disk.put_many(items([0, 1]), [1000, 999])
    calls, touch, put = [], disk.touch_many, disk.put_many
    disk.touch_many = lambda *arguments: (calls.append("use"), touch(*arguments))[1]
    disk.put_many = lambda *arguments: (calls.append("put"), put(*arguments))[1]
    writer = WriteBack([disk], flush_seconds=60)
    writer.use(keys([0, 1]), [2000, 1999])
    writer.submit(keys([2]), 20_000, load([2]), [1998])
    writer.close()
    assert calls == ["use", "put"]
    assert [round(1e9 * e.last_used) for key in keys(range(3)) for e in disk.entries() if e.key == key] == [
        2000, 1999, 1998,
    ]  # fmt: skip
    disk.close()


@pytest.mark.parametrize("error", [OSError("bad disk"), MemoryError("no room for a copy"), ValueError("a fault")])
@pytest.mark.parametrize("method", ["put_many", "sync", "touch_many"])
def test_whatever_a_tier_raises_costs_its_own_pages_only_and_one_log_line(caplog, method, error):
    broken, sound = HostTier(10 * MIB), HostTier(10 * MIB)

    def fail(*_):
        raise error

    whole = getattr(broken, method)
    setattr(broken, method, fail)
    writer = WriteBack([broken, sound], flush_seconds=0)
    for i in range(5):
        writer.use(keys([i]), [i])
        assert writer.submit(keys([i]), 20_000, load([i]))
        assert writer.flush(60)
    assert right(sound, range(5)) == [True] * 5
    assert writer.queued_bytes == 0
    assert writer.failed == (5 if method == "put_many" else 0)
    assert writer.failures.count >= 5
    assert len(caplog.records) == 1
    setattr(broken, method, whole)
    writer.submit(keys([9]), 20_000, load([9]))
    assert writer.flush(60)
    assert right(broken, [9]) == [True]
    writer.close()


def test_flush_and_close_end_in_time_though_a_tier_hangs() -> None:
    tier, hung = HostTier(10 * MIB), threading.Event()
    tier.put_many = lambda *_: (hung.set(), threading.Event().wait())
    writer = WriteBack([tier], flush_seconds=0)
    writer.submit(keys([0]), 20_000, load([0]))
    assert hung.wait(60)
    assert not writer.flush(0.01)
    assert not writer.close(0.01)
    assert not writer.submit(keys([1]), 20_000, load([1]))


def test_a_flush_after_the_end_returns(disk):
    writer = WriteBack([disk])
    assert writer.close()
    assert writer.flush()


@pytest.mark.parametrize("method", ["contains_many", "get_many", "put_many", "sync", "close"])
def test_a_process_ends_in_time_though_a_tier_hangs(child, method):
    process = child("hang", method)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()[-2000:]
    assert float(out) < 30, "half a second was asked for"
    assert err.decode().count("did not close in") == 1 or method == "contains_many"
