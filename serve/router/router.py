"""Router: routes requests, and learns from what becomes of them. The one writer of all its state; not thread-safe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from serve.cost.model import Constants
from serve.router.choice import Choice, Tier, choose
from serve.router.fleet import NO_PAGE, Fleet, Prefill
from serve.router.index import PrefixIndex
from serve.router.request import RoutedRequest
from serve.router.summary import Increment, Snapshot

AGENTS = 1 << 16  # that are remembered, with the replica where each was last
TIER_PAGES = 1 << 20  # that are remembered of a tier


@dataclass(frozen=True)
class Sent:
    """A request on its way, or being answered."""

    request: RoutedRequest
    replica: str
    at: float
    answering_since: float | None = None


class Router:
    """Call `route`, then `sent` with the replica that the request really went to, then `first_token` and `finished`.

    A request that comes to nothing ends with `failed` instead.
    """

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.index = PrefixIndex()
        self.stored = PrefixIndex()  # what tiers hold, by the tier's name
        self.reach: dict[str, dict[str, float]] = {}  # seconds a token, by tier and replica
        self.in_flight: dict[str, Sent] = {}
        self.agents: OrderedDict[str, str] = OrderedDict()  # the replica of each agent's last request
        self.sequences: dict[str, int] = {}  # of the last summary of each replica

    def add(
        self,
        name: str,
        costs: Constants,
        pages: int,
        tiers: Mapping[str, float] | None = None,
        places: float = float("inf"),
        overtakes: bool = True,
    ) -> None:
        """A replica with room for `pages` in its cache, and for `places` requests that run at once.

        `tiers` are the seconds a token to read from each tier that it reaches; replicas that name the same tier share
        it. `overtakes` says whether a short prefill passes a long one there, as in this engine.
        """
        self.fleet.add(name, costs, places, overtakes)
        self.index.add(name, pages)
        self.sequences[name] = 0
        for tier, token_s in (tiers or {}).items():
            if tier not in self.stored.pages:
                self.stored.add(tier, TIER_PAGES)
            self.reach.setdefault(tier, {})[name] = token_s

    def remove(self, name: str) -> list[str]:
        """Forget a replica that is gone. Returns the ids of the requests that were in flight there."""
        self.fleet.remove(name)
        self.index.drop(name)
        del self.sequences[name]
        for reach in self.reach.values():
            reach.pop(name, None)
        lost = [id for id, sent in self.in_flight.items() if sent.replica == name]
        for id in lost:
            del self.in_flight[id]
        return lost

    def route(self, request: RoutedRequest, now: float, among: Collection[str] | None = None) -> Choice:
        """The best replica for a request, of those named in `among` if given; changes nothing."""
        fleet = self.fleet
        allowed = None if among is None else np.array([name in among for name in fleet.names], bool)
        tiers = ()
        if self.reach:
            depths = zip(self.stored.names, self.stored.overlap(request.keys).tolist(), strict=True)
            tiers = tuple(self._tier(name, depth) for name, depth in depths)
        known, overlap = fleet.known(now, self.index.pages), self.index.overlap(request.keys)
        return choose(request, known, overlap, tiers, self.agents.get(request.agent), allowed)

    def sent(self, request: RoutedRequest, choice: Choice, now: float) -> None:
        """A request was sent as chosen. Its pages count as cached there from now on."""
        self.in_flight[request.id] = Sent(request, choice.replica, now)
        start = choice.cached + choice.restored
        page = start // request.page_size
        known = page < len(request.keys)
        prefill = Prefill(
            start, request.tokens, now, page if known else NO_PAGE, int(request.keys[page]) if known else 0
        )
        self.fleet.sent(choice.replica, request.id, prefill)
        self.index.insert(choice.replica, request.keys, predicted=True)
        if request.agent:
            self.agents[request.agent] = choice.replica
            self.agents.move_to_end(request.agent)
            if len(self.agents) > AGENTS:
                self.agents.popitem(last=False)

    def first_token(self, request: str, now: float, cached: int | None = None) -> None:
        """A request's first token has come, after `cached` of its tokens were found in the replica's cache."""
        if sent := self.in_flight.get(request):
            self.in_flight[request] = replace(sent, answering_since=now)
            self.fleet.prefilled(sent.replica, request, now)
            self.fleet.decodes[self.fleet.row(sent.replica)] += 1

    def finished(self, request: str, now: float) -> None:
        """A request's answer is complete."""
        if sent := self.in_flight.pop(request, None):
            row = self.fleet.row(sent.replica)
            self.fleet.prefilled(sent.replica, request, now)
            if sent.answering_since is not None:
                self.fleet.decodes[row] -= 1

    def failed(self, request: str, now: float) -> None:
        """A request came to nothing: refused, broken off, or cancelled."""
        self.finished(request, now)

    def published(self, name: str, summary: Increment | Snapshot) -> bool:
        """A replica's summary has come. False if it cannot be used: ask for a snapshot."""
        if isinstance(summary, Snapshot):
            self.index.clear(name)
            self.index.insert(name, summary.held)
        elif summary.sequence != self.sequences[name] + 1:
            return False
        else:
            self.index.insert(name, summary.added)
            self.index.remove(name, summary.removed)
            for tier, reach in self.reach.items():
                if name in reach:
                    self.stored.insert(tier, summary.added)
        self.sequences[name] = summary.sequence
        return True

    def _tier(self, name: str, depth: int) -> Tier:
        names, reach = self.fleet.names, self.reach[name]
        return Tier(np.full(len(names), depth), np.array([reach.get(each, np.inf) for each in names]))
