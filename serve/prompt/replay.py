"""What the model sampled for every answered turn, found again by the conversation, and the signatures of thinking.

Clients send an answer back as content, not as tokens: its JSON parsed and written anew, its whitespace trimmed. The log
maps that content, and what was said before it, to the ids it was decoded from. By its content alone a turn would not be
known: the same words twice in one conversation may have been sampled in two ways. A turn that somebody edited has
another key, as have those behind it, whose cached prefix the edit has ended as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import numpy as np
from cachetools import LRUCache

from cache.disk import DiskTier
from cache.lmdb_env import RECORDS
from cache.worker import Worker
from serve.api.messages import Block, InputMessage, TextBlock, ThinkingBlock, ToolUseBlock
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.prompt.conversation import blocks, joined, turns

log = logging.getLogger("tokenzero.replay")

FOLDER = "replay"  # below the store directory
SYNC_SECONDS = 5.0
RECORD_BYTES = 512  # of memory that a record takes beside its tokens, about
VERSION = b"\x01"
LENGTH = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class RecordedAnswer:
    """One answered turn: what the prompt wrote of the turn ahead of the model, and what the model wrote."""

    opening: str  # as `render.Prompt.opening`
    tokens: np.ndarray  # [tokens] int32, begun ones included, without the stop token


class ReplayLog:
    """Answered turns by their content: the latest in memory, all in an LMDB environment below `directory`, if any.

    What the disk is too slow for, beyond `queue_bytes` that wait, is kept in memory alone; `on_lost` is told of each.
    A record that `put` returned for survives a killed process within milliseconds, and a power cut after a few seconds;
    a damaged one is a miss. Any thread may use it. Raises StoreError for a folder that holds something else.
    """

    def __init__(
        self,
        directory: Path | None = None,
        memory_bytes: int = DEFAULT_BOUNDS.turns,
        disk_bytes: int = 256 * 2**20,
        queue_bytes: int = DEFAULT_BOUNDS.unwritten_turns,
        on_lost: Callable[[], object] = lambda: None,
    ) -> None:
        self.memory: LRUCache[bytes, RecordedAnswer] = LRUCache(
            memory_bytes, getsizeof=lambda sampled: RECORD_BYTES + len(sampled.opening) + sampled.tokens.nbytes
        )
        self.lock = Lock()
        self.disk = DiskTier(directory / FOLDER, disk_bytes, name=RECORDS) if directory else None
        self.writer = Worker("replay")
        self.waiting_bytes, self.queue_bytes = 0, queue_bytes  # of records that wait to be written
        self.on_lost = on_lost
        self.synced = time.monotonic()

    def put(
        self, scope: bytes, messages: Sequence[InputMessage], answer: Sequence[Block], sampled: RecordedAnswer
    ) -> None:
        """Remember the answer to a conversation; of two with the same content, the later one.

        `answer` is what the client is sent, without what it has begun itself. Returns before the record is on disk.
        """
        key = keys(scope, [*messages, InputMessage("assistant", tuple(answer))])[-1]
        self._keep(key, sampled)
        if self.disk:
            self._queue(self.disk, key, pack(sampled))

    def recall(self, scope: bytes, messages: Sequence[InputMessage]) -> list[RecordedAnswer | None]:
        """What was sampled for each of a conversation's answers, None where that is not known."""
        wanted = keys(scope, messages)
        with self.lock:
            found = [self.memory.get(key) for key in wanted]
        missing = [i for i, sampled in enumerate(found) if sampled is None]
        records = self.disk.get_many([wanted[i] for i in missing]) if self.disk else ()
        for i, record in zip(missing, records, strict=False):
            sampled = unpack(bytes(record)) if record is not None else None
            if sampled is not None:
                found[i] = sampled
                self._keep(wanted[i], sampled)
        return found

    @property
    def remembered_bytes(self) -> int:
        """Memory that the turns in memory take, about."""
        return int(self.memory.currsize)

    def flush(self) -> None:
        """Wait until everything that was put is written through to the disk."""
        if self.disk:
            self.writer.submit(self.disk.sync).result()

    def close(self, seconds: float = 30.0) -> None:
        """Write what is waiting and close; what a disk does not take within so many seconds is lost, with one warning.

        Later calls of `put` keep turns in memory alone.
        """
        if self.disk:
            try:
                self.writer.submit(self.disk.close).result(seconds)
            except (TimeoutError, CancelledError):
                log.warning("sampled turns of %d bytes are not written: the disk hangs", self.waiting_bytes)
        self.writer.stop()

    def _queue(self, disk: DiskTier, key: bytes, record: bytes) -> None:
        size = RECORD_BYTES + len(record)
        with self.lock:
            if room := not self.waiting_bytes or self.waiting_bytes + size <= self.queue_bytes:
                self.waiting_bytes += size
        if not room:
            self.on_lost()
            return

        def done(written: Future[None]) -> None:
            with self.lock:
                self.waiting_bytes -= size
            if written.cancelled():
                self.on_lost()

        self.writer.submit(self._write, disk, key, record).add_done_callback(done)

    def _keep(self, key: bytes, sampled: RecordedAnswer) -> None:
        with self.lock, suppress(ValueError):  # larger than the whole memory
            self.memory[key] = sampled

    def _write(self, disk: DiskTier, key: bytes, record: bytes) -> None:
        try:
            (old,) = disk.get_many([key])
            if old is not None and old != record:
                disk.delete([key])  # the tier keeps what it has, since a page never changes
            disk.put_many([(key, record)])
            if time.monotonic() - self.synced > SYNC_SECONDS:
                self.synced = time.monotonic()
                disk.sync()
        except Exception:
            log.exception("a sampled turn is not written to the disk")


