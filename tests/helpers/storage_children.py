"""Pages for the storage tests, and the programs that they run in processes of their own."""

import hashlib
import json
import os
import random
import resource
import shutil
import struct
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cache import lmdb_env as environment
from cache.disk import DiskTier
from cache.keys import page_keys, root_key
from cache.lmdb_env import FORMAT
from cache.tiers import Tiers

PAGE = 4096


def key_of(i: int) -> bytes:
    return hashlib.blake2b(i.to_bytes(8, "little"), digest_size=32).digest()


def page_of(i: int, size: int = 20_000) -> bytes:
    return random.Random(i).randbytes(size + i % 7 * 1000)


def keys(numbers) -> list[bytes]:
    return [key_of(i) for i in numbers]


def items(numbers) -> list[tuple[bytes, bytes]]:
    return [(key_of(i), page_of(i)) for i in numbers]


def right(tier, numbers, in_buffers: bool = False) -> list[bool]:
    """Which of the pages are there, read into buffers or not. Asserts that none of them is another's or torn."""
    buffers = [np.empty(len(page_of(i)), np.uint8) for i in numbers] if in_buffers else None
    found = tier.get_many(keys(numbers), buffers)
    assert all(got is None or got == page_of(i) for i, got in zip(numbers, found, strict=True)), "a WRONG page"
    return [got is not None for got in found]


def write_forever(directory: str, budget: str, start: str) -> None:
    """Put three pages at a time and print the number of the last one that is acknowledged."""
    tier = DiskTier(directory, int(budget))
    number = int(start)
    while True:
        tier.put_many(items(range(number, number + 3)))
        number += 3
        os.write(1, f"{number - 1}\n".encode())


