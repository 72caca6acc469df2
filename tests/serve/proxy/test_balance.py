"""What the proxy learns of engines that are not ours, and what it makes of it."""

from __future__ import annotations

import heapq

from serve.proxy.balance import Balance, Decision
from serve.proxy.prefix import BLOCK_BYTES, Prompt, chain_keys
from serve.proxy.relay import Usage
from serve.web.agents import Sender

BOTH = ["one", "two"]


def prompt_of(text: str, number: int, agent: str = "") -> Prompt:
    return Prompt(f"{number}", chain_keys(text.encode()), len(text), Sender(agent, agent))


class Clock:
    """Requests to engines that take a given time for each token, one after another."""

    def __init__(self, **token_s: float) -> None:
        self.token_s, self.balance, self.now, self.number = token_s, Balance(list(token_s)), 0.0, 0

    def decide(self, text: str, agent: str = "", among: list[str] = BOTH) -> Decision:
        self.number += 1
        return self.balance.decide(prompt_of(text, self.number, agent), among, self.now)

    def ask(self, text: str, agent: str = "", among: list[str] = BOTH, **usage: int) -> Decision:
        """A request and its answer."""
        decision = self.decide(text, agent, among)
        self.balance.sent(decision, self.now)
        computed = decision.request.tokens - decision.choice.cached
        self.now += 0.02 + computed * self.token_s[decision.choice.replica]
        answered = Usage(usage.get("prompt"), usage.get("cached"))
        self.balance.first_token(decision, answered, self.now)
        self.balance.finished(decision, answered, self.now)
        self.now += 1.0
        return decision


def test_agents_stay_where_they_were_if_engines_are_equal() -> None:
    clock = Clock(one=1e-4, two=1e-4)
    first = clock.decide("Hi", "a")
    clock.balance.sent(first, clock.now)
    second = clock.decide("Hi", "b")
    clock.balance.sent(second, clock.now)
    assert first.choice.replica != second.choice.replica
    clock.now += 0.02
    for each in (first, second):
        clock.balance.first_token(each, Usage(), clock.now)
        clock.balance.finished(each, Usage(), clock.now)
    for n in range(3):
        assert clock.ask(f"Short {n}", "b").choice.replica == second.choice.replica
        assert clock.ask(f"Short {n}", "a").choice.replica == first.choice.replica


def test_the_bytes_of_a_token_are_those_of_the_answers() -> None:
    clock = Clock(one=1e-4, two=1e-4)
    text = "x" * 10_000
    assert clock.decide(text).request.tokens == 2500
    clock.ask(text, prompt=5000, cached=0)
    assert clock.balance.page_size == BLOCK_BYTES // 2
    assert clock.decide(text).request.tokens == 5000


def test_what_an_engine_has_dropped_is_not_expected_there() -> None:
    clock = Clock(one=1e-4, two=1e-4)
    texts = [f"{n} {'a text of its own ' * 2000}" for n in range(6)]
    for text in texts:
        clock.ask(text, among=["one"], prompt=9000, cached=0)
    assert clock.decide(texts[0], among=["one"]).choice.cached > 8000
    clock.ask(texts[0], among=["one"], prompt=9000, cached=0)  # it holds five at most
    for text in texts[1:]:
        clock.ask(text, among=["one"], prompt=9000, cached=0)
    assert clock.decide(texts[0], among=["one"]).choice.cached == 0
    assert clock.decide(texts[-1], among=["one"]).choice.cached > 8000


def test_what_came_to_nothing_is_not_expected_and_what_is_lost_is_not_either() -> None:
    clock = Clock(one=1e-4, two=1e-4)
    text = "a text " * 3000
    decision = clock.decide(text, among=["one"])
    clock.balance.sent(decision, clock.now)
    clock.balance.failed(decision, clock.now)
    assert clock.decide(text, among=["one"]).choice.cached == 0
    clock.ask(text, among=["one"])
    assert clock.decide(text, among=["one"]).choice.cached > 4000
    clock.balance.lost("one")
    assert clock.decide(text, among=["one"]).choice.cached == 0


def test_what_another_has_computed_stays_expected_when_one_that_shares_it_comes_to_nothing() -> None:
    clock = Clock(one=1e-4, two=1e-4)
    text = "a text " * 3000
    first, second = (clock.decide(text, among=["one"]) for _ in range(2))
    for each in (first, second):
        clock.balance.sent(each, clock.now)
    clock.balance.failed(first, clock.now)
    clock.balance.first_token(second, Usage(), clock.now + 1)
    clock.balance.finished(second, Usage(), clock.now + 1)
    third = clock.decide(text, among=["one"])
    assert third.choice.cached > 4000
    assert len(third.ages) == len(third.request.keys), "what the router expects is what it is believed to hold"


def test_a_slow_engine_gets_fewer_prompts() -> None:
    clock = Clock(one=1e-3, two=4e-3)
    for n in range(16):
        clock.ask(f"{n} {'word ' * (500 + 100 * (n % 7))}", among=[BOTH[n % 2]])
    went = [clock.ask(f"{n} {'word ' * 1000}").choice.replica for n in range(16, 24)]
    assert set(went) == {"one"}
    last = clock.decide("another " * 1000)
    assert 2 < last.expected_ms["two"] / last.expected_ms["one"] < 6


def shares_under_load(requests: int, gap_s: float, **token_s: float) -> dict[str, float]:
    """The share of the latter half of new prompts, one each `gap_s`, at each engine; an engine takes one after another.

    Times to the first token are the only thing that tells the engines apart.
    """
    balance, free = Balance(list(token_s)), dict.fromkeys(token_s, 0.0)
    pending: list[tuple[float, int, Decision]] = []
    went: list[str] = []
    for number in range(requests):
        now = number * gap_s
        while pending and pending[0][0] <= now:
            at, _, done = heapq.heappop(pending)
            balance.first_token(done, Usage(), at)
            balance.finished(done, Usage(), at)
        decision = balance.decide(prompt_of(f"{number} {'word ' * (500 + 100 * (number % 7))}", number), BOTH, now)
        balance.sent(decision, now)
        name = decision.choice.replica
        free[name] = max(now, free[name]) + 0.02 + decision.request.tokens * token_s[name]
        heapq.heappush(pending, (free[name], number, decision))
        went.append(name)
    late = went[requests // 2 :]
    return {name: late.count(name) / len(late) for name in token_s}


def test_an_engine_that_is_four_times_slower_gets_its_share_and_no_more() -> None:
    # A prompt takes the fast engine 1.02 s and the slow one 4 s: together, they can do one each 0.81 s.
    shares = shares_under_load(300, 0.85, one=1e-3, two=4e-3)
    assert 0.1 < shares["two"] < 0.25
    # At a quarter of that load the fast one has time for nearly all.
    assert shares_under_load(300, 4.0, one=1e-3, two=4e-3)["two"] < 0.05
    assert 0.4 < shares_under_load(300, 0.6, one=1e-3, two=1e-3)["two"] < 0.6
