"""The keys of a server: who may call it, as which name, how much at a time, and whose requests a caller may see.

A key file has a line for each key, and is read again on SIGHUP:

    # name  hash of the key, by `printf %s KEY | sha256sum`       limits, each optional
    alice   sha256:2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90  requests=8 tokens=200000 rate=60
    ops     sha256:81b637d8fcd2c6da6359e6963113a1170de795e4b725b84d1e0b4cfd9ec58ce9  admin
    nightly sha256:4d7fa1b1a1d1f3b3f1ab6c1c9a90a7a2b4cf5c4ae0a9e9b4b5d1a06d2e1f9d10  priority=background

Only hashes are kept. A key is taken from random bytes, not from a head, since its hash is not salted.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from starlette.types import Scope

from serve.api.messages import InvalidRequest
from serve.limits.recent import Recent

log = logging.getLogger("tokenzero.keys")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
HASH = re.compile(r"sha256:[0-9a-fA-F]{64}")
ADMIN = "admin"
PRIORITY = "priority"
PRIORITIES = {"interactive": False, "background": True}
LIMITS = ("requests", "tokens", "rate")
MOST_LIMIT = 10**12
TOTALS = ("requests", "refused_requests", "prompt_tokens", "reused_tokens", "generated_tokens")
THREADS = 4  # in which requests of a key are read and tokenised at a time
RETRY_SECONDS = 1  # for a request beyond a limit of what is in flight
FREE_WRONG_KEYS = 10  # of an address, before the answers to it are slowed
FIRST_DELAY, MOST_DELAY = 0.1, 4.0  # seconds
FORGET_SECONDS = 60.0  # without a wrong key, after which an address starts anew
ADDRESS_BYTES = 2**20  # of memory for them


@dataclass(frozen=True)
class Key:
    """A key by its hash, and what it may do."""

    name: str  # "": it is the only one, and scopes nothing
    digest: bytes  # SHA-256, 32 bytes
    admin: bool = False  # sees all requests and metrics
    requests: int | None = None  # in flight at a time
    tokens: int | None = None  # of prompts and of the answers asked for, in flight at a time
    rate: int | None = None  # requests a minute
    background: bool = False  # the requests of others come first


class LimitReached(Exception):
    """A key has as much in flight as it may, or has sent as much; `retry_s` is when to try again."""

    def __init__(self, text: str, retry_s: int = RETRY_SECONDS) -> None:
        super().__init__(text)
        self.retry_s = retry_s


@dataclass
class Usage:
    """What a key has in flight, and its TOTALS. Only the event loop's thread writes it."""

    requests: int = 0
    tokens: int = 0
    next_at: float = 0.0  # seconds, `time.monotonic`: when the rate would be used up evenly, see `Admission`
    threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(THREADS))
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))


class Keys:
    """The keys in force and the use of each. Only the event loop's thread calls it."""

    def __init__(self, keys: Sequence[Key], path: Path | None = None) -> None:
        self.path, self.keys = path, tuple(keys)
        self.usages: dict[str, Usage] = {key.name: Usage() for key in keys}
        self.wrong = WrongKeys()

    def find(self, headers: Mapping[bytes, bytes]) -> Key | None:
        """The key that a request has in x-api-key or as Bearer; None if it has none or a wrong one.

        Every hash is compared, each in constant time, so that the time says nothing of which are right.
        """
        digests = [hashlib.sha256(secret).digest() for secret in secrets_in(headers)]
        found: Key | None = None
        for key in self.keys:
            for digest in digests:
                found = key if hmac.compare_digest(digest, key.digest) else found
        return found

    def admit(self, key: Key, now: float | None = None) -> Admission:
        """Count one more request of a key. Raises LimitReached."""
        return Admission(key, self.usages.setdefault(key.name, Usage()), time.monotonic() if now is None else now)

    def reload(self) -> None:
        """Read the file again; if it is wrong, the keys before stay in force."""
        if self.path is None:
            return
        try:
            self.keys = read_keys(self.path)
        except (OSError, ValueError) as error:
            log.error("%s: the keys before stay in force", error)
            return
        # Uses of requests in flight stay with the name; a name that is gone takes no more memory once they have ended.
        names = {key.name for key in self.keys}
        self.usages = {name: usage for name, usage in self.usages.items() if name in names or usage.requests}
        self.usages |= {name: Usage() for name in names if name not in self.usages}
        log.info("%s: %d keys", self.path, len(self.keys))


