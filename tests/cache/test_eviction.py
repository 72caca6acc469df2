"""Which pages go first: the rule, the order by changing ranks, and the tree that follows them."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.disk import DiskTier
from cache.eviction import PERSON_S, LastUse, Rank, State, agent_aware, greedy_dual, least_recently_used, next_pace
from cache.eviction_order import EvictionOrder
from cache.host import HostTier
from cache.nodes import Agent
from cache.pool import PoolExhausted
from cache.prefix_cache import PrefixCache

NOW = 1000.0


def wait_s(use: LastUse, now: float = NOW) -> float:
    rank = agent_aware(use, now)
    return rank.offset + rank.slope * now


def level(use: LastUse, now: float = NOW) -> int:
    return agent_aware(use, now).level


class Time:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def test_who_waits_for_a_person_goes_before_who_waits_for_a_tool_for_less_than_five_minutes_more() -> None:
    person = LastUse(NOW - 10, State.PERSON)
    assert wait_s(person) > wait_s(LastUse(NOW - 10 - PERSON_S + 1, State.TOOL))
    assert wait_s(person) < wait_s(LastUse(NOW - 10 - PERSON_S - 1, State.TOOL))


def test_a_tools_result_is_expected_after_the_agents_pace_and_when_overdue_ever_later() -> None:
    use = LastUse(NOW, State.TOOL, pace_s=10)
    waits = [wait_s(use, NOW + t) for t in (0, 2, 4.9, 5.1, 8, 100)]
    assert waits == pytest.approx([10, 8, 5.1, 5.1, 8, 100])
    assert agent_aware(use, NOW).until == NOW + 5


def test_what_ended_goes_first_then_the_others_then_what_was_promised_and_last_what_runs() -> None:
    ended, other = LastUse(NOW, State.ENDED), LastUse(0.0, State.UNKNOWN)
    kept = replace(other, kept_until=NOW + 1)
    assert level(ended) < level(other) < level(kept) < level(replace(ended, state=State.RUNNING))
    assert level(kept, NOW + 1) == level(other)
    assert level(replace(ended, kept_until=math.inf)) == level(kept)


def test_background_goes_before_interactive_of_the_same_age() -> None:
    assert wait_s(LastUse(NOW - 10, priority=-1)) > wait_s(LastUse(NOW - 300))


def test_greedy_dual_keeps_what_costs_more_and_lru_what_was_used_last() -> None:
    cheap, dear = LastUse(0.0, cost_s=1.0), LastUse(0.0, cost_s=2.0)
    assert greedy_dual(cheap, NOW).offset > greedy_dual(dear, NOW).offset
    assert least_recently_used(LastUse(1.0), NOW).offset > least_recently_used(LastUse(2.0), NOW).offset


def test_an_agents_pace_follows_its_gaps() -> None:
    pace = 9.0
    for _ in range(20):
        pace = next_pace(pace, 60.0)
    assert 50 < pace <= 60
    assert next_pace(pace, 5.0) < pace


@given(st.data())
@settings(deadline=None)
def test_the_order_takes_out_what_a_search_through_all_ranks_finds(data) -> None:
    times = Time()
    uses: dict[int, LastUse] = {}

    def rank(item: int, now: float) -> Rank:
        return agent_aware(uses[item], now)

    order = EvictionOrder(rank)
    for _ in range(data.draw(st.integers(1, 40))):
        times.now += data.draw(st.floats(0, 8))
        if uses and data.draw(st.booleans()):
            expected = min(uses, key=lambda i: (level(uses[i], times.now), -wait_s(uses[i], times.now)))
            best, found = uses[expected], order.pop(times.now)
            assert found is not None
            assert level(uses[found], times.now) == level(best, times.now)
            assert wait_s(uses[found], times.now) == pytest.approx(wait_s(best, times.now), abs=1e-6)
            del uses[found]
        else:
            state = data.draw(st.sampled_from(list(State)))
            kept = times.now + data.draw(st.sampled_from([-1.0, 5.0]))
            item = data.draw(st.integers(0, 8))
            uses[item] = LastUse(times.now, state, data.draw(st.floats(4, 30)), kept_until=kept)
            order.put(item, times.now)
    assert len(order) == len(uses)


def run(cache: PrefixCache, prompt: list[int], state: State, agent: Agent | None = None) -> int:
    """Send a prompt through the cache, answer it, and return how much of it was found."""
    tokens = np.array(prompt, np.int32)
    use = cache.begin(tokens, agent=agent)
    lease = cache.match(tokens, use=use)
    found = lease.reused
    lease, _ = cache.extend(lease, len(tokens))
    cache.insert(lease, tokens)
    cache.release(lease)
    cache.answered(use, state)
    return found


def ids(first: int, count: int = 10) -> list[int]:
    return list(range(first, first + count))


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def cache(clock: Time) -> PrefixCache:
    return PrefixCache(31, 1, clock=clock)


def test_the_session_that_waits_for_a_person_goes_first_without_any_header(cache, clock) -> None:
    for first, state in ((100, State.TOOL), (200, State.PERSON), (300, State.TOOL)):
        run(cache, ids(first), state)
        clock.now += 20
    run(cache, ids(400), State.TOOL)
    found = [cache.peek(np.array(ids(first), np.int32)) for first in (100, 200, 300)]
    assert found == [10, 1, 10]


def test_the_end_of_an_agent_demotes_what_only_it_has_used(cache, clock) -> None:
    head = ids(1, 5)
    one, two = Agent("one"), Agent("two")
    run(cache, head + ids(100, 5), State.TOOL, one)
    clock.now += 20
    run(cache, head + ids(200, 5), State.TOOL, two)
    clock.now += 20
    cache.end(two)
    run(cache, ids(300, 20), State.TOOL)
    assert cache.peek(np.array(head + ids(100, 5), np.int32)) == 10
    assert cache.peek(np.array(head + ids(200, 5), np.int32)) == 6


def test_a_compaction_demotes_the_conversation_before_it_and_a_side_request_does_not(clock) -> None:
    cache, agent = PrefixCache(8000, 1, clock=clock), Agent("a")
    head = ids(1, 1100)
    run(cache, head + ids(10_000, 3000), State.TOOL, agent)
    run(cache, ids(50_000, 300), State.PERSON, agent)
    assert agent.uses[0].state is State.TOOL
    run(cache, head + ids(10_000, 3200), State.TOOL, agent)
    run(cache, head + ids(20_000, 100), State.TOOL, agent)
    assert [use.state for use in agent.uses] == [State.PERSON, State.ENDED, State.TOOL]
    run(cache, head + ids(10_000, 3300), State.TOOL, agent)
    assert agent.branches


def test_what_was_promised_outlasts_what_was_used_later_until_its_time_has_come(cache, clock) -> None:
    kept = np.array(ids(100), np.int32)
    run(cache, ids(100), State.PERSON)
    assert cache.keep(kept, NOW + 100) == 10
    for first in (200, 300, 400):
        clock.now += 10
        run(cache, ids(first), State.TOOL)
    assert cache.peek(kept) == 10
    clock.now = NOW + 101
    run(cache, ids(500), State.TOOL)
    assert cache.peek(kept) < 10


@pytest.mark.parametrize("seed", range(4))
def test_no_page_in_use_is_evicted_and_every_tail_goes_before_its_head(seed) -> None:
    rng, clock = random.Random(seed), Time()
    cache, agents = PrefixCache(60, 1, clock=clock), [Agent(f"{i}") for i in range(5)]
    live: list = []
    for _ in range(300):
        clock.now += rng.expovariate(0.1)
        action = rng.random()
        if action < 0.5:
            prompt = np.array([rng.randrange(3) for _ in range(rng.randrange(1, 15))], np.int32)
            use = cache.begin(prompt, agent=rng.choice([*agents, None]))
            lease = cache.match(prompt, use=use)
            try:
                lease, _ = cache.extend(lease, len(prompt))
            except PoolExhausted:
                cache.release(lease)
                continue
            cache.insert(lease, prompt)
            live.append((lease, use, prompt))
        elif action < 0.9 and live:
            lease, use, prompt = live.pop(rng.randrange(len(live)))
            assert cache.peek(prompt) == len(prompt)  # as long as it was in use, no page of it went
            cache.release(lease)
            cache.answered(use, rng.choice(list(State)[1:]))
        else:
            cache.end(rng.choice(agents))
        cache.check()  # a page whose head is gone would be in no node


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_demoted_pages_of_a_tier_go_first_tails_before_heads_and_over_restarts(kind, tmp_path) -> None:
    page, now = bytes(4096), time.time_ns()
    budget = 30 * 8704 + (1 << 17) if kind == "disk" else 20 * 4096

    def opened() -> HostTier | DiskTier:
        return DiskTier(tmp_path, budget) if kind == "disk" else HostTier(budget)

    tier = opened()
    chains = {name: [f"{name}{i:031d}".encode() for i in range(8)] for name in "ab"}
    stamps = {"a": range(now - 10**9, now - 10**9 - 8, -1), "b": range(now - 2 * 10**9, now - 2 * 10**9 - 8, -1)}
    for name, keys in chains.items():
        tier.put_many([(key, page) for key in keys], stamps[name])
    # The first two pages of a are used by b meanwhile: only the others are demoted.
    tier.touch_many(chains["a"][:2], [now, now - 1])
    tier.demote_many(chains["a"], stamps["a"], 300.0)
    tier.sync()
    if kind == "disk":
        tier.close()
        tier = opened()
        tier.prune(12 * 8704)
    else:
        tier.put_many([(f"c{i:031d}".encode(), page) for i in range(9)])
    there = {name: tier.contains_many(keys) for name, keys in chains.items()}
    assert all(there["b"])
    assert there["a"][:2] == [True, True]
    assert not all(there["a"])
    assert there["a"] == sorted(there["a"], reverse=True)
    tier.close()
