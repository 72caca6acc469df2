"""The choice of an upstream for a prompt by its expected time to the first token, and what its answer teaches."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.cost.model import Constants, weighted_median
from serve.proxy.holdings import MOST_CAPACITY, Holdings
from serve.proxy.prefix import BLOCK_BYTES, Prompt
from serve.proxy.relay import Usage
from serve.router.choice import Choice
from serve.router.request import RoutedRequest
from serve.router.router import Router
from serve.router.summary import Increment

# Of an engine that has not answered yet: 20 ms a request, and 10,000 tokens a second.
FIRST_CONSTANTS = Constants(fixed=0.02, linear=1e-4, attention=0.0)
LEAST = 4  # busy periods, after which that is not believed any more: it can be wrong by any factor
FIRST_TOKEN_BYTES = 4.0
REMEMBERED = 16  # answers, from which the bytes of a token are taken
MOST_EXPLAINED = 8  # upstreams whose expected time is reported


@dataclass(frozen=True, eq=False)
class Decision:
    """A prompt, where it goes, and what its first token was expected to take at each upstream that could take it."""

    prompt: Prompt
    request: RoutedRequest
    choice: Choice
    expected_ms: Mapping[str, float]
    ages: list[int] = field(default_factory=list)  # of its blocks there, see Holdings


class Balance:
    """The router, over texts in place of tokens: answers tell how many bytes a token has.

    Engines that are not ours publish nothing of their caches, so the proxy publishes what it believes of them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.router = Router()
        self.holdings = {name: Holdings() for name in names}
        self.sequences = dict.fromkeys(names, 0)
        self.token_bytes: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)  # (bytes of a token, tokens)
        self.open: set[str] = set()  # ids of the requests without a first token
        for name in names:
            self.router.add(name, FIRST_CONSTANTS, MOST_CAPACITY, overtakes=False, kind=name, least=LEAST)

    @property
    def page_size(self) -> int:
        """Tokens of a block, about."""
        token_bytes = weighted_median(self.token_bytes) if self.token_bytes else FIRST_TOKEN_BYTES
        return max(1, round(BLOCK_BYTES / token_bytes))

    def decide(self, prompt: Prompt, among: Sequence[str], now: float) -> Decision:
        """The best of some upstreams; changes nothing."""
        page_size = self.page_size
        tokens = max(prompt.size * page_size // BLOCK_BYTES, 1)
        request = RoutedRequest(prompt.id, prompt.keys, tokens, page_size, *prompt.sender)
        choice = self.router.route(request, now, among)
        everywhere_s = dict(zip(self.router.fleet.names, choice.everywhere_s.tolist(), strict=True))
        expected = {name: 1e3 * everywhere_s[name] for name in among[:MOST_EXPLAINED]}
        ages = self.holdings[choice.replica].ages(prompt.keys)
        return Decision(prompt, request, choice, expected, ages)

    def sent(self, decision: Decision, now: float) -> None:
        """A request goes to its upstream."""
        self.open.add(decision.request.id)
        self.router.sent(decision.request, decision.choice, now)
        name, keys = decision.choice.replica, decision.request.keys
        self.publish(name, removed=self.holdings[name].use(keys, now))

    def first_token(self, decision: Decision, usage: Usage, now: float) -> None:
        """Its first token has come, so that its prompt is cached; `usage` is what is known by then."""
        self.router.first_token(decision.request.id, now, cached_tokens(decision.request, usage))
        self.computed(decision, now)

    def finished(self, decision: Decision, usage: Usage, now: float) -> None:
        """Its answer is complete."""
        name, request = decision.choice.replica, decision.request
        self.computed(decision, now)
        self.router.finished(request.id, now)
        if usage.prompt and decision.prompt.size:
            self.token_bytes.append((decision.prompt.size / usage.prompt, usage.prompt))
        if (cached := cached_tokens(request, usage)) is not None:
            self.holdings[name].learn(decision.ages, min(round(cached / request.page_size), len(request.keys)))

    def computed(self, decision: Decision, now: float) -> None:
        """A prompt is cached. One that shared its start, and came to nothing, may have had that forgotten."""
        if decision.request.id in self.open:
            self.open.discard(decision.request.id)
            name, keys = decision.choice.replica, decision.request.keys
            holdings = self.holdings[name]
            self.publish(name, keys, [] if holdings.has(keys) else holdings.use(keys, now))

    def failed(self, decision: Decision, now: float) -> None:
        """It came to nothing: refused, broken off, or cancelled."""
        self.router.failed(decision.request.id, now)
        if decision.request.id in self.open:
            self.open.discard(decision.request.id)
            name, new = decision.choice.replica, decision.request.keys[len(decision.ages) :]
            self.publish(name, removed=self.holdings[name].forget(new))

    def lost(self, name: str) -> None:
        """An upstream is out: its cache is taken for empty when it comes back."""
        self.publish(name, removed=self.holdings[name].clear())

    def publish(self, name: str, added: Collection[int] | np.ndarray = (), removed: Collection[int] = ()) -> None:
        """Tell the router what an upstream holds, and holds no longer."""
        if len(added) or len(removed):
            self.sequences[name] += 1
            changed = Increment(self.sequences[name], np.array(added, np.uint64), np.array(removed, np.uint64))
            self.router.published(name, changed)


def cached_tokens(request: RoutedRequest, usage: Usage) -> int | None:
    """How many tokens of a request were cached, in the estimate's tokens; None where the answer does not say."""
    if usage.cached is None or not usage.prompt:
        return None
    return round(min(1.0, usage.cached / usage.prompt) * request.tokens)