class Admission:
    """One request of a key, from its admission to its end; `tokens` are those that it has in flight.

    The rate is a leaky bucket that holds a minute's requests: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm.
    """

    def __init__(self, key: Key, usage: Usage, now: float) -> None:
        self.key, self.usage, self.tokens = key, usage, 0
        spacing = 60.0 / key.rate if key.rate else 0.0
        late = max(usage.next_at, now) + spacing - now
        if key.rate and late > 60.0 + 1e-6:
            usage.totals["refused_requests"] += 1
            raise LimitReached(f"rate limit: {key.name!r} may send {key.rate} requests a minute", int(late - 60) + 1)
        if key.requests is not None and usage.requests >= key.requests:
            usage.totals["refused_requests"] += 1
            raise LimitReached(f"{key.name!r} has {usage.requests} requests in flight, and may have {key.requests}")
        usage.next_at = now + late if key.rate else 0.0
        usage.requests += 1
        usage.totals["requests"] += 1

    def take(self, tokens: int) -> None:
        """Count the tokens of the request's prompt and answer.

        Raises LimitReached, and InvalidRequest for more than the key may ever have in flight.
        """
        usage, most = self.usage, self.key.tokens
        if most is not None and tokens > most:
            usage.totals["refused_requests"] += 1
            raise InvalidRequest(
                f"max_tokens: {self.key.name!r} may have {most} tokens in flight, prompt and max_tokens are {tokens}"
            )
        if most is not None and usage.tokens + tokens > most:
            usage.totals["refused_requests"] += 1
            raise LimitReached(
                f"{self.key.name!r} has {usage.tokens} tokens in flight and may have {most}: a request of {tokens}, "
                "with its max_tokens, does not fit"
            )
        usage.tokens += tokens
        self.tokens += tokens

    def count(self, prompt: int, reused: int, generated: int) -> None:
        """Count the tokens of an answer."""
        for name, tokens in (("prompt_tokens", prompt), ("reused_tokens", reused), ("generated_tokens", generated)):
            self.usage.totals[name] += tokens

    def end(self) -> None:
        """Give back what it has in flight."""
        self.usage.requests -= 1
        self.usage.tokens -= self.tokens


class WrongKeys:
    """How many wrong keys each address has sent lately. Answers to those who guess are slowed, nobody else's."""

    def __init__(self) -> None:
        self.counts: Recent[str, tuple[int, float]] = Recent(ADDRESS_BYTES, lambda _: 0)

    def delay(self, address: str, now: float) -> float:
        """Count a wrong key of an address, and return for how many seconds its answer waits."""
        count, at = self.counts.get(address) or (0, now)
        count = 1 if now - at > FORGET_SECONDS else count + 1
        self.counts.put(address, (count, now))
        if count & (count - 1) == 0:  # a line for each power of two, so that guessing does not fill the log
            log.warning("wrong API key from %s, %d so far", address, count)
        over = count - FREE_WRONG_KEYS
        return min(MOST_DELAY, FIRST_DELAY * 2.0 ** min(over - 1, 10)) if over > 0 else 0.0


