"""One LMDB environment that several processes share and that may fail, vanish and come back while it is in use.

Nothing here raises once a store is open: an action that cannot run returns the caller's fallback, is counted, and is
logged once. LMDB trusts its B-tree pages. So the first process that opens a store runs `lmdb verify`, which walks the
tree without LMDB's own code, and a damaged tree is deleted with all its pages. LMDB nearly always detects later damage
itself (py-lmdb 3 adds checks to it). Undetected damage may end the process, but it never gives a wrong page.

Because of that check, opening may take long. Reads never wait for it: they miss meanwhile.
"""

import contextlib
import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from cache.private import FILE_MODE, FOLDER_MODE, close_to_others, make_folder

log = logging.getLogger("tokenzero.cache.lmdb_env")
T = TypeVar("T")

# The version is in the name of the directory, where a flipped bit in a file cannot change it. Pages of version 1 may be
# wrong. Records of other kinds were kept under the same name; they are valid and move to a name of their own.
FORMAT = "tokenzero-pages-v2"
RECORDS = "tokenzero-records-v1"
OLD_FORMATS = ("tokenzero-pages-v1",)
PROGRAM = "tokenzero-"
FILES = ("data.mdb", "lock.mdb")
CHECK_SECONDS = 8.0  # a longer check is given up; ten times that after LMDB has reported damage
RETRY_SECONDS = 5.0  # after a failure, until the next try
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
OVERHEAD_BYTES = 64 << 20  # of the map in addition to the file, for the trees and for pages that are being replaced
LOCK_BYTES = 1 << 14  # of LMDB's lock file, room for 254 readers; fixed, since it must not grow while it is mapped
AT_ONCE, WRITING = ("read", "removal"), ("write", "removal")  # kinds of action that never wait, and that write
RESIZES = 3  # tries of an action, where another process makes the file larger than the map
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)  # LMDB reports a write that was cut short as EIO


class StoreError(Exception):
    """A directory that must not be used: another program's or version's, or damaged and not to be repaired."""


