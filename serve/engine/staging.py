"""Memory that pages are read into on their way to the device, used again and again.

Fresh memory costs a page fault for every 4 KiB, which takes as long as reading them.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from contextlib import suppress

import numpy as np


class Staging:
    """Buffers of one size, each free again once no array refers to it: XLA on a CPU reads them without a copy.

    One thread asks for them; any may drop the last reference.
    """

    def __init__(self, size: int, kept: int) -> None:
        self.size = size  # bytes of each buffer
        self.free: deque[mmap.mmap] = deque(maxlen=kept)  # no more than `kept` of them wait to be used again

    def takes(self, size: int) -> int:
        """Bytes of memory that a request for `size` bytes takes: a whole buffer, or its own if that is far smaller."""
        return self.size if size > self.size // 2 else size

    def buffer(self, size: int) -> np.ndarray:
        """Room for up to `self.size` bytes, [size] uint8, with any contents; aligned to a page of memory."""
        assert 0 < size <= self.size
        again = self.takes(size) == self.size
        memory = self.free.pop() if again and self.free else anonymous_memory(self.takes(size))
        whole = np.frombuffer(memory, np.uint8)
        if again:
            # All views refer to `whole`, those that JAX holds as well, so it goes last.
            weakref.finalize(whole, self.free.append, memory).atexit = False
        return whole[:size]

    def prefault(self) -> None:
        """Make the buffers that are kept, so that no request pays for their first use."""
        taken = [self.buffer(self.size) for _ in range(self.free.maxlen or 0)]
        for each in taken:
            each[:: mmap.PAGESIZE] = 0


def anonymous_memory(size: int) -> mmap.mmap:
    """Memory of so many bytes that belongs to this process alone, in huge pages where the system has them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
