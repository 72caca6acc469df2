"""What other threads leave for the engine's: requests, cancellations, questions, wake-ups, and the request to stop."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cache.eviction import State
from serve.engine.sequence import Sequence

log = logging.getLogger("tokenzero.engine")


class Overloaded(Exception):
    """The engine takes no more requests: its queue is full, or it has stopped."""


class QueueFull(Overloaded):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Answered:
    """How a request's answer ended."""

    id: str  # of the request
    state: State  # of its agent from now on
    ended_session: str = ""  # one that asks for nothing more


@dataclass
class Inbox:
    """A mailbox; `changed` guards all fields, and the engine's thread sleeps on it when it has nothing to do."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    submissions: deque[Sequence] = field(default_factory=deque)
    cancellations: set[int] = field(default_factory=set)
    questions: deque[Callable[[], object]] = field(default_factory=deque)
    woken: bool = False  # something that the engine waits for has arrived
    stopping: bool = False

    def submit(self, sequence: Sequence) -> None:
        """Hand over a request. Raises Overloaded once the engine is to stop."""
        with self.changed:
            if self.stopping:
                raise Overloaded("the engine has stopped")
            self.submissions.append(sequence)
            self.changed.notify()

    def cancel(self, number: int) -> None:
        """Ask for the end of a request."""
        with self.changed:
            self.cancellations.add(number)
            self.changed.notify()

    def ask(self, question: Callable[[], object]) -> None:
        """Have something called on the engine's thread between two steps. Raises Overloaded once the engine ends."""
        with self.changed:
            if self.stopping:
                raise Overloaded("the engine has stopped")
            self.questions.append(question)
            self.changed.notify()

    def wake(self) -> None:
        """Wake the engine: something has arrived that it may be waiting for."""
        with self.changed:
            self.woken = True
            self.changed.notify()

    def stop(self) -> None:
        """Ask the engine to end."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    def sleep(self, seconds: float | None) -> None:
        """Return when there is anything to read, or after so many seconds."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.stopping or self.submissions or self.cancellations or self.questions or self.woken,
                seconds,
            )

    def answer(self, seconds: float = math.inf) -> None:
        """Answer questions, for about so many seconds, and at least one: requests wait meanwhile."""
        end = time.monotonic() + seconds
        while self.questions:
            try:
                self.questions.popleft()()
            except Exception:  # which must not cost any request
                log.exception("a question to the engine has no answer")
            if time.monotonic() >= end:
                break

    def read(self) -> tuple[deque[Sequence], set[int]]:
        """Empty it: the requests and the numbers of those to cancel."""
        with self.changed:
            submissions, self.submissions = self.submissions, deque()
            cancellations, self.cancellations = self.cancellations, set()
            self.woken = False
        return submissions, cancellations
