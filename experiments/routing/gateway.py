"""Gateways: what a router knows of a fleet, and how it chooses; one for others' formulae, one with our router."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from experiments.routing.policies import BLIND, POLICIES, Asked, Known
from experiments.routing.replica import Engine
from experiments.routing.workload import Request
from serve.cost.model import CostModel
from serve.router.choice import Choice
from serve.router.request import RoutedRequest
from serve.router.router import Router
from serve.router.summary import Increment, Snapshot

OURS = "tokenzero"
Summary = Increment | Snapshot


@dataclass(frozen=True, slots=True)
class Meters:
    """What replicas report of themselves, for all gateways to read; each array is [replicas]."""

    queued: np.ndarray  # int64, requests that wait
    used: np.ndarray  # float64, the share of pages that running requests hold


class Gateway(Protocol):
    """Routes requests to replicas by their numbers. A request is named by its ticket."""

    moved: int  # tokens of prompts that a replica held, by the gateway's index, and the chosen one did not

    def add(self, replica: int, engine: Engine) -> None:
        """A replica is there."""

    def remove(self, replica: int) -> None:
        """A replica is gone, and all that it held."""

    def route(self, request: Request, ticket: int, now: float) -> int:
        """Choose a replica for a request, and send it there."""

    def first_token(self, ticket: int, now: float, cached: int) -> None:
        """The first token of a request has come, after `cached` tokens of its prompt were found."""

    def finished(self, ticket: int, now: float) -> None:
        """A request is answered."""

    def published(self, replica: int, summary: Summary) -> bool:
        """A replica's summary has come. False where an earlier one is missing and a snapshot is needed."""

    def costs(self, replica: int, costs: CostModel) -> None:
        """What a replica has measured has come."""

    def pages_known(self) -> int:
        """Entries of the index: one for each page of each replica."""


class PageIndex:
    """Which replicas hold which pages: a set of replicas for each page, as the bits of a number."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.counts: dict[int, int] = {}  # pages by replica
        self.alive = 0  # bits

    def add(self, replica: int) -> None:
        """A replica that holds nothing."""
        self.alive |= 1 << replica
        self.counts[replica] = 0

    def drop(self, replica: int) -> None:
        """Forget what a replica holds."""
        bit = 1 << replica
        self.alive &= ~bit
        left = {page: bits & ~bit for page, bits in self.holders.items()}
        self.holders = {page: bits for page, bits in left.items() if bits}
        self.counts[replica] = 0

    def insert(self, replica: int, pages: Sequence[int] | np.ndarray) -> None:
        """A replica holds these pages of a prompt, and so all pages before each of them."""
        bit, holders = 1 << replica, self.holders
        for page in reversed(pages.tolist() if isinstance(pages, np.ndarray) else pages):
            bits = holders.get(page, 0)
            if bits & bit:
                break
            holders[page] = bits | bit
            self.counts[replica] += 1

    def hold(self, replica: int, pages: Iterable[int]) -> None:
        """A replica holds these pages, in any order."""
        bit, holders, new = 1 << replica, self.holders, 0
        for page in pages:
            bits = holders.get(page, 0)
            if not bits & bit:
                holders[page] = bits | bit
                new += 1
        self.counts[replica] += new

    def remove(self, replica: int, pages: Iterable[int]) -> None:
        """A replica holds these pages no longer."""
        bit, holders = 1 << replica, self.holders
        for page in pages:
            bits = holders.get(page, 0)
            if bits & bit:
                self.counts[replica] -= 1
                if bits == bit:
                    del holders[page]
                else:
                    holders[page] = bits & ~bit

    def overlap(self, pages: np.ndarray, replicas: int) -> np.ndarray:
        """How many of the first `pages` ([pages] int32) each replica holds, [replicas] int64.

        Who holds a page holds those before it, so the holders only become fewer along a prompt: wherever both ends of a
        stretch have the same, nothing in between has to be looked at.
        """
        depths = np.zeros(replicas, np.int64)
        listed = pages.tolist()
        last = self.holders.get(listed[-1], 0) & self.alive if listed else 0
        pending = [(0, len(listed), self.alive, last)]
        while pending:
            low, high, before, after = pending.pop()
            after &= before
            if high - low > 1 and before != after:
                middle = (low + high) // 2
                between = self.holders.get(listed[middle - 1], 0) & before
                pending += [(low, middle, before, between), (middle, high, between, after)]
                continue
            for replica in bits_of(before & ~after):
                depths[replica] = low
        for replica in bits_of(last):
            depths[replica] = len(listed)
        return depths


def bits_of(number: int) -> Iterable[int]:
    """The positions of the bits that are set."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


@dataclass(slots=True)
class Sent:
    """A request in flight."""

    replica: int
    pages: int
    prefill: float  # pages that it prefills; 0 after its first token


