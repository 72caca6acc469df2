"""The records of the disk tier (see `cache.disk`), one at a time: read and checked, stamped, deleted."""

import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

import lmdb
import numpy as np

from cache.lmdb_env import Databases
from cache.tier import CLOCK_SLACK_NS, SEAL, Payload, placed, seal

STAMP = struct.Struct("<Q")  # last use, nanoseconds since 1970
ENTRY_BYTES = SEAL.size + STAMP.size


@dataclass(frozen=True)
class Entry:
    """One stored page, without its payload."""

    key: bytes
    size: int  # bytes
    last_used: float  # seconds since 1970; earlier where whoever used it last is not expected back soon


@dataclass(frozen=True)
class Read:
    """What was under a key; sound if the payload matches the entry's seal."""

    entry: bytes | None
    payload: Payload | None
    sound: bool


def room_for(size: int) -> int:
    """Bytes that a payload of `size` bytes takes in LMDB: whole pages, a header, and its share of a tree."""
    return -(-(size + 16) // 4096) * 4096 + 512


def delete(dbs: Databases, txn: "lmdb.Transaction[bytes]", key: bytes) -> None:
    """Delete a record, if it is there."""
    txn.delete(key, db=dbs.entries)
    txn.delete(key, db=dbs.pages)


def stamp_uses(dbs: Databases, txn: "lmdb.Transaction[bytes]", uses: Mapping[bytes, int]) -> None:
    """Record uses of pages, unless a later one is recorded. In key order, since neighbours share a leaf."""
    with txn.cursor(dbs.entries) as cursor:
        for key in sorted(uses):
            if cursor.set_key(key) and last_used(entry := cursor.value()) < uses[key]:
                cursor.put(key, entry[: SEAL.size] + STAMP.pack(uses[key]))


def lower_stamps(dbs: Databases, txn: "lmdb.Transaction[bytes]", lowered: Mapping[bytes, tuple[int, int]]) -> None:
    """Give pages an earlier stamp, the second of each two, unless they were used after the first one."""
    with txn.cursor(dbs.entries) as cursor:
        for key in sorted(lowered):
            at, stamp = lowered[key]
            if cursor.set_key(key) and stamp < last_used(entry := cursor.value()) <= at:
                cursor.put(key, entry[: SEAL.size] + STAMP.pack(stamp))


def read(
    entries: "lmdb.Cursor[memoryview]", pages: "lmdb.Cursor[memoryview]", key: bytes, buffer: np.ndarray | None
) -> Read:
    """What is under a key, checked; the payload is copied, to `buffer` ([bytes] uint8 or None) if it fits there."""
    entry = bytes(entries.value()) if entries.set_key(key) else None
    if not pages.set_key(key):
        return Read(entry, None, False)
    view = pages.value()
    payload = placed(view, buffer) if buffer is not None else None
    payload = bytes(view) if payload is None else payload
    # The copy is checked, at once: it is still in the processor's cache.
    return Read(entry, payload, entry is not None and seal(key, payload) == entry[: SEAL.size])


def size_of(entry: bytes | None) -> int:
    """Bytes of a record's payload, by its entry."""
    # An entry of another length is damaged, but must not stop an eviction.
    return int(SEAL.unpack_from(entry)[0]) if entry and len(entry) == ENTRY_BYTES else 0


def last_used(entry: bytes) -> int:
    """A record's last use, nanoseconds since 1970, by its entry."""
    stamp = int(STAMP.unpack_from(entry, SEAL.size)[0]) if len(entry) == ENTRY_BYTES else 0
    # A stamp from the future (a wrong clock, a flipped bit) counts as the oldest, and any use is newer.
    return stamp if stamp <= time.time_ns() + CLOCK_SLACK_NS else 0
