"""A compressed body is decoded as any other decoder would, and never beyond the limit."""

from __future__ import annotations

import gzip
import time
import tracemalloc
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from serve.limits import encodings
from serve.limits.encodings import BodyTooLarge, MalformedBody, UnsupportedEncoding, decode_body


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.compress,
    "br": lambda data: brotli.compress(data, quality=4),
}
LIMIT = 2**20


@given(data=st.binary(max_size=300), name=st.sampled_from([*ENCODERS]), piece=st.integers(1, 50))
def test_what_was_encoded_is_decoded_whatever_the_size_of_a_piece(data: bytes, name: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "PIECE", piece)
        assert decode_body(bytearray(ENCODERS[name](data)), name.upper(), LIMIT) == data


@given(data=st.binary(max_size=300))
def test_deflate_is_read_without_its_header_too(data: bytes) -> None:
    assert decode_body(raw_deflate(data), "deflate", LIMIT) == data


def test_several_members_and_several_encodings_are_one_body() -> None:
    assert decode_body(gzip.compress(b"one ") + gzip.compress(b"two"), "gzip", LIMIT) == b"one two"
    assert decode_body(zstandard.compress(b"one ") + zstandard.compress(b"two"), "zstd", LIMIT) == b"one two"
    assert decode_body(brotli.compress(gzip.compress(b"both")), "gzip, br", LIMIT) == b"both"


def test_a_body_without_an_encoding_is_the_same_object() -> None:
    body = b"{}"
    assert decode_body(body, "", LIMIT) is body
    assert decode_body(body, "identity, identity", LIMIT) is body


@pytest.mark.parametrize("name", ENCODERS)
def test_a_bomb_takes_little_more_memory_than_the_limit(name: str) -> None:
    bomb = ENCODERS[name](bytes(32 * LIMIT))
    assert len(bomb) < LIMIT / 10
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge, match=f"at most {LIMIT} bytes after {name}"):
            decode_body(bomb, name, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 6 * LIMIT
    finally:
        tracemalloc.stop()


def test_a_body_at_the_limit_is_decoded() -> None:
    assert len(decode_body(gzip.compress(bytes(LIMIT)), "gzip", LIMIT)) == LIMIT


@pytest.mark.parametrize("name", ENCODERS)
def test_a_body_that_is_something_else_is_malformed(name: str) -> None:
    with pytest.raises(MalformedBody, match=f"body: expected {name} data"):
        decode_body(b'{"model": "m"}', name, LIMIT)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "zstd"])
def test_a_body_that_was_cut_off_is_malformed(name: str) -> None:
    with pytest.raises(MalformedBody, match=name):
        decode_body(ENCODERS[name](b"words that are cut" * 20)[:-2], name, LIMIT)


def test_an_unknown_encoding_is_named_with_what_to_do() -> None:
    with pytest.raises(UnsupportedEncoding, match="expected gzip, deflate, zstd, br or none, got 'lzma': send the"):
        decode_body(b"", "gzip, LZMA", LIMIT)
    with pytest.raises(UnsupportedEncoding, match="at most 3, got 4"):
        decode_body(b"", "gzip, gzip, gzip, gzip", LIMIT)


def test_many_small_members_take_no_more_than_their_bytes() -> None:
    start = time.process_time()
    assert decode_body(gzip.compress(b"") * 100_000 + gzip.compress(b"end"), "gzip", LIMIT) == b"end"
    assert time.process_time() - start < 5
