"""Who comes next where several owners of requests share an engine.

Places in the batch and chunks of prompts are divided evenly among the owners that want some, so that a hundred requests
of one delay another's single one by no more than one would. Of one owner's requests, those come first that `scheduler`
says. Where requests have no owner, all have the same, and nothing changes.

Background requests come after all others, an owner's in a line of their own. They never starve: of EVERY turns in which
others pass them, to be admitted or to compute a chunk, one is theirs, and the last one that runs keeps its place.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator

from serve.engine.scheduler import ScheduledSequence, next_prefill
from serve.engine.sequence import PREFILLING, Sequence

EVERY = 8
BEHIND = "\0background"  # ends the name of a line of background requests; no owner's name has a zero byte


def owner_of(sequence: Sequence) -> str:
    """The owner of a request."""
    return sequence.request.owner


def line_of(sequence: Sequence) -> str:
    """The line that a request waits in: its owner's, or its owner's for background requests."""
    return owner_of(sequence) + (BEHIND if sequence.request.background else "")


def is_behind(line: str) -> bool:
    """Whether a line is of background requests."""
    return line.endswith(BEHIND)


def first_lines(lines: Iterable[str], passed: int) -> list[str]:
    """Those of some lines that are next: all others' before those of the background, which `passed` turns went to."""
    every = list(lines)
    behind = [line for line in every if is_behind(line)]
    if not behind or len(behind) == len(every):
        return every
    return behind if passed >= EVERY - 1 else [line for line in every if not is_behind(line)]


class Turns:
    """When each of the present owners had its latest turn.

    One that has just come is before the owner that had the latest turn, and after all others: so nobody who leaves and
    comes again, as a client between two requests, keeps another from its turn.
    """

    def __init__(self) -> None:
        self.latest = 0
        self.taken: dict[str, int] = {}
        self.passed = 0  # turns that others had since a background request waits

    def present(self, owners: Iterable[str]) -> dict[str, int]:
        """The number of each owner's latest turn; `owners` are all that there are now."""
        self.taken = {owner: self.taken.get(owner, self.latest - 1) for owner in owners}
        return self.taken

    def take(self, owner: str, waiting: Iterable[str] = ()) -> None:
        """An owner has its turn, while others are `waiting` for one."""
        self.latest += 2
        self.taken[owner] = self.latest
        self.passed = 0 if is_behind(owner) else self.passed + any(map(is_behind, waiting))


class Queue:
    """The requests that wait, in a line for each owner. The engine's thread changes it, any thread may read it."""

    def __init__(self) -> None:
        self.lines: dict[str, deque[Sequence]] = {}  # none of them is empty; see `line_of`
        self.turns = Turns()  # to be admitted

    def __len__(self) -> int:
        """The number of requests."""
        return sum(map(len, list(self.lines.values())))

    def __iter__(self) -> Iterator[Sequence]:
        """The requests as they are now, owner by owner."""
        return iter([sequence for line in list(self.lines.values()) for sequence in list(line)])

    def count(self, owner: str) -> int:
        """The number of an owner's requests."""
        return sum(len(self.lines.get(line, ())) for line in (owner, owner + BEHIND))

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Add new requests."""
        for sequence in sequences:
            self.lines.setdefault(line_of(sequence), deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Add a request that was admitted before, as the first of its owner."""
        self.lines.setdefault(line_of(sequence), deque()).appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a request out."""
        line = self.lines[line_of(sequence)]
        line.remove(sequence)
        if not line:
            del self.lines[line_of(sequence)]

    def admitted(self, sequence: Sequence) -> None:
        """Note that a request, which was taken out, is running."""
        self.turns.take(line_of(sequence), self.lines)

    def next_owner(self, running: Iterable[Sequence]) -> str:
        """The line with the fewest running requests; of equals, the one that was admitted longest ago.

        Raises ValueError if nobody waits.
        """
        if len(self.lines) == 1:
            return next(iter(self.lines))
        places = Counter(map(line_of, running))
        turns = self.turns.present([*places, *self.lines])
        return min(first_lines(self.lines, self.turns.passed), key=lambda line: (places[line], turns[line]))

    def next_line(self, running: Iterable[Sequence]) -> Collection[Sequence]:
        """The requests of the owner that is next; empty if nobody waits."""
        return self.lines[self.next_owner(running)] if self.lines else ()


def gives_place(running: Iterable[Sequence], line: str) -> Sequence | None:
    """The running sequence that makes place for a request of `line`; None if each has its share.

    For one that is not of the background, it is the youngest background sequence, if there are two. Else it is the
    youngest of the line with the most, which has at least two more than `line`: so no two take turns.
    """
    every = list(running)
    behind = [s for s in every if s.request.background]
    if not is_behind(line) and len(behind) > 1:
        return max(behind, key=lambda s: s.number)
    rivals = [s for s in every if s.request.background == is_behind(line)]
    places = Counter(map(line_of, rivals))
    most = max(places, key=lambda each: places[each], default=line)
    if places[most] < places[line] + 2:
        return None
    return max((s for s in rivals if line_of(s) == most), key=lambda s: s.number)


def gives_way(running: Iterable[Sequence]) -> Sequence:
    """The sequence to preempt when the pool is full: one of the background, or else the youngest of the line with most.

    The oldest of all always goes on, and one that `gives_place` has let in is not the next to go. Raises ValueError
    without sequences.
    """
    every = sorted(running, key=lambda s: s.number)
    places = Counter(map(line_of, every))
    return max(every[1:] or every, key=lambda s: (s.request.background, places[line_of(s)], s.number))


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
        self.wanted = set[str]()  # lines with a prompt that is being computed

    def next_prefill(
        self, running: Collection[Sequence], now: float, prefill_s: Callable[[int, int], float]
    ) -> Sequence | None:
        """The sequence that prefills in the next step, by `scheduler.next_prefill`, of the owner that waits longest."""
        prefilling = [sequence for sequence in running if sequence.state is PREFILLING]
        self.wanted = set(map(line_of, prefilling))
        if len(self.wanted) > 1:
            turns = self.turns.present(map(line_of, running))
            first = min(first_lines(self.wanted, self.turns.passed), key=lambda line: (turns[line], line))
            prefilling = [sequence for sequence in prefilling if line_of(sequence) == first]
        return next_prefill(prefilling, now, prefill_s)

    def noted(self, plan: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """The same plan, of which the owner of its chunk is remembered."""
        if plan and plan[0].sequence.state is PREFILLING:
            self.turns.take(line_of(plan[0].sequence), self.wanted)
        return plan
