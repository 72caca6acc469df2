"""The speed of the tiers: MB/s of put and get compared with a plain file, and the look-up of a long prompt.

Every round writes and reads the same bytes by each way in turn, a batch at a time and into memory that was used before,
as a restore does; the table and the JSON hold medians over the rounds.
Run `python -m experiments.bench.tiers --directory DIR`: DIR must be on the disk in question, and have room.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache.disk import DiskTier
from cache.host import HostTier
from cache.lmdb_env import FORMAT
from cache.remote import RemoteTier
from cache.tier import Item, Tier
from experiments.harness.disk import drop_from_memory
from experiments.harness.provenance import provenance
from experiments.harness.report import write_json

RESULTS = Path("experiments/results/bench/tiers.json")
PROMPT_PAGES = 812  # 52K tokens in pages of 64


@dataclass(frozen=True)
class Config:
    """What is measured."""

    page_bytes: int = 1 << 20
    page_tokens: int = 64
    pages: int = 256
    batch: int = 16  # pages that are put or got by one call
    rounds: int = 5
    stored: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)


def key_of(number: int) -> bytes:
    """A key like those of cache.keys: uniform bytes."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def make_pages(config: Config, first: int) -> list[Item]:
    """Pages of random bytes under keys from `first` on."""
    return [(key_of(first + i), os.urandom(config.page_bytes)) for i in range(config.pages)]


def rate(size: int, action: Callable[[], Any]) -> float:
    """MB/s (1e6 bytes) of an action that moves `size` bytes."""
    start = time.perf_counter()
    action()
    return size / 1e6 / (time.perf_counter() - start)


def measure_file(path: Path, pages: Sequence[Item]) -> dict[str, float]:
    """The baseline: one file, written and read in order."""
    size, room = sum(len(payload) for _, payload in pages), room_for(pages)

    def write() -> None:
        with path.open("wb") as file:
            for _, payload in pages:
                file.write(payload)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            for buffer in room:
                assert file.readinto(buffer) == len(buffer)

    result = {"put": rate(size, write)}
    with path.open("rb") as file:
        result["put and sync"] = 1 / (1 / result["put"] + 1 / rate(size, lambda: os.fsync(file.fileno())))
    result["get"] = rate(size, read)
    drop_from_memory(path)
    result["get, cold"] = rate(size, read)
    path.unlink()
    return result


def room_for(pages: Sequence[Item]) -> np.ndarray:
    """Memory for all pages, [pages, page_bytes] uint8, already written to, so that reads do not pay for page faults.

    A few pages' worth, filled repeatedly, would measure the processor's cache.
    """
    return np.ones((len(pages), len(pages[0][1])), np.uint8)


def get_all(tier: Tier, pages: Sequence[Item], room: np.ndarray, batch: int) -> None:
    """Get all pages, `batch` at a time."""
    for at in range(0, len(pages), batch):
        keys = [key for key, _ in pages[at : at + batch]]
        assert None not in tier.get_many(keys, list(room[at : at + len(keys)]))


def measure_tier(tier: Tier, pages: Sequence[Item], batch: int) -> dict[str, float]:
    """Put, sync and get all pages, `batch` at a time."""
    size, room = sum(len(payload) for _, payload in pages), room_for(pages)

    def put() -> None:
        for at in range(0, len(pages), batch):
            tier.put_many(pages[at : at + batch])

    result = {"put": rate(size, put)}
    result["put and sync"] = 1 / (1 / result["put"] + 1 / rate(size, tier.sync))
    result["get"] = rate(size, lambda: get_all(tier, pages, room, batch))
    return result


def measure_cold_disk(directory: Path, budget: int, pages: Sequence[Item], batch: int) -> float:
    """MB/s of reading pages from a store that is not in memory, as after a restart of the machine."""
    drop_from_memory(directory / FORMAT / "data.mdb")
    tier, room = DiskTier(directory, budget), room_for(pages)
    result = rate(sum(len(payload) for _, payload in pages), lambda: get_all(tier, pages, room, batch))
    tier.close()
    return result


