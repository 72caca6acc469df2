"""Signatures of thinking blocks, by which the server knows its own when they come back, and the key that signs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import secrets
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from cache.lmdb_env import StoreError
from serve.prompt.replay import FOLDER, LENGTH

log = logging.getLogger("tokenzero.signing")

KEY_FILE = "signing.key"
KEY_BYTES = 32


def signing_key(directory: Path | None) -> bytes:
    """The key of the store below `directory`, 32 bytes, made on first use; without a store, one for this process only.

    The same where a disk has no room for it, or takes no writes. Raises StoreError for a key file of another length,
    OSError if it cannot be read.
    """
    if directory is None:
        return secrets.token_bytes(KEY_BYTES)
    path = directory / FOLDER / KEY_FILE
    if not path.exists():
        try:
            make_key(path)
        except OSError as error:
            log.warning(
                "%s cannot be written: thinking signed now is another server's after a restart: %s", path, error
            )
            return secrets.token_bytes(KEY_BYTES)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise StoreError(f"{path}: found {len(key)} bytes, expected a key of {KEY_BYTES}: delete it to have a new one")
    return key


def make_key(path: Path) -> None:
    """Write a new key unless another process does so first. Raises OSError, and leaves nothing then."""
    # Written to a scratch file and linked into its place: no reader sees half a key, and of two makers one wins.
    scratch = path.with_name(f".{KEY_FILE}.{secrets.token_hex(8)}")
    try:
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def sign(key: bytes, tokens: np.ndarray | Sequence[int]) -> str:
    """The signature of a thinking block, in base64: the count of `tokens` and HMAC-SHA256 over them.

    `tokens` are the ids of its answer up to the end of the block, prefilled ones included. HMAC:
    https://datatracker.ietf.org/doc/html/rfc2104.
    """
    mac = hmac.new(key, np.asarray(tokens, "<i4").tobytes(), hashlib.sha256)
    return base64.b64encode(LENGTH.pack(len(tokens)) + mac.digest()).decode()


def verify(key: bytes, tokens: np.ndarray | Sequence[int], signature: str) -> bool:
    """Whether `sign` made this signature for a block of the answer with these ids.

    False for any other text: its block is plain thinking text then.
    """
    try:
        (count,) = LENGTH.unpack_from(base64.b64decode(signature.encode(), validate=True))
    except (ValueError, struct.error):
        return False
    return hmac.compare_digest(sign(key, tokens[:count]).encode(), signature.encode())
