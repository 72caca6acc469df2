"""Stop sequences in one pass: what the automaton finds is what a plain search over all text would find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from serve.api.stops import MAX_STOP_CHARS, MAX_STOPS, Stops
from serve.formats.stream import overlap

LETTERS = st.sampled_from("abé🙂")
SEQUENCES = st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=6)


def plain_first(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop sequence that is complete first begins, and which it is; of two that end together, the longest."""
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1:] if found else None


@given(text=st.text(LETTERS, max_size=60), stops=SEQUENCES, cuts=st.lists(st.integers(0, 60), max_size=6))
def test_it_finds_what_a_plain_search_finds_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    automaton, state, done = Stops(stops), 0, 0
    for cut in sorted([*cuts, len(text)]):
        state, count = automaton.scan(state, text[done : max(done, cut)])
        done += count
        if (found := automaton.complete[state]) is not None:
            assert plain_first(text, stops) == (done - len(found), found)
            return
        assert automaton.depth[state] == max([overlap(text[:done], stop) for stop in stops], default=0)
    assert done == len(text)
    assert plain_first(text, stops) is None


class Counting(dict):
    """A mapping that counts how often it is asked."""

    def __init__(self, given: dict) -> None:
        super().__init__(given)
        self.asked: Counter[str] = Counter()

    def get(self, key: object, default: object = None) -> object:
        """Ask."""
        self.asked["times"] += 1
        return super().get(key, default)


def test_a_character_costs_two_lookups_whatever_the_stop_sequences_and_whatever_is_held() -> None:
    few = ["a" * MAX_STOP_CHARS]
    many = ["a" * (MAX_STOP_CHARS - len(str(n))) + str(n) for n in range(MAX_STOPS)]
    text = ("a" * (MAX_STOP_CHARS - 1) + "b") * 40
    for stops in (few, many):
        automaton = Stops(stops)
        automaton.edges = Counting(automaton.edges)
        automaton.scan(0, text)
        assert automaton.edges.asked["times"] <= 2 * len(text)


def test_the_automaton_grows_with_the_characters_of_its_sequences() -> None:
    stops = Stops([chr(0x4E00 + n) * MAX_STOP_CHARS for n in range(MAX_STOPS)])
    assert len(stops.depth) == MAX_STOPS * MAX_STOP_CHARS + 1
