"""The remote tier: pages shared between machines, in any TensorStore KvStore (`file://`, `s3://`, `gs://`, or a spec).

An object is seal (length and XXH3-64) and payload under `tokenzero-pages-v2/<2 hex digits>/<key in hex>`. There is no
budget and no eviction here, since machines do not share a record of uses: use a lifecycle rule of the bucket. KvStore
is documented at https://google.github.io/tensorstore/kvstore/index.html.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts

from cache.lmdb_env import FORMAT, RETRY_SECONDS
from cache.tier import SEAL, Item, Payload, TierStats, placed, seal

log = logging.getLogger("tokenzero.cache.remote")
T = TypeVar("T")


class RemoteTier:
    """Pages behind a URL; `s3://` follows AWS_ENDPOINT_URL and AWS_REGION, as Amazon's own tools do.

    A written page is visible to all machines when put_many returns. After a failure, or an answer slower than
    `timeout_seconds`, the tier is not used for RETRY_SECONDS, so that a dead network delays one request, not all.
    Raises ValueError if TensorStore refuses the URL.
    """

    def __init__(self, url: str, timeout_seconds: float = 10.0, in_flight: int = 32) -> None:
        self.name = "remote"
        self.budget_bytes = 0
        self.url = url
        self.timeout_seconds = timeout_seconds
        self.in_flight = in_flight
        self.store = ts.KvStore.open(place(url)).result(timeout=timeout_seconds)
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()  # of counts
        self.retry_at = 0.0  # nothing is tried before
        self.failing = False

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See Tier. One small read per key, many in parallel: tens of milliseconds over a network."""
        results = self._each(keys, lambda key: self.store.read(name_of(key), byte_range=slice(0, SEAL.size)))
        return [result is not None and result.state == "value" for result in results]

    def touch_many(self, keys: Sequence[bytes], stamps: Sequence[int] | None = None) -> list[bool]:
        """See Tier. Always True: uses are not recorded here, and to look would cost a read per key."""
        return [True] * len(keys)

    def demote_many(self, keys: Sequence[bytes], stamps: Sequence[int], seconds: float) -> None:
        """See Tier. Do nothing: a bucket has no stamps."""

    def recent(self, size: int, count: int) -> list[bytes]:
        """See Tier. Always empty: uses are not recorded here, and to list a bucket may take minutes."""
        return []

    def get_many(
        self,
        keys: Sequence[bytes],
        into: Sequence[np.ndarray] | None = None,
        stamps: Sequence[int] | None = None,
    ) -> list[Payload | None]:
        """See Tier. An object that does not match its seal is a miss, counted and removed; uses are not recorded."""
        results = self._each(keys, lambda key: self.store.read(name_of(key)))
        buffers = [None] * len(keys) if into is None else into
        return [self._opened(*item) for item in zip(keys, results, buffers, strict=True)]

    def put_many(self, items: Sequence[Item], stamps: Sequence[int] | None = None) -> None:
        """See Tier. Objects that are there are not written again."""
        there = self.contains_many([key for key, _ in items])
        new = [item for item, found in zip(items, there, strict=True) if not found]
        results = self._each(new, lambda item: self.store.write(name_of(item[0]), seal(*item) + item[1]))
        written = [memoryview(p).nbytes for (_, p), result in zip(new, results, strict=True) if result is not None]
        self._count(bytes_written=sum(written), dropped=len(new) - len(written))

    def delete(self, keys: Sequence[bytes]) -> bool:
        """See Tier."""
        return all(done is not None for done in self._each(keys, lambda key: self.store.write(name_of(key), None)))

    def sync(self) -> None:
        """Do nothing: TensorStore writes through."""

    def stats(self) -> TierStats:
        """Counters; pages and bytes are 0, since counting a bucket takes a listing of it."""
        with self.lock:
            is_open = time.monotonic() >= self.retry_at
            return TierStats(self.name, 0, 0, self.budget_bytes, open=is_open, **self.counts)

    def close(self) -> None:
        """Do nothing: TensorStore manages its connections."""

    def _each(self, things: Sequence[T], start: Callable[[T], Any]) -> list[Any]:
        """The result of a TensorStore operation for each thing, `in_flight` in parallel; None where it failed."""
        results: list[Any] = []
        for at in range(0, len(things), self.in_flight):
            if time.monotonic() < self.retry_at:
                break
            futures = [start(thing) for thing in things[at : at + self.in_flight]]
            results += [self._result(future) for future in futures]
        return results + [None] * (len(things) - len(results))

    def _result(self, future: Any) -> Any:
        # After one operation timed out, do not wait for the others.
        wait = self.timeout_seconds if time.monotonic() >= self.retry_at else 0.0
        try:
            result = future.result(timeout=wait)
        except (ValueError, OSError, TimeoutError, RuntimeError) as error:
            self._count(errors=1)
            self.retry_at = time.monotonic() + RETRY_SECONDS
            if not self.failing:
                log.warning("%s fails, going on without: %s", self.url, str(error) or "no answer in time")
            self.failing = True
            return None
        self.failing = self.failing and time.monotonic() < self.retry_at
        return result

    def _opened(self, key: bytes, result: Any, buffer: np.ndarray | None) -> Payload | None:
        if result is None or result.state != "value":
            self._count(misses=1)
            return None
        payload = memoryview(result.value)[SEAL.size :]
        if seal(key, payload) != result.value[: SEAL.size]:
            self._count(misses=1, corrupt=1)
            self.delete([key])
            return None
        found = placed(payload, buffer)
        self._count(**({"misses": 1} if found is None else {"hits": 1, "bytes_read": payload.nbytes}))
        return found

    def _count(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)


def place(url: str) -> str | dict[str, str]:
    """The TensorStore spec of a URL, with the endpoint of AWS_ENDPOINT_URL, which TensorStore does not read itself."""
    # TensorStore joins a path and a key without a separator.
    folder = url if url.endswith("/") else url + "/"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint or not folder.startswith("s3://"):
        return folder
    bucket, _, path = folder.removeprefix("s3://").partition("/")
    region = os.environ.get("AWS_REGION", "us-east-1")
    return {"driver": "s3", "bucket": bucket, "path": path, "endpoint": endpoint, "aws_region": region}


def name_of(key: bytes) -> str:
    """The object's name, in one of 256 folders: a single folder of a million files is slow to list."""
    return f"{FORMAT}/{key.hex()[:2]}/{key.hex()}"
