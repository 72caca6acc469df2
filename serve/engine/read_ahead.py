"""Pages of an agent's latest prompt, on their way back while its next request is still being received.

A body of a long conversation takes a while on a slow connection. Its headers name the agent, whose next prompt begins
as its latest one does: what the device has lost of that is preloaded meanwhile, as far as the engine is idle. A name
that lies costs reads, and makes room as the request itself would; its pages are found by those who have their key only.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import replace

from serve.engine.core import EngineCore
from serve.engine.sequence import Sequence

log = logging.getLogger("tokenzero.preload")

AGENTS = 64  # whose latest prompts are remembered, 4 bytes a token
SHARE_OF_PAGES = 4  # room is made for one of so many pages of the pool at most


class ReadAhead:
    """The latest prompts of one engine's agents. The engine's thread calls it."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.latest: OrderedDict[str, Sequence] = OrderedDict()  # by agent

    def answered(self, sequence: Sequence) -> None:
        """Remember the prompt of a request that has its first token."""
        request = sequence.request
        if not request.agent or self.core.preloader is None:
            return
        tokens = sequence.tokens[: sequence.length].copy()
        asked = replace(request, tokens=tokens, max_tokens=0, constraint=None)
        keys = sequence.keys[: (len(tokens) - 1) // sequence.page_size]
        known = Sequence(0, asked, lambda event: None, tokens, len(tokens), sequence.page_size, time.perf_counter())
        known.keys = keys
        self.latest[request.agent] = known
        self.latest.move_to_end(request.agent)
        if len(self.latest) > AGENTS:
            self.latest.popitem(last=False)

    def expect(self, agent: str) -> None:
        """A request of an agent is on its way. It never raises."""
        try:
            if (known := self.latest.get(agent)) and self.core.quiet:
                self.read(known)
        except Exception:
            log.exception("nothing is read ahead")

    def read(self, known: Sequence) -> None:
        """Preload what the device has lost of a prompt, before all else that is to be preloaded."""
        memory, preloader, restorer = self.core.memory, self.core.preloader, self.core.restorer
        assert preloader is not None
        assert restorer is not None
        full = len(known.matchable_tokens) // known.page_size
        restorer.names.extend(known, full)
        first = memory.cached_tokens(known) // known.page_size
        keys = [key for key in known.keys[first:full] if key not in preloader.preloaded]
        cache = memory.prefix_cache
        wanted = min(len(keys), cache.pool.num_pages // SHARE_OF_PAGES) - cache.pool.free_pages
        if wanted > 0:
            cache.tree.evict(wanted)
        preloader.left = dict.fromkeys(keys) | preloader.left
