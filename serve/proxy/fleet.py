"""The upstreams of a proxy: which one a request goes to next, what became of it there, and the counts of all."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from serve.limits.recent import Recent
from serve.proxy.balance import Balance, Decision
from serve.proxy.health import Health, watch
from serve.proxy.prefix import Prompt
from serve.proxy.relay import Usage
from serve.proxy.upstream import REFUSALS, Upstream, UpstreamFault
from serve.web.request_status import RequestStatuses

RESPONSE_BYTES = 2**22  # for who gave which response

Ask = Callable[[Upstream], Awaitable[bool]]


@dataclass(eq=False)
class Member:
    """One upstream, how it is, and what was counted there."""

    upstream: Upstream
    health: Health
    in_flight: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # by the names of `metrics.COUNTERS`

    @property
    def name(self) -> str:
        """Its URL."""
        return self.health.name


class Fleet:
    """All upstreams. With one alone, nothing is chosen, held back or tried again."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.balance = Balance([one.url for one in upstreams])
        self.responses: Recent[str, str] = Recent(RESPONSE_BYTES, len)  # who gave each of the latest, by id
        self.members = {one.url: Member(one, Health(one.url, partial(self.balance.lost, one.url))) for one in upstreams}

    @property
    def several(self) -> bool:
        """Whether there is a choice."""
        return len(self.members) > 1

    def only(self) -> Upstream:
        """The upstream that is alone."""
        return next(iter(self.members.values())).upstream

    def candidates(self, tried: Collection[str]) -> list[Member]:
        """Those that a request can go to next: the ones that are up, else those that refused the latest, else any."""
        now = asyncio.get_running_loop().time()
        left = [member for name, member in self.members.items() if name not in tried]
        up = [member for member in left if member.health.is_up(now)]
        return up or [member for member in left if member.health.state == "refusing"] or left

    def next(self, prompt: Prompt | None, tried: Collection[str], statuses: RequestStatuses) -> Attempt:
        """Where a request goes next; without a prompt, to where the fewest are. Not all may have been tried."""
        if prompt and (giver := self.giver(prompt, tried)):
            among, replaceable = [giver], False
        else:
            among, replaceable = self.candidates(tried), len(tried) + 1 < len(self.members)
        if prompt is None:
            return Attempt(self, min(among, key=lambda member: member.in_flight), replaceable=replaceable)
        decision = self.balance.decide(prompt, [member.name for member in among], time.perf_counter())
        statuses.update(
            prompt.id,
            upstream=decision.choice.replica,
            expected_cached_tokens=decision.choice.cached,
            expected_ttft_ms={name: round(ms, 1) for name, ms in decision.expected_ms.items()},
        )
        return Attempt(self, self.members[decision.choice.replica], decision, replaceable)

    def giver(self, prompt: Prompt, tried: Collection[str]) -> Member | None:
        """The one upstream that remembers the response which a prompt continues, unless it is out: no other one can."""
        name = prompt.continues and self.responses.get(prompt.continues)
        giver = self.members[name] if name and name not in tried else None
        return None if giver is None or giver.health.state == "out" else giver

    async def watch(self, ask: Ask) -> None:
        """Ask those upstreams how they are that need it, until cancelled."""
        await watch([(member.health, partial(ask, member.upstream)) for member in self.members.values()])


class Attempt:
    """One attempt to have a request answered by one upstream.

    `replaceable` says whether another attempt could follow, so that an error need not be forwarded.
    """

    def __init__(
        self, fleet: Fleet, member: Member, decision: Decision | None = None, replaceable: bool = False
    ) -> None:
        self.fleet, self.member, self.decision, self.replaceable = fleet, member, decision, replaceable
        self.limit = asyncio.timeout(None)
        self.began = time.perf_counter()
        self.is_well = True  # whether the answer, so far, shows that the upstream is

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While it runs. Its end is told to the router and the health; raises UpstreamFault if the upstream is lost."""
        member, health, since = self.member, self.member.health, asyncio.get_running_loop().time()
        member.in_flight += 1
        member.counts["requests"] += 1
        if self.decision:
            self.fleet.balance.sent(self.decision, self.began)
        try:
            async with self.limit:
                if self.decision:
                    health.waiting[self.limit] = since
                yield
            if self.is_well:
                health.answered(since)
        except UpstreamFault as fault:
            self.broke(fault)
            raise
        except TimeoutError as error:
            member.counts["failed"] += 1
            raise UpstreamFault(502, "the upstream failed: it answers nothing any more, /health included") from error
        finally:
            member.in_flight -= 1
            health.waiting.pop(self.limit, None)
            if self.decision:  # unless it has finished
                self.fleet.balance.failed(self.decision, time.perf_counter())

    def first_token(self, usage: Usage) -> None:
        """The first event with text has arrived."""
        self.member.health.waiting.pop(self.limit, None)
        if self.decision:
            now = time.perf_counter()
            self.member.counts["first_tokens"] += 1
            self.member.counts["ttft_ms"] += round(1e3 * (now - self.began))
            self.fleet.balance.first_token(self.decision, usage, now)

    def used(self, usage: Usage) -> None:
        """The answer is complete."""
        if usage.response:
            self.fleet.responses.put(usage.response, self.member.name)
        if self.decision:
            self.member.counts["prompt_tokens"] += usage.prompt or 0
            self.member.counts["cached_tokens"] += usage.cached or 0
            self.fleet.balance.finished(self.decision, usage, time.perf_counter())

    def refused(self, error: int, retry_after: float | None) -> None:
        """The answer is an error with one of the statuses REFUSALS or FAILURES."""
        self.is_well = False
        if error in REFUSALS:
            self.member.counts["refused"] += 1
            self.member.health.refused(asyncio.get_running_loop().time(), retry_after)
        else:
            self.member.counts["failed"] += 1
            self.member.health.doubted()

    def broke(self, fault: UpstreamFault) -> None:
        """The upstream cannot be reached, or its answer broke off."""
        self.is_well = False
        self.member.counts["failed"] += 1
        self.member.health.failed(asyncio.get_running_loop().time(), fault)
