"""One LMDB environment that several processes share and that may fail, vanish and come back while it is in use.

Nothing here raises once a store is open: an action that cannot run gives the caller's fallback, is counted, and is
logged once. LMDB trusts its B-tree pages; so the first process that opens a store has `lmdb verify` walk the tree (it
runs no LMDB code), and a damaged tree is deleted with all its pages. Damage that comes later LMDB nearly always finds
itself (py-lmdb 3 patches checks into it); where it does not, it may end the process, but gives no wrong page.
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

log = logging.getLogger(__name__)
T = TypeVar("T")

# The version is in the name of the directory, where no flipped bit in a file can change it.
PROGRAM = "tokenzero-pages-v"
FORMAT = PROGRAM + "1"
CHECK_SECONDS = 8.0  # a walk that takes longer is given up; ten times that once LMDB has reported damage
RETRY_SECONDS = 5.0  # what failed is left alone for so long
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)  # a write that was cut short is EIO to LMDB


class StoreError(Exception):
    """A directory that must not be used: of another program or version, or damaged and not to be repaired."""


@dataclass(frozen=True, eq=False)
class Databases:
    """An open environment and its sub-databases: `pages` maps key -> payload, `entries` key -> what is known of it."""

    env: lmdb.Environment
    pages: Any  # lmdb._Database, which lmdb does not export
    entries: Any
    inode: int  # of the data file

    def occupied(self, txn: "lmdb.Transaction[bytes]") -> int:
        """Bytes of all LMDB pages that hold something; pages that were freed are not among them and are used again."""
        stats = [txn.stat(db) for db in (self.pages, self.entries)]
        return sum(s["psize"] * (s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"]) for s in stats)


def check_directory(directory: Path) -> None:
    """Raise StoreError unless `directory` is absent, empty, or has a store of this version; changes nothing.

    Stores in folders of their own below it, of this version too, are no other program's.
    """
    try:
        found = sorted(set(os.listdir(directory)) - {"lost+found"})
    except NotADirectoryError:
        raise StoreError(f"{directory}: found a file, expected a directory: name another directory") from None
    except OSError:
        return  # absent, or unreadable: opening it says so
    found = [name for name in found if not (directory / name / FORMAT).is_dir()]
    if not found or (directory / FORMAT).is_dir():
        return
    others = [name for name in found if name.startswith(PROGRAM)]
    what = others[0] if others else f"files of another program ({', '.join(found[:3])})"
    raise StoreError(f"{directory}: found {what}, expected a folder {FORMAT} or nothing: name another directory")


def file_bytes(path: Path) -> int:
    """Length of the data file in `path`, 0 if there is none."""
    data = path / "data.mdb"
    return data.stat().st_size if data.exists() else 0


def check_tree(path: Path, seconds: float) -> str:
    """What is wrong with the structure of the LMDB data file in `path`; '' if nothing, or if that takes over `seconds`.

    No process may be writing the file. Raises OSError if it cannot be read.
    """
    if not file_bytes(path):
        return ""
    (path / "data.mdb").open("rb").close()
    # A process of its own: a walk that takes seconds would hold up the threads of this one, and could not be ended.
    command = [sys.executable, "-P", "-m", "lmdb", "verify", str(path)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        log.info("%s: the tree is too large to be checked in %.0f s, going on unchecked", path, seconds)
        return ""
    last = run.stderr.strip().rsplit("\n", 1)[-1]
    if run.returncode and "verify: " not in last:
        log.warning("%s: the tree could not be checked, going on unchecked: %s", path, last)
        return ""
    return f"{last}, {run.stdout.strip()[:200]}" if run.returncode else ""


class SharedEnvironment:
    """The environment in `directory`/FORMAT, opened now and, after a failure, again. Any thread may use it."""

    def __init__(self, directory: Path, map_bytes: int, repair: bool) -> None:
        check_directory(directory)
        self.directory = directory
        self.path = directory / FORMAT
        self.map_bytes = -(-map_bytes // 4096) * 4096
        self.repair = repair
        self.errors = 0
        self.failing: dict[str, float] = {}  # kinds of action that do not work now, and when to try again
        self.opened: Databases | None = None
        # File descriptor of self.path, locked: shared while it is in use, exclusively while its tree is checked.
        self.claim = -1
        self.stale = False  # to be closed and opened again before the next use
        self.suspect = False  # LMDB has reported damage
        self.closed = False
        self.users = 0  # threads inside an action
        self.changed = threading.Condition()
        with contextlib.suppress(OSError):  # opening it says what is wrong
            directory.mkdir(parents=True, exist_ok=True)
        with self.changed:
            self._open()

    def attempt(self, kind: str, action: Callable[[Databases], T], fallback: T) -> T:
        """The result of `action`, or `fallback` if it failed or if this `kind` ("read", "write") failed just before.

        Actions must not nest: the one outside would wait for itself when the environment has to be closed.
        """
        dbs = self._enter(kind)
        if dbs is None:
            return fallback
        try:
            if kind == "write" and dbs.env.flags()["readonly"]:
                self.stale = os.access(self.path / "data.mdb", os.W_OK)  # it was mounted anew, so open it anew
                raise OSError(errno.EROFS, "the store is read-only")
            result = action(dbs)
        except (lmdb.Error, OSError) as error:
            self._failed(kind, error)
            return fallback
        else:
            self._works(kind)
            return result
        finally:
            with self.changed:
                self.users -= 1
                self.changed.notify_all()

    def close(self) -> None:
        """Close the environment for good: later actions give their fallbacks."""
        with self.changed:
            self.closed = self.stale = True
            self._close_stale()

    def _enter(self, kind: str) -> Databases | None:
        now = time.monotonic()
        with self.changed:
            if self.closed or self.failing.get(kind, 0.0) > now:
                return None
            if self.opened is not None and not self.stale:
                self.stale = self._vanished(self.opened)
            self._close_stale()
            if self.opened is None and not self.closed and self.failing.get("open", 0.0) <= now:
                self._open()
            if self.opened is not None:
                self.users += 1
            return self.opened

    def _vanished(self, dbs: Databases) -> bool:
        try:
            return os.stat(self.path / "data.mdb").st_ino != dbs.inode
        except OSError as error:
            self._failed("open", error)
            return True

    def _close_stale(self) -> None:
        while self.opened is not None and self.stale:
            if self.users:
                self.changed.wait()  # a page that another thread is reading must not be unmapped under it
            else:
                self.opened.env.close()
                self.opened = None
                self._release_claim()

    def _release_claim(self) -> None:
        if self.claim >= 0:
            os.close(self.claim)
            self.claim = -1

    def _open(self) -> None:
        self.stale = False
        try:
            if not self.path.is_dir():
                self.path.mkdir()  # without parents: a directory that vanished is not ours to make again
            self.claim = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            alone = self._claim_alone()
            if alone:
                self._drop_damaged_tree()
                self.suspect = False
            try:
                self.opened = self._open_databases(readonly=False)
            except (lmdb.Error, OSError) as error:
                if code_of(error) not in READ_ONLY:
                    raise
                self.opened = self._open_databases(readonly=True)
            if alone:
                # Another process may check the tree in the moment between the two locks: nothing is written before.
                fcntl.flock(self.claim, fcntl.LOCK_SH)
        except (lmdb.Error, OSError) as error:
            self._release_claim()
            self._failed("open", error)
        except BaseException:
            self._release_claim()
            raise
        else:
            self._works("open")

    def _claim_alone(self) -> bool:
        try:
            fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self.claim, fcntl.LOCK_SH)  # waits while another process checks the tree
            return False
        return True

    def _drop_damaged_tree(self) -> None:
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
        for name in ("data.mdb", "lock.mdb"):
            (self.path / name).unlink(missing_ok=True)

    def _open_databases(self, readonly: bool) -> Databases:
        env = lmdb.open(
            str(self.path),
            map_size=max(self.map_bytes, file_bytes(self.path)),
            max_dbs=2,
            sync=False,
            metasync=False,
            readonly=readonly,
            create=not readonly,
        )
        try:
            env.reader_check()  # readers that were killed would keep old pages from being used again
            pages, entries = (env.open_db(name, create=not readonly) for name in (b"pages", b"entries"))
            return Databases(env, pages, entries, os.stat(self.path / "data.mdb").st_ino)
        except BaseException:
            env.close()
            raise

    def _failed(self, kind: str, error: Exception) -> None:
        with self.changed:
            self.errors += 1
            if kind not in self.failing:
                log.warning("%s: %s fails, going on without: %s", self.path, kind, error)
            self.failing[kind] = time.monotonic() + RETRY_SECONDS
            # A tree that LMDB finds wrong, or an environment that gave up, is checked and opened anew.
            if isinstance(error, lmdb.Error) and code_of(error) not in (*NO_ROOM, *READ_ONLY) and not full(error):
                self.stale = self.suspect = True

    def _works(self, kind: str) -> None:
        if kind in self.failing:
            with self.changed:
                del self.failing[kind]
            log.info("%s: %s works again", self.path, kind)


def code_of(error: Exception) -> int:
    """The errno of an OSError, or the code that LMDB gave (an errno, or a negative number of its own); 0 if none."""
    if isinstance(error, OSError):
        return error.errno or 0
    return int(getattr(error, "code", 0))


def full(error: Exception) -> bool:
    """Whether the disk or LMDB's map had no room."""
    return isinstance(error, lmdb.MapFullError) or code_of(error) in NO_ROOM
