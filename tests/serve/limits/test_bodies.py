"""The parts of a body are counted as a JSON parser would, across the borders of slices."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api.messages import InvalidRequest, decode_request
from serve.limits import bodies
from serve.limits.bodies import MOST_ESCAPES, MOST_PARTS, parts

VALUES = st.recursive(
    st.text('\\",[{é\n') | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('\\",[{a'), inner),
    max_leaves=12,
)


def counted(value: Any) -> int:
    """Brackets and commas of a value as JSON."""
    if not isinstance(value, list | dict):
        return 0
    inner = value if isinstance(value, list) else value.values()
    return 1 + max(0, len(value) - 1) + sum(map(counted, inner))


@given(value=VALUES, size=st.integers(1, 9))
def test_what_is_in_strings_does_not_count(value: Any, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "MOST_PARTS", 0)
        patch.setattr(bodies, "SLICE", size)
        assert parts(json.dumps(value).encode()) == counted(value)


MINIMAL = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}


def test_a_body_of_too_many_parts_is_refused_by_their_number() -> None:
    body = json.dumps(MINIMAL | {"metadata": {"a": [[]] * MOST_PARTS}}).encode()
    with pytest.raises(InvalidRequest, match=r"^body: expected at most 262144 brackets and commas, got 52\d{4}$"):
        decode_request(body)


def test_a_body_of_too_many_escapes_is_refused_by_their_number() -> None:
    body = json.dumps(MINIMAL | {"system": "\n" * (MOST_ESCAPES + 1)}).encode()
    with pytest.raises(InvalidRequest, match=r"^body: expected at most 4194304 escaped characters, got about 4194305$"):
        decode_request(body)


def test_a_long_text_of_brackets_and_commas_is_read() -> None:
    text = '[{,"\\' * MOST_PARTS
    request = decode_request(json.dumps(MINIMAL | {"system": text}).encode())
    assert request.system == text
