"""Prefixes that stay on the device for a time (retained), or until they are dropped (pinned), within a budget of pages.

A `Retention` is a lease on whole pages, so that no eviction takes them. Each owner has a share of the budget; beyond
it, the retentions that end first are given up, an owner's background requests before the others. Pins come before
retentions. Ends are on a monotonic clock, so that a wall clock which is set changes nothing while a server runs.

Only the engine's thread calls it, but any thread may read its figures.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cache.prefix_cache import Lease, PrefixCache

MOST_LOST = 4096  # retentions that were given up early, and whose owners were not told yet


@dataclass(frozen=True)
class Ask:
    """What a request asks to be kept: the first `tokens` of its prompt, for `seconds` after each use.

    Infinitely many seconds pin it, under the name `pin`, until it is dropped.
    """

    tokens: int
    seconds: float
    pin: str = ""


@dataclass(frozen=True)
class Kept:
    """What was done about an `Ask`: so many tokens stay until then (seconds since 1970), or `why` none do."""

    tokens: int
    until: float  # 0 for nothing, infinite for a pin
    why: str = ""


@dataclass(frozen=True)
class Client:
    """Who asks: an owner with a share of the budget, between 0 and 1."""

    owner: str = ""
    share: float = 1.0
    background: bool = False


@dataclass(frozen=True, eq=False)
class Published:
    """A sequence that the cache lists."""

    tokens: np.ndarray  # [tokens] int32
    keys: Sequence[bytes]  # of its full pages
    salt: bytes
    head: int


@dataclass(frozen=True, eq=False)
class Retention:
    """A prefix that stays, known by the keys of its pages."""

    keys: tuple[bytes, ...]
    lease: Lease  # of its pages and no more
    client: Client
    seconds: float
    end: float  # of it, on the clock
    pin: str = ""

    @property
    def pages(self) -> np.ndarray:
        """Its pages, [pages] int32."""
        return self.lease.pages


class Resumed(NamedTuple):
    """What a page was kept for by an earlier server: it is known by its key alone until its owner asks for it."""

    owner: str
    seconds: float
    end: float  # on the clock


def first_to_go(retentions: Iterable[Retention]) -> Retention | None:
    """The retention to give up first: a background one before the others, and of those the one that ends first."""
    return min(retentions, key=lambda each: (not each.client.background, each.end), default=None)


class Retentions:
    """All retentions of one engine. `budget` is in pages, of which pins take theirs first."""

    def __init__(
        self,
        cache: Callable[[], PrefixCache],
        budget: int,
        resumed: dict[bytes, Resumed] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache, self.budget, self.clock = cache, budget, clock
        self.resumed = {} if resumed is None else resumed  # by the key of a page
        self.by_owner: dict[str, dict[bytes, Retention]] = {}  # by the key of the last page
        self.pins: dict[str, Retention] = {}
        # How many retentions of an owner hold each page, and how many pins: each [pages] int32.
        self.held: dict[str, np.ndarray] = {}
        self.pinned = np.zeros(1, np.int32)
        self.lost: OrderedDict[tuple[str, bytes], float] = OrderedDict()  # when each was to end, by owner and last key
        self.events: Counter[str] = Counter()
        self.version = 0  # changes with each retention
        self.due = 0.0  # nothing ends before

    # Asking.

    def keep(self, asks: Sequence[Ask], published: Published, client: Client) -> list[Kept]:
        """What each of `asks` about a sequence gets. What it uses of its owner's earlier retentions ends later."""
        self.expire()
        self._resume(published, client)
        before = self._use(published.keys, client.owner)
        kept = [self._keep(ask, published, client) for ask in asks]
        if before and kept:
            kept[0] = replace(kept[0], why=f"{before}; {kept[0].why}" if kept[0].why else before)
        return kept

    def _keep(self, ask: Ask, published: Published, client: Client) -> Kept:
        if not ask.seconds:
            return Kept(0, 0.0)
        size = self.cache().page_size
        count = min(ask.tokens // size, len(published.keys))
        if not count:
            return self._refused(f"expected a page of {size} tokens or more, found {ask.tokens}")
        if (lease := self._lease(published, count)) is None:
            return self._refused("its pages are not on the device")
        keys, end = tuple(published.keys[: len(lease.pages)]), self.clock() + ask.seconds
        new = Retention(keys, lease, client, ask.seconds, end, ask.pin)
        return self._pin(new) if ask.pin else self._retain(new)

    def _lease(self, published: Published, count: int) -> Lease | None:
        """A lease on the first `count` pages of a sequence, or on as many of them as are there; None without any."""
        cache, size = self.cache(), self.cache().page_size
        found = cache.peek(published.tokens[: count * size], published.salt, published.head)
        tokens = published.tokens[: found // size * size]
        return cache.hold(tokens, published.salt, published.head) if len(tokens) else None

    def _pin(self, new: Retention) -> Kept:
        old, holders = self.pins.get(new.pin), self._holders(new).copy()
        holders[new.pages] += 1
        if old:
            holders[old.pages] -= 1
        if (pinned := int(np.count_nonzero(holders))) > self.budget:
            self.cache().release(new.lease)
            return self._refused(
                f"{pinned} pages would be pinned, and {self.budget} may be (--retain-bytes): it is cached, not pinned"
            )
        if old:
            self._end(old)
        self._add(new)
        self._trim_all()
        self.events["pinned"] += 1
        return Kept(self._tokens(new), math.inf)

    def _retain(self, new: Retention) -> Kept:
        owner = new.client.owner
        own = self.by_owner.setdefault(owner, {})
        same = own.get(new.keys[-1])
        if same and same.end >= new.end:
            self.cache().release(new.lease)
            return Kept(self._tokens(same), self.wall(same.end))
        held = set(new.keys)
        for old in [each for key, each in own.items() if key in held and each.end <= new.end]:
            self._end(old)  # the new one holds its pages as long
        self._add(new)
        if not self._trim(owner, new):
            most = self.most_pages(new.client.share)
            return self._refused(
                f"{len(held)} pages do not fit beside what is kept for longer: this client may keep {most} "
                "(--retain-bytes); they are cached as long as there is room"
            )
        self.events["retained"] += 1
        return Kept(self._tokens(new), self.wall(new.end))

    def _trim(self, owner: str, new: Retention | None = None) -> bool:
        """End what an owner has beyond its share; False if the `new` retention goes as well."""
        own = self.by_owner.get(owner, {})
        while (first := first_to_go(own.values())) and self.pages_of(owner) > self.most_pages(first.client.share):
            self._end(first)
            if first is new:
                return False
            self._lose(first)
        return True

    def _trim_all(self) -> None:
        """Trim all owners, as pins have changed: less is left for them, or what a pin held with them is theirs now."""
        for owner in self.by_owner:
            self._trim(owner)

    def _refused(self, why: str) -> Kept:
        self.events["refused"] += 1
        return Kept(0, 0.0, why)

    def _resume(self, published: Published, client: Client) -> None:
        """Hold on to what an earlier server has promised about the start of a sequence."""
        run: list[Resumed] = []
        for key in published.keys if self.resumed else ():
            if (found := self.resumed.get(key)) is None or found.owner != client.owner:
                break
            run.append(found)
        if not run or (lease := self._lease(published, len(run))) is None:
            return
        for key in published.keys[: len(run)]:
            del self.resumed[key]
        keys = tuple(published.keys[: len(lease.pages)])
        self._retain(Retention(keys, lease, client, run[-1].seconds, run[-1].end))

    def _use(self, keys: Sequence[bytes], owner: str) -> str:
        """Let what a sequence uses end later; returns in words what had been given up of it early."""
        own, now = self.by_owner.get(owner, {}), self.clock()
        for key in keys if own else ():
            if old := own.get(key):
                own[key] = replace(old, end=now + old.seconds)
                self.version += 1
        ends = [self.lost.pop((owner, key), 0.0) for key in keys] if self.lost else []
        if (latest := max(ends, default=0.0)) <= now:
            return ""
        return f"what was kept until {utc(self.wall(latest))} was given up before, as there was no room"

    # Ending.

    def expire(self) -> None:
        """End what has had its time."""
        if (now := self.clock()) < self.due:
            return
        for old in [each for each in self.retained() if each.end <= now]:
            self._end(old)
            self.events["expired"] += 1
        for key in [key for key, each in self.resumed.items() if each.end <= now]:
            del self.resumed[key]
        ends = [*(each.end for each in self.retained()), *(each.end for each in self.resumed.values())]
        self.due = min(ends, default=math.inf)

    def give_up(self) -> bool:
        """End one retention early, as a request needs its pages: a pin only if there is nothing else. False if none."""
        first = first_to_go(self.retained())
        if first is None and self.resumed:
            self.resumed.clear()
            return True
        first = first or next(reversed(self.pins.values()), None)
        if first is None:
            return False
        self._end(first)
        self._lose(first)
        return True

    def drop_pin(self, name: str) -> None:
        """End a pin, if there is one of this name."""
        if old := self.pins.get(name):
            self._end(old)
            self._trim_all()

    def forget_unlisted(self) -> None:
        """End what the cache lists no longer, since it was found to be wrong."""
        listed = self.cache().tree.held
        for old in [*self.retained(), *self.pins.values()]:
            if not listed[old.pages].all():
                self._end(old)
                self._lose(old)

    def end(self) -> None:
        """End all of them, as the engine ends."""
        for old in [*self.retained(), *self.pins.values()]:
            self._end(old)

    def cleared(self) -> None:
        """Forget all: the cache whose pages it held is gone."""
        self.by_owner, self.held, self.pins, self.pinned = {}, {}, {}, np.zeros(1, np.int32)
        self.version += 1

    # Figures.

    @property
    def pinned_pages(self) -> int:
        """Pages that are pinned."""
        return int(np.count_nonzero(self.pinned))

    @property
    def idle_pages(self) -> int:
        """Pages that are retained or pinned, and that no request uses."""
        holders = self.pinned + sum(list(self.held.values()))  # [pages] int32
        if len(holders) == 1:
            return 0  # nothing was ever held
        return int(np.count_nonzero((holders > 0) & (self.cache().pool.ref_counts <= holders + 1)))

    def pages_of(self, owner: str) -> int:
        """Pages that an owner's retentions hold, and no pin does."""
        held = self.held.get(owner)
        return 0 if held is None else int(np.count_nonzero((held > 0) & (self.pinned == 0)))

    def most_pages(self, share: float) -> int:
        """Pages that an owner with this share of the budget may retain."""
        return int((self.budget - self.pinned_pages) * share)

    def wall(self, end: float) -> float:
        """An end on the clock in seconds since 1970."""
        return time.time() + end - self.clock()

    def retained(self) -> list[Retention]:
        """All of them but pins."""
        return [each for own in self.by_owner.values() for each in own.values()]

    def _tokens(self, retention: Retention) -> int:
        return len(retention.keys) * self.cache().page_size

    def _holders(self, retention: Retention) -> np.ndarray:
        """How many of a retention's kind hold each page, [pages] int32."""
        owner, pages = retention.client.owner, self.cache().pool.num_pages
        if not retention.pin:
            return self.held.setdefault(owner, np.zeros(pages, np.int32))
        if len(self.pinned) < pages:
            self.pinned = np.zeros(pages, np.int32)
        return self.pinned

    def _add(self, new: Retention) -> None:
        if new.pin:
            self.pins[new.pin] = new
        else:
            self.by_owner.setdefault(new.client.owner, {})[new.keys[-1]] = new
            self.due = min(self.due, new.end)
        self._holders(new)[new.pages] += 1
        self.version += 1

    def _end(self, old: Retention) -> None:
        if old.pin:
            del self.pins[old.pin]
        else:
            del self.by_owner[old.client.owner][old.keys[-1]]
        self._holders(old)[old.pages] -= 1
        self.cache().release(old.lease)
        self.version += 1

    def _lose(self, old: Retention) -> None:
        """Remember a retention that ended early, until its owner can be told; of pins there is a list."""
        self.events["lost"] += 1
        if old.pin:
            return
        self.lost[old.client.owner, old.keys[-1]] = old.end
        if len(self.lost) > MOST_LOST:
            self.lost.popitem(last=False)


def utc(seconds: float) -> str:
    """A time in seconds since 1970 as RFC 3339 has it, https://www.rfc-editor.org/rfc/rfc3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
