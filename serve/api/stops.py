"""Stop sequences, matched in one pass by an Aho-Corasick automaton.

Source: Aho and Corasick, "Efficient string matching", https://doi.org/10.1145/360825.360855.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MAX_STOPS = 64  # stop sequences of a request
MAX_STOP_CHARS = 256  # of one of them


class Stops:
    """The automaton of a request's stop sequences. It does not change after it is made.

    A state is a number. It stands for the longest suffix of the text that is a prefix of a stop sequence; 0 stands for
    the empty one.
    """

    def __init__(self, sequences: Sequence[str] = ()) -> None:
        self.edges: dict[tuple[int, str], int] = {}  # (state, character) -> the next state
        self.depth = [0]  # length of the prefix that each state stands for, in characters
        self.shorter = [0]  # the state of its longest proper suffix that is such a prefix as well
        self.complete: list[str | None] = [None]  # the longest stop sequence that each state ends with
        for sequence in sequences:
            self._add(sequence)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character. A text of n characters takes at most 2n look-ups."""
        while (following := self.edges.get((state, character))) is None:
            if not state:
                return 0
            state = self.shorter[state]
        return following

    def scan(self, state: int, text: str) -> tuple[int, int]:
        """The state after a text, and the characters read: up to the end of the first stop sequence, or all."""
        if not self.edges:
            return 0, len(text)
        for count, character in enumerate(text, 1):
            state = self.step(state, character)
            if self.complete[state] is not None:
                return state, count
        return state, len(text)

    def _add(self, sequence: str) -> None:
        state = 0
        for character in sequence:
            following = self.edges.setdefault((state, character), len(self.depth))
            if following == len(self.depth):
                self.depth.append(self.depth[state] + 1)
                self.shorter.append(0)
                self.complete.append(None)
            state = following
        self.complete[state] = sequence

    def _link(self) -> None:
        """Set `shorter`, and the stop sequences that are complete through it, shorter states first."""
        following: dict[int, list[tuple[str, int]]] = {}
        for (state, character), target in self.edges.items():
            following.setdefault(state, []).append((character, target))
        queue = deque([0])
        while queue:
            state = queue.popleft()
            for character, target in following.get(state, ()):
                if state:
                    self.shorter[target] = self.step(self.shorter[state], character)
                self.complete[target] = self.complete[target] or self.complete[self.shorter[target]]
                queue.append(target)
