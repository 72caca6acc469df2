"""What the requests that pass a proxy share with those before them, found out in a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from serve.api.messages import CountTokensRequest, InvalidRequest, decode_count_tokens
from serve.api.openai import read_chat, read_responses
from serve.diagnosis.compare import Render, characters
from serve.diagnosis.divergence import Divergences, RememberedRequest, nearest
from serve.diagnosis.sections import CHARACTERS, Vocabulary
from serve.diagnosis.volatility import Volatility
from serve.web.request_status import RequestStatuses

log = logging.getLogger("tokenzero.proxy")

# Bodies of requests that wait for their report; a further one gets none.
TRACED_BYTES = 64 * 2**20
TRACED = 32
# The routes whose prompts are computed, and what reads them.
READERS: dict[str, Callable[[bytes | bytearray], CountTokensRequest]] = {
    "/v1/messages": decode_count_tokens,
    "/v1/chat/completions": lambda body: read_chat(body)[0],
    "/v1/responses": lambda body: read_responses(body)[0],
}


@dataclass(frozen=True)
class Chat:
    """A chat request as the rules left it."""

    id: str  # of the report on it
    path: str
    agent: str  # the client's name
    body: bytes | bytearray
    applied: tuple[str, ...]  # the rules that changed it, with their places
    received: float  # when its last byte came, as `time.perf_counter` tells it
    held_s: float  # how long the rules kept it


class Reports:
    """What requests share with those before them, found out one by one in a thread.

    Positions are tokens of the prompts that `render` makes, in `vocabulary`; without them, characters.
    """

    def __init__(
        self,
        render: Render = characters,
        vocabulary: Vocabulary = CHARACTERS,
        unit: str = "characters",
        show_prompt_text: bool = True,
    ) -> None:
        self.render = render
        self.divergences = Divergences(vocabulary, page_size=0, show_prompt_text=show_prompt_text, unit=unit)
        self.volatility = Volatility(show_prompt_text)
        self.outcomes = RequestStatuses()
        self.thread = ThreadPoolExecutor(1, "reports")
        self.waiting: dict[str, int] = {}  # bytes of the bodies that wait, by request
        self.lock = Lock()

    def submit(self, chat: Chat) -> None:
        """Report on a request later, unless too many wait for that."""
        with self.lock:
            room = TRACED_BYTES - sum(self.waiting.values()) - len(chat.body)
            if chat.path not in READERS or len(self.waiting) >= TRACED or room < 0:
                return
            self.waiting[chat.id] = len(chat.body)
        self.thread.submit(self.report, chat)

    def report(self, chat: Chat) -> None:
        """Compare a request with the latest ones, and remember it."""
        try:
            request = READERS[chat.path](chat.body)
            made = self.render(request, False)
            new = RememberedRequest(chat.id, request, made, made.tokens, request.model)
            # What the engine's cache holds is not known here: at best, what the nearest prompt shares.
            _, shared = nearest(new.tokens, [old for old in self.divergences.kept.values() if old.model == new.model])
            self.divergences.started(new, {"expected": min(shared, len(new.tokens) - 1)}, chat.applied)
            self.volatility.observe(chat.agent, request)
        except InvalidRequest as error:  # images, say: the engine may know what this package's server does not
            log.debug("no report on %s: %s", chat.id, error)
        except Exception:  # a report is not worth a request
            log.exception("no report on %s", chat.id)
        finally:
            with self.lock:
                self.waiting.pop(chat.id, None)
