"""What a server has promised to keep, in files, so that the next one on the same store keeps it.

Each server writes a file of its own, since several may share a folder, and reads those of all. Times are of the wall
clock; one that was set meanwhile makes no retention longer than its client has asked for.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cache.keys import KEY_BYTES
from cache.private import FILE_MODE, make_folder
from cache.retention import Resumed, Retention, Retentions

log = logging.getLogger("tokenzero.cache.retention")

FOLDER = "retained"  # below the store directory
MOST_FILES = 64  # that are read
WRITE_SECONDS = 0.5  # from a change to the file


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One retention."""

    owner: str
    seconds: float
    end: float  # seconds since 1970
    keys: bytes  # of its pages, in order, KEY_BYTES each


class Rows(msgspec.Struct, frozen=True):
    """A file's contents."""

    model: bytes  # the fingerprint of the model that the pages are of
    rows: tuple[Row, ...]


def resumed(rows: Iterable[Row], now: float, wall: float) -> dict[bytes, Resumed]:
    """What is kept of rows at the time `now` of the clock, which is `wall` in seconds since 1970, by key.

    The prefixes that were used last come first.
    """
    found: dict[bytes, Resumed] = {}
    for row in sorted(rows, key=lambda row: row.seconds - row.end):
        left = min(row.seconds, row.end - wall)
        for at in range(0, len(row.keys) if left > 0 else 0, KEY_BYTES):
            each = Resumed(row.owner, row.seconds, now + left)
            key = row.keys[at : at + KEY_BYTES]
            if (known := found.get(key)) is None or known.end < each.end:
                found[key] = each
    return found


def read(folder: Path, model: bytes, now: float, wall: float) -> dict[bytes, Resumed]:
    """What earlier servers have promised about pages of a model; files that hold nothing valid any more are removed."""
    rows = list[Row]()
    try:
        files = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)
    except OSError:  # there is none, or it cannot be read: then nothing can be kept
        return {}
    for path in files[:MOST_FILES]:
        try:
            found = msgspec.msgpack.decode(path.read_bytes(), type=Rows)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("%s: what it retained is forgotten: %s", path, error)
            found = Rows(b"", ())
        if all(row.end < wall for row in found.rows):
            remove(path)
        elif found.model == model:
            rows += found.rows
    return resumed(rows, now, wall)


def remove(path: Path) -> None:
    """Remove a file; one that cannot be is left to the next start."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: not removed: %s", path, error)


class RetainedFile:
    """Writes what an engine's retentions are, soon after each change, on a thread of its own."""

    def __init__(self, folder: Path, model: bytes) -> None:
        self.path, self.model = folder / f"{secrets.token_hex(8)}.msgpack", model
        # Retentions, what earlier servers have promised about pages, and zero of their clock in seconds since 1970.
        self.noted: tuple[list[Retention], dict[bytes, Resumed], float] = ([], {}, 0.0)
        self.version = 0  # of these, as `Retentions` counts
        self.changed, self.closing = threading.Event(), False
        self.thread = threading.Thread(target=self._run, name="retained", daemon=True)
        self.thread.start()

    def note(self, retentions: Retentions) -> None:
        """Take what there is, if it has changed; on the engine's thread."""
        if retentions.version == self.version:
            return
        self.version = retentions.version
        self.noted = retentions.retained(), retentions.resumed.copy(), retentions.wall(0.0)
        self.changed.set()

    def close(self, seconds: float) -> None:
        """Write what is noted, in at most so many seconds."""
        self.closing = True
        self.changed.set()
        self.thread.join(seconds)

    def _run(self) -> None:
        closing = False
        while not closing:
            self.changed.wait()
            if not self.closing:
                time.sleep(WRITE_SECONDS)  # more may change at once
            self.changed.clear()
            closing = self.closing  # what is noted before is written now, and what is noted later sets `changed` again
            self._write()

    def _write(self) -> None:
        kept, left, zero = self.noted
        rows = (
            *(Row(each.client.owner, each.seconds, zero + each.end, b"".join(each.keys)) for each in kept),
            *(Row(old.owner, old.seconds, zero + old.end, key) for key, old in left.items()),
        )
        part = self.path.with_suffix(".part")
        try:
            make_folder(self.path.parent)
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE), "wb") as opened:
                opened.write(msgspec.msgpack.encode(Rows(self.model, rows)))
            part.replace(self.path)
        except OSError as error:
            log.warning("%s: what is retained lasts only until the server ends: %s", self.path, error)