def keys(scope: bytes, messages: Sequence[InputMessage]) -> list[bytes]:
    """The keys of a conversation's answers, 32 bytes each: a hash of the answer and of everything in front of it.

    `scope` is whatever separates those who may share records: key, salt, model. Signatures, redacted thinking, blanks
    around texts, the borders between neighbouring texts, key order and the spelling of numbers make no difference.
    """
    chain, found = hashlib.sha256(scope).digest(), list[bytes]()
    for message in joined(messages):
        if message.role == "assistant":
            try:
                chain = link(chain, canonical(blocks(message)))
            except RecursionError:
                chain = secrets.token_bytes(32)  # JSON that nests too deeply to be compared is like no other
            found.append(chain)
        else:
            # By turns, as the template gets them: how they are spread over messages makes no difference either.
            for turn in turns(message):
                chain = link(chain, [turn["role"], turn["content"].strip()])
    return found


def link(chain: bytes, said: list[Any]) -> bytes:
    """The chain with one more turn."""
    try:
        text = msgspec.json.encode(said, order="deterministic")
    except UnicodeEncodeError:  # half a surrogate pair, which a model can write and no client can send
        text = json.dumps(said, sort_keys=True).encode()
    return hashlib.sha256(chain + text).digest()


def canonical(answer: Iterable[Block]) -> list[list[Any]]:
    """An answer as JSON values, the same for all forms in which clients send it back."""
    parts: list[list[Any]] = []
    for block in answer:
        if isinstance(block, TextBlock) and parts and parts[-1][0] == "text":
            parts[-1][1] += block.text
        elif isinstance(block, TextBlock):
            parts.append(["text", block.text])
        elif isinstance(block, ThinkingBlock):
            parts.append(["thinking", block.thinking])
        elif isinstance(block, ToolUseBlock):
            parts.append(["tool_use", block.id, block.name, plain(block.input)])
    trimmed = ([kind, text.strip(), *rest] for kind, text, *rest in parts)
    return [part for part in trimmed if part[1:] != [""]]


def plain(value: Any) -> Any:
    """JSON with its numbers as the doubles that JavaScript reads them as: 1, 1.0 and 1e0 are one number."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        # An integer beyond all doubles stays itself. Adding 0 makes -0 the 0 that JavaScript writes for it.
        with suppress(OverflowError):
            return float(value) + 0.0
    return value


def pack(sampled: RecordedAnswer) -> bytes:
    """A record: a version byte, the opening's length and UTF-8, the tokens as little-endian int32."""
    opening = sampled.opening.encode()
    return VERSION + LENGTH.pack(len(opening)) + opening + np.asarray(sampled.tokens, "<i4").tobytes()


def unpack(record: bytes) -> RecordedAnswer | None:
    """The turn of a record; None if it is not one."""
    start = len(VERSION) + LENGTH.size
    if len(record) < start or not record.startswith(VERSION):
        return None
    end = start + LENGTH.unpack_from(record, len(VERSION))[0]
    if end > len(record) or (len(record) - end) % 4:
        return None
    try:
        return RecordedAnswer(record[start:end].decode(), np.frombuffer(record[end:], "<i4").astype(np.int32))
    except UnicodeDecodeError:
        return None
