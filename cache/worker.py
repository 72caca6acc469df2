"""A thread for calls that wait for a disk or a network, and a guard that contains the exceptions they raise."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

log = logging.getLogger("tokenzero.cache.worker")
T = TypeVar("T")

MAX_QUEUED = 4096  # calls that wait for a worker; there are so many only if the disk or network hangs
TIDY_AT = 64  # from so many queued calls on, cancelled ones are dropped
LOG_SECONDS = 60.0


class Worker:
    """One daemon thread that runs calls in order.

    Python joins the threads of its own executors at exit: a thread that waits for a dead disk would keep the process.
    """

    def __init__(self, name: str) -> None:
        self.queued: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, action: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Queue a call. Its future is cancelled at once if the worker is closed or its queue is full."""
        future: Future[T] = Future()
        with self.changed:
            if len(self.queued) >= TIDY_AT:
                self.queued = deque(call for call in self.queued if not call[0].cancelled())
            if taken := not self.closing and len(self.queued) < MAX_QUEUED:
                self.queued.append((future, lambda: action(*arguments)))
                self.changed.notify_all()
        if not taken:
            future.cancel()
        return future

    def stop(self) -> None:
        """Drop the queued calls, and end after the one that runs; returns at once."""
        with self.changed:
            self.closing = True
            dropped = list(self.queued)
            self.queued.clear()
            self.changed.notify_all()
        for future, _ in dropped:
            future.cancel()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queued or self.closing)
                if not self.queued:
                    return
                future, action = self.queued.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = action()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            del future, action  # so that they are freed while the thread waits


@dataclass
class Failures:
    """Counts contained exceptions, and logs at most one a minute."""

    count: int = 0
    quiet_until: float = field(default=0.0, repr=False)  # seconds, monotonic

    def guard(self, what: str, action: Callable[[], T], fallback: T) -> T:
        """The result of `action`, or the fallback if it raises; `what` is logged as the loss."""
        try:
            return action()
        except Exception as error:
            self.count += 1
            now = time.monotonic()
            if now >= self.quiet_until:
                self.quiet_until = now + LOG_SECONDS
                log.warning("%s (failure %d; more within a minute are only counted)", what, self.count, exc_info=error)
            return fallback