@dataclass
class FormulaGateway:
    """A gateway with a published formula: it counts what it sent, and has an index of what replicas hold.

    With `predict` a request's pages count as held from the moment it is sent; with `recovers` a snapshot closes a gap
    in what a replica publishes.
    """

    policy: str
    replicas: int
    meters: Meters
    seed: int = 0
    predict: bool = True
    recovers: bool = True
    routed: int = 0
    moved: int = 0
    index: PageIndex = field(default_factory=PageIndex)
    in_flight: dict[int, Sent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing is alive, and nothing in flight."""
        size = self.replicas
        self.alive, self.requests = np.zeros(size, bool), np.zeros(size, np.int64)
        self.prefill, self.active = np.zeros(size), np.zeros(size, np.int64)
        self.sequence, self.rng = np.zeros(size, np.int64), random.Random(self.seed)

    def add(self, replica: int, engine: Engine) -> None:
        """A replica is there."""
        self.alive[replica] = True
        self.index.add(replica)

    def remove(self, replica: int) -> None:
        """A replica is gone."""
        self.alive[replica] = False
        self.index.drop(replica)
        for ticket in [t for t, sent in self.in_flight.items() if sent.replica == replica]:
            del self.in_flight[ticket]
        self.requests[replica] = self.active[replica] = 0
        self.prefill[replica] = 0.0

    def route(self, request: Request, ticket: int, now: float) -> int:
        """Choose by the policy."""
        blind = self.policy in BLIND
        overlap = np.zeros(self.replicas, np.int64) if blind else self.index.overlap(request.pages, self.replicas)
        counts = np.zeros(self.replicas, np.int64)
        counts[list(self.index.counts)] = list(self.index.counts.values())
        draws = (self.rng.random(), self.rng.random())
        chosen = POLICIES[self.policy](
            Asked(request.agent, request.tokens, len(request.pages), self.routed, draws),
            Known(
                self.alive,
                overlap,
                self.requests,
                self.prefill,
                self.active,
                self.meters.queued,
                self.meters.used,
                counts,
            ),
        )
        self.routed += 1
        self.moved += int(overlap.max() - overlap[chosen]) * request.tokens // max(1, len(request.pages))
        prefill = float(len(request.pages) - overlap[chosen])
        self.in_flight[ticket] = Sent(chosen, len(request.pages), prefill)
        self.requests[chosen] += 1
        self.prefill[chosen] += prefill
        self.active[chosen] += len(request.pages)
        if self.predict and not blind:
            self.index.insert(chosen, request.pages)
        return chosen

    def first_token(self, ticket: int, now: float, cached: int) -> None:
        """Its prefill is over."""
        if sent := self.in_flight.get(ticket):
            self.prefill[sent.replica] -= sent.prefill
            sent.prefill = 0.0

    def finished(self, ticket: int, now: float) -> None:
        """It is in flight no longer."""
        if sent := self.in_flight.pop(ticket, None):
            self.requests[sent.replica] -= 1
            self.prefill[sent.replica] -= sent.prefill
            self.active[sent.replica] -= sent.pages

    def published(self, replica: int, summary: Summary) -> bool:
        """Take over what a replica gained and lost."""
        if isinstance(summary, Snapshot):
            if not self.recovers:
                return False
            self.index.drop(replica)
            self.index.add(replica)
            self.index.hold(replica, summary.held.tolist())
        elif summary.sequence != self.sequence[replica] + 1:
            return False
        else:
            self.index.hold(replica, summary.added.tolist())
            self.index.remove(replica, summary.removed.tolist())
        self.sequence[replica] = summary.sequence
        return True

    def costs(self, replica: int, costs: CostModel) -> None:
        """Formulae of others have no use for it."""

    def pages_known(self) -> int:
        """Entries of the index."""
        return sum(self.index.counts.values())


@dataclass
class OurGateway:
    """Our router itself."""

    page_size: int
    router: Router = field(default_factory=Router)
    moved: int = 0

    def add(self, replica: int, engine: Engine) -> None:
        """A replica is there."""
        tiers = {"shared": engine.restore_s} if engine.restore_s else {}
        self.router.add(str(replica), engine.constants, engine.num_pages, tiers, places=engine.max_num_seqs)

    def remove(self, replica: int) -> None:
        """A replica is gone."""
        self.router.remove(str(replica))

    def route(self, request: Request, ticket: int, now: float) -> int:
        """Choose by expected time."""
        keys = request.pages.astype(np.uint64)
        asked = RoutedRequest(str(ticket), keys, request.tokens, self.page_size, agent=str(request.agent))
        choice: Choice = self.router.route(asked, now)
        self.router.sent(asked, choice, now)
        self.moved += choice.most_cached - choice.cached
        return int(choice.replica)

    def first_token(self, ticket: int, now: float, cached: int) -> None:
        """Its prefill is over."""
        self.router.first_token(str(ticket), now, cached)

    def finished(self, ticket: int, now: float) -> None:
        """It is answered."""
        self.router.finished(str(ticket), now)

    def published(self, replica: int, summary: Summary) -> bool:
        """Take over what a replica gained and lost."""
        return self.router.published(str(replica), summary)

    def costs(self, replica: int, costs: CostModel) -> None:
        """Take over what a replica has measured."""
        if costs.known:
            self.router.measured(str(replica), costs.known, costs.beside_s)

    def pages_known(self) -> int:
        """Entries of the index."""
        return sum(self.router.index.pages.values())
