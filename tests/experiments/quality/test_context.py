"""Perplexity by context length: of the tokens before each length, and of no others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.quality.context import OWN, STRETCHED, perplexities, table


def test_only_the_tokens_before_a_length_count() -> None:
    surprises = np.full(99, 50.0)  # of a text of 100 tokens; entry i is of token i + 1
    surprises[25:35] = 1.0  # tokens 26 to 35
    surprises[89:99] = 2.0  # the last ten
    found = perplexities({OWN: [surprises], STRETCHED: [surprises, surprises + 1]}, (36, 100), 10)
    assert found[OWN] == {36: pytest.approx(math.e), 100: pytest.approx(math.exp(2))}
    assert found[STRETCHED] == {36: pytest.approx(math.exp(1.5)), 100: pytest.approx(math.exp(2.5))}


def test_the_table_has_a_row_for_each_kind_and_length() -> None:
    rows = [{"text": "sources", "length": length, OWN: 5.0, STRETCHED: 6.0} for length in (2048, 8192)]
    assert table(rows).row_count == 2
