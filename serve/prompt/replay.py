"""The token ids that the model sampled for each answer, found by the conversation that the client sends back.

Clients send an answer back as content, not as tokens: its JSON is parsed and written again, its whitespace trimmed. The
log maps that content, and the conversation before it, to the ids that it was decoded from. The content alone would not
do: the same words twice in one conversation may have been sampled in two ways. An edited answer has another key, and so
have all answers after it, whose cached prefix the edit has ended as well.
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
from serve.prompt.conversation import blocks, joined, lasting, turns

log = logging.getLogger("tokenzero.replay")

FOLDER = "replay"  # below the store directory
SYNC_SECONDS = 5.0
RECORD_BYTES = 512  # of memory that a record takes besides its tokens, about
VERSION = b"\x01"
LENGTH = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class RecordedAnswer:
    """One answer: the end of the prompt that belongs to its turn, and the tokens of the answer."""

    opening: str  # as `render.Prompt.opening`
    tokens: np.ndarray  # [tokens] int32, prefilled ones included, without the stop token


class ReplayLog:
    """Recorded answers by their content: the latest in memory, all in an LMDB environment below `directory`, if any.

    At most `queue_bytes` wait for a slow disk. A record beyond that is kept in memory alone, and `on_lost` is called.
    A few milliseconds after `put` returns its record survives a killed process, after a few seconds a power cut. A
    damaged record is a miss. Any thread may use the log. Raises StoreError for a folder that holds something else.
    """

    def __init__(
        self,
        directory: Path | None = None,
        memory_bytes: int = DEFAULT_BOUNDS.answers,
        disk_bytes: int = 256 * 2**20,
        queue_bytes: int = DEFAULT_BOUNDS.unwritten_answers,
        on_lost: Callable[[], object] = lambda: None,
    ) -> None:
        self.memory: LRUCache[bytes, RecordedAnswer] = LRUCache(
            memory_bytes, getsizeof=lambda answer: RECORD_BYTES + len(answer.opening) + answer.tokens.nbytes
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

        `answer` has the blocks that the client is sent, without those that it has prefilled. Returns before the record
        is on disk.
        """
        key = keys(scope, [*messages, InputMessage("assistant", tuple(answer))])[-1]
        self._keep(key, sampled)
        if self.disk:
            self._queue(self.disk, key, pack(sampled))

    def recall(self, scope: bytes, messages: Sequence[InputMessage]) -> list[RecordedAnswer | None]:
        """The record of each answer in a conversation, None where there is no record."""
        wanted = keys(scope, messages)
        with self.lock:
            recalled = [self.memory.get(key) for key in wanted]
        missing = [i for i, sampled in enumerate(recalled) if sampled is None]
        records = self.disk.get_many([wanted[i] for i in missing]) if self.disk else ()
        for i, record in zip(missing, records, strict=False):
            sampled = unpack(bytes(record)) if record is not None else None
            if sampled is not None:
                recalled[i] = sampled
                self._keep(wanted[i], sampled)
        return recalled

    @property
    def remembered_bytes(self) -> int:
        """Bytes that the records in memory take, about."""
        return int(self.memory.currsize)

    def flush(self) -> None:
        """Wait until all records are written through to the disk."""
        if self.disk:
            self.writer.submit(self.disk.sync).result()

    def close(self, seconds: float = 30.0) -> None:
        """Write the waiting records and close; those that are not written within `seconds` are lost, with one warning.

        Later calls of `put` keep records in memory alone.
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
        with self.lock, suppress(ValueError):  # a record that is larger than the whole memory
            self.memory[key] = sampled

    def _write(self, disk: DiskTier, key: bytes, record: bytes) -> None:
        try:
            (old,) = disk.get_many([key])
            if old is not None and old != record:
                disk.delete([key])  # the tier would keep the old record, since a page never changes
            disk.put_many([(key, record)])
            if time.monotonic() - self.synced > SYNC_SECONDS:
                self.synced = time.monotonic()
                disk.sync()
        except Exception:
            log.exception("a sampled turn is not written to the disk")


def keys(scope: bytes, messages: Sequence[InputMessage]) -> list[bytes]:
    """The keys of a conversation's answers, 32 bytes each: a hash of the answer and of everything before it.

    `scope` separates those who may not share records: API key, salt, model. Signatures, redacted thinking, whitespace
    around texts, the borders between neighbouring texts, key order and the spelling of numbers make no difference, nor
    do texts that the next user message clears: an answer is found after it as well.
    """
    chain, result = hashlib.sha256(scope).digest(), list[bytes]()
    for message in joined(lasting(messages)):
        if message.role == "assistant":
            try:
                chain = link(chain, canonical(blocks(message)))
            except RecursionError:
                chain = secrets.token_bytes(32)  # JSON that nests too deeply to be compared matches nothing
            result.append(chain)
        else:
            # By turns, as the template gets them: their division into messages makes no difference either.
            for turn in turns(message):
                chain = link(chain, [turn["role"], turn["content"].strip()])
    return result


def link(chain: bytes, turn: list[Any]) -> bytes:
    """The hash of the chain with one more turn, 32 bytes."""
    try:
        text = msgspec.json.encode(turn, order="deterministic")
    except UnicodeEncodeError:  # half a surrogate pair, which a model can write and no client can send
        text = json.dumps(turn, sort_keys=True).encode()
    return hashlib.sha256(chain + text).digest()


def canonical(answer: Iterable[Block]) -> list[list[Any]]:
    """An answer as JSON values that are the same for all forms in which clients send it back."""
    parts: list[list[Any]] = []
    for block in answer:
        if isinstance(block, TextBlock) and parts and parts[-1][0] == "text":
            parts[-1][1] += block.text
        elif isinstance(block, TextBlock):
            parts.append(["text", block.text])
        elif isinstance(block, ThinkingBlock):
            parts.append(["thinking", block.thinking])
        elif isinstance(block, ToolUseBlock):
            parts.append(["tool_use", block.id, block.name, with_doubles(block.input)])
    trimmed = ([kind, text.strip(), *rest] for kind, text, *rest in parts)
    return [part for part in trimmed if part[1:] != [""]]


def with_doubles(value: Any) -> Any:
    """JSON with its numbers as doubles, as JavaScript reads them: 1, 1.0 and 1e0 are one number."""
    if isinstance(value, dict):
        return {key: with_doubles(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_doubles(item) for item in value]
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
    """The answer in a record; None for bytes that are not a record."""
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
