"""Router: routes requests, and learns from what becomes of them. The one writer of all its state; not thread-safe."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from serve.cost.model import Constants
from serve.router.choice import Choice, choose
from serve.router.index import PrefixIndex
from serve.router.replica import Prefill, ReplicaState
from serve.router.request import RoutedRequest
from serve.router.summary import Increment, Snapshot


@dataclass(frozen=True)
class Sent:
    """A request on its way, or being answered."""

    request: RoutedRequest
    replica: str
    at: float
    answering: bool = False  # it has had its first token


class Router:
    """Call `route`, then `sent` with the replica that the request really went to, then `first_token` and `finished`.

    A request that comes to nothing ends with `failed` instead.
    """

    def __init__(self) -> None:
        self.replicas: dict[str, ReplicaState] = {}
        self.index = PrefixIndex()
        self.in_flight: dict[str, Sent] = {}
        self.agents: dict[str, str] = {}  # the replica of each agent's last request
        self.sequences: dict[str, int] = {}  # of the last summary of each replica

    def add(self, name: str, costs: Constants, pages: int, tiers: Mapping[str, float] | None = None) -> None:
        """A replica with room for `pages` in its cache; `tiers` as in ReplicaState."""
        self.replicas[name] = ReplicaState(name, costs, tiers=tiers or {})
        self.index.add(name, pages)
        self.sequences[name] = 0

    def remove(self, name: str) -> list[str]:
        """Forget a replica that is gone. Returns the ids of the requests that were in flight there."""
        self.replicas.pop(name, None)
        self.index.drop(name)
        lost = [id for id, sent in self.in_flight.items() if sent.replica == name]
        for id in lost:
            del self.in_flight[id]
        return lost

    def route(self, request: RoutedRequest, now: float, among: Collection[str] | None = None) -> Choice:
        """The best replica for a request, of those named in `among` if given; changes nothing."""
        replicas = [state for name, state in self.replicas.items() if among is None or name in among]
        return choose(request, replicas, self.index.overlap(request.keys), self.agents.get(request.agent))

    def sent(self, request: RoutedRequest, choice: Choice, now: float) -> None:
        """A request was sent as chosen. Its pages count as cached there from now on."""
        self.in_flight[request.id] = Sent(request, choice.replica, now)
        state = self.replicas[choice.replica]
        prefill = Prefill(request.id, choice.cached + choice.restored, request.tokens)
        self.replicas[choice.replica] = replace(state, prefills=(*state.prefills, prefill))
        self.index.insert(choice.replica, request.keys)
        self.agents[request.agent] = choice.replica

    def first_token(self, request: str, now: float, cached: int | None = None) -> None:
        """A request's first token has come, after `cached` of its tokens were found in the replica's cache."""
        if sent := self.in_flight.get(request):
            self.in_flight[request] = replace(sent, answering=True)
            self._prefilled(sent, 1)

    def finished(self, request: str, now: float) -> None:
        """A request's answer is complete."""
        if sent := self.in_flight.pop(request, None):
            self._prefilled(sent, -1 if sent.answering else 0)

    def failed(self, request: str, now: float) -> None:
        """A request came to nothing: refused, broken off, or cancelled."""
        self.finished(request, now)

    def published(self, name: str, summary: Increment | Snapshot) -> bool:
        """A replica's summary has come. False if it cannot be used: ask for a snapshot."""
        if isinstance(summary, Snapshot):
            pages = len(summary.held)
            self.index.drop(name)
            self.index.add(name, pages)
            self.index.insert(name, summary.held)
        elif summary.sequence != self.sequences[name] + 1:
            return False
        else:
            self.index.insert(name, summary.added)
            self.index.remove(name, summary.removed)
        self.sequences[name] = summary.sequence
        return True

    def _prefilled(self, sent: Sent, decodes: int) -> None:
        state = self.replicas[sent.replica]
        prefills = tuple(each for each in state.prefills if each.request != sent.request.id)
        self.replicas[sent.replica] = replace(state, prefills=prefills, decodes=state.decodes + decodes)
