"""Which replica serves a request: `serve.router`'s choice, asked for by Ray's router and told by the ingress.

Ray asks on a thread of its own, so a lock guards the router.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.cluster.report import Report
from serve.cluster.speed import UNMEASURED, Speed, expected_flops
from serve.cost.model import Constants, CostModel
from serve.engine.request import Forecast
from serve.router.choice import Choice
from serve.router.request import RoutedRequest
from serve.router.router import Router

# Seconds that a request takes besides its tokens: its way through Ray, and a step. Smaller differences are none.
REQUEST_S = 0.005
ALL_PAGES = -1  # the increment that a router knows which knows nothing: the replica sends a snapshot
SILENT_SECONDS = 5.0  # without a report while others report, after which a replica counts as one that hangs


@dataclass(eq=False)
class Call:
    """A request on its way through Ray's router, which sends only its bytes to the replica."""

    packed: bytes
    constrained: bool  # unpacking it compiles a grammar
    request: RoutedRequest
    dispatch: Dispatch
    tried: list[str] = field(default_factory=list)  # replicas that it was sent to, the latest last
    started: bool = False  # whether its first token has come
    forecast: Forecast | None = None  # what the router expects where it was sent
    over: bool = False  # Ray may still ask for a replica, as it does so on another thread

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its bytes."""
        return bytes, (self.packed,)


class Dispatch:
    """The router's state, for threads. A call that was chosen for ends with `ended`."""

    def __init__(self, round_robin: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """`round_robin` ignores what the replicas have, for comparisons."""
        self.clock, self.lock, self.router = clock, threading.Lock(), Router()
        self.known: dict[str, int] = {}  # the latest increment of each replica's pages
        self.reports: dict[str, Report] = {}  # the latest of each replica
        self.reported: dict[str, float] = {}  # when that was, seconds
        self.speeds: dict[str, Speed] = {}  # as each replica has measured it
        self.turns = itertools.count() if round_robin else None

    def choose(self, call: Call, names: Sequence[str]) -> str:
        """The replica for a call, of those that Ray runs now; for one that was tried before, another if there is one.

        One that hangs comes last. The router counts on the choice from now on.
        """
        with self.lock:
            for gone in self.router.replicas.keys() - set(names):
                self.router.remove(gone)
                for kept in (self.known, self.reports, self.reported, self.speeds):
                    kept.pop(gone, None)
            if call.tried:
                self.router.failed(call.request.id, self.clock())
            silent = self.silent
            fresh = [name for name in names if name not in call.tried] or names
            fresh = [name for name in fresh if name not in silent] or fresh
            reported = [name for name in fresh if name in self.router.replicas]
            name = self._turn(sorted(fresh)) if self.turns or not reported else ""
            now = self.clock()
            if reported and name in ("", *reported) and not call.over:
                choice = self.router.route(call.request, now, among=[name] if name else reported)
                self.router.sent(call.request, choice, now)
                call.forecast = self.expected(call.request, choice)
                name = choice.replica
            name = name or fresh[0]
            call.tried.append(name)
            return name

    def forecast(self, request: RoutedRequest) -> Forecast | None:
        """What a request would find where it would go now; None while no replica is known."""
        with self.lock:
            names = [name for name in self.router.replicas if name not in self.silent]
            return self.expected(request, self.router.route(request, self.clock(), names)) if names else None

    def expected(self, request: RoutedRequest, choice: Choice) -> Forecast:
        """A choice as a forecast. Which of several tiers it reads from is not known."""
        restored = {"+".join(self.router.reach): choice.restored} if choice.restored else {}
        cached = {"device": choice.cached} | restored
        return Forecast(request.tokens, cached, choice.queue_s, choice.restore_s, choice.prefill_s)

    @property
    def silent(self) -> set[str]:
        """Replicas that hang: others have reported since. A pause of this process makes none of them silent."""
        latest = max(self.reported.values(), default=0.0)
        return {name for name, at in self.reported.items() if latest - at > SILENT_SECONDS}

    def published(self, report: Report) -> None:
        """Take note of a replica's report."""
        name, sizes = report.name, report.identity.settings
        with self.lock:
            now, costs = self.clock(), report.costs
            self.reports[name], self.reported[name] = report, now
            before = self.speeds.get(name, UNMEASURED)
            self.speeds[name] = before.again(costs.prefill, costs.chunks, now, costs.chunk_flops)
            flops = expected_flops(self.speeds, now)
            new = name not in self.router.replicas
            if new:
                first = constants(costs.model, flops[name])
                self.router.add(name, first, sizes.num_pages, places=sizes.max_num_seqs)
                self.known[name] = ALL_PAGES
            # A new replica's speed counts for the others as well; what else is measured waits for their own reports.
            for each in self.reports if new else (name,):
                model = self.reports[each].costs.model
                tiers = seconds_a_token(self.reports[each])
                self.router.measured(each, constants(model, flops[each]), model.beside_s, tiers)
            self.router.loaded(name, report.load, now)
            for summary in report.pages if isinstance(report.pages, Sequence) else (report.pages,):
                complete = self.router.published(name, summary)
                self.known[name] = summary.sequence if complete else ALL_PAGES

    def first_token(self, call: Call, cached: int) -> None:
        """A call has its first token; `cached` tokens of its prompt were reused."""
        call.started = True
        with self.lock:
            self.router.first_token(call.request.id, self.clock(), cached)

    def ended(self, call: Call, complete: bool) -> None:
        """A call's answer is complete, or came to nothing."""
        with self.lock:
            call.over = True
            (self.router.finished if complete else self.router.failed)(call.request.id, self.clock())

    def _turn(self, names: Sequence[str]) -> str:
        return names[next(self.turns or itertools.count()) % len(names)]


def constants(costs: CostModel, flops: float) -> Constants:
    """The constants of a cost model: a sweep's, or those of `flops` a second."""
    if costs.constants:
        return costs.constants
    return Constants(REQUEST_S, costs.linear_flops / flops, costs.attention_flops / flops)


def seconds_a_token(report: Report) -> dict[str, float]:
    """Seconds to read a token's part of a page from each tier that replicas share: all but a process's own memory."""
    costs = report.costs.model
    return {tier: costs.read_s(tier, report.token_bytes) for tier in report.tiers if tier != "host"}
