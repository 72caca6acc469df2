"""Who comes next where several owners of requests share an engine.

Places in the batch and chunks of prompts are divided evenly among the owners that want some, so that a hundred requests
of one delay another's single one by no more than one would. Of one owner's requests, those come first that `scheduler`
says. Where requests have no owner, all have the same, and nothing changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from serve.engine.scheduler import ScheduledSequence, next_prefill
from serve.engine.sequence import PREFILLING, Sequence


def owner_of(sequence: Sequence) -> str:
    """The owner of a request."""
    return sequence.request.owner


def next_owners(waiting: Collection[Sequence], running: Iterable[Sequence]) -> Collection[Sequence]:
    """The waiting requests of the owner that has the fewest running ones; of equals, of the one that waits first."""
    owners = dict.fromkeys(map(owner_of, waiting))
    if len(owners) <= 1:
        return waiting
    places = Counter(map(owner_of, running))
    first = min(owners, key=lambda owner: places[owner])
    return [sequence for sequence in waiting if owner_of(sequence) == first]


def gives_place(running: Iterable[Sequence], owner: str) -> Sequence | None:
    """The running sequence that makes place for a request of `owner`; None if each has its share.

    It is the youngest of the owner with the most, who has at least two more than `owner`: so no two take turns.
    """
    places = Counter(map(owner_of, running))
    most = max(places, key=lambda each: places[each], default=owner)
    if places[most] < places[owner] + 2:
        return None
    return max((s for s in running if owner_of(s) == most), key=lambda s: s.number)


def make_place(
    running: Collection[Sequence],
    waiting: Collection[Sequence],
    full: Callable[[], bool],
    collect: Callable[[], bool],
    preempt: Callable[[Sequence], object],
) -> bool:
    """While the batch or the pool is `full`, `preempt` a sequence of an owner that has more than its share, if any has.

    `collect` comes first, which reads the step in flight, if any. Whether there is a place for one of the `waiting`.
    """
    while full():
        owner = owner_of(next(iter(next_owners(waiting, running))))
        if (sequence := gives_place(running, owner)) is None:
            return False
        if not collect():
            preempt(sequence)
    return True


def may_queue(waiting: Collection[Sequence], owner: str, most: int) -> bool:
    """Whether one more request of `owner` may wait: `most` of each may, so that none fills another's queue."""
    return len(waiting) < most or sum(owner_of(sequence) == owner for sequence in waiting) < most


class Shares:
    """Whose prompt had a chunk when: owners whose prompts are computed take turns."""

    def __init__(self) -> None:
        self.turn = 0
        self.served: dict[str, int] = {}  # the turn of the latest chunk, of each running owner that had one

    def next_prefill(
        self, running: Iterable[Sequence], now: float, prefill_s: Callable[[int, int], float]
    ) -> Sequence | None:
        """The sequence that prefills in the next step, by `scheduler.next_prefill`, of the owner that waits longest."""
        prefilling = [sequence for sequence in running if sequence.state is PREFILLING]
        owners = {owner_of(sequence) for sequence in prefilling}
        if len(owners) > 1:
            first = min(prefilling, key=lambda sequence: self.served.get(owner_of(sequence), 0))
            prefilling = [sequence for sequence in prefilling if owner_of(sequence) == owner_of(first)]
        return next_prefill(prefilling, now, prefill_s)

    def noted(self, plan: list[ScheduledSequence], running: Iterable[Sequence]) -> list[ScheduledSequence]:
        """The same plan, of which the owner of its chunk is remembered."""
        if plan and plan[0].sequence.state is PREFILLING:
            self.turn += 1
            owners = {owner_of(sequence) for sequence in running}
            self.served = {owner: turn for owner, turn in self.served.items() if owner in owners}
            self.served[owner_of(plan[0].sequence)] = self.turn
        return plan
