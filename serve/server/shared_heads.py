"""The heads that keys share (`--share-prefix tools-system`): those that enough keys have sent, or the operator named.

What one key sends is counted within a limit of its own, so that no other key's requests decide what is forgotten of it.
Counts last until the server ends. Heads that are shared are kept in a file beside the store, if there is one, so that a
restarted server finds their pages there.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from threading import Lock, Thread
from typing import TypeVar

import msgspec
import numpy as np

from cache.keys import HEAD_SALT, root_key, tail_key
from cache.private import FILE_MODE, make_folder
from serve.api.messages import CountTokensRequest, InvalidRequest
from serve.diagnosis.captures import read_file
from serve.limits.recent import Recent
from serve.prompt.heads import head_tokens
from serve.prompt.tokenizer import Tokenizer
from serve.rules.normalize import normalize

log = logging.getLogger("tokenzero.keys")
K = TypeVar("K")
V = TypeVar("V")

FILE = "shared_heads"  # below the store directory: a name in hexadecimal on each line
MOST_COUNTED = 256  # heads of each key that are remembered until enough keys have sent them
MOST_KEYS = 256  # of which any are remembered, those that have sent one last
MOST_SHARED = 1024
HEAD_BYTES = 200  # of memory that each takes, about
KNOWN_BYTES = 2**20  # for the lengths and names of heads by the requests that had them

Head = tuple[int, bytes]  # its tokens, whole pages, and its name


class SharedHeads:
    """Decides which tokens of a prompt all keys share. Any thread may use it.

    A head is shared from the request on with which `after` different keys have sent it.
    """

    def __init__(self, fingerprint: bytes, page_size: int, after: int, file: Path | None = None) -> None:
        self.root = root_key(fingerprint, page_size, HEAD_SALT)
        self.page_size, self.after, self.file = page_size, after, file
        self.named: set[bytes] = set()  # by the operator: these stay
        self.shared: OrderedDict[bytes, None] = OrderedDict.fromkeys(read_names(file) if file else ())
        # The heads that each key has sent, the latest last, and so the keys.
        self.counted: OrderedDict[str, OrderedDict[bytes, None]] = OrderedDict()
        self.known: Recent[bytes, Head] = Recent(KNOWN_BYTES, lambda head: HEAD_BYTES, scoped=True)
        self.lock = Lock()
        self.writing: Thread | None = None  # the latest name to the file

    @property
    def remembered_bytes(self) -> int:
        """The memory in use, approximately."""
        heads = len(self.shared) + len(self.named) + sum(map(len, list(self.counted.values())))
        return HEAD_BYTES * heads + self.known.bytes

    @property
    def most_bytes(self) -> int:
        """The limit of that."""
        return HEAD_BYTES * (MOST_SHARED + len(self.named) + MOST_COUNTED * MOST_KEYS) + KNOWN_BYTES

    def name(self, request: CountTokensRequest, tokenizer: Tokenizer, rules: Collection[str]) -> None:
        """Share the head of a request, as the operator wants it. Raises ValueError for one of less than a page."""
        normalized = normalize(request, rules).request
        length, name = self.head(normalized, tokenizer, "tools-first" in rules)
        if not length:
            raise ValueError(f"tools and system text: expected a page of {self.page_size} tokens or more, found less")
        self.named.add(name)

    def length(
        self,
        request: CountTokensRequest,
        tokens: np.ndarray,
        tokenizer: Tokenizer,
        tools_first: bool,
        key: str,
        sent: bool = True,
    ) -> int:
        """How many of a prompt's first tokens ([tokens] int32) all keys share.

        That this key has sent its head is counted if it is `sent`, not if it only asks.

        `request` is the prompt's, after the rules.
        """
        length, name = self.head(request, tokenizer, tools_first)
        # The template may write another head before this conversation than before a question alone.
        if not length or length >= len(tokens) or self.name_of(tokens[:length]) != name:
            return 0
        shared = self.is_shared(name, key) if sent else name in self.named or name in self.shared
        return length if shared else 0

    def head(self, request: CountTokensRequest, tokenizer: Tokenizer, tools_first: bool) -> Head:
        """The length and the name of a request's head, of which only whole pages count."""
        parts = msgspec.json.encode([request.system, request.tools, request.thinking, tools_first])
        digest = hashlib.blake2b(parts, digest_size=32).digest()
        if (found := self.known.get(digest)) is None:
            try:
                tokens = head_tokens(request, tokenizer, tools_first)
            except InvalidRequest:  # the template may want more than a question, which the conversation has
                return 0, b""
            length = len(tokens) // self.page_size * self.page_size
            found = length, self.name_of(tokens[:length])
            if not tokenizer.template.reads_clock:
                self.known.put(digest, found)
        return found

    def name_of(self, tokens: np.ndarray) -> bytes:
        """A hash of the model and of a head's tokens ([tokens] int32), 32 bytes."""
        return tail_key(self.root, tokens)

    def is_shared(self, name: bytes, key: str) -> bool:
        """Whether a head is shared, now that this key has sent it, too."""
        with self.lock:
            if name in self.named:
                return True
            if name in self.shared:
                self.shared.move_to_end(name)
                return True
            sent = self.counted.setdefault(key, OrderedDict())
            use_latest(self.counted, key, MOST_KEYS)
            sent[name] = None
            use_latest(sent, name, MOST_COUNTED)
            if sum(name in heads for heads in self.counted.values()) < self.after:
                return False
            for heads in self.counted.values():
                heads.pop(name, None)
            self.shared[name] = None
            use_latest(self.shared, name, MOST_SHARED)
        if self.file:  # in a thread, as no request waits for a disk
            self.writing = Thread(target=append_name, args=(self.file, name), name="shared-heads", daemon=True)
            self.writing.start()
        log.info("a head is shared from now on: %d keys have sent it", self.after)
        return True


def use_latest(entries: OrderedDict[K, V], key: K, most: int) -> None:
    """Make an entry the latest, and drop the oldest beyond so many."""
    entries.move_to_end(key)
    if len(entries) > most:
        entries.popitem(last=False)


def open_heads(shared: SharedHeads, path: Path | None, tokenizer: Tokenizer, rules: Collection[str]) -> SharedHeads:
    """The same, with the heads of the requests in a file or in a folder named by the operator.

    Raises OSError, and ValueError that names the file.
    """
    files = [] if path is None else sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        try:
            shared.name(read_file(file), tokenizer, rules)
        except ValueError as error:
            raise ValueError(f"--share-heads: {file}: {str(error).removeprefix(f'{file}: ')}") from error
    return shared


def read_names(file: Path) -> list[bytes]:
    """The latest names in a file; none where it cannot be read."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").split()
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("%s: the heads that were shared are forgotten: %s", file, error)
        return []
    return [bytes.fromhex(line) for line in lines if is_name(line)][-MOST_SHARED:]


def is_name(line: str) -> bool:
    """Whether this is a name in hexadecimal."""
    return len(line) == 64 and not set(line) - set("0123456789abcdef")


def append_name(file: Path, name: bytes) -> None:
    """Add a name to a file, in one write, as several servers may share it. What fails is logged."""
    try:
        make_folder(file.parent)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE), "wb", buffering=0) as opened:
            opened.write(name.hex().encode() + b"\n")
    except OSError as error:
        log.warning("%s: a head is shared only until the server ends: %s", file, error)
