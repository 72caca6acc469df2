"""The remote tier on an S3 server of one's own: moto's, over HTTP."""

import logging
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from cache.remote import RemoteTier, name_of
from cache.tiers import Tiers
from tests.helpers.storage_children import items, key_of, keys, page_of, right


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with a bucket `pages`, where the environment points to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    httpx.post(f"{url}/moto-api/reset").raise_for_status()
    httpx.put(f"{url}/pages").raise_for_status()
    yield url
    server.stop()


def test_machines_share_pages_in_a_bucket(endpoint):
    tier, other = RemoteTier("s3://pages/shared"), RemoteTier("s3://pages/shared/")
    tier.put_many(items(range(40)))
    assert other.contains_many(keys(range(41))) == [True] * 40 + [False]
    assert right(other, range(41), in_buffers=True) == [True] * 40 + [False]
    assert right(RemoteTier("s3://pages/elsewhere"), range(3)) == [False] * 3
    other.delete(keys([3]))
    assert right(tier, [2, 3]) == [True, False]
    stats = other.stats()
    assert (stats.hits, stats.misses, stats.corrupt, stats.errors) == (40, 1, 0, 0)


def test_a_damaged_object_is_a_miss_and_is_removed(endpoint):
    tier = RemoteTier("s3://pages/shared")
    tier.put_many(items([0, 1]))
    name = name_of(key_of(0))
    stored = tier.store.read(name).result().value
    tier.store.write(name, stored[:50] + b"?" + stored[51:]).result()
    assert right(tier, [0, 1]) == [False, True]
    assert tier.contains_many(keys([0, 1])) == [False, True]
    assert tier.stats().corrupt == 1


def test_what_is_written_behind_is_found_by_another_machine(endpoint):
    here = Tiers("s3://pages/shared", 0, 0, flush_seconds=0.1)
    here.writer.submit(keys([0, 7]), 40_000, lambda: [page_of(0), page_of(7)])
    here.close()
    there = Tiers("s3://pages/shared", 0, 10**6)
    assert there.pages.locate(keys([0, 7, 1])) == ["remote", "remote", None]
    rows = np.empty((2, len(page_of(0))), np.uint8)
    assert there.pages.read(keys([0, 7]), rows).sources == ["remote", "remote"]
    assert [row.tobytes() for row in rows] == [page_of(0), page_of(7)]
    assert there.pages.locate(keys([0, 7])) == ["host", "host"]
    there.close()


def test_a_bucket_that_is_not_there_costs_hits_and_one_warning(endpoint, caplog):
    tier = RemoteTier("s3://nowhere/shared")
    for i in range(3):
        tier.put_many(items([i]))
        assert right(tier, [i]) == [False]
    assert tier.stats().dropped == 3
    assert len([record for record in caplog.records if record.name == "tokenzero.cache.remote"]) == 1
