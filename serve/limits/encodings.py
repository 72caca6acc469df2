"""Compressed bodies: each `content-encoding` decoded piece by piece, within a limit on the decoded bytes.

The encodings: https://www.rfc-editor.org/rfc/rfc9110#section-8.4.1 and https://www.rfc-editor.org/rfc/rfc8878.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator

import brotli
import zstandard

from serve.limits.exceeded import LimitExceeded

Body = bytes | bytearray
PIECE = 2**20  # bytes that are decoded at once
GIVEN = 2**12  # bytes that zlib is given at once: what follows a member is copied, and a member may have 20 bytes
MOST_ENCODINGS = 3  # one on top of the other
MOST_WINDOW = 2**27  # bytes of memory that a zstd frame may demand


class UnsupportedEncoding(Exception):
    """A `content-encoding` that is not one of ENCODINGS."""


class BodyTooLarge(LimitExceeded):
    """The body exceeds the limit in bytes."""

    def __init__(self, expected: str, found: str = "more") -> None:
        text = f"request body: expected {expected}, got {found}: send less, or raise --max-body-bytes"
        super().__init__(text, "max_body_bytes", 413)


class MalformedBody(Exception):
    """The body is not what its `content-encoding` says."""


def compressed_as(body: Body) -> str | None:
    """The encoding of a body that begins as compressed data does; None for any other."""
    return next((name for magic, name in MAGIC.items() if body.startswith(magic)), None)


def decode_body(body: Body, encodings: str, most_bytes: int) -> Body:
    """A body without its `content-encoding`, which may list several; the same object if it has none.

    Reading stops at `most_bytes` decoded bytes. Raises UnsupportedEncoding, BodyTooLarge or MalformedBody.
    """
    names = [name for name in (part.strip().lower() for part in encodings.split(",")) if name not in ("", "identity")]
    if unknown := next((name for name in names if name not in DECODERS), None):
        raise UnsupportedEncoding(
            f"content-encoding: expected {', '.join(ENCODINGS)} or none, got {unknown!r:.80}: send the body as it is"
        )
    if len(names) > MOST_ENCODINGS:
        raise UnsupportedEncoding(f"content-encoding: expected at most {MOST_ENCODINGS}, got {len(names)}")
    for name in reversed(names):
        decoded = bytearray()
        try:
            for piece in DECODERS[name](body):
                decoded += piece
                if len(decoded) > most_bytes:
                    raise BodyTooLarge(f"at most {most_bytes} bytes after {name}")
        except (zlib.error, zstandard.ZstdError, brotli.error, EOFError) as error:
            raise MalformedBody(f"body: expected {name} data, as content-encoding says: {error}") from None
        body = decoded
    return body


def inflated(body: Body, wbits: int) -> Iterator[bytes]:
    """The decoded pieces of zlib's formats, of one gzip member or several. Raises zlib.error or EOFError."""
    at = 0
    while at < len(body):
        member = zlib.decompressobj(wbits)
        while not member.eof:
            given = body[at : at + GIVEN]
            piece = member.decompress(given, PIECE)
            at += len(given) - len(member.unconsumed_tail) - len(member.unused_data)
            if not (piece or given or member.eof):
                raise EOFError("it ends too early")
            yield piece
        padding = ZEROS.match(body, at) if wbits == GZIP else None
        at = padding.end() if padding else len(body)


def deflated(body: Body) -> Iterator[bytes]:
    """The decoded pieces of deflate, with zlib's header as the standard has it, or without."""
    has_header = len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return inflated(body, ZLIB if has_header else RAW_DEFLATE)


def unzstd(body: Body) -> Iterator[bytes]:
    """The decoded pieces of zstd, of one frame or several; those before the cut if it is cut off. Raises ZstdError."""
    stream = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).stream_reader(body, read_across_frames=True)
    while piece := stream.read(PIECE):
        yield piece


def unbrotli(body: Body) -> Iterator[bytes]:
    """The decoded pieces of brotli. Raises brotli.error, EOFError if it is cut off."""
    stream = brotli.Decompressor()
    piece = stream.process(bytes(body), output_buffer_limit=PIECE)
    while piece or not stream.can_accept_more_data():
        yield piece
        piece = stream.process(b"", output_buffer_limit=PIECE)
    if not stream.is_finished():
        raise EOFError("it ends too early")


ZEROS = re.compile(rb"\0*")  # after a gzip member
ZLIB, RAW_DEFLATE, GZIP = zlib.MAX_WBITS, -zlib.MAX_WBITS, zlib.MAX_WBITS | 16
DECODERS: dict[str, Callable[[Body], Iterator[bytes]]] = {
    "gzip": lambda body: inflated(body, GZIP),
    "x-gzip": lambda body: inflated(body, GZIP),
    "deflate": deflated,
    "zstd": unzstd,
    "br": unbrotli,
}
ENCODINGS = ("gzip", "deflate", "zstd", "br")
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # how JSON never begins
