"""Half a surrogate pair costs one replacement character, and nothing else of a body changes."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from serve.api.messages import TextBlock, decode_request
from serve.limits.surrogates import mend_surrogates

HALVES = st.characters(categories=["Cs"])
TEXTS = st.text(HALVES | st.sampled_from('\\"ud8€😀a') | st.characters(codec="utf-8"), max_size=12)


def mended(text: str) -> str:
    """The text with pairs joined and other halves replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@given(values=st.dictionaries(TEXTS, st.lists(TEXTS, max_size=3), max_size=3))
def test_escaped_halves_are_replaced_in_keys_and_values_and_at_every_place(values: dict[str, list[str]]) -> None:
    body = json.dumps(values).encode()
    want = json.loads(body)
    want = {mended(key): [mended(text) for text in texts] for key, texts in want.items()}
    found = mend_surrogates(body)
    assert json.loads(found) == want
    assert (found is body) == (found == body)
    assert len(found) == len(body)


def test_what_only_looks_like_a_half_stays() -> None:
    for body in (
        rb'"\\ud83d"',
        rb'"\\\\ud83d"',
        rb'"\ud83d\ude00"',
        rb'"\\ud83d\ud83d\ude00"',
        rb'"ud83d \u"',
        b"",
        b"\\",
    ):
        assert mend_surrogates(body) is body
    assert mend_surrogates(rb'"\\ud83d\ude00"') == rb'"\\ud83d\ufffd"'
    assert mend_surrogates(rb'"\\\ud83d"') == rb'"\\\ufffd"'
    assert mend_surrogates(rb'"\uD83D\ud83d\ude00\uDE00"') == rb'"\ufffd\ud83d\ude00\ufffd"'


def test_a_request_is_read_with_the_replacement() -> None:
    for half in (rb"\ud83d", rb"\ude00"):
        body = b'{"model": "m%b", "max_tokens": 2, "messages": [{"role": "user", "content": "cut %b"}], "%b": 1}'
        request = decode_request(body % (half, half, half))
        assert (request.model, request.messages[0].content) == ("m\ufffd", "cut \ufffd")


def test_history_that_cannot_be_read_is_mended_beside_a_half() -> None:
    known = rb'{"type": "text", "text": "\ud83d"}'
    body = b'{"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": [%b, %b]}]}'
    for blocks in ((b'{"type": "new", "x": 1}', known), (known, b'{"type": "new", "x": 1}')):
        request = decode_request((body % blocks).replace(rb"\\u", rb"\u"))
        assert TextBlock("\ufffd") in request.messages[0].content
