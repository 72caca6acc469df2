"""A request as the router sees it: its length, and the keys of its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class RoutedRequest:
    """A request to be routed.

    `agent` groups requests that follow each other (sub-agents share their parent's session, so each has an id of its
    own); it settles near ties. What requests share is known by their keys alone.
    """

    id: str  # unique among the requests in flight
    keys: np.ndarray  # [pages] uint64, of the prompt's full pages in order, see `short_keys`
    tokens: int  # of the whole prompt
    page_size: int  # tokens
    agent: str = ""
    session: str = ""


def short_keys(keys: Sequence[bytes]) -> np.ndarray:
    """The first 8 bytes of each page's chain key (`cache.keys.page_keys`), [pages] uint64."""
    return np.frombuffer(b"".join(key[:8] for key in keys), "<u8")