@dataclass(frozen=True, eq=False)
class Databases:
    """An open environment and its sub-databases: `pages` maps key -> payload, `entries` key -> what is known of it."""

    env: lmdb.Environment
    pages: Any  # lmdb._Database, which lmdb does not export
    entries: Any
    files: tuple[tuple[str, int], ...]  # name and inode of the data file and the lock file

    def occupied(self, txn: "lmdb.Transaction[bytes]") -> int:
        """Bytes of all LMDB pages in use; freed pages are not counted, as LMDB reuses them."""
        stats = [txn.stat(db) for db in (self.pages, self.entries)]
        return sum(s["psize"] * (s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"]) for s in stats)


def check_directory(directory: Path, name: str = FORMAT) -> None:
    """Raise StoreError unless `directory` is absent, empty, or has a store `name` or an older one; change nothing.

    Folders in it that hold such stores themselves are ours, too.
    """
    try:
        found = sorted(set(os.listdir(directory)) - {"lost+found"})
    except NotADirectoryError:
        raise StoreError(f"{directory}: found a file, expected a directory: name another directory") from None
    except OSError:
        return  # absent, or unreadable, which opening it reports
    ours = (name, *OLD_FORMATS)
    if any((directory / one).is_dir() for one in ours):
        return
    formats = (FORMAT, RECORDS, *OLD_FORMATS)
    found = [entry for entry in found if not any((directory / entry / one).is_dir() for one in formats)]
    if not found:
        return
    others = [entry for entry in found if entry.startswith(PROGRAM)]
    what = others[0] if others else f"files of another program ({', '.join(found[:3])})"
    raise StoreError(f"{directory}: found {what}, expected a folder {name} or nothing: name another directory")


def old_stores(directory: Path) -> list[Path]:
    """The folders of older formats in `directory`."""
    return [directory / name for name in OLD_FORMATS if os.path.isdir(directory / name)]


def adopt_records(directory: Path) -> None:
    """Rename records that are still under an old format's name, if possible."""
    for old in old_stores(directory):
        with contextlib.suppress(OSError):
            if not (directory / RECORDS).exists():
                old.rename(directory / RECORDS)


def reserve_lock(path: Path, alone: bool) -> None:
    """Make LMDB's lock file and allocate its blocks. Raises OSError on a full disk.

    LMDB maps the file and writes to it: without an allocated block, that ends the process (SIGBUS).
    """
    try:
        file = os.open(path / "lock.mdb", os.O_RDWR | os.O_CREAT, FILE_MODE)
    except OSError as error:
        if error.errno in READ_ONLY:
            return  # LMDB then uses no locks
        raise
    try:
        size = os.fstat(file).st_size
        if alone or size:
            os.posix_fallocate(file, 0, max(size, LOCK_BYTES) if alone else size)
    finally:
        os.close(file)


def file_bytes(path: Path) -> int:
    """Length of the data file in `path` in bytes, 0 if there is none."""
    data = path / "data.mdb"
    return data.stat().st_size if data.exists() else 0


def check_tree(path: Path, seconds: float) -> str:
    """The damage to the tree of the LMDB data file in `path`; '' if there is none, or the check takes over `seconds`.

    No process may be writing the file. Raises OSError if it cannot be read.
    """
    if not file_bytes(path):
        return ""
    (path / "data.mdb").open("rb").close()
    # In its own process: a walk of seconds would block the threads of this one, and could not be ended.
    command = [sys.executable, "-P", "-m", "lmdb", "verify", str(path)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        log.info("%s: the tree is too large to be checked in %.0f s, continuing unchecked", path, seconds)
        return ""
    last = run.stderr.strip().rsplit("\n", 1)[-1]
    if run.returncode and "verify: " not in last:
        log.warning("%s: the tree could not be checked, continuing unchecked: %s", path, last)
        return ""
    return f"{last}, {run.stdout.strip()[:200]}" if run.returncode else ""


class SharedEnvironment:
    """The environment in `directory`/`name`, opened now and, after a failure, again. Any thread may use it."""

    def __init__(self, directory: Path, map_bytes: int, repair: bool, name: str = FORMAT) -> None:
        if name == RECORDS:
            adopt_records(directory)
        check_directory(directory, name)
        self.directory = directory
        self.path = directory / name
        self.map_bytes = map_bytes  # of the file, without the overhead
        self.repair = repair
        self.errors = 0
        self.failing: dict[str, float] = {}  # kinds of action that do not work now, and when to try again
        self.opened: Databases | None = None
        # File descriptor of self.path with a lock: shared while it is in use, exclusive while its tree is checked.
        self.claim = -1
        self.stale = False  # close and open it again before the next use
        self.outgrown = False  # map it again before the next use: the file is larger than the map
        self.suspect = False  # LMDB has reported damage
        self.closed = False
        self.users = 0  # threads inside an action
        self.mending = False  # a thread closes, opens or maps it again, while no other is inside an action
        self.changed = threading.Condition()
        with contextlib.suppress(OSError):  # opening it reports what is wrong
            make_folder(directory)
        with self.changed:
            self._mend()

    def attempt(self, kind: str, action: Callable[[Databases], T], fallback: T) -> T:
        """The result of `action`, or `fallback` if it fails or if this `kind` has just failed.

        While the store is closed, a "read" or a "removal" returns the fallback at once; a "write", and any other kind,
        opens it first. Actions must not nest: the outer one would wait for itself when the environment has to close.
        """
        for tries_left in reversed(range(RESIZES)):
            dbs = self._enter(kind)
            if dbs is None:
                break
            try:
                if kind in WRITING and dbs.env.flags()["readonly"]:
                    self.stale = os.access(self.path / "data.mdb", os.W_OK)  # it was remounted, so open it again
                    raise OSError(errno.EROFS, "the store is read-only")
                result = action(dbs)
            except (lmdb.Error, OSError) as error:
                grown = isinstance(error, lmdb.MapFullError) and dbs.env.info()["map_size"] < self._map_size()
                if tries_left and (grown or isinstance(error, lmdb.MapResizedError)):
                    self.outgrown = True
                    continue
                self._failed(kind, error)
                break
            else:
                self._works(kind)
                return result
            finally:
                with self.changed:
                    self.users -= 1
                    self.changed.notify_all()
        return fallback

    def close(self) -> None:
        """Close the environment for good: later actions give their fallbacks."""
        with self.changed:
            self.closed = self.stale = True
            while self.mending:
                self.changed.wait()
            self._mend()

    def _enter(self, kind: str) -> Databases | None:
        mended = False
        with self.changed:
            while not self.closed and self.failing.get(kind, 0.0) <= time.monotonic():
                if not self.mending and self.opened is not None and not self.stale:
                    self.stale = self._vanished(self.opened)
                if self.opened is not None and not (self.mending or self.stale or self.outgrown):
                    self.users += 1
                    return self.opened
                if mended or (kind in AT_ONCE and (self.stale or not self.outgrown)):
                    return None
                if self.mending:
                    self.changed.wait()
                else:
                    self._mend()
                    mended = self.opened is None
        return None

    def _vanished(self, dbs: Databases) -> bool:
        try:
            return any(os.stat(self.path / name).st_ino != inode for name, inode in dbs.files)
        except OSError as error:
            self._failed("open", error)
            return True

    def _mend(self) -> None:
        """Map, close or open it again, as needed. The caller holds the lock, which is released while it opens."""
        self.mending = True
        try:
            while self.users:
                self.changed.wait()  # a page that another thread is reading must stay mapped
            if self.opened is not None and not self.stale:
                self._map_again(self.opened)
                return
            if self.opened is not None:
                self.opened.env.close()
                self.opened = None
                self._release_claim()
            if self.closed or self.failing.get("open", 0.0) > time.monotonic():
                return
            self.stale = self.outgrown = False
            self.changed.release()
            try:
                opened = self._open()
            finally:
                self.changed.acquire()
            self.opened = opened
        finally:
            self.mending = False
            self.changed.notify_all()

    def _map_again(self, dbs: Databases) -> None:
        try:
            dbs.env.set_mapsize(self._map_size())
        except (lmdb.Error, OSError) as error:
            self._failed("open", error)
            self.stale = True
        self.outgrown = False

    def _map_size(self) -> int:
        # Eviction needs free pages, and a file that never evicted has none.
        size = max(self.map_bytes, file_bytes(self.path)) + OVERHEAD_BYTES
        return -(-size // 4096) * 4096

    def _release_claim(self) -> None:
        if self.claim >= 0:
            os.close(self.claim)
            self.claim = -1

    def _open(self) -> Databases | None:
        opened = None
        try:
            if not self.path.is_dir():
                self.path.mkdir(mode=FOLDER_MODE)  # without parents: a directory that vanished must not be made again
            self.claim = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            for path in (self.path, *(self.path / name for name in FILES)):
                close_to_others(path)
            alone = self._claim_alone()
            if alone:
                self._drop_damaged_tree()
                self.suspect = False
            elif not all((self.path / name).exists() for name in FILES) and os.access(self.path, os.W_OK):
                # Two lock files would let two processes write at once.
                raise OSError(errno.EBUSY, f"{' or '.join(FILES)} is gone while another process uses them")
            reserve_lock(self.path, alone)
            try:
                opened = self._open_databases(readonly=False)
            except (lmdb.Error, OSError) as error:
                if code_of(error) not in READ_ONLY:
                    raise
                opened = self._open_databases(readonly=True)
            if alone:
                # Another process may check the tree between the two locks, so nothing is written before this one.
                fcntl.flock(self.claim, fcntl.LOCK_SH)
        except (lmdb.Error, OSError) as error:
            self._release_claim()
            self._failed("open", error)
        except BaseException:
            self._release_claim()
            raise
        else:
            self._works("open")
        return opened

    def _claim_alone(self) -> bool:
        try:
            fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self.claim, fcntl.LOCK_SH)  # waits while another process checks the tree
            return False
        return True

    def _drop_damaged_tree(self) -> None:
        if self.repair and 0 < file_bytes(self.path) < 2 * 4096:
            # A full disk cut it off before it had both of LMDB's first pages, so it has no others.
            (self.path / "data.mdb").unlink()
            return
        problem = check_tree(self.path, CHECK_SECONDS * (10 if self.suspect else 1))
        if not problem:
            return
        if not self.repair:
            raise StoreError(
                f"{self.path / 'data.mdb'}: found a damaged tree ({problem}), expected a sound one: "
                "run `python -m cache verify --fix`, which deletes it with all its pages"
            )
        log.warning("%s: the tree is damaged, all pages in it are deleted: %s", self.path, problem)
        self.errors += 1
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)

    def _open_databases(self, readonly: bool) -> Databases:
        env = lmdb.open(
            str(self.path),
            map_size=self._map_size(),
            max_dbs=2,
            sync=False,
            metasync=False,
            readonly=readonly,
            create=not readonly,
            mode=FILE_MODE,
        )
        try:
            env.reader_check()  # readers of killed processes would keep old pages from being reused
            pages, entries = (env.open_db(name, create=not readonly) for name in (b"pages", b"entries"))
            files = ((name, self.path / name) for name in FILES)
            return Databases(env, pages, entries, tuple((n, os.stat(p).st_ino) for n, p in files if p.exists()))
        except BaseException:
            env.close()
            raise

    def _failed(self, kind: str, error: Exception) -> None:
        with self.changed:
            self.errors += 1
            if kind not in self.failing:
                log.warning("%s: %s fails, going on without: %s", self.path, kind, error)
            self.failing[kind] = time.monotonic() + RETRY_SECONDS
            # After damage, or an error that closes the environment, check the tree and open it again.
            if isinstance(error, lmdb.Error) and code_of(error) not in (*NO_ROOM, *READ_ONLY) and not full(error):
                self.stale = self.suspect = True

    def _works(self, kind: str) -> None:
        if self.failing.pop(kind, None) is not None:
            log.info("%s: %s works again", self.path, kind)


def code_of(error: Exception) -> int:
    """The errno of an OSError, or LMDB's code (an errno, or a negative number of its own); 0 if there is neither."""
    if isinstance(error, OSError):
        return error.errno or 0
    return int(getattr(error, "code", 0))


def full(error: Exception) -> bool:
    """Whether the disk or LMDB's map was full."""
    return isinstance(error, lmdb.MapFullError) or code_of(error) in NO_ROOM
