"""What agents hold on the device: counted as it is there, each token once, and without a use of it."""

import random

import numpy as np
import pytest

from cache.eviction import State
from cache.holdings import MOST_NODES, Holding, holding, path_of
from cache.nodes import Agent
from cache.prefix_cache import PrefixCache

HEAD = list(range(8))


def run(cache: PrefixCache, prompt: list[int], agent: Agent, answer: tuple[int, ...] = ()) -> None:
    """Send a prompt through the cache, and its answer."""
    tokens = np.array(prompt, np.int32)
    use = cache.begin(tokens, agent=agent)
    lease = cache.match(tokens, use=use)
    whole = np.array([*prompt, *answer], np.int32)
    lease, _ = cache.extend(lease, len(whole))
    cache.insert(lease, tokens)
    cache.insert(lease, whole)
    cache.release(lease)
    cache.answered(use, State.UNKNOWN)


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(64, 1)


def test_what_two_agents_share_is_neithers_own(cache: PrefixCache) -> None:
    first, second = Agent("first"), Agent("second")
    run(cache, [*HEAD, 100, 101], first, answer=(102,))
    assert holding(first) == Holding(tokens=11, own=11, prompt_tokens=10, prompt=10)
    run(cache, [*HEAD, 200], second)
    assert holding(first) == Holding(tokens=11, own=3, prompt_tokens=10, prompt=10)
    assert holding(second) == Holding(tokens=9, own=1, prompt_tokens=9, prompt=9)


def test_an_agents_conversations_are_counted_once_where_they_agree(cache: PrefixCache) -> None:
    agent = Agent("one")
    run(cache, [*HEAD, 100, 101], agent)
    run(cache, [*HEAD, 200], agent)
    assert holding(agent) == Holding(tokens=11, own=11, prompt_tokens=9, prompt=9)


def test_what_another_computes_behind_an_agents_prompt_is_not_held_by_it(cache: PrefixCache) -> None:
    first, second = Agent("first"), Agent("second")
    run(cache, HEAD, first)
    run(cache, [*HEAD, *range(200, 220)], second)
    assert holding(first) == Holding(tokens=8, own=0, prompt_tokens=8, prompt=8)


def test_a_look_is_no_use(cache: PrefixCache) -> None:
    old, new = Agent("old"), Agent("new")
    run(cache, list(range(100, 130)), old)
    run(cache, list(range(200, 230)), new)
    before = [(node.last_used, node.use) for node in cache.tree.nodes()]
    holding(old)
    assert [(node.last_used, node.use) for node in cache.tree.nodes()] == before
    run(cache, list(range(300, 320)), Agent("next"))
    assert holding(old).prompt < 30
    assert holding(new).prompt == 30


def test_what_is_said_to_be_there_is_there_whatever_was_evicted() -> None:
    rng, cache = random.Random(0), PrefixCache(64, 1)
    agents = [Agent(f"agent {number}") for number in range(6)]
    prompts: dict[str, list[int]] = {agent.id: HEAD for agent in agents}
    fell = 0
    for turn in range(400):
        agent = rng.choice(agents)
        if len(prompts[agent.id]) > 40 or rng.random() < 0.2:
            prompts[agent.id] = HEAD  # it starts again
        prompts[agent.id] = [*prompts[agent.id], *range(100 * turn + 100, 100 * turn + rng.randrange(101, 106))]
        run(cache, prompts[agent.id], agent)
        cache.check()
        for each in agents:
            held, length = holding(each), cache.peek(np.array(prompts[each.id], np.int32))
            assert held.prompt <= length
            assert held.own <= held.tokens <= 64
            fell += held.prompt < len(prompts[each.id])
        assert holding(agent).prompt == len(prompts[agent.id])
    assert fell > 100, "nothing was evicted"


def test_the_nodes_that_are_looked_at_are_bounded() -> None:
    cache, agent = PrefixCache(700, 1), Agent("long")
    path = list(range(300))
    run(cache, path, agent)
    for length in range(1, 300):  # each cuts a node of the path
        run(cache, [*path[:length], 10_000 + length], Agent())
        cache.tree.evict(1)
    run(cache, path, agent)
    assert len(path_of(agent.uses[-1])) == MOST_NODES
    assert holding(agent) == Holding(300, holding(agent).own, 300, 300)
