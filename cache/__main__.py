"""`python -m cache ls|stats|verify|prune --store DIR`: list, count, check or evict the pages of a KV store on disk.

It may run while servers use the store.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache.disk import DiskTier
from cache.lmdb_env import FILES, FORMAT, RECORDS, StoreError, check_directory, file_bytes, old_stores
from cache.sizes import parse_bytes, show_bytes


def show_age(seconds: float) -> str:
    """A time span in its largest unit: 3 min ago."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def open_store(directory: str, repair: bool) -> DiskTier:
    """The disk tier in a directory. Raises StoreError if it has none, or must not be used."""
    if "://" in directory:
        raise StoreError(f"--store is {directory}, expected a directory: list a bucket with the provider's tools")
    name = RECORDS if file_bytes(Path(directory) / RECORDS) else FORMAT
    check_directory(Path(directory), name)
    path = Path(directory) / name
    if not file_bytes(path):
        raise StoreError(f"{directory}: found no {FORMAT}/data.mdb, expected a store: check the path")
    tier = DiskTier(directory, file_bytes(path), name=name, repair=repair)
    if tier.store.opened is None:
        raise StoreError(f"{directory}: the store cannot be opened: see the warning above")
    return tier


def list_pages(tier: DiskTier, console: Console, limit: int) -> None:
    """Print the most recently used pages."""
    entries = sorted(tier.entries(), key=lambda entry: -entry.last_used)
    table = Table("key", "size", "last used", box=None)
    for entry in entries[:limit]:
        table.add_row(entry.key.hex()[:16], show_bytes(entry.size), show_age(time.time() - entry.last_used))
    console.print(table)
    if len(entries) > limit:
        console.print(f"... and {len(entries) - limit} more: --limit shows them")


def print_stats(tier: DiskTier, console: Console) -> None:
    """Print totals."""
    stats, entries = tier.stats(), tier.entries()
    sizes = sum(entry.size for entry in entries)
    table = Table(box=None, show_header=False)
    table.add_row("pages", str(stats.pages))
    table.add_row("payload", show_bytes(sizes))
    table.add_row("occupied", show_bytes(stats.bytes))
    table.add_row("file", show_bytes(file_bytes(tier.store.path)))
    if entries:
        table.add_row("oldest use", show_age(time.time() - min(entry.last_used for entry in entries)))
        table.add_row("newest use", show_age(time.time() - max(entry.last_used for entry in entries)))
    console.print(table)


def verify(tier: DiskTier, console: Console, fix: bool) -> int:
    """Read every page; return how many are damaged, counting a damaged tree as 1."""
    bad = tier.store.errors  # 1 if opening the store deleted a damaged tree
    total = tier.stats().pages
    for sound in track(tier.check(remove=fix), "reading pages", total=total, console=console, transient=True):
        bad += not sound
    what = "" if not bad else "removed" if fix else "run again with --fix to remove them"
    console.print(f"{total} pages read, {bad} damaged", f"({what})" if what else "")
    return bad


def remove_old(directory: Path, console: Console) -> None:
    """Remove the stores of older formats. Raises StoreError for one that is in use or holds other files."""
    stores = old_stores(directory)
    for path in stores:
        if others := sorted(set(os.listdir(path)) - set(FILES)):
            raise StoreError(f"{path}: found {others[0]} in it, expected {' and '.join(FILES)} alone: move it away")
        claim = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = file_bytes(path)
            shutil.rmtree(path)
        except BlockingIOError:
            raise StoreError(f"{path}: it is in use by an earlier version of the server: stop that first") from None
        finally:
            os.close(claim)
        console.print(f"{path.name} removed: {show_bytes(size)} ({size} bytes)", soft_wrap=True)
    if not stores:
        console.print("no store of an earlier format found")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if damage was found, 2 if the store cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m cache", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("ls", "list pages, the most recently used first"),
        ("stats", "totals"),
        ("verify", "read every page and check it; exit status 1 if any is damaged"),
        ("prune", "evict the least recently used pages, or remove stores of earlier versions"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--store", required=True, metavar="DIR")
        if name == "ls":
            command.add_argument("--limit", type=int, default=50, help="rows to show (default 50)")
        if name == "verify":
            command.add_argument("--fix", action="store_true", help="remove damaged pages")
        if name == "prune":
            keep = "size to keep, such as 20GB or 512MiB"
            command.add_argument("--store-bytes", type=parse_bytes, metavar="SIZE", help=keep)
            command.add_argument("--old", action="store_true", help="remove the stores of earlier versions")
    args = parser.parse_args(arguments)
    if args.command == "prune" and not args.old and args.store_bytes is None:
        parser.error("prune: expected --store-bytes SIZE or --old, found neither")
    console = Console()
    try:
        if args.command == "prune" and args.old:
            remove_old(Path(args.store), console)
            if args.store_bytes is None:
                return 0
        tier = open_store(args.store, repair=args.command == "verify" and args.fix)
        with contextlib.closing(tier):
            if args.command == "ls":
                list_pages(tier, console, args.limit)
            elif args.command == "stats":
                print_stats(tier, console)
            elif args.command == "prune":
                console.print(f"{tier.prune(args.store_bytes)} pages evicted")
            elif verify(tier, console, args.fix):
                return 1
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