def share(directory: str, budget: str, seconds: str, seed: str) -> None:
    """Read, write, delete and prune at random while others do; fails on a wrong page, or if it never found one."""
    tier = DiskTier(directory, int(budget))
    rng = random.Random(int(seed))
    end, hits = time.monotonic() + float(seconds), 0
    while time.monotonic() < end:
        start = rng.randrange(300)
        tier.put_many(items(range(start, start + rng.randrange(1, 6))))
        hits += sum(right(tier, [rng.randrange(300) for _ in range(5)]))
        if rng.random() < 0.02:
            tier.prune(int(budget) // 2)
        if rng.random() < 0.05:
            tier.delete([key_of(rng.randrange(300))])
        if rng.random() < 0.1:
            tier.sync()
    stats = tier.stats()
    assert hits > 0, "never found a page"
    assert not stats.errors, stats
    assert not stats.corrupt, stats
    assert not stats.dropped, stats


def fill_up(directory: str, limit: str) -> None:
    """Write under a limit to the size of files, which fails as a full disk does; what is stored stays right."""
    tier = DiskTier(directory, 1 << 30)
    tier.put_many(items(range(10)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    for i in range(10, 500, 5):
        tier.put_many(items(range(i, i + 5)))
    assert any(right(tier, range(500)))
    stats = tier.stats()
    assert stats.evicted > 0, "no room was made"
    tier.close()


def as_nobody(directory: str) -> None:
    """Use a store without any right to it."""
    os.setuid(65534)
    tier = DiskTier(directory, 4_000_000)
    assert right(tier, range(3)) == [False] * 3
    tier.put_many(items([5]))
    assert tier.stats().dropped == 1
    tier.close()


PAGE_TOKENS = 4
ROOT = root_key(b"", PAGE_TOKENS, b"")


def chain_keys(tokens) -> list[bytes]:
    return page_keys(ROOT, np.asarray(tokens, np.int32), PAGE_TOKENS)


class Actor:
    """One process's tiers, for tests that have two processes take turns."""

    def open(self, directory: str, budget: int, overhead: int) -> None:
        environment.OVERHEAD_BYTES = overhead
        self.tier = DiskTier(directory, budget)

    def put(self, start: int, count: int) -> None:
        self.tier.put_many(items(range(start, start + count)))

    def find(self, start: int, count: int) -> list[bool]:
        return right(self.tier, range(start, start + count))

    def sync(self) -> None:
        self.tier.sync()

    def stats(self) -> dict:
        return asdict(self.tier.stats())

    def close(self) -> None:
        self.tier.close()

    # As an engine uses them: requests that look up, read back and write late and in slices.

    def start(self, directory: str, budget: int, host_bytes: int) -> None:
        self.tiers, self.requests = Tiers(directory, budget, host_bytes, flush_seconds=0.05), {}

    def begin(self, number: int, tokens: list[int], held: int) -> int:
        keys, used = chain_keys(tokens), time.time_ns()
        looking = self.tiers.look([ROOT, *keys], keys, np.asarray(tokens, np.int32), held, PAGE_TOKENS, used)
        self.requests[number] = keys, used, looking.result(60).pages
        return used

    def step(self, number: int, first: int, stop: int, wait: bool) -> None:
        """Read the pages of a slice that were found, and write the others."""
        keys, used, found = self.requests[number]
        pages = [page for page in found if first <= page.index < stop]
        rows = np.empty((len(pages), 20_000), np.uint8)
        sources = self.tiers.pages.read([page.key for page in pages], rows, [page.stamp for page in pages]).sources
        had = [page.index for page, source in zip(pages, sources, strict=True) if source is not None]
        lack = [i for i in range(first, stop) if i not in had]
        self.tiers.writer.use(keys[first:stop], [used - i for i in range(first, stop)])
        self.tiers.writer.submit(
            [keys[i] for i in lack], 1, lambda: [keys[i] * 625 for i in lack], [used - i for i in lack]
        )
        assert not wait or self.tiers.writer.flush(60)

    def stamps(self) -> list[dict[str, int]]:
        """Stamps by key in each tier."""
        host, disk = self.tiers.pages.tiers
        found = disk.store.attempt("read", lambda dbs: all_stamps(dbs), {})
        return [{key.hex(): stamp for key, stamp in host.used.items()}, found]

    def end(self) -> None:
        self.tiers.close()


def all_stamps(dbs) -> dict[str, int]:
    with dbs.env.begin() as txn, txn.cursor(dbs.entries) as cursor:
        return {key.hex(): struct.unpack("<QQQ", entry)[2] for key, entry in cursor}


def obey() -> None:
    """Do what the lines of standard input say, until it ends."""
    actor = Actor()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(actor, name)(*arguments)), flush=True)


def open_full(directory: str, name: str) -> None:
    """Open a store on a disk that is full, with any number of blocks left; then make room and use it."""
    environment.RETRY_SECONDS = 0.0
    base = Path(directory)
    for blocks in range(40):
        (base / "ballast").write_bytes(b"")
        path = base / f"store{blocks}"
        path.mkdir()
        left = os.statvfs(base).f_bavail
        with (base / "ballast").open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, (left - blocks) * PAGE)
        tier = DiskTier(path, 1 << 20, name=name)
        tier.put_many(items(range(10)))
        right(tier, range(10))
        tier.sync()
        if not blocks:
            assert not tier.stats().open
            assert tier.stats().errors
            assert tier.stats().dropped == 10
        (base / "ballast").unlink()
        tier.sync()
        assert tier.stats().open
        tier.put_many(items(range(10)))
        assert all(right(tier, range(10)))
        assert not tier.stats().corrupt
        tier.close()
        shutil.rmtree(path)


