"""The text layer of PDFs, extracted by pypdf in a process of its own and remembered by the hash of the file.

A PDF stays in an agent's history, so each is read once and its text, or the reason why it has none, is the same in
every request while it is remembered. A hostile file costs at most the limits of `pdf_process`; all files of a request
together cost READING_SECONDS. Those for which no time is left, or no process, are read with the next request. pypdf: https://pypdf.readthedocs.io.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore

import msgspec

from serve.limits.bounds import DEFAULT_BOUNDS
from serve.limits.recent import Recent

PROCESS = Path(__file__).with_name("pdf_process.py")
READING_SECONDS = 60.0  # for all PDFs of a request
FILE_SECONDS = 30.0  # for one of them
PROCESSES = 4  # that run at the same time
MOST_WAITING = 8  # requests that wait for a process: each holds a thread, and others need one, too
MAX_BYTES = 32 * 2**20

BUSY = "there was no time to read it"


@dataclass(frozen=True)
class PdfText:
    """The text of a PDF, or why it has none."""

    text: str = ""
    reason: str = ""


remembered: Recent[bytes, PdfText] = Recent(DEFAULT_BOUNDS.documents, lambda pdf: len(pdf.text) * 4, scoped=True)
_running, _waiting = BoundedSemaphore(PROCESSES), BoundedSemaphore(MOST_WAITING)
_deadline: ContextVar[float] = ContextVar("deadline")


@contextmanager
def reading_time(seconds: float = READING_SECONDS) -> Iterator[None]:
    """Within it, PDFs are read for so many seconds."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def pdf_text(data: str) -> PdfText:
    """The text of a PDF in Base64, which may be a data URL; remembered or read now."""
    key = hashlib.blake2b(data.encode("utf-8", "replace"), digest_size=32).digest()
    if (found := remembered.get(key)) is None:
        found = read(data)
        if found.reason != BUSY:  # a later request may have the time
            remembered.put(key, found)
    return found


def read(data: str) -> PdfText:
    """The text of a PDF in Base64, read in the time that is left."""
    if len(data) * 3 // 4 > MAX_BYTES:
        return PdfText(reason=f"it has over {MAX_BYTES >> 20} MiB")
    try:
        content = base64.b64decode(data.partition(",")[2] if data.startswith("data:") else data)
    except ValueError:
        return PdfText(reason="its data is not Base64")
    left = _deadline.get(time.monotonic() + FILE_SECONDS) - time.monotonic()
    if left <= 0 or not may_run(left):
        return PdfText(reason=BUSY)
    try:
        return in_process(content, FILE_SECONDS)
    finally:
        _running.release()


def may_run(seconds: float) -> bool:
    """Wait for one of the processes, so many seconds at most. Returns whether it was acquired."""
    if _running.acquire(blocking=False):
        return True
    if not _waiting.acquire(blocking=False):
        return False
    try:
        return _running.acquire(timeout=seconds)
    finally:
        _waiting.release()


def in_process(content: bytes, seconds: float) -> PdfText:
    """The text of a PDF, read in a process that ends after so many seconds at the latest."""
    try:
        # Without -P, modules of this folder would take the place of others with the same names.
        command = [sys.executable, "-P", str(PROCESS)]
        done = subprocess.run(command, input=content, capture_output=True, timeout=seconds, check=True)
        return msgspec.convert(msgspec.json.decode(done.stdout), PdfText)
    except (subprocess.SubprocessError, msgspec.MsgspecError):  # it ended at a limit
        return PdfText(reason="it takes too long to read")
