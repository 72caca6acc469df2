"""How pages come from one replica to another on one machine: the shared store's directory, or straight from a process.

`python -m experiments.bench.peers --directory DIR`: DIR is on the disk of `--store`. A second process has the pages and
sends them over a plain TCP stream, or puts them into Ray's object store. All ways fill the same memory, in turn.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.console import Console

from cache.disk import DiskTier
from experiments.bench.tiers import key_of
from experiments.harness.report import make_table

BATCH = 16  # pages that are asked for by one call


def serve_pages(told: Connection, pages: int, size: int) -> None:
    """The process that has the pages: sends as many as it is asked for."""
    held = memoryview(os.urandom(size * pages))
    with socket.create_server(("127.0.0.1", 0)) as server:
        told.send(server.getsockname()[1])
        peer, _ = server.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while asked := peer.recv(8):
                at = int.from_bytes(asked, "little")
                peer.sendall(held[at * size : (at + BATCH) * size])


@contextmanager
def stream(pages: int, size: int) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A function that gets a batch of pages, from a number on, into [BATCH, size] uint8, over a TCP stream."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve_pages, args=(theirs, pages, size))
    process.start()
    with socket.create_connection(("127.0.0.1", ours.recv())) as connection:

        def get(at: int, room: np.ndarray) -> None:
            connection.sendall(at.to_bytes(8, "little"))
            left = room.data.cast("B")
            while left:
                left = left[connection.recv_into(left) :]

        yield get
    process.join()


@contextmanager
def object_store(pages: int, size: int) -> Iterator[Callable[[int, np.ndarray], None]]:
    """The same over Ray's object store: an actor puts the batch there, and this process copies it out."""
    import ray

    class Peer:
        def __init__(self) -> None:
            self.held = np.frombuffer(os.urandom(size * pages), np.uint8).reshape(pages, size)

        def pages(self, at: int) -> np.ndarray:
            return self.held[at : at + BATCH]

    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=2**29, logging_level="ERROR")
    peer = ray.remote(Peer).remote()

    def get(at: int, room: np.ndarray) -> None:
        np.copyto(room, ray.get(peer.pages.remote(at)))

    yield get
    ray.shutdown()


@contextmanager
def directory(folder: Path, pages: int, size: int) -> Iterator[Callable[[int, np.ndarray], None]]:
    """The same from a store's directory, with its checksums."""
    tier = DiskTier(folder, 2 * pages * size)
    keys = [key_of(number) for number in range(pages)]
    tier.put_many([(key, os.urandom(size)) for key in keys])

    def get(at: int, room: np.ndarray) -> None:
        assert None not in tier.get_many(keys[at : at + BATCH], list(room))

    yield get
    tier.close()


def rate(get: Callable[[int, np.ndarray], None], pages: int, room: np.ndarray) -> float:
    """GB/s of getting all pages."""
    start = time.perf_counter()
    for at in range(0, pages, BATCH):
        get(at, room[at : at + BATCH])
    return room.nbytes / 1e9 / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.peers", description=__doc__.split("\n")[0])
    cli.add_argument("--directory", type=Path, required=True, metavar="DIR")
    cli.add_argument("--page-bytes", type=int, default=1 << 20, metavar="BYTES", help="(default: %(default)s)")
    cli.add_argument("--pages", type=int, default=256, metavar="N", help="(default: %(default)s)")
    cli.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: %(default)s)")
    args = cli.parse_args(argv)
    pages, size = args.pages // BATCH * BATCH, args.page_bytes
    room = np.ones((pages, size), np.uint8)  # written to before, so that no way pays for page faults
    rates: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as folder,
        directory(Path(folder), pages, size) as stored,
        stream(pages, size) as streamed,
        object_store(pages, size) as put,
    ):
        ways = {"shared directory": stored, "TCP stream": streamed, "Ray's object store": put}
        for _ in range(args.rounds):
            for name, get in ways.items():
                rates.setdefault(name, []).append(rate(get, pages, room))
    table = make_table(("pages of another replica", "GB/s"), words=("pages of another replica",))
    for name, found in rates.items():
        table.add_row(name, f"{statistics.median(found):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
