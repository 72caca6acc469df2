"""Which replica holds which pages, in a table of fixed size: bounded memory, and a few array operations a request.

A page is known by the first 8 bytes of its chain key. Each replica has a region of one shared table, of as many pages
as it can hold. A page lies in one of two buckets of its region, which its key names; of the two, the emptier one takes
a new page, which keeps buckets from overflowing until nearly all slots are taken (Azar, Broder, Karlin and Upfal,
"Balanced allocations", 1999, https://doi.org/10.1137/S0097539795288490). A page that finds no empty slot takes the one
that was used longest ago. So nothing is ever rehashed, and memory never grows while a replica serves.

A key chains all keys before it, and caches evict from the ends, so that a replica that holds a page holds those before
it. The depth of an overlap is therefore found by a search that halves, or here divides by ten, and not page by page.
"""

from __future__ import annotations

import math

import numpy as np

SLOTS = 8  # in a bucket: 64 bytes, one line of the processor's cache
LOAD = 0.75  # of the slots are taken when a replica holds as many pages as it was added with
PROBES = 9  # pages of a prompt that one step of the search looks at, on each replica
HALF = np.uint64(32)  # bits; each half of a hashed key names a bucket
PREDICTED = np.uint64(1)  # the lowest bit of a slot: the page was sent there, and is not confirmed yet


