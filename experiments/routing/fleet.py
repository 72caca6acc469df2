"""The fleet: replicas, gateways and clients, driven by a heap of events. Nothing here reads a clock."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace

import numpy as np

from experiments.routing.cache import ReplicaCache
from experiments.routing.gateway import Gateway, Meters
from experiments.routing.replica import Engine, Replica, Sequence
from experiments.routing.workload import Request, Workload
from serve.router.summary import Increment, Snapshot


@dataclass(frozen=True)
class Publishing:
    """How replicas tell gateways what they hold."""

    every_s: float = 0.1
    delay_s: float = 0.01
    loss: float = 0.0  # the share of summaries that get lost


@dataclass(frozen=True)
class Change:
    """A replica dies or comes at a time."""

    at_s: float
    replica: int
    comes: bool = False


@dataclass(eq=False, slots=True)
class Answered:
    """A request and what became of it; times in seconds."""

    request: Request
    sent: float
    replica: int = -1
    gateway: int = 0
    first_token: float = float("nan")
    finished: float = float("nan")
    reused: int = 0  # tokens
    restored: int = 0  # tokens of these
    retries: int = 0
    broken_off: bool = False  # its replica died during the answer
    lane: int = -1


class WorkClock:
    """How far work is that began at some time, where those at work share a machine's cores.

    Each of n gets a core where there are enough of them, and cores / n of one else (processor sharing). So all are
    slowed alike, and one clock of work done serves them all.
    """

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self.active: set[int] = set()
        self.factor = 1.0  # seconds that a second of work takes
        self.since, self.done = 0.0, 0.0  # seconds of time and of work, when the factor changed last

    def work(self, now: float) -> float:
        """Seconds of work at a time."""
        return self.done + (now - self.since) / self.factor if self.cores < math.inf else now

    def real(self, now: float, work: float) -> float:
        """When so much work is done, as long as nobody comes or goes."""
        return now + (work - self.work(now)) * self.factor if self.cores < math.inf else work

    def factor_of(self, active: int) -> float:
        """Seconds that a second of work takes while so many are at work."""
        return max(1.0, active / self.cores)

    def set(self, name: int, active: bool, now: float) -> bool:
        """Somebody is at work from now on, or is not. Whether that changes the others' pace."""
        if (name in self.active) == active:
            return False
        (self.active.add if active else self.active.remove)(name)
        factor = self.factor_of(len(self.active))
        if factor == self.factor:
            return False
        self.done, self.since, self.factor = self.work(now), now, factor
        return True


