"""The connections of a server: how many there are, of which address, and which of them wait for a request."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from serve.limits.exceeded import RETRY_SECONDS, LimitExceeded
from serve.web.limit_flags import ConnectionFlags

SPARE = 64  # connections beyond the limit, which are told why they are refused
OTHER_FILES = 512  # that a server opens besides connections, at most about

C = TypeVar("C")


class Connections(Generic[C]):
    """The open connections by their addresses. Only the event loop's thread calls it."""

    def __init__(self, limits: ConnectionFlags, on_refused: Callable[[str], object] = lambda limit: None) -> None:
        """`on_refused` is called with the name of a limit whenever something goes beyond it."""
        self.limits, self.on_refused = limits, on_refused
        self.count = 0
        self.addresses: Counter[str] = Counter()
        self.waiting: dict[C, str] = {}  # for a request, with their addresses; the longest first

    def open(self, connection: C, address: str) -> tuple[C | None, LimitExceeded | None]:
        """Count a new connection. If it is one too many: why, and a waiting one to close in its place, if there is one.

        Of an address that has too many, it is one of its own.
        """
        limits, places = self.limits, self.addresses[address]
        self.count += 1
        self.addresses[address] += 1
        problem = None
        idle = next(iter(self.waiting), None)
        if places >= limits.max_connections_per_address:
            idle = next((each for each, other in self.waiting.items() if other == address), None)
            problem = LimitExceeded(
                f"connections: {address} has {places}, at most {limits.max_connections_per_address} may be open: close "
                "some, or raise --max-connections-per-address",
                "max_connections_per_address",
                429,
                RETRY_SECONDS,
            )
        elif self.count > limits.max_connections:
            problem = LimitExceeded(
                f"connections: {self.count - 1} are open, of at most {limits.max_connections}: try again later, or "
                "raise --max-connections",
                "max_connections",
                529,
                RETRY_SECONDS,
            )
        if problem and idle:
            del self.waiting[idle]
        self.waiting[connection] = address
        return (idle if problem else None), problem

    @property
    def overfull(self) -> bool:
        """Whether so many are refused already that one more is closed without an answer."""
        return self.count > self.limits.max_connections + SPARE

    def closed(self, connection: C, address: str) -> None:
        """Count a connection that has ended."""
        self.count -= 1
        self.addresses[address] -= 1
        if not self.addresses[address]:
            del self.addresses[address]
        self.waiting.pop(connection, None)


def allow_open_files(connections: int) -> str | None:
    """Raise this process's limit of open files for so many connections; a sentence if the system allows fewer."""
    wanted = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == wanted:
        return None
    return (
        f"--max-connections: {connections} need {wanted} open files, this process may have {allowed}: raise `ulimit -n`"
    )
