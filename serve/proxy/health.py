"""Which upstreams can be sent requests: what became of the latest ones, and questions to those silent or out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

log = logging.getLogger("tokenzero.proxy")

PATIENCE_SECONDS = 10.0  # that a request waits for its first token before its upstream is asked how it is
TICK_SECONDS = 0.25
BACKOFF_SECONDS = (0.25, 15.0)  # between two questions to one that is out: at first, and at most
REFUSAL_SECONDS = (1.0, 30.0)  # that one which refuses is left alone: if it says nothing, and at most

State = Literal["up", "refusing", "out"]
Ask = Callable[[], Awaitable[bool]]  # whether an upstream answers at all


@dataclass(eq=False)
class Health:
    """How one upstream is. All times are those of the event loop, in seconds."""

    name: str
    on_lost: Callable[[], object]  # called whenever it does not answer a question
    state: State = "up"
    until: float = 0.0  # when it is `up` again if it is `refusing`; when it is asked next if it is `out`
    pause: float = 0.0  # before the question after that
    refused_at: float = float("-inf")
    is_doubted: bool = False  # whether it is to be asked at once
    waiting: dict[asyncio.Timeout, float] = field(default_factory=dict)  # requests without a token: since when

    def is_up(self, now: float) -> bool:
        """Whether it takes requests."""
        return self.state_at(now) == "up"

    def state_at(self, now: float) -> State:
        """How it is taken to be: one that has refused is tried again after a while."""
        return "up" if self.state == "refusing" and now >= self.until else self.state

    def answered(self, since: float) -> None:
        """It has answered a request or question of the time `since`; what is older than a refusal does not end it."""
        if self.state == "refusing" and since < self.refused_at:
            return
        if self.state == "out":
            log.warning("%s answers again", self.name)
        self.state = "up"

    def refused(self, now: float, retry_after: float | None) -> None:
        """It has refused a request for now, and perhaps said for how many seconds."""
        least, most = REFUSAL_SECONDS
        self.state, self.refused_at = "refusing", now
        self.until = now + min(least if retry_after is None else retry_after, most)

    def doubted(self) -> None:
        """It has failed at a request. The request may be the cause, so the others only see it asked how it is."""
        self.is_doubted = True

    def failed(self, now: float, why: object) -> None:
        """A request could not reach it, or broke off: it gets no more until it has answered a question."""
        if self.state != "out":
            log.warning("%s is out: %s", self.name, why)
            self.state, self.until, self.pause = "out", now, BACKOFF_SECONDS[0]

    def lost(self, now: float) -> None:
        """It does not answer even a question: the requests that wait there are given up."""
        self.failed(now, "it answers neither its requests nor /health")
        self.until, self.pause = now + self.pause, min(2 * self.pause, BACKOFF_SECONDS[1])
        for limit in self.waiting:
            limit.reschedule(now)
        self.waiting.clear()
        self.on_lost()

    def wants_question(self, now: float) -> bool:
        """Whether it is to be asked: it has been out, or silent, for long enough."""
        if self.state == "out":
            return now >= self.until
        silent = self.waiting and now >= max(self.until, min(self.waiting.values()) + PATIENCE_SECONDS)
        return self.is_doubted or bool(silent)

    async def question(self, ask: Ask) -> None:
        """Ask how it is, and take the answer."""
        loop = asyncio.get_running_loop()
        asked, self.is_doubted = loop.time(), False
        is_well = await ask()
        now = loop.time()
        if not is_well:
            self.lost(now)
        elif self.state_at(now) != "refusing":
            self.answered(asked)
            self.until = now + PATIENCE_SECONDS


async def watch(members: Sequence[tuple[Health, Ask]]) -> None:
    """Ask those upstreams how they are that need it, until cancelled."""
    asked: dict[Health, asyncio.Task[None]] = {}
    try:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = asyncio.get_running_loop().time()
            for health, ask in members:
                if health.wants_question(now) and (health not in asked or asked[health].done()):
                    asked[health] = asyncio.ensure_future(health.question(ask))
    finally:
        for task in asked.values():
            task.cancel()
