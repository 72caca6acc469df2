"""Host-side accounting of the device page pool: which pages are free, and how many holders each other page has.

A page here is a number. Its arrays belong to the engine; `prefix_cache` and `radix_tree` know who holds it and why.
"""

import numpy as np


class PoolExhausted(RuntimeError):
    """More pages were asked for than are free."""


def pages_for(length: int, page_size: int) -> int:
    """Pages that `length` tokens occupy, the last one perhaps partly."""
    return -(-length // page_size)


class PagePool:
    """Reference counts and a free stack over pages 0 .. num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, expected at least 1: give the pool more memory")
        self.num_pages = num_pages
        self.free_pages = num_pages
        self.ref_counts = np.zeros(num_pages, np.int32)  # [pages] int32
        # [pages] int32, the first `free_pages` are valid
        self.free_stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)

    def allocate(self, count: int) -> np.ndarray:
        """Take `count` free pages, [count] int32, with one reference each. Raises PoolExhausted if there are fewer."""
        assert count >= 0, f"cannot allocate {count} pages"
        if count > self.free_pages:
            raise PoolExhausted(
                f"{count} pages needed, {self.free_pages} of {self.num_pages} free: "
                "wait until a running request releases its lease, or enlarge the pool"
            )
        pages = self.free_stack[self.free_pages - count : self.free_pages][::-1].copy()
        self.free_pages -= count
        assert not self.ref_counts[pages].any(), "a page was both free and referenced"
        self.ref_counts[pages] = 1
        return pages

    def retain(self, pages: np.ndarray) -> None:
        """Add one reference to each of `pages` ([n] int32), which must not be free."""
        assert (self.ref_counts[pages] > 0).all(), "retained a free page: it may hold another sequence's KV by now"
        np.add.at(self.ref_counts, pages, 1)

    def release(self, pages: np.ndarray) -> None:
        """Drop one reference from each of `pages` ([n] int32); pages without any reference become free."""
        np.subtract.at(self.ref_counts, pages, 1)
        left = self.ref_counts[pages]
        assert (left >= 0).all(), f"pages released more often than retained: {pages[left < 0].tolist()}"
        freed = np.unique(pages[left == 0])
        self.free_stack[self.free_pages : self.free_pages + len(freed)] = freed
        self.free_pages += len(freed)

    def check(self) -> None:
        """Assert that the free stack holds exactly the pages without references, each once."""
        free = np.sort(self.free_stack[: self.free_pages])
        assert np.array_equal(free, np.flatnonzero(self.ref_counts == 0)), "free stack and reference counts disagree"
