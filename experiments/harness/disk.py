"""A disk's sequential speed, measured on files that are not in memory."""

from __future__ import annotations

import os
import time
from pathlib import Path


def drop_from_memory(path: Path) -> None:
    """Have the next read of a file come from the disk; a file that is mapped stays in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential_rate(folder: Path, size: int) -> float:
    """Bytes a second of reading a file of `size` bytes in `folder` from the disk, in order."""
    path, buffer = folder / "sequential", bytearray(1 << 20)
    path.write_bytes(os.urandom(size))
    drop_from_memory(path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    seconds = time.perf_counter() - start
    path.unlink()
    return size / seconds