def secrets_in(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """The keys that a request has: in x-api-key, and as Bearer."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    bearer = token.strip() if scheme.lower() == b"bearer" else b""
    return [secret for secret in (headers.get(b"x-api-key", b""), bearer) if secret]


def open_keys(api_key: str | None, path: Path | None) -> Keys | None:
    """The keys of `--api-key-file`, or the one of `--api-key`; None without either. Raises what `read_keys` does."""
    if path is not None:
        return Keys(read_keys(path), path)
    return only_key(api_key) if api_key else None


def keys_problem(api_key: str | None, path: Path | None) -> str | None:
    """What is wrong with the flags that name the keys, as a sentence; None if they are sound."""
    if path is None:
        return None
    if api_key:
        return "--api-key-file: found an --api-key as well, or $TOKENZERO_API_KEY: give one of the two"
    try:
        read_keys(path)
    except (OSError, ValueError) as error:
        return f"--api-key-file: {error}"
    return None


def viewer_of(scope: Scope) -> str | None:
    """The name of the key whose requests the caller may see; None for those of all keys."""
    key: Key | None = scope.get("key")
    return None if key is None or key.admin else key.name


def only_key(secret: str) -> Keys:
    """The keys of a server that has a single one, without a name."""
    return Keys([Key("", hashlib.sha256(secret.encode()).digest(), admin=True)])


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file. Raises OSError, and ValueError that names the line which is wrong."""
    keys: dict[str, Key] = {}
    lines: dict[bytes, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key = parse_key(words)
            if key.name in keys:
                raise ValueError(f"the name {key.name} is given twice: name each key once")
            if other := lines.get(key.digest):
                raise ValueError(f"the hash is that of line {other}: give each name a key of its own")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        keys[key.name], lines[key.digest] = key, number
    if not keys:
        raise ValueError(f"{path}: found no key, expected a line `NAME sha256:HASH` for each")
    return tuple(keys.values())


def parse_key(words: Sequence[str]) -> Key:
    """The key that the words of a line describe. Raises ValueError."""
    name, *rest = words
    if not NAME.fullmatch(name):
        raise ValueError(f"name: expected up to 64 letters, digits, dots, @, _ or -, found {name!r:.80}")
    if not rest or not HASH.fullmatch(rest[0]):
        # What is there may be the key itself, which belongs into no log.
        found = "nothing" if not rest else f"{len(rest[0])} other characters"
        raise ValueError(f"key of {name}: expected sha256: and 64 hexadecimal digits, found {found}")
    options: dict[str, Any] = {}
    given = set[str]()
    for word in rest[1:]:
        option, equals, value = word.partition("=")
        if word == ADMIN:
            options[ADMIN] = True
            continue
        if option not in (*LIMITS, PRIORITY) or not equals:
            expected = ", ".join(f"{limit}=NUMBER" for limit in LIMITS)
            raise ValueError(f"limits of {name}: expected {expected}, {PRIORITY}=NAME or {ADMIN}, found {word!r:.80}")
        if option in given:
            raise ValueError(f"limits of {name}: {option} is given twice")
        given.add(option)
        if option == PRIORITY:
            if value not in PRIORITIES:
                raise ValueError(f"{PRIORITY} of {name}: expected {' or '.join(PRIORITIES)}, found {value!r:.80}")
            options["background"] = PRIORITIES[value]
            continue
        if not re.fullmatch(r"[0-9]{1,13}", value) or not 1 <= int(value) <= MOST_LIMIT:
            raise ValueError(f"limits of {name}: {option}: expected 1 to {MOST_LIMIT}, found {value!r:.80}")
        options[option] = int(value)
    return Key(name, bytes.fromhex(rest[0].partition(":")[2]), **options)


def private_salt(name: str, salt: bytes) -> bytes:
    """The cache salt of a key's requests, of which `salt` is the client's own part.

    No header can have a zero byte (https://www.rfc-editor.org/rfc/rfc9110#section-5.5), so no client can name a salt of
    another key, nor can one of a server without keys that shares the store.
    """
    return b"\0key\0" + name.encode() + b"\0" + salt


@contextmanager
def reloading(keys: Keys | None) -> Iterator[None]:
    """Read the file of keys again at each SIGHUP, where this is the process's own event loop."""
    loop = asyncio.get_running_loop()
    if keys is None or keys.path is None:
        yield
        return
    try:
        loop.add_signal_handler(signal.SIGHUP, keys.reload)
    except (RuntimeError, ValueError):  # not on the main thread, or no such signals here
        yield
        return
    yield
    loop.remove_signal_handler(signal.SIGHUP)
