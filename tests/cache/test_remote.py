"""The remote tier over files: damage, failures and slow answers."""

import logging
import shutil
import time

import pytest

import cache.remote
from cache.remote import RemoteTier, name_of
from tests.helpers.storage_children import items, keys, page_of, right


@pytest.fixture
def tier(tmp_path) -> RemoteTier:
    return RemoteTier(f"file://{tmp_path}/shared/")


def test_pages_are_shared_by_url(tmp_path, tier):
    tier.put_many(items(range(40)))
    other = RemoteTier(f"file://{tmp_path}/shared")
    assert other.contains_many(keys(range(41))) == [True] * 40 + [False]
    assert right(other, range(41)) == [True] * 40 + [False]
    assert other.delete(keys([3]))
    assert right(tier, [2, 3]) == [True, False]
    stats = other.stats()
    assert (stats.hits, stats.misses, stats.corrupt, stats.errors) == (40, 1, 0, 0)


def test_it_says_so_when_something_may_not_be_deleted(tmp_path, tier):
    tier.put_many(items([0]))
    tier.retry_at = time.monotonic() + 60  # as after a failure
    assert not tier.delete(keys([0]))
    tier.retry_at = 0.0
    assert right(tier, [0]) == [True]


def test_what_is_there_is_not_written_again(tier):
    tier.put_many(items([0, 1]))
    tier.put_many(items([0, 1, 2]))
    assert tier.stats().bytes_written == sum(len(page_of(i)) for i in range(3))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:50] + b"?" + b[51:], lambda b: b + b"0"]
)
def test_a_damaged_object_is_a_miss_and_is_removed(tmp_path, tier, damage):
    tier.put_many(items([0, 1]))
    path = tmp_path / "shared" / name_of(keys([0])[0])
    path.write_bytes(damage(path.read_bytes()))
    assert right(tier, [0, 1]) == [False, True]
    assert not path.exists()
    assert tier.stats().corrupt == 1


def test_a_page_under_another_name_is_a_miss(tmp_path, tier):
    tier.put_many(items([0, 1]))
    first, second = (tmp_path / "shared" / name_of(key) for key in keys([0, 1]))
    shutil.copy(first, second)
    assert right(tier, [0, 1]) == [True, False]


def test_a_store_that_fails_costs_hits_and_one_warning_until_it_works(tmp_path, tier, monkeypatch, caplog):
    tier.put_many(items([0]))
    (tmp_path / "shared").rename(tmp_path / "moved")
    (tmp_path / "shared").write_bytes(b"a file")
    with caplog.at_level(logging.WARNING, "tokenzero.cache.remote"):
        for i in range(3):
            assert right(tier, [0]) == [False]
            tier.put_many(items([i]))
    assert len(caplog.records) == 1
    assert tier.stats().errors == 1, "it is left alone for a while"
    assert tier.stats().dropped == 3
    (tmp_path / "shared").unlink()
    (tmp_path / "moved").rename(tmp_path / "shared")
    tier.retry_at = 0.0
    assert right(tier, [0]) == [True]
    tier.put_many(items([5]))
    assert right(tier, [5]) == [True]


def test_a_server_that_does_not_answer_costs_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.remote, "RETRY_SECONDS", 60.0)
    tier = RemoteTier("http://127.0.0.1:9/", timeout_seconds=0.3)
    assert right(tier, range(70)) == [False] * 70
    assert tier.contains_many(keys(range(70))) == [False] * 70
    tier.put_many(items(range(3)))
    assert tier.stats().dropped == 3


def test_a_url_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="unsupported URL scheme"):
        RemoteTier("nowhere://pages/")