def hashed(keys: np.ndarray) -> np.ndarray:
    """Evenly spread numbers for keys ([pages] uint64), of the same shape: even, and never 0, which is an empty slot.

    The mix is the finaliser of SplitMix64 (https://doi.org/10.1145/2660193.2660195).
    """
    mixed = keys + np.uint64(0x9E37_79B9_7F4A_7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    mixed = (mixed ^ (mixed >> np.uint64(31))) & ~PREDICTED
    return np.where(mixed == 0, np.uint64(2), mixed)


class PrefixIndex:
    """The pages of each replica, by name."""

    def __init__(self) -> None:
        self.slots = np.zeros((0, SLOTS), np.uint64)  # hashed keys with PREDICTED, 0 where empty
        self.used = np.zeros((0, SLOTS), np.uint32)  # when a slot's page was used last, by `clock`
        self.clock = 0
        self.names: list[str] = []
        self.first = np.zeros(0, np.int64)  # [replicas] the first bucket of each region
        self.buckets = np.zeros(0, np.uint64)  # [replicas] buckets in it
        self.pages: dict[str, int] = {}  # that each replica holds
        self.free: list[tuple[int, int]] = []  # regions of replicas that are gone: first bucket, buckets

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.slots.nbytes + self.used.nbytes

    def add(self, name: str, pages: int) -> None:
        """A new replica with nothing cached, and room for `pages`; of more, those used longest ago are forgotten.

        Raises ValueError for a name that is there, or room for no page.
        """
        if name in self.pages:
            raise ValueError(f"replica {name!r} is in the index already: drop it first")
        if pages < 1:
            raise ValueError(f"replica {name!r} has room for {pages} pages, expected at least 1")
        buckets = math.ceil(pages / (SLOTS * LOAD))
        self.first = np.append(self.first, self._allocate(buckets))
        self.buckets = np.append(self.buckets, np.uint64(buckets))
        self.names.append(name)
        self.pages[name] = 0

    def drop(self, name: str) -> None:
        """Forget a replica; one that is not there is no error."""
        if name not in self.pages:
            return
        self.clear(name)
        at = self.names.index(name)
        self.free = joined([*self.free, (int(self.first[at]), int(self.buckets[at]))])
        self.first, self.buckets = np.delete(self.first, at), np.delete(self.buckets, at)
        del self.names[at], self.pages[name]

    def clear(self, name: str) -> None:
        """A replica holds nothing any more."""
        at = self.names.index(name)
        region = slice(int(self.first[at]), int(self.first[at]) + int(self.buckets[at]))
        self.slots[region] = 0
        self.used[region] = 0
        self.pages[name] = 0

    def insert(self, name: str, keys: np.ndarray, predicted: bool = False) -> None:
        """A replica holds `keys` ([pages] uint64), or will if `predicted`; those that it holds count as used now."""
        self.clock = (self.clock + 1) % (1 << 32)
        stamp, flag = np.uint32(self.clock), PREDICTED if predicted else np.uint64(0)
        slots, used = self.slots.reshape(-1), self.used.reshape(-1)
        left = hashed(np.asarray(keys, np.uint64))
        while len(left):
            places = self._places(name, left)
            there = slots[places]
            same = (there ^ left[:, None]) <= PREDICTED
            found = same.any(1)
            known = places[found, same[found].argmax(1)]
            used[known] = stamp
            if not predicted:
                slots[known] &= ~PREDICTED
            left, places, there = left[~found], places[~found], there[~found]
            if not len(left):
                return
            target = chosen_slots(there, used[places], stamp)  # [pages], -1 for no place
            placed = target >= 0
            left, where = left[placed], places[placed, target[placed]]
            was_empty = slots[where] == 0
            slots[where] = left | flag
            used[where] = stamp
            # Of several pages that chose one slot, the last one has it, and the others look again.
            winners = (slots[where] ^ left) <= PREDICTED
            self.pages[name] += len(np.unique(where[was_empty]))
            left = left[~winners]

    def remove(self, name: str, keys: np.ndarray, predicted_only: bool = False) -> None:
        """A replica does not hold `keys` ([pages] uint64); with `predicted_only`, those stay that were confirmed."""
        slots = self.slots.reshape(-1)
        wanted = hashed(np.asarray(keys, np.uint64))
        places = self._places(name, wanted)
        difference = slots[places] ^ wanted[:, None]
        same = difference == PREDICTED if predicted_only else difference <= PREDICTED
        found = same.any(1)
        gone = np.unique(places[found, same[found].argmax(1)])
        slots[gone] = 0
        self.pages[name] -= len(gone)

    def overlap(self, keys: np.ndarray) -> np.ndarray:
        """How many of `keys` ([pages] uint64, a prompt's in order) each replica holds, [replicas] int64 as `names`."""
        wanted = hashed(np.asarray(keys, np.uint64))
        low = np.zeros(len(self.names), np.int64)  # pages that are held
        high = np.full(len(self.names), len(wanted), np.int64)  # no more than so many are
        steps = np.arange(1, PROBES + 1)
        open_ = np.flatnonzero(low < high)
        while len(open_):
            a, b = low[open_, None], high[open_, None]
            # Numbers of pages that may be held, [open replicas, PROBES], rising: page number - 1 tells.
            tried = a + -(-(b - a) * steps // PROBES)
            held = self._holds(open_, wanted[tried - 1])
            count = np.logical_and.accumulate(held, axis=1).sum(1)
            rows = np.arange(len(open_))
            some, all_ = count > 0, count == PROBES
            low[open_[some]] = tried[rows[some], count[some] - 1]
            high[open_[~all_]] = tried[rows[~all_], count[~all_]] - 1
            open_ = open_[low[open_] < high[open_]]
        return low

    def check(self) -> None:
        """Assert that counts and regions agree with the table; slow, for tests."""
        regions = [*zip(self.first.tolist(), self.buckets.tolist(), strict=True), *self.free]
        assert sum(count for _, count in regions) == len(self.slots), "regions do not cover the table"
        for name, first, count in zip(self.names, self.first.tolist(), self.buckets.tolist(), strict=True):
            held = self.slots[first : first + count]
            assert np.count_nonzero(held) == self.pages[name], f"{name} holds another number of pages than it counts"

    def _holds(self, replicas: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Whether replica i of `replicas` ([n] int64) has wanted[i, j] ([n, k] uint64, hashed); [n, k] bool."""
        at = bucket_pairs(wanted, self.first[replicas, None], self.buckets[replicas, None])  # [n, k, 2]
        found: np.ndarray = ((self.slots[at] ^ wanted[:, :, None, None]) <= PREDICTED).any((2, 3))
        return found

    def _places(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """The slots where each hashed key ([pages] uint64) can be, [pages, 2 * SLOTS] int64: those of two buckets."""
        at = self.names.index(name)
        pairs = bucket_pairs(wanted, self.first[at], self.buckets[at])
        return (pairs[:, :, None] * SLOTS + np.arange(SLOTS)).reshape(len(wanted), 2 * SLOTS)

    def _allocate(self, buckets: int) -> int:
        """The first bucket of a new region, zeroed."""
        for i, (first, room) in enumerate(self.free):
            if room >= buckets:
                self.free[i : i + 1] = [(first + buckets, room - buckets)] if room > buckets else []
                return first
        first = len(self.slots)
        # In place: a copy would take the memory of two tables.
        self.slots.resize((first + buckets, SLOTS), refcheck=False)
        self.used.resize((first + buckets, SLOTS), refcheck=False)
        return first


def joined(regions: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same buckets as (first, count), with neighbours made one."""
    made = list[tuple[int, int]]()
    for first, count in sorted(regions):
        if made and sum(made[-1]) == first:
            made[-1] = (made[-1][0], made[-1][1] + count)
        else:
            made.append((first, count))
    return made


def bucket_pairs(wanted: np.ndarray, first: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The two buckets of each hashed key ([...] uint64) in regions of `buckets` from `first` on; [..., 2] int64."""
    halves = np.stack([wanted >> HALF, wanted & ((np.uint64(1) << HALF) - np.uint64(1))], axis=-1)
    pairs: np.ndarray = first[..., None] + ((halves * buckets[..., None]) >> HALF).astype(np.int64)
    return pairs


def chosen_slots(there: np.ndarray, used: np.ndarray, stamp: np.uint32) -> np.ndarray:
    """Which of its 2 * SLOTS slots each new page takes, [pages] int64; -1 for one whose slots were all used now.

    `there` ([pages, 2 * SLOTS] uint64) is what the slots hold, `used` (the same shape, uint32) when each was used last.
    An empty slot of the emptier bucket, or else the slot that was used longest ago.
    """
    empty = there == 0
    counts = empty.reshape(-1, 2, SLOTS).sum(2)  # [pages, 2]
    emptier = np.repeat(counts == counts.max(1, keepdims=True), SLOTS, axis=1)
    # Ages in the order of the clock, which wraps around.
    age = (stamp - used).astype(np.int64)
    rank = np.where(empty & emptier, np.int64(1) << 33, np.where(empty, np.int64(1) << 32, age))
    best = rank.argmax(1)
    return np.where(rank[np.arange(len(best)), best] > 0, best, -1)
