"""Whose turn it is: the order in which requests are admitted and prefilled.

Highest response ratio next (Brinch Hansen, 1971): a request's claim is the time it has waited over the time it still
takes, so a short one passes a long one, a long one is never passed for ever, and of equals the earlier goes first. What
a prompt takes is what the cache does not have of it, so those whose prefix is there, or is just being computed for
another, go together with it. A place in the batch is taken for an answer's time, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def response_ratio(waited_s: float, takes_s: float) -> float:
    """(waited + takes) / takes, both in seconds; 1 for a request of which nobody knows what it takes."""
    return 1 + waited_s / takes_s if takes_s > 0 else float("inf")


def most_urgent(requests: Iterable[T], waited_s: Callable[[T], float], takes_s: Callable[[T], float]) -> T:
    """The request with the highest response ratio, the first of equals. Raises ValueError without requests."""
    return max(requests, key=lambda request: response_ratio(waited_s(request), takes_s(request)))


def by_urgency(requests: Iterable[T], waited_s: Callable[[T], float], takes_s: Callable[[T], float]) -> list[T]:
    """The requests, the highest response ratio first, and equals in the order given."""
    return sorted(requests, key=lambda request: -response_ratio(waited_s(request), takes_s(request)))