def fill_while_open(directory: str) -> None:
    """Use a store by more and more readers after the disk has filled up: each takes a slot in LMDB's mapped file."""
    tier = DiskTier(f"{directory}/store", 1 << 20)
    tier.put_many(items(range(10)))
    with open(f"{directory}/ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(directory).f_bavail * PAGE)
    readers = [tier.store.opened.env.begin() for _ in range(110)]
    assert all(right(tier, range(10)))
    for reader in readers:
        reader.abort()
    for start in range(100, 400, 10):
        tier.put_many(items(range(start, start + 10)))
    tier.close()


def hang(what: str) -> None:
    """Leave while a tier hangs for ever in one of its methods."""
    tiers, started = Tiers(None, 0, 1 << 20, flush_seconds=0), threading.Event()
    (tier,) = tiers.pages.tiers

    def never(*_: object) -> None:
        started.set()
        threading.Event().wait()

    setattr(tier, what, never)
    tokens, rows = np.arange(8, dtype=np.int32), np.empty((1, 20_000), np.uint8)
    named = chain_keys(tokens)
    tiers.look([ROOT, *named], named, tokens, 1, PAGE_TOKENS, time.time_ns())
    tiers.pages.fetch(keys([0]), rows, lambda fetched: fetched)
    tiers.writer.submit(keys([0]), 20_000, lambda: [page_of(0)])
    if what == "close":
        started.set()
    assert started.wait(60)
    begun = time.monotonic()
    assert what == "close" or not tiers.writer.flush(0.1) or what in ("get_many", "contains_many")
    tiers.close(0.5)
    print(time.monotonic() - begun)


def tree_pages(data: bytes) -> list[int]:
    """Numbers of the pages that hold no payload: LMDB 0.9 has flags at byte 10, an overflow page's count at byte 12."""
    found, number = [], 0
    while number < len(data) // PAGE:
        (flags,) = struct.unpack_from("<H", data, number * PAGE + 10)
        (count,) = struct.unpack_from("<I", data, number * PAGE + 12)
        if flags & 4:
            number += max(1, count)
        else:
            found.append(number)
            number += 1
    return found


def flip_bit(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def place_in(data: bytes, rng: random.Random) -> int:
    """A place to damage: half of the time not in a payload, though nearly all bytes are."""
    if rng.random() < 0.5:
        return rng.randrange(len(data))
    return rng.choice(tree_pages(data)) * PAGE + rng.randrange(rng.choice([64, PAGE]))


def flip(directory: str, first_seed: str, count: str) -> None:
    """Flip a bit somewhere in a store's files, open and use it, and repair the files: over and over."""
    path = Path(directory) / FORMAT
    data, lock = (path / "data.mdb").read_bytes(), (path / "lock.mdb").read_bytes()
    damaged_trees = corrupt = 0
    for seed in range(int(first_seed), int(first_seed) + int(count)):
        rng = random.Random(seed)
        (path / "data.mdb").write_bytes(data)
        (path / "lock.mdb").write_bytes(lock)
        if seed % 20:
            flip_bit(path / "data.mdb", place_in(data, rng), rng.randrange(8))
        else:
            flip_bit(path / "lock.mdb", rng.randrange(len(lock)), rng.randrange(8))
        tier = DiskTier(directory, 4_000_000)
        right(tier, range(100))
        tier.put_many(items(range(100, 200)))  # evicts
        right(tier, range(200), in_buffers=True)
        damaged_trees += tier.store.errors
        corrupt += tier.stats().corrupt
        tier.close()
    print(damaged_trees, corrupt)


def flip_live(directory: str, first_seed: str, count: str) -> None:
    """Flip bits in the payloads of a store that is in use. In the tree they could end the process: LMDB has asserts."""
    environment.RETRY_SECONDS = 0.0
    path = Path(directory) / FORMAT
    tier = DiskTier(directory, 2_000_000)
    for seed in range(int(first_seed), int(first_seed) + int(count)):
        rng = random.Random(seed)
        tier.put_many(items(rng.sample(range(150), 10)))
        data = (path / "data.mdb").read_bytes()
        tree = set(tree_pages(data))
        place = rng.choice([at for at in range(rng.randrange(PAGE), len(data), PAGE) if at // PAGE not in tree])
        flip_bit(path / "data.mdb", place, rng.randrange(8))
        right(tier, rng.sample(range(150), 30), in_buffers=seed % 2 == 0)
        tier.delete([key_of(rng.randrange(150))])
        tier.stats()
    print(tier.stats().errors, tier.stats().corrupt)
    tier.close()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
