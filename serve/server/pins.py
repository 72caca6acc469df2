"""Prefixes that an operator keeps on the device: the tools and the system text of a request, until they are dropped.

Pins of `POST /v1/cache/pin` are kept as requests beside the store, if there is one; those of `--pin` are in files. A
start computes or restores all of them before it serves. They are pinned within `--retain-bytes`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from threading import Lock

import msgspec
import numpy as np
from starlette.concurrency import run_in_threadpool

from cache.private import FILE_MODE, make_folder
from cache.retention import Ask, Kept
from serve.api.messages import CountTokensRequest, InvalidRequest
from serve.api.pins import Pin, PinList, PinRequest
from serve.diagnosis.captures import read_capture
from serve.engine.engine import Engine
from serve.engine.inbox import Overloaded
from serve.engine.request import Failed, GenerationRequest, Started
from serve.prompt.heads import head_tokens
from serve.rules.normalize import normalize
from serve.server.config import EVERYTHING, HEADS, ServerConfig
from serve.server.context import ServerContext
from serve.server.limits import refuse_too_many
from serve.web.keys import Keys, private_salt

log = logging.getLogger("tokenzero.pins")

FOLDER = "pins"  # below the store directory: a body for each, by its name
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_PINS = 64
GIVEN_UP = "it was given up, as a request needed the whole pool, or a fault has emptied it: pin it again"
SHARED = ""  # the key of a pin that is every key's


@dataclass(frozen=True)
class Wanted:
    """A prefix to pin."""

    name: str
    key: str
    body: bytes  # with its request
    file: Path | None = None  # that has it already


@dataclass(frozen=True, eq=False)
class Head:
    """What is pinned, as the engine takes it."""

    tokens: np.ndarray  # [tokens] int32
    salt: bytes
    shared: int  # tokens that all keys share, whole pages


@dataclass(eq=False)
class Pins:
    """The pins of a server; any thread may use it."""

    context: ServerContext
    keys: Keys | None
    folder: Path | None = None  # for those that routes have set
    known: dict[str, Pin] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    async def pin(self, wanted: Wanted) -> Pin:
        """Pin a prefix, and keep it beside the store. Raises InvalidRequest for a body without a request."""
        if not isinstance(self.context.engine, Engine):
            return self.refused(wanted, "several replicas pin nothing: which of them a request goes to is not known")
        head = await run_in_threadpool(self.head, wanted)
        if isinstance(head, str):
            return self.refused(wanted, head)
        if wanted.name not in self.known and len(self.known) >= MOST_PINS:
            return self.refused(wanted, f"{MOST_PINS} prefixes are pinned already: drop one first")
        ask = Ask(head.shared or len(head.tokens), inf, wanted.name)
        request = GenerationRequest(head.tokens, 0, salt=head.salt, head=head.shared, asks=(ask,))
        kept = await self.computed(request)
        if not kept.tokens:
            return self.refused(wanted, kept.why)
        lasting = wanted.file is not None or await run_in_threadpool(self.write, wanted)
        found = Pin(wanted.name, True, kept.tokens, wanted.key, "device", lasting, kept.why or None)
        with self.lock:
            self.known[wanted.name] = found
        log.info("pinned %s: %d tokens", wanted.name, kept.tokens)
        return found

    async def computed(self, request: GenerationRequest) -> Kept:
        """What the engine has kept of a request, once it is computed."""
        kept = Kept(0, 0.0, "the engine pins nothing")
        try:
            async for event in self.context.engine.generate(request):
                if isinstance(event, Started) and event.kept:
                    (kept,) = event.kept
                elif isinstance(event, Failed):
                    return Kept(0, 0.0, event.message)
        except (Overloaded, ValueError) as error:
            return Kept(0, 0.0, str(error))
        return kept

    def head(self, wanted: Wanted) -> Head | str:
        """The tokens to pin, and who finds them; or why there are none. Raises InvalidRequest."""
        context = self.context
        asked = request_in(wanted.body)
        refuse_too_many(asked, context.config)
        request = normalize(asked, context.rules).request
        tokens = head_tokens(request, context.tokenizer, "tools-first" in context.rules)
        if len(tokens) <= self.page_size:
            return f"expected tools and system text of more than a page of {self.page_size} tokens, found {len(tokens)}"
        if self.keys is None or self.keys.path is None or context.config.share_prefix == EVERYTHING:
            return Head(tokens, b"", 0)
        if wanted.key:
            if wanted.key not in {key.name for key in self.keys.keys}:
                return f"key: expected a name in --api-key-file, found {wanted.key!r:.80}"
            return Head(tokens, private_salt(wanted.key, b""), 0)
        if context.config.share_prefix != HEADS or context.heads is None:
            return "key: expected the name of a key, as no key reads what another has without --share-prefix"
        context.heads.name(asked, context.tokenizer, context.rules)
        return Head(tokens, b"", (len(tokens) - 1) // self.page_size * self.page_size)

    def drop(self, name: str) -> Pin | None:
        """End a pin; None if there is none of this name."""
        with self.lock:
            found = self.known.pop(name, None)
        if found is None:
            return None
        if isinstance(self.context.engine, Engine):
            self.context.engine.drop_pin(name)
        if self.folder:
            (self.folder / f"{name}.json").unlink(missing_ok=True)
        return msgspec.structs.replace(found, pinned=False, tier=None, tokens=0, over_restarts=False)

    def listed(self) -> PinList:
        """All pins as they are now, by name."""
        with self.lock:
            known = sorted(self.known.values(), key=lambda pin: pin.name)
        return PinList(tuple(map(self.now, known)))

    def now(self, pin: Pin) -> Pin:
        """A pin as the engine has it: it gives up what it has no room for."""
        if isinstance(self.context.engine, Engine) and self.context.engine.pinned(pin.name):
            return pin
        return msgspec.structs.replace(pin, pinned=False, tokens=0, tier=None, instead=GIVEN_UP)

    async def restore(self) -> None:
        """Pin again what an earlier server has pinned, and what `--pin` names. What fails is logged."""
        for wanted in self.stored():
            try:
                found = await self.pin(wanted)
            except Exception as error:
                log.warning("%s is not pinned: %s: %s", wanted.file, type(error).__name__, error)
                continue
            if not found.pinned:
                log.warning("%s is not pinned: %s", wanted.file, found.instead)

    def stored(self) -> Iterator[Wanted]:
        """The pins in files."""
        for file in (*files_in(self.context.config.pin), *files_in(self.folder)):
            try:
                body = file.read_bytes()
            except OSError as error:
                log.warning("%s is not pinned: %s", file, error)
                continue
            fields = fields_of(body)
            yield Wanted(name_of(fields.name or file.stem, body), fields.key or SHARED, body, file)

    def write(self, wanted: Wanted) -> bool:
        """Keep a pin for the next start; False where there is no place for it."""
        if self.folder is None:
            return False
        try:
            make_folder(self.folder)
            body = msgspec.json.decode(wanted.body) | {"name": wanted.name}
            path = self.folder / f"{wanted.name}.json"
            path.touch(FILE_MODE)
            path.write_bytes(msgspec.json.encode(body))
        except OSError as error:
            log.warning("%s is pinned only until the server ends: %s", wanted.name, error)
            return False
        return True

    def refused(self, wanted: Wanted, why: str) -> Pin:
        """What is answered where nothing is pinned."""
        return Pin(wanted.name, False, 0, wanted.key, None, False, why)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.context.engine.settings.page_size


def wanted_of(body: bytes | bytearray) -> Wanted:
    """The prefix that a body asks to be pinned."""
    fields = fields_of(body)
    return Wanted(name_of(fields.name or "", bytes(body)), fields.key or SHARED, bytes(body))


def name_of(name: str, body: bytes) -> str:
    """The name of a pin: the given one if it can be part of a path, or else one made from its body."""
    return name if NAME.fullmatch(name) else f"pin-{hashlib.sha256(body).hexdigest()[:12]}"


def fields_of(body: bytes | bytearray) -> PinRequest:
    """The name and the key in a body; none where they are no texts."""
    try:
        return msgspec.json.decode(body, type=PinRequest)
    except (msgspec.DecodeError, RecursionError):
        return PinRequest()


def request_in(body: bytes) -> CountTokensRequest:
    """The request whose head a body pins; one without messages gets a question. Raises InvalidRequest."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"body: {error}") from None
    if isinstance(value, dict) and "messages" not in value and not {"input", "body", "request"} & value.keys():
        question = {"messages": [{"role": "user", "content": "?"}], "model": value.get("model") or "any"}
        body = msgspec.json.encode(value | question)
    try:
        return read_capture(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"body: {error}") from None


def files_in(path: Path | None) -> Sequence[Path]:
    """A file, or the files of a folder; none where there is nothing."""
    try:
        return sorted(path.iterdir()) if path and path.is_dir() else (path,) if path and path.exists() else ()
    except OSError as error:
        log.warning("%s: nothing is pinned: %s", path, error)
        return ()


def pins_folder(config: ServerConfig) -> Path | None:
    """The folder for pins that routes have set, if there is a directory for a store."""
    return config.state_dir and config.state_dir / FOLDER
