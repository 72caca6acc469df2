"""Guesses are what followed the same words before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.prompt_lookup import NGRAM, propose_draft


def drafted(tokens: list[int], count: int) -> list[int]:
    return propose_draft(np.asarray(tokens, np.int32), count).tolist()


def test_what_followed_the_latest_words_is_drafted() -> None:
    assert drafted([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 4) == [4, 5, 6, 9]


def test_the_latest_of_several_places_counts() -> None:
    assert drafted([1, 2, 3, 7, 7, 1, 2, 3, 8, 8, 1, 2, 3], 2) == [8, 8]


def test_a_place_with_enough_after_it_is_better_than_a_later_one() -> None:
    assert drafted([5] * 10, 4) == [5] * 4


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [1, 2, 3, 4, 5, 6]])
def test_words_that_are_new_have_no_draft(tokens: list[int]) -> None:
    assert drafted(tokens, 4) == []


def test_no_draft_is_made_of_no_tokens() -> None:
    assert drafted([5] * 10, 0) == []


@given(tokens=st.lists(st.integers(0, 3), max_size=60), count=st.integers(0, 8))
def test_a_draft_is_a_run_of_the_text_after_the_same_words(tokens: list[int], count: int) -> None:
    found = drafted(tokens, count)
    assert len(found) <= count
    if found:
        run = tokens[-NGRAM:] + found
        assert any(tokens[i : i + len(run)] == run for i in range(len(tokens) - NGRAM))
