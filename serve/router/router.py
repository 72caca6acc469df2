"""Router: routes requests, and learns from what becomes of them. The one writer of all its state; not thread-safe."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from serve.cost.model import Constants, weighted_median
from serve.router.choice import Choice, Tier, choose
from serve.router.fleet import NO_PAGE, Fleet, Prefill
from serve.router.index import PrefixIndex
from serve.router.refit import LEAST, Fitted, Measured, Refit, at_speed
from serve.router.request import RoutedRequest
from serve.router.summary import Increment, Load, Snapshot

AGENTS = 1 << 16  # that are remembered, with the replica where each was last
TIER_PAGES = 1 << 20  # that are remembered of a tier
EVICTED_PAGES = 1 << 18  # that are remembered, to see which of them are asked for again
ENDED = 1024  # requests that are remembered, as a replica may tell of them once more
UNCONFIRMED = 1024  # requests of a replica whose pages it has not published
REUSES = 16  # requests, whose reused tokens are compared with those expected
EVICTED = "evicted"


@dataclass(frozen=True)
class Sent:
    """A request on its way, or being answered."""

    request: RoutedRequest
    choice: Choice
    at: float
    decodes: int  # that ran beside it when it was sent
    answering_since: float | None = None


@dataclass(eq=False)
class Replica:
    """What is known of one replica besides its queue and its pages."""

    pages: int  # that it has room for
    refit: Refit | None  # what its first tokens show, if that is used
    sequence: int = 0  # of its last summary
    # Pages that were predicted, and the summary that must have named them.
    unconfirmed: deque[tuple[int, np.ndarray]] = field(default_factory=lambda: deque(maxlen=UNCONFIRMED))
    reuses: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=REUSES))
    reuse: float = 1.0  # the share of the pages cached there that requests do reuse
    others: list[str] = field(default_factory=list)  # prefills that other routers sent


class Router:
    """Call `route`, then `sent` with the choice that was followed, then `first_token` and `finished`.

    A request that comes to nothing ends with `failed` instead. A call for a request or a replica that is not known (any
    more) is no error.
    """

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.index = PrefixIndex()
        self.stored = PrefixIndex()  # what tiers hold, by the tier's name
        self.evicted = PrefixIndex()  # pages that replicas have lost, all together
        self.evicted.add(EVICTED, EVICTED_PAGES)
        self.evictions = self.missed = 0.0  # pages evicted, and those of them that were asked for again
        self.reach: dict[str, dict[str, float]] = {}  # seconds a token, by tier and replica
        self.replicas: dict[str, Replica] = {}
        self.kinds: dict[str, Measured] = {}
        self.in_flight: dict[str, Sent] = {}
        self.ended: OrderedDict[str, None] = OrderedDict()  # the latest that were
        self.agents: OrderedDict[str, str] = OrderedDict()  # the replica of each agent's last request

    @property
    def regret(self) -> float:
        """The share of evicted pages that are asked for again."""
        return self.missed / self.evictions if self.evictions else 0.0

    def add(
        self,
        name: str,
        costs: Constants,
        pages: int,
        tiers: Mapping[str, float] | None = None,
        places: float = float("inf"),
        overtakes: bool = True,
        kind: str = "",
        least: int = LEAST,
    ) -> None:
        """A replica with room for `pages` in its cache, and for `places` requests that run at once.

        `costs` are what its work is expected to take, until it says (`measured`) or its first tokens show something
        else. The latter count for replicas with a `kind`, from `least` busy periods on: those of one kind are equal
        machines with the same model, and are measured together. `tiers` are the seconds a token to read from each tier
        that it reaches; replicas that name the same tier share it. `overtakes` says whether a short prefill passes a
        long one there, as in this engine. Raises ValueError for a name that is there.
        """
        self.index.add(name, pages)
        self.fleet.add(name, costs, places, overtakes)
        refit = Refit(self.kinds.setdefault(kind, Measured(costs, least))) if kind else None
        self.replicas[name] = Replica(pages, refit)
        self._refitted()
        self._reaches(name, tiers or {})

    def measured(
        self, name: str, costs: Constants, beside_s: float = 0.0, tiers: Mapping[str, float] | None = None
    ) -> None:
        """A replica has measured itself what its work takes; `costs` and `tiers` as in `add`.

        A computed token takes `beside_s` more for each sequence that decodes meanwhile.
        """
        if name in self.replicas:
            self.fleet.set_costs(name, costs, beside_s)
            self._reaches(name, tiers or {})

    def remove(self, name: str) -> list[str]:
        """Forget a replica that is gone. Returns the ids of the requests that were in flight there."""
        if name not in self.replicas:
            return []
        self.fleet.remove(name)
        self.index.drop(name)
        del self.replicas[name]
        for reach in self.reach.values():
            reach.pop(name, None)
        lost = [id for id, sent in self.in_flight.items() if sent.choice.replica == name]
        for id in lost:
            del self.in_flight[id]
        return lost

    def route(self, request: RoutedRequest, now: float, among: Collection[str] | None = None) -> Choice:
        """The best replica for a request, of those named in `among` if given; changes nothing.

        Raises ValueError if there is none.
        """
        names = self.fleet.names
        allowed = None if among is None else np.array([name in among for name in names], bool)
        held = np.array([self.index.pages[name] for name in names], np.int64)
        room = np.array([self.replicas[name].pages for name in names], np.int64) - held
        reuse = np.array([self.replicas[name].reuse for name in names])
        known = self.fleet.known(now, held, room, self.regret, reuse)
        overlap = (self.index.overlap(request.keys) * reuse).astype(np.int64)
        return choose(request, known, overlap, self._tiers(request), self.agents.get(request.agent), allowed)

    def sent(self, request: RoutedRequest, choice: Choice, now: float) -> None:
        """A request was sent as chosen. Its pages count as cached there from now on, so that others follow it."""
        replica = self.replicas.get(choice.replica)
        if replica is None:
            return
        fleet, start = self.fleet, choice.cached + choice.restored
        self.in_flight[request.id] = Sent(request, choice, now, fleet.decodes(choice.replica))
        if replica.refit:
            replica.refit.sent(now, fleet.idle(choice.replica), fleet.full(choice.replica))
        page, key = start // request.page_size, 0
        new = request.keys[page:]
        if len(new):
            key = int(new[0])
            self._count_missed(new)
        fleet.sent(choice.replica, request.id, Prefill(start, request.tokens, now, page if len(new) else NO_PAGE, key))
        fleet.asked(fleet.constants[fleet.row(choice.replica)].compute_s(start, request.tokens), now)
        self.index.insert(choice.replica, request.keys, predicted=True)
        if request.agent:
            self.agents[request.agent] = choice.replica
            self.agents.move_to_end(request.agent)
            if len(self.agents) > AGENTS:
                self.agents.popitem(last=False)

    def first_token(self, request: str, now: float, cached: int | None = None) -> None:
        """A request's first token has come, after `cached` of its tokens were found in the replica's cache and tiers.

        None where the replica does not say.
        """
        sent = self.in_flight.get(request)
        if sent is None or sent.answering_since is not None:
            return
        name, expected = sent.choice.replica, sent.choice.cached + sent.choice.restored
        replica = self.replicas[name]
        self.in_flight[request] = replace(sent, answering_since=now)
        decodes = (sent.decodes + self.fleet.decodes(name)) / 2
        self.fleet.prefilled(name, request, now)
        self.fleet.answering(name)
        found = expected if cached is None else cached
        refit, idle = replica.refit, self.fleet.idle(name)
        if refit and refit.first_token(found, sent.request.tokens, decodes, now, idle):
            self._refitted()
        if expected:
            replica.reuses.append((min(1.0, found / expected), expected))
            replica.reuse *= weighted_median(replica.reuses) if len(replica.reuses) == REUSES else 1.0
            if len(replica.reuses) == REUSES:
                replica.reuses.clear()
        # The increment after the next one is made later than this, and names these pages if they are cached.
        replica.unconfirmed.append((replica.sequence + 2, sent.request.keys[found // sent.request.page_size :]))

    def finished(self, request: str, now: float) -> None:
        """A request's answer is complete."""
        if sent := self.in_flight.pop(request, None):
            self.ended[request] = None
            if len(self.ended) > ENDED:
                self.ended.popitem(last=False)
            self.fleet.prefilled(sent.choice.replica, request, now)
            if sent.answering_since is None:
                if refit := self.replicas[sent.choice.replica].refit:
                    refit.spoiled = True  # its work will be missing, its time will not
            else:
                self.fleet.answered(sent.choice.replica, now - sent.answering_since)

    def failed(self, request: str, now: float) -> None:
        """A request came to nothing: refused, broken off, or cancelled. What it would have cached is not expected."""
        if sent := self.in_flight.get(request):
            self.finished(request, now)
            if sent.answering_since is None:
                first = (sent.choice.cached + sent.choice.restored) // sent.request.page_size
                self.index.remove(sent.choice.replica, sent.request.keys[first:], predicted_only=True)

    def published(self, name: str, summary: Increment | Snapshot) -> bool:
        """A replica's summary has come. False if one before it is missing: ask for a snapshot, once.

        An increment that a snapshot has overtaken is left out.
        """
        replica = self.replicas.get(name)
        if replica is None:
            return True
        if isinstance(summary, Snapshot):
            self._rebuild(name, replica, summary)
        elif summary.sequence <= replica.sequence:
            return True
        elif summary.sequence > replica.sequence + 1:
            return False
        else:
            self._take(name, summary)
        replica.sequence = summary.sequence
        while replica.unconfirmed and replica.unconfirmed[0][0] <= replica.sequence:
            self.index.remove(name, replica.unconfirmed.popleft()[1], predicted_only=True)
        return True

    def loaded(self, name: str, load: Load, now: float) -> None:
        """A replica has told all its work: what other routers sent there counts, too."""
        replica = self.replicas.get(name)
        if replica is None:
            return
        for request in replica.others:
            self.fleet.prefilled(name, request, now)
        # What has ended here since the replica told its load is nobody else's.
        others = [each for each in load.prefills if each[0] not in self.in_flight and each[0] not in self.ended]
        replica.others = [request for request, _, _ in others]
        for request, start, stop in others:
            self.fleet.sent(name, request, Prefill(start, stop, now))
        # Own answers whose end is on its way are in both counts.
        self.fleet.rows["decodes"][self.fleet.row(name)] = load.decodes

    def _reaches(self, name: str, tiers: Mapping[str, float]) -> None:
        for tier, token_s in tiers.items():
            if tier not in self.stored.pages:
                self.stored.add(tier, TIER_PAGES)
            self.reach.setdefault(tier, {})[name] = token_s

    def _take(self, name: str, summary: Increment) -> None:
        self.index.insert(name, summary.added)
        self.index.remove(name, summary.removed)
        for tier, reach in self.reach.items():
            if name in reach:
                self.stored.insert(tier, summary.added)
        if len(summary.removed):
            self.evicted.insert(EVICTED, summary.removed)
            self.evictions += len(summary.removed)
            if self.evictions > EVICTED_PAGES:
                self.evictions, self.missed = self.evictions / 2, self.missed / 2

    def _rebuild(self, name: str, replica: Replica, summary: Snapshot) -> None:
        """Know of a replica what it has said, and what was sent there and has no first token."""
        self.index.clear(name)
        self.index.insert(name, summary.held)
        replica.unconfirmed.clear()
        for sent in self.in_flight.values():
            if sent.choice.replica == name and sent.answering_since is None:
                self.index.insert(name, sent.request.keys, predicted=True)

    def _count_missed(self, keys: np.ndarray) -> None:
        """A request computes pages ([pages] uint64): those of them that were evicted once were missed."""
        if self.evictions:
            before = self.evicted.pages[EVICTED]
            self.evicted.remove(EVICTED, keys)
            self.missed += before - self.evicted.pages[EVICTED]

    def _refitted(self) -> None:
        """Use what was measured; a kind that was not measured yet is taken to be as fast as the median of others."""
        speeds = [(kind.fitted.speed, 1.0) for kind in self.kinds.values() if kind.fitted]
        for name, replica in self.replicas.items():
            if replica.refit and speeds:
                measured = replica.refit.measured
                fitted = measured.fitted or Fitted(at_speed(measured.prior, weighted_median(speeds)))
                self.fleet.set_costs(name, fitted.costs, fitted.beside)

    def _tiers(self, request: RoutedRequest) -> tuple[Tier, ...]:
        if not self.reach:
            return ()
        names, depths = self.fleet.names, self.stored.overlap(request.keys)
        return tuple(
            Tier(np.full(len(names), depth), np.array([self.reach[tier].get(name, np.inf) for name in names]))
            for tier, depth in zip(self.stored.names, depths.tolist(), strict=True)
        )
