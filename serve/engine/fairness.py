"""Who comes next where several owners of requests share an engine.

Places in the batch and chunks of prompts are divided evenly among the owners that want some, so that a hundred requests
of one delay another's single one by no more than one would. Of one owner's requests, those come first that `scheduler`
says. Where requests have no owner, all have the same, and nothing changes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator

from serve.engine.scheduler import ScheduledSequence, next_prefill
from serve.engine.sequence import PREFILLING, Sequence


def owner_of(sequence: Sequence) -> str:
    """The owner of a request."""
    return sequence.request.owner


class Turns:
    """When each of the present owners had its latest turn.

    One that has just come is before the owner that had the latest turn, and after all others: so nobody who leaves and
    comes again, as a client between two requests, keeps another from its turn.
    """

    def __init__(self) -> None:
        self.latest = 0
        self.taken: dict[str, int] = {}

    def present(self, owners: Iterable[str]) -> dict[str, int]:
        """The number of each owner's latest turn; `owners` are all that there are now."""
        self.taken = {owner: self.taken.get(owner, self.latest - 1) for owner in owners}
        return self.taken

    def take(self, owner: str) -> None:
        """An owner has its turn."""
        self.latest += 2
        self.taken[owner] = self.latest


class Queue:
    """The requests that wait, in a line for each owner. The engine's thread changes it, any thread may read it."""

    def __init__(self) -> None:
        self.lines: dict[str, deque[Sequence]] = {}  # none of them is empty
        self.turns = Turns()  # to be admitted

    def __len__(self) -> int:
        """The number of requests."""
        return sum(map(len, list(self.lines.values())))

    def __iter__(self) -> Iterator[Sequence]:
        """The requests as they are now, owner by owner."""
        return iter([sequence for line in list(self.lines.values()) for sequence in list(line)])

    def count(self, owner: str) -> int:
        """The number of an owner's requests."""
        return len(self.lines.get(owner, ()))

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Add new requests."""
        for sequence in sequences:
            self.lines.setdefault(owner_of(sequence), deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Add a request that was admitted before, as the first of its owner."""
        self.lines.setdefault(owner_of(sequence), deque()).appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a request out."""
        line = self.lines[owner_of(sequence)]
        line.remove(sequence)
        if not line:
            del self.lines[owner_of(sequence)]

    def next_owner(self, running: Iterable[Sequence]) -> str:
        """The owner with the fewest running requests; of equals, the one that was admitted longest ago.

        Raises ValueError if nobody waits.
        """
        if len(self.lines) == 1:
            return next(iter(self.lines))
        places = Counter(map(owner_of, running))
        turns = self.turns.present([*places, *self.lines])
        return min(self.lines, key=lambda owner: (places[owner], turns[owner]))

    def next_line(self, running: Iterable[Sequence]) -> Collection[Sequence]:
        """The requests of the owner that is next; empty if nobody waits."""
        return self.lines[self.next_owner(running)] if self.lines else ()


def gives_place(running: Iterable[Sequence], owner: str) -> Sequence | None:
    """The running sequence that makes place for a request of `owner`; None if each has its share.

    It is the youngest of the owner with the most, who has at least two more than `owner`: so no two take turns.
    """
    places = Counter(map(owner_of, running))
    most = max(places, key=lambda each: places[each], default=owner)
    if places[most] < places[owner] + 2:
        return None
    return max((s for s in running if owner_of(s) == most), key=lambda s: s.number)


def gives_way(running: Iterable[Sequence]) -> Sequence:
    """The sequence to preempt when the pool is full: the youngest of the owners that have the most running.

    So the oldest of all always goes on, and one that `gives_place` has let in is not the next to go. Raises ValueError
    without sequences.
    """
    places = Counter(map(owner_of, running))
    return max(running, key=lambda s: (places[owner_of(s)], s.number))


def make_place(
    running: Collection[Sequence],
    waiting: Queue,
    full: Callable[[], bool],
    collect: Callable[[], bool],
    preempt: Callable[[Sequence], object],
) -> bool:
    """While there is no place, `preempt` a sequence of an owner that has more than its share, if any has.

    `full` is whether there is none, and `collect`, which comes first, reads the step in flight, if any. Returns whether
    there is a place for one of the `waiting`.
    """
    while full():
        if (sequence := gives_place(running, waiting.next_owner(running))) is None:
            return False
        if not collect():
            preempt(sequence)
    return True


class Shares:
    """Whose prompt had a chunk when: owners whose prompts are computed take turns."""

    def __init__(self) -> None:
        self.turns = Turns()

    def next_prefill(
        self, running: Collection[Sequence], now: float, prefill_s: Callable[[int, int], float]
    ) -> Sequence | None:
        """The sequence that prefills in the next step, by `scheduler.next_prefill`, of the owner that waits longest."""
        prefilling = [sequence for sequence in running if sequence.state is PREFILLING]
        if len(set(map(owner_of, prefilling))) > 1:
            turns = self.turns.present(map(owner_of, running))
            first = min(map(owner_of, prefilling), key=lambda owner: turns[owner])
            prefilling = [sequence for sequence in prefilling if owner_of(sequence) == first]
        return next_prefill(prefilling, now, prefill_s)

    def noted(self, plan: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """The same plan, of which the owner of its chunk is remembered."""
        if plan and plan[0].sequence.state is PREFILLING:
            self.turns.take(owner_of(plan[0].sequence))
        return plan
