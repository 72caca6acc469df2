"""Requests that are almost valid."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st


@st.composite
def mutated(draw: st.DrawFn, valid: dict[str, Any], values: st.SearchStrategy) -> object:
    """A valid request in which one value, at any depth, was replaced or removed."""
    body = json.loads(json.dumps(valid))
    parent = body
    while True:
        key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        if not parent[key] or not isinstance(parent[key], dict | list) or draw(st.integers(0, 3)) == 0:
            break
        parent = parent[key]
    if draw(st.booleans()):
        parent[key] = draw(values)
    else:
        del parent[key]
    return body
