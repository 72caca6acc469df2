"""What the engine keeps on the device because a client or an operator has asked for it, over restarts as well.

`Retainer` belongs to the engine's thread, except for `drop_pin`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from cache.prefix_cache import PrefixCache
from cache.retained_file import RetainedFile, read
from cache.retention import Client, Kept, Published, Resumed, Retentions
from cache.worker import Failures
from serve.engine.page_names import PageNames
from serve.engine.sequence import Sequence
from serve.engine.settings import EngineSettings


class Retainer:
    """The retentions of one engine, and the file that they are written to, if there is a folder for it."""

    def __init__(
        self,
        settings: EngineSettings,
        names: PageNames,
        cache: Callable[[], PrefixCache],  # the engine's, which keeps what is preloaded of `retentions.resumed`
        wake: Callable[[], None],
    ) -> None:
        folder, self.names, self.wake = settings.retained_folder, names, wake
        resumed: dict[bytes, Resumed] = {}
        self.file: RetainedFile | None = None
        if folder and settings.retain_pages:
            promised = read(folder, names.fingerprint, time.monotonic(), time.time())
            resumed = dict(islice(promised.items(), settings.retain_pages))  # several servers' may be more
            self.file = RetainedFile(folder, names.fingerprint)
        self.retentions = Retentions(cache, settings.retain_pages, resumed)
        self.dropping: deque[str] = deque()  # names of pins
        self.failures = Failures()

    def started(self, sequence: Sequence) -> tuple[Kept, ...]:
        """What a sequence gets of what it asks for, now that its prompt is computed and published."""
        nothing = tuple(Kept(0, 0.0, "the server failed to keep it") for _ in sequence.request.asks)
        return self.failures.guard("nothing is retained", lambda: self._keep(sequence), nothing)

    def _keep(self, sequence: Sequence) -> tuple[Kept, ...]:
        request, kept = sequence.request, self.retentions
        if not (request.asks or kept.by_owner.get(request.owner) or kept.resumed):
            return ()
        self.names.extend(sequence, min(sequence.computed, sequence.length) // sequence.page_size)
        published = Published(sequence.tokens[: sequence.length], sequence.keys, request.salt, request.head)
        return tuple(kept.keep(request.asks, published, Client(request.owner, request.share, request.background)))

    def step(self) -> None:
        """End what has had its time, drop what an operator no longer pins, and have changes written."""
        while self.dropping:
            self.retentions.drop_pin(self.dropping.popleft())
        self.retentions.expire()
        if self.file:
            self.file.note(self.retentions)

    def pages_by_state(self) -> dict[str, int]:
        """The pages of the pool: free, cached, retained by nobody but this, in use; on any thread, about."""
        stats, kept = self.retentions.cache().stats(), self.retentions.idle_pages
        in_use = max(0, stats.pages_in_use - kept)
        return {"free": stats.pages_free, "cached": stats.pages_cached, "retained": kept, "in_use": in_use}

    def drop_pin(self, name: str) -> None:
        """End a pin soon; on any thread."""
        self.dropping.append(name)
        self.wake()

    def close(self, seconds: float) -> None:
        """Write what there is to the file, and end all of it."""
        if self.file:
            self.file.note(self.retentions)
            self.file.close(seconds)
        self.retentions.end()
