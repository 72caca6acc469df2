"""Reports on what each request through the proxy shares with earlier ones, made in a thread of their own."""

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

# Limits on the requests that wait for their report; a request beyond them gets none.
MAX_WAITING_BYTES = 64 * 2**20
MAX_WAITING = 32
# The routes whose prompts are compared, and the reader of each.
READERS: dict[str, Callable[[bytes | bytearray], CountTokensRequest]] = {
    "/v1/messages": decode_count_tokens,
    "/v1/chat/completions": lambda body: read_chat(body)[0],
    "/v1/responses": lambda body: read_responses(body)[0],
}


@dataclass(frozen=True)
class Chat:
    """A chat request after the rules."""

    id: str  # of the report on it
    path: str
    agent: str  # the client's name
    body: bytes | bytearray
    applied: tuple[str, ...]  # the rules that changed it, with their places
    received: float  # when its last byte arrived, by `time.perf_counter`
    held_s: float  # how long the rules took


class Reports:
    """Reports on what requests share with earlier ones, made one after another in a thread.

    Positions are in tokens of the prompts that `render` returns, in `vocabulary`; by default, in characters.
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
        self.statuses = RequestStatuses()
        self.thread = ThreadPoolExecutor(1, "reports")
        self.waiting: dict[str, int] = {}  # bytes of the waiting bodies, by request
        self.lock = Lock()

    def submit(self, chat: Chat) -> None:
        """Report on a request later, unless too many wait already."""
        with self.lock:
            room = MAX_WAITING_BYTES - sum(self.waiting.values()) - len(chat.body)
            if chat.path not in READERS or len(self.waiting) >= MAX_WAITING or room < 0:
                return
            self.waiting[chat.id] = len(chat.body)
        self.thread.submit(self.report, chat)

    def report(self, chat: Chat) -> None:
        """Compare a request with the latest ones, and remember it."""
        try:
            request = READERS[chat.path](chat.body)
            rendered = self.render(request, False)
            new = RememberedRequest(chat.id, request, rendered, rendered.tokens, request.model)
            # The proxy does not know what the engine's cache holds: at best, what the nearest prompt shares.
            _, shared = nearest(
                new.tokens, [old for old in self.divergences.remembered.values() if old.model == new.model]
            )
            self.divergences.started(new, {"expected": min(shared, len(new.tokens) - 1)}, chat.applied)
            self.volatility.observe(chat.agent, request)
        except InvalidRequest as error:  # images, for example: the engine may support what this package does not
            log.debug("no report on %s: %s", chat.id, error)
        except Exception:  # a failed report must not fail a request
            log.exception("%s: the report on its prompt failed", chat.id)
        finally:
            with self.lock:
                self.waiting.pop(chat.id, None)
