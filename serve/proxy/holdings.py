"""What an upstream is believed to hold, as it publishes nothing: what was sent there and is not dropped yet."""

from __future__ import annotations

from functools import partial
from itertools import islice, takewhile

import numpy as np

FIRST_CAPACITY = 2**14  # blocks, until its answers show more or less: about a million tokens
MOST_CAPACITY = 2**17
LEAST_CAPACITY = 2**6
EXPIRY_SECONDS = 3600.0  # unused for so long, a block counts as dropped
SLACK = 2  # blocks less than expected that are no miss: tokens are estimated, and engines keep whole pages only


class Holdings:
    """The blocks of one upstream, the least recently used first; `capacity` is learned from what its answers report.

    A block's age is how many new blocks were sent there since it was last used: an engine that drops the least recently
    used pages has dropped it at the age of its capacity. A chain's later blocks are used before its earlier ones, as
    engines drop a chain from its end.
    """

    def __init__(self) -> None:
        self.capacity = FIRST_CAPACITY
        self.sent = 0  # new blocks, ever
        self.used: dict[int, tuple[int, float]] = {}  # by key: `sent` and the time at its last use

    def __len__(self) -> int:
        """The blocks that it is believed to hold."""
        return len(self.used)

    def has(self, keys: np.ndarray) -> bool:
        """Whether it is believed to hold all of these keys, [blocks] uint64."""
        return all(key in self.used for key in keys.tolist())

    def use(self, keys: np.ndarray, now: float) -> list[int]:
        """A prompt with these keys, [blocks] uint64, goes there. Returns the keys that count as dropped by then."""
        listed = keys.tolist()
        self.sent += sum(key not in self.used for key in listed)
        at = (self.sent, now)
        for key in reversed(listed):
            self.used.pop(key, None)
            self.used[key] = at
        dropped = list(islice(self.used, max(0, len(self.used) - MOST_CAPACITY)))
        dropped += takewhile(partial(self.is_old, now), islice(self.used, len(dropped), None))
        for key in dropped:
            del self.used[key]
        return dropped

    def is_old(self, now: float, key: int) -> bool:
        """Whether a block must have been dropped."""
        sent, time = self.used[key]
        return self.sent - sent >= self.capacity or now - time >= EXPIRY_SECONDS

    def ages(self, keys: np.ndarray) -> list[int]:
        """The age of each key, [blocks] uint64, that is held, from the first one on."""
        found = []
        for key in keys.tolist():
            if key not in self.used:
                break
            found.append(self.sent - self.used[key][0])
        return found

    def learn(self, ages: list[int], cached: int) -> None:
        """An answer has reported `cached` blocks of a prompt, which had these ages when it was sent.

        A miss at an age at which others are hit has another cause, such as a template that rewrites earlier turns.
        """
        self.sent += max(0, len(ages) - cached)  # those were computed again
        if cached > len(ages) + SLACK:
            self.capacity = min(2 * self.capacity, MOST_CAPACITY)
        elif cached + SLACK < len(ages) and (missed := ages[cached]) > max(ages[:cached], default=0):
            self.capacity = max(min(self.capacity, missed), LEAST_CAPACITY)

    def forget(self, keys: np.ndarray) -> list[int]:
        """It does not hold these keys, [blocks] uint64, after all. Returns those that it was believed to hold."""
        return [key for key in keys.tolist() if self.used.pop(key, None)]

    def clear(self) -> list[int]:
        """The upstream has lost everything. Returns the keys that it held."""
        held = list(self.used)
        self.used.clear()
        return held
