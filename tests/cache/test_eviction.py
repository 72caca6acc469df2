"""Which pages go first: the rule, the order by changing ranks, and the tree that follows them."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.agents import Agents
from cache.disk import DiskTier
from cache.eviction import (
    PERSON_S,
    LastUse,
    Rank,
    State,
    agent_aware,
    demotion_s,
    greedy_dual,
    least_recently_used,
    next_pace,
)
from cache.eviction_order import EvictionOrder
from cache.host import HostTier
from cache.nodes import MOST_USES, Agent
from cache.pool import PoolExhausted
from cache.prefix_cache import PrefixCache
from cache.radix_tree import BUSY_S

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


def test_what_ended_goes_first_then_the_others_and_last_what_runs() -> None:
    ended, other = LastUse(NOW, State.ENDED), LastUse(0.0, State.UNKNOWN)
    assert level(ended) < level(other) < level(replace(ended, state=State.RUNNING))


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
            item = data.draw(st.integers(0, 8))
            uses[item] = LastUse(times.now, state, data.draw(st.floats(4, 30)))
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


def test_a_session_is_that_of_its_salt_alone() -> None:
    agents = Agents()
    mine, sub, theirs = (agents.named(salt, id, "s") for salt, id in ((b"1", "a"), (b"1", "b"), (b"2", "a")))
    assert agents.of_session(mine.salt, "s") == [mine, sub]
    assert agents.of_session(theirs.salt, "s") == [theirs]


def test_who_shares_a_head_alone_goes_on_with_nobodys_conversation(cache) -> None:
    head, uses = ids(1, 5), []
    for salt, rest in ((b"a", 100), (b"b", 200), (b"b", 200)):
        tokens = np.array([*head, rest, rest + 1], np.int32)
        uses.append(cache.begin(tokens, salt, len(head)))
        lease, _ = cache.extend(cache.match(tokens, salt, len(head), uses[-1]), len(tokens))
        cache.insert(lease, tokens)
        cache.release(lease)
        if salt == b"a":
            assert cache.tree.evict(2) == 2, "the head is the end of all that is cached"
    one, two, again = (use.agent for use in uses)
    assert one is not two
    assert two is again


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


def test_what_was_evicted_is_held_by_no_agent_and_known_where_only_its_agent_had_used_it(clock) -> None:
    cache, agent = PrefixCache(100, 1, clock=clock), Agent("a")
    head = ids(1, 5)
    run(cache, head, State.TOOL, Agent("other"))
    for first in range(1000, 30_000, 100):
        clock.now += 10
        run(cache, head + ids(first), State.TOOL, agent)
    leaves = [use.leaf for use in agent.uses if use.leaf]
    assert len(agent.uses) <= len(leaves) + 1 <= 21
    assert all(leaf in cache.tree.leaves for leaf in leaves)
    last = agent.uses[-1]
    run(cache, ids(50_000, 100), State.TOOL)
    assert last.leaf is None
    assert cache.tree.own_start(last) == len(head)


def test_an_agent_of_many_conversations_is_remembered_by_its_latest() -> None:
    cache, agent = PrefixCache(3 * MOST_USES, 1), Agent("a")
    for number in range(2 * MOST_USES):
        run(cache, [number], State.PERSON, agent)
    assert len(agent.uses) == MOST_USES
    cache.end(agent)
    run(cache, ids(1000, 2 * MOST_USES), State.TOOL)
    assert [number for number in range(2 * MOST_USES) if cache.peek(np.array([number]))] == list(range(MOST_USES))


def test_what_is_held_is_not_looked_at_in_each_eviction_and_goes_in_its_turn_afterwards(clock) -> None:
    cache, looks = PrefixCache(231, 1, clock=clock), []
    held = []
    for number in range(200):
        run(cache, [number], State.PERSON)
        held.append(cache.hold(np.array([number])))
    pop = cache.tree.leaves.pop
    cache.tree.leaves.pop = lambda now: looks.append(now) or pop(now)  # type: ignore[method-assign]
    for first in range(1000, 2000, 10):
        clock.now += 0.001
        run(cache, ids(first), State.TOOL)
    assert len(looks) < 200 + 3 * 100, "each of what is held once, then only what may go"
    for lease in held:
        cache.release(lease)
    clock.now += BUSY_S
    run(cache, ids(3000), State.TOOL)
    assert sum(cache.peek(np.array([number])) for number in range(200)) == 190


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


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_an_agent_that_waits_and_then_ends_has_its_pages_demoted_twice(kind, synced, tmp_path) -> None:
    page, now = bytes(4096), time.time_ns()
    tier = DiskTier(tmp_path, 1 << 20) if kind == "disk" else HostTier(1 << 20)
    mine, older = b"m" * 32, b"o" * 32
    tier.put_many([(mine, page)], [now])
    tier.put_many([(older, page)], [now - 2 * round(PERSON_S * 1e9)])
    for state in (State.PERSON, State.ENDED):
        tier.demote_many([mine], [now], demotion_s(state))
        if synced:
            tier.sync()
    tier.sync()
    assert tier.recent(len(page), 2) == [older, mine]
    tier.close()


def test_demotions_take_no_more_memory_the_more_there_are() -> None:
    tier, keys, now = HostTier(1 << 20), [bytes([n]) * 32 for n in range(100)], time.time_ns()
    tier.put_many([(key, b"page") for key in keys])
    for turn in range(200):
        stamps = range(now + 10**12 * turn, now + 10**12 * turn - len(keys), -1)
        tier.touch_many(keys, stamps)
        tier.demote_many(keys, stamps, PERSON_S)
    assert len(tier.oldest) < 2000
