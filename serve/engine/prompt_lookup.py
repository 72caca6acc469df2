"""Draft tokens for speculative decoding: the tokens that followed the latest ones where these occurred before.

Prompt lookup decoding (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding): agents copy long runs of
what they have read into edits and calls, so the same tokens are likely to follow again. The model runs over the draft
in one step and accepts the tokens that it would have sampled itself, so only the time changes.
"""

from __future__ import annotations

import numpy as np

# Tokens that have to agree: with fewer, most drafts are wrong.
NGRAM = 3


def propose_draft(
    tokens: np.ndarray,  # [tokens] int32
    count: int,
) -> np.ndarray:
    """Up to `count` tokens that may follow, [draft tokens] int32: those after an earlier occurrence of the last NGRAM.

    It is the latest occurrence with `count` tokens after it, or else the first one, which has the most.
    """
    length = len(tokens)
    if count < 1 or length <= NGRAM:
        return tokens[:0]
    alike = np.ones(length - NGRAM, bool)  # by the start of an n-gram; the last n-gram itself is left out
    for i in range(NGRAM):
        alike &= tokens[i : i + length - NGRAM] == tokens[length - NGRAM + i]
    places = np.flatnonzero(alike)
    if not len(places):
        return tokens[:0]
    enough = places[places + NGRAM + count <= length]
    follows = int(enough[-1] if len(enough) else places[0]) + NGRAM
    return tokens[follows : follows + count]
