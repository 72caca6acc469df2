"""Sequences that an audit found wrong, as files; `python -m serve audit FILE --model DIR` replays one (cli.py).

A file always holds the prompt as token ids, since these are what is computed again. So only its owner may read it (mode
0600), and only the latest FILES of them are kept. The salt is in it only as a digest, the root key of its pages, from
which their other keys follow. The replay of a salted sequence takes the salt, and that of a named key's the name.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from pathlib import Path

import jax
import msgspec

from cache.keys import root_key
from cache.private import make_folder
from serve.audit.findings import Mismatch, ReusedPrefix
from serve.engine.engine import Engine

log = logging.getLogger("tokenzero.audit")

VERSION = 1
FILES = 16
BYTES = 16 << 20  # of all files together; the latest stays in any case


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that was found wrong, and all that its replay needs."""

    version: int = VERSION
    time: str  # ISO 8601, UTC
    fingerprint: str  # of the model and the dtype of its pages, hexadecimal
    root: str  # key of the pages' parent, hexadecimal: a digest of fingerprint, page size and salt
    head: int = 0  # tokens whose pages all salts share
    page_size: int
    kv_dtype: str | None = None
    max_prefill_tokens: int
    dtype: str
    quantize: str | None = None
    device: str
    jax: str
    tokens: list[int]
    reused: int  # the prefix that was audited
    first: int | None  # the token that was sampled after all of `tokens`, if it was the most likely one
    witness: str  # these as in findings.Mismatch
    source: str
    position: int
    layer: int | None
    part: str | None
    error: float
    scale: float

    @staticmethod
    def of(engine: Engine, record: ReusedPrefix, wrong: Mismatch) -> Case:
        """The case of a mismatch."""
        settings = engine.settings
        root = root_key(engine.fingerprint, settings.page_size, record.salt)
        return Case(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=engine.fingerprint.hex(),
            root=root.hex(),
            head=record.head,
            page_size=settings.page_size,
            kv_dtype=settings.kv_dtype,
            max_prefill_tokens=settings.max_prefill_tokens,
            dtype=settings.dtype,
            quantize=settings.quantize,
            device=jax.devices()[0].device_kind,
            jax=jax.__version__,
            tokens=record.tokens.tolist(),
            reused=record.reused,
            first=record.first,
            witness=wrong.witness,
            source=wrong.source,
            position=wrong.position,
            layer=wrong.layer,
            part=wrong.part,
            error=wrong.error,
            scale=wrong.scale,
        )


def write_case(folder: Path | None, case: Case) -> Path | None:
    """Write a case to a new file in the folder, and delete the oldest ones. Returns its path; None if that failed."""
    if folder is None:
        return None
    try:
        make_folder(folder)
        stem = f"{case.time.replace(':', '').removesuffix('+0000')}-{case.root[:8]}"
        path = next(p for i in range(1000) if not (p := folder / f"{stem}-{i:03}.json").exists())
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(case))
        written = sorted(folder.glob("*-*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)
        total = 0
        for i, each in enumerate(written):
            total += each.stat().st_size
            if i >= FILES or (i and total > BYTES):
                each.unlink()
    except (OSError, StopIteration) as error:
        log.warning("%s: an audit's sequence is not kept: %s", folder, error)
        return None
    return path


def read_case(path: Path) -> Case:
    """The case in a file. Raises OSError if it cannot be read, ValueError if it is not a case."""
    try:
        case = msgspec.json.decode(path.read_bytes(), type=Case)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: expected what an audit wrote, found {error}") from error
    if case.version != VERSION or not 0 < case.reused < len(case.tokens) or case.page_size < 1:
        raise ValueError(
            f"{path}: expected version {VERSION} and a reused prefix within its tokens, found version "
            f"{case.version} with {case.reused} of {len(case.tokens)} tokens, pages of {case.page_size}"
        )
    return case
