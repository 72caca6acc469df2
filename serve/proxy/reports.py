"""Reports on what each request through the proxy shares with earlier ones, made in a thread of their own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

from serve.api.messages import InvalidRequest
from serve.diagnosis.captures import Api, decode_json, read_prompt
from serve.diagnosis.causes import UNAVOIDABLE
from serve.diagnosis.compare import Render, characters
from serve.diagnosis.divergence import Divergences, RememberedRequest, nearest, report_line
from serve.diagnosis.sections import CHARACTERS, Vocabulary
from serve.diagnosis.volatility import Volatility
from serve.proxy.chat import Chat
from serve.web.request_status import RequestStatuses

log = logging.getLogger("tokenzero.proxy")

# Limits on the requests that wait for their report; a request beyond them gets none.
MAX_WAITING_BYTES = 64 * 2**20
MAX_WAITING = 32
REPORT_SECONDS = 0.25  # that the head of an answer waits for a report, which it names
# The routes whose prompts are compared, and the API of each.
APIS: dict[str, Api] = {"/v1/messages": "messages", "/v1/chat/completions": "chat", "/v1/responses": "responses"}


def salt_of(chat: Chat) -> bytes:
    """The cache salt of a request, by its header and its body's `cache_salt`; b"" if it has none.

    Raises InvalidRequest for a body that is not JSON.
    """
    try:
        value = decode_json(chat.body)
    except (ValueError, RecursionError) as error:  # such as a field that nobody reads and is no UTF-8
        raise InvalidRequest(f"body: expected JSON in UTF-8: {error}") from None
    named = value.get("cache_salt") if isinstance(value, dict) else None
    return json.dumps([named, chat.salt]).encode() if named is not None or chat.salt else b""


@dataclass
class LeftOut:
    """How many requests were left out of something, by reason; the first of each reason is logged."""

    counts: Counter[str] = field(default_factory=Counter)

    def note(self, reason: str, text: str) -> None:
        """Count a request."""
        self.counts[reason] += 1
        if self.counts[reason] == 1:
            log.warning("%s (logged once; all are counted in /v1/requests)", text)


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
        self.lock = Lock()
        self.waiting: dict[str, int] = {}  # bytes of the waiting bodies, by request
        self.reports: dict[str, Future[bool]] = {}  # of the requests whose answer has not begun
        self.without_rules, self.without_report = LeftOut(), LeftOut()
        self.refused: Counter[str] = Counter()  # requests and connections beyond a limit, by the limit

    def submit(self, chat: Chat) -> None:
        """Report on a request later, unless too many wait already."""
        if chat.path not in APIS or chat.id in self.reports:
            return
        with self.lock:
            room = MAX_WAITING_BYTES - sum(self.waiting.values()) - len(chat.body)
            accepted = len(self.waiting) < MAX_WAITING and room >= 0
            if accepted:
                self.waiting[chat.id] = len(chat.body)
        if accepted:
            self.reports[chat.id] = self.thread.submit(self.report, chat)
        else:
            self.without_report.note("busy", "no report: too many requests wait for theirs")

    def report(self, chat: Chat) -> bool:
        """Compare a request with the latest ones, and remember it; whether the report could be made."""
        try:
            request = read_prompt(chat.body, APIS[chat.path])
            rendered = self.render(request, False)
            salt, key = salt_of(chat), chat.key
            new = RememberedRequest(chat.id, request, rendered, rendered.tokens, request.model, salt, key)
            # The proxy does not know what the engine's cache holds: at best, what the nearest prompt shares.
            _, shared = nearest(
                new.tokens,
                [o for o in self.divergences.remembered.values() if (o.model, o.scope) == (new.model, new.scope)],
            )
            made = self.divergences.started(new, {"expected": min(shared, len(new.tokens) - 1)}, chat.applied)
            if made.cause and made.cause not in UNAVOIDABLE:
                log.info("%s", report_line(made))
            self.volatility.observe(chat.agent, request, chat.key)
        except InvalidRequest as error:  # the engine may support what this package does not
            self.without_report.note("unread", f"POST {chat.path}: no report: {error}")
            return False
        except Exception:  # a failed report must not fail a request
            log.exception("%s: the report on its prompt failed", chat.id)
            self.without_report.counts["failed"] += 1
            return False
        finally:
            with self.lock:
                self.waiting.pop(chat.id, None)
        return True

    async def is_made(self, id: str) -> bool:
        """Whether there is a report on a request; waits a little for one that is being made."""
        report = self.reports.get(id)
        if report is None:
            return False
        await asyncio.wait({asyncio.wrap_future(report)}, timeout=REPORT_SECONDS)
        return report.done() and not report.cancelled() and report.result()

    def forget(self, id: str) -> None:
        """The request's answer has been sent."""
        self.reports.pop(id, None)

    def count_refused(self, limit: str) -> None:
        """Count a request or a connection beyond a limit."""
        self.refused[limit] += 1

    def left_out(self) -> dict[str, dict[str, int]]:
        """The counts that are not zero of requests that passed without rules and without a report, by reason.

        Also of those that were refused, by limit.
        """
        counts = {
            "without_rules": self.without_rules.counts,
            "without_report": self.without_report.counts,
            "refused": self.refused,
        }
        return {name: dict(count) for name, count in counts.items() if count}
