"""Guesses at the next tokens of an answer: what followed the same words before.

Prompt lookup decoding (Saxena, 2023): agents copy long runs of what they have read into edits and calls, so the tokens
behind an earlier occurrence of the latest ones are likely to come again. The model runs over the guesses in one step
and keeps those that it would have sampled, which changes nothing but the time.
"""

from __future__ import annotations

import numpy as np

# Tokens that have to agree: with fewer, most guesses are chance.
NGRAM = 3


def propose_draft(
    tokens: np.ndarray,  # [tokens] int32
    count: int,
) -> np.ndarray:
    """Up to `count` tokens that may follow, [guesses] int32: those behind the latest earlier place that reads alike.

    Of places, the latest one with `count` tokens behind it, or else the first, which has the most.
    """
    length = len(tokens)
    if count < 1 or length <= NGRAM:
        return tokens[:0]
    alike = np.ones(length - NGRAM, bool)  # by the place where an n-gram starts; the last one itself is left out
    for i in range(NGRAM):
        alike &= tokens[i : i + length - NGRAM] == tokens[length - NGRAM + i]
    places = np.flatnonzero(alike)
    if not len(places):
        return tokens[:0]
    enough = places[places + NGRAM + count <= length]
    follows = int(enough[-1] if len(enough) else places[0]) + NGRAM
    return tokens[follows : follows + count]