def measure_round(directory: Path, config: Config, number: int) -> dict[str, dict[str, float]]:
    """One round over all tiers; the disk tier's store is kept, so that later rounds evict and reuse its pages."""
    pages = make_pages(config, number * config.pages)
    budget = 2 * config.pages * config.page_bytes
    disk = DiskTier(directory / "disk", budget)
    results = {
        "plain file": measure_file(directory / "file", pages),
        "disk (LMDB)": measure_tier(disk, pages, config.batch),
    }
    disk.close()
    results["disk (LMDB)"]["get, cold"] = measure_cold_disk(directory / "disk", budget, pages, config.batch)
    results["remote (file://)"] = measure_tier(RemoteTier(f"file://{directory}/remote/"), pages, config.batch)
    shutil.rmtree(directory / "remote")
    results["host"] = measure_tier(HostTier(budget), pages, config.batch)
    return results


def measure_lookup(directory: Path, stored: int) -> dict[str, float]:
    """Look up a prompt of PROMPT_PAGES keys, all there, among `stored` small pages; ms, and s to open the store."""
    tier = DiskTier(directory, 64 << 30)
    for start in range(0, stored, 10_000):
        tier.put_many([(key_of(i), b"page" * 16) for i in range(start, min(start + 10_000, stored))])
    tier.close()
    start_time = time.perf_counter()
    tier = DiskTier(directory, 64 << 30)
    opened = time.perf_counter() - start_time
    prompt = [key_of(i * (stored // PROMPT_PAGES)) for i in range(PROMPT_PAGES)]
    times = []
    for _ in range(9):
        start_time = time.perf_counter()
        assert all(tier.contains_many(prompt))
        times.append(1e3 * (time.perf_counter() - start_time))
    tier.close()
    shutil.rmtree(directory)
    return {"pages": stored, "first ms": times[0], "median ms": statistics.median(times), "open s": opened}


def medians(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of each number over the rounds."""
    return {
        way: {name: statistics.median(r[way][name] for r in rounds) for name in numbers}
        for way, numbers in rounds[0].items()
    }


def show(rates: dict[str, dict[str, float]], lookups: Sequence[dict[str, float]], console: Console) -> None:
    """Print both tables."""
    columns = ("put", "put and sync", "get", "get, cold")
    table = Table("MB/s", *columns)
    for way, numbers in rates.items():
        cells = (
            f"{numbers[c]:,.0f} ({numbers[c] / rates['plain file'][c]:.2f}x)" if c in numbers else "" for c in columns
        )
        table.add_row(way, *cells)
    console.print(table)
    table = Table("stored pages", f"look-up of {PROMPT_PAGES} keys, ms", "first, ms", "open, s")
    for row in lookups:
        table.add_row(f"{row['pages']:,}", f"{row['median ms']:.2f}", f"{row['first ms']:.2f}", f"{row['open s']:.2f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.tiers", description=__doc__)
    parser.add_argument(
        "--directory", type=Path, default=None, help="on the disk to measure (default: the temp folder)"
    )
    parser.add_argument("--page-bytes", type=int, default=Config.page_bytes)
    parser.add_argument("--pages", type=int, default=Config.pages)
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    parser.add_argument("--stored", type=int, nargs="*", default=Config.stored)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    args = parser.parse_args(arguments)
    config = Config(args.page_bytes, pages=args.pages, rounds=args.rounds, stored=tuple(args.stored))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        rounds = [
            measure_round(directory, config, number)
            for number in track(range(config.rounds), "rounds", console=console, transient=True)
        ]
        shutil.rmtree(directory / "disk")
        lookups = [
            measure_lookup(directory / "lookup", stored)
            for stored in track(config.stored, "look-ups", console=console, transient=True)
        ]
    rates = medians(rounds)
    result = {
        "config": asdict(config),
        "bytes per token": config.page_bytes / config.page_tokens,
        "rates MB/s": rates,
        "rounds": rounds,
        "lookups": lookups,
        "command": " ".join(["python -m experiments.bench.tiers", *sys.argv[1:]]),
        "provenance": provenance(("tokenzero", "lmdb", "xxhash", "tensorstore")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    show(rates, lookups, Console())
    write_json(args.out, result)


if __name__ == "__main__":
    main()