@dataclass(eq=False)
class Fleet:
    """Replicas behind gateways. `run` plays a workload to its end."""

    engines: Many[Engine]  # by replica; those that come later, too
    make_gateway: Callable[[Meters, int], Gateway]
    gateways: int = 1
    publishing: Publishing = field(default_factory=Publishing)
    changes: Many[Change] = ()
    shared_store: bool = False
    seed: int = 0
    cores: float = math.inf  # that all replicas and deliveries share: one each, where there are enough

    def __post_init__(self) -> None:
        """All replicas are there that no change brings. Raises ValueError for shared cores and a store together."""
        if self.shared_store and self.cores < math.inf:
            raise ValueError("a store's reads take as long on shared cores, which is not simulated: leave one out")
        size = len(self.engines)
        self.meters = Meters(np.zeros(size, np.int64), np.zeros(size))
        self.routers = [self.make_gateway(self.meters, number) for number in range(self.gateways)]
        self.replicas: dict[int, Replica] = {}
        self.store: set[int] | None = set() if self.shared_store else None
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.pushed = 0
        self.answered: list[Answered] = []
        self.lanes: list[tuple[Many[Request], int]] = []
        self.open = 0  # requests that are not answered yet
        self.published_pages = 0
        self.snapshots = 0  # that gateways asked for
        self.sequences = [0] * size
        self.runs = [0] * size  # names a replica's current run: an event of an earlier one is void
        self.quiet = set(range(size))  # replicas without a summary on its way
        self.clock = WorkClock(self.cores)
        self.rng = random.Random(self.seed)
        late = {change.replica for change in self.changes if change.comes}
        for number in range(size):
            if number not in late:
                self.add(number)
        for change in self.changes:
            self.at(change.at_s, self.change, change)

    def at(self, time_s: float, act: Callable[..., None], *arguments: object) -> None:
        """Let something happen at a time."""
        heapq.heappush(self.events, (time_s, self.pushed, lambda now: act(now, *arguments)))
        self.pushed += 1

    def run(self, workload: Workload) -> list[Answered]:
        """Play all lanes of a workload; returns its requests as they became, in the order of sending.

        Raises ValueError for a request that no replica has room for.
        """
        least = min(engine.num_pages for engine in self.engines)
        for lane in workload.lanes:
            most = max(-(-(r.tokens + r.output) // workload.page_size) for r in lane.requests)
            if most > least:
                raise ValueError(
                    f"a request of {workload.name} needs {most} pages, a replica has {least}: give it more"
                )
            self.lanes.append((lane.requests, 0))
            self.open += len(lane.requests)
            self.at(lane.start_s, self.next_of, len(self.lanes) - 1)
        while self.open:
            now, _, act = heapq.heappop(self.events)
            act(now)
        return self.answered

    # Clients.

    def next_of(self, now: float, lane: int) -> None:
        """A lane sends its next request."""
        requests, done = self.lanes[lane]
        self.lanes[lane] = (requests, done + 1)
        answered = Answered(requests[done], now, lane=lane, gateway=self.rng.randrange(self.gateways))
        self.answered.append(answered)
        self.send(now, len(self.answered) - 1)

    def send(self, now: float, ticket: int) -> None:
        """Route a request and submit it."""
        answered = self.answered[ticket]
        answered.replica = self.routers[answered.gateway].route(answered.request, ticket, now)
        replica = self.replicas[answered.replica]
        replica.submit(answered.request, ticket, self.clock.work(now))
        self.go_on(now, replica)

    def came(self, now: float, ticket: int) -> None:
        """An answer is complete: its lane goes on after a pause."""
        requests, done = self.lanes[self.answered[ticket].lane]
        self.open -= 1
        if done < len(requests):
            self.at(now + requests[done].pause_s, self.next_of, self.answered[ticket].lane)

    # Replicas.

    def go_on(self, now: float, replica: Replica) -> None:
        """Begin a run if there is none, and note when the current one ends."""
        number = replica.number
        if replica.run is None and replica.next_run(self.clock.work(now)) is None:
            wakes = replica.wakes_at()
            if wakes is not None:
                self.at(max(wakes, now), self.woken, replica)
        self.meters.queued[number] = len(replica.waiting)
        self.meters.used[number] = replica.pages_in_use / replica.engine.num_pages
        if self.clock.set(number, replica.run is not None, now):
            for each in self.replicas.values():
                self.expect_end(now, each)
        else:
            self.expect_end(now, replica)

    def expect_end(self, now: float, replica: Replica) -> None:
        """Note when a replica's run ends, if there is one; what was noted before is void."""
        if replica.run is not None:
            self.runs[replica.number] += 1
            ends = self.clock.real(now, replica.run.ends(replica.engine))
            self.at(ends, self.ran, replica, self.runs[replica.number])

    def delivered(self, now: float, replica: Replica, sequence: Sequence) -> float:
        """When a sequence's event reaches its client; until then that takes a core, too."""
        name, seconds = -1 - self.pushed, self.clock.factor * delivery_s(replica, sequence)
        if self.cores < math.inf:
            self.share(now, name, True)
            self.at(now + seconds, self.share, name, False)
        return now + seconds

    def share(self, now: float, name: int, active: bool) -> None:
        """Something besides replicas begins or ends to use a core."""
        if self.clock.set(name, active, now):
            for each in self.replicas.values():
                self.expect_end(now, each)

    def woken(self, now: float, replica: Replica) -> None:
        """Pages have come from the store."""
        if self.replicas.get(replica.number) is replica and replica.run is None:
            self.go_on(now, replica)

    def ran(self, now: float, replica: Replica, run: int) -> None:
        """A replica's run ends, unless it was cut short meanwhile."""
        if self.runs[replica.number] != run or self.replicas.get(replica.number) is not replica:
            return
        happened = replica.finish_run(self.clock.work(now))
        for sequence in happened.prefilled:
            answered = self.answered[sequence.ticket]
            answered.first_token = self.delivered(now, replica, sequence)
            answered.reused, answered.restored = sequence.reused, sequence.restored
            self.routers[answered.gateway].first_token(sequence.ticket, now, sequence.reused)
            if self.store is not None:
                self.store.update(sequence.request.pages[sequence.reused // replica.engine.page_size :].tolist())
        for sequence in happened.finished:
            answered = self.answered[sequence.ticket]
            answered.finished = max(now + self.clock.factor * delivery_s(replica, sequence), answered.first_token)
            self.routers[answered.gateway].finished(sequence.ticket, now)
            self.came(answered.finished, sequence.ticket)
        if replica.number in self.quiet and (happened.prefilled or happened.finished):
            self.quiet.discard(replica.number)
            self.at(now + self.publishing.every_s, self.publish, replica)
        self.go_on(now, replica)

    def publish(self, now: float, replica: Replica) -> None:
        """A replica sends what its cache has gained and lost to every gateway; each may lose it."""
        number = replica.number
        if self.replicas.get(number) is not replica:
            return
        self.quiet.add(number)
        gained, lost = replica.cache.ledger.take()
        if not len(gained) and not len(lost):
            return
        self.sequences[number] += 1
        self.published_pages += len(gained) + len(lost)
        summary = Increment(self.sequences[number], gained, lost)
        for gateway in range(self.gateways):
            if self.rng.random() >= self.publishing.loss:
                self.at(now + self.publishing.delay_s, self.deliver, gateway, replica, summary)

    def deliver(self, now: float, gateway: int, replica: Replica, summary: Increment | Snapshot) -> None:
        """A summary reaches a gateway, which asks for a snapshot if it missed an earlier one."""
        if self.replicas.get(replica.number) is not replica:
            return
        self.routers[gateway].costs(replica.number, replica.costs)
        if not self.routers[gateway].published(replica.number, summary):
            held = replica.cache.ledger.held - replica.cache.ledger.gained | replica.cache.ledger.lost
            snapshot = Snapshot(self.sequences[replica.number], np.fromiter(held, np.uint64, len(held)))
            self.published_pages += len(held)
            self.snapshots += 1
            self.at(now + 2 * self.publishing.delay_s, self.deliver, gateway, replica, snapshot)

    def add(self, number: int) -> None:
        """A replica comes, with nothing cached."""
        engine = self.engines[number]
        replica = Replica(number, engine, ReplicaCache(engine.num_pages), self.store)
        # Replicas measure while all are at work, as a rule.
        told = engine.slowed(self.clock.factor_of(len(self.engines)))
        replica.costs = replace(replica.costs, constants=told.constants)
        self.replicas[number] = replica
        self.sequences[number] = 0
        self.quiet.add(number)
        for router in self.routers:
            router.add(number, told)

    def change(self, now: float, change: Change) -> None:
        """A replica comes, or dies with its cache: requests without a first token are sent again, others end there."""
        if change.comes:
            self.add(change.replica)
            return
        replica = self.replicas.pop(change.replica)
        self.share(now, change.replica, False)
        for router in self.routers:
            router.remove(change.replica)
        for sequence in replica.requests():
            answered = self.answered[sequence.ticket]
            if np.isnan(answered.first_token):
                answered.retries += 1
                self.send(now, sequence.ticket)
            else:
                answered.broken_off = True
                answered.finished = now
                self.came(now, sequence.ticket)


def delivery_s(replica: Replica, sequence: Sequence) -> float:
    """Seconds of a request outside of the engine's steps: its text is read and rendered, and its prefix is found."""
    constants = replica.engine.constants
    return constants.fixed + constants.match * sequence.reused
