"""Halves of surrogate pairs in a body: JavaScript can cut a character in two, and UTF-8 cannot write the halves."""

from __future__ import annotations

import numpy as np

BACKSLASH = ord("\\")
HIGH, LOW = b"89abAB", b"cdefCDEF"  # the digits after `\ud`


def mend_surrogates(body: bytes | bytearray) -> bytes | bytearray:
    r"""The body with `\ufffd` for each escape such as `\ud83d` that stands alone; the same object if there is none.

    The length stays. Takes up to about 60 bytes of memory for each backslash of the body.
    """
    data = np.frombuffer(body, np.uint8)
    places = lone_escapes(data)
    if not len(places):
        return body
    mended = data.copy()
    for i, byte in enumerate(b"fffd"):
        mended[places + 2 + i] = byte
    return mended.tobytes()


def lone_escapes(data: np.ndarray) -> np.ndarray:
    """The places, int64, of the escapes in [bytes] uint8 that are a half without the other half next to it."""
    backslashes = np.flatnonzero(data == BACKSLASH)
    order = np.arange(len(backslashes))
    run_starts = np.maximum.accumulate(np.where(np.diff(backslashes, prepend=-2) > 1, order, 0))
    # Of a run of backslashes, each second one is escaped by the one before it.
    starts = backslashes[(order - run_starts) % 2 == 0]
    starts = starts[starts + 6 <= len(data)]
    starts = starts[(data[starts + 1] == ord("u")) & np.isin(data[starts + 2], list(b"dD"))]
    high = starts[np.isin(data[starts + 3], list(HIGH))]
    low = starts[np.isin(data[starts + 3], list(LOW))]
    return np.concatenate([np.setdiff1d(high, low - 6), np.setdiff1d(low, high + 6)])
