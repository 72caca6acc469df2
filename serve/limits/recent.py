"""The latest values by key, within a limit in bytes; those that tell of a caller's prompts, for each salt apart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from threading import Lock
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
# For whom this thread or task works: the cache salt of its request, "" for none. Threads of a pool inherit it.
SCOPE: ContextVar[str] = ContextVar("scope", default="")
ENTRY_BYTES = 300  # of a key and of the mapping that holds it, about


class Recent(Generic[K, V]):
    """The latest values whose sizes add up to at most `most_bytes`; of these at most `most`. Any thread may use it.

    `size_of` returns the memory of a value in bytes, with its key unless that is small. The least recently used value
    is dropped first; a value that alone exceeds `most_bytes` is not kept. Of `scoped` values, only those are found that
    were set under the present SCOPE: a value that is found is there sooner than one that is made, which a caller sees.
    """

    def __init__(
        self, most_bytes: int, size_of: Callable[[V], int], most: int | None = None, scoped: bool = False
    ) -> None:
        self.most_bytes, self.most, self.size_of, self.scoped = most_bytes, most, size_of, scoped
        self.bytes = 0
        self._held: OrderedDict[Any, tuple[V, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """The number of values."""
        return len(self._held)

    def get(self, key: K) -> V | None:
        """The value of a key, or None; it counts as used."""
        known_as = self._known_as(key)
        with self._lock:
            if (found := self._held.get(known_as)) is None:
                return None
            self._held.move_to_end(known_as)
            return found[0]

    def peek(self, key: K) -> V | None:
        """The value of a key, or None; it does not count as used."""
        with self._lock:
            found = self._held.get(self._known_as(key))
        return found and found[0]

    def put(self, key: K, value: V) -> None:
        """Set the value of a key, and drop the least recently used values beyond the limits."""
        known_as = self._known_as(key)
        with self._lock:
            self._drop(known_as)
            self._set(known_as, value)

    def change(self, key: K, make: Callable[[V | None], V | None]) -> None:
        """Set a key's value to what `make` returns for it, unless that is None; this does not count as use."""
        known_as = self._known_as(key)
        with self._lock:
            found = self._held.get(known_as)
            if (value := make(found and found[0])) is not None:
                self.bytes -= found[1] if found else 0
                self._set(known_as, value)

    def values(self) -> list[V]:
        """All values, the least recently used first."""
        with self._lock:
            return [value for value, _ in self._held.values()]

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._held.clear()
            self.bytes = 0

    def _known_as(self, key: K) -> Any:
        return (SCOPE.get(), key) if self.scoped else key

    def _set(self, key: Any, value: V) -> None:
        size = ENTRY_BYTES + self.size_of(value)
        self._held[key] = (value, size)
        self.bytes += size
        if size > self.most_bytes:
            self._drop(key)
        while self.bytes > self.most_bytes or (self.most is not None and len(self._held) > self.most):
            self._drop(next(iter(self._held)))

    def _drop(self, key: Any) -> None:
        if (found := self._held.pop(key, None)) is not None:
            self.bytes -= found[1]
