"""Replaying a trace: each policy against a plain account of it, the optimum against every choice there is."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.replay.__main__ import main
from experiments.replay.capacity import PAGE_TOKENS
from experiments.replay.policies import POLICIES, Request, Workload, belady, fifo, lru, order, sessions, trace
from experiments.workloads.demo_model import TINY, write_demo_model

KEYS = [bytes([65 + i]) for i in range(6)]
REQUESTS = st.lists(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True), min_size=1, max_size=6)
SMALL = Workload(sessions=6, turns=4)


def most_hits(requests: list[Request], capacity: int, held: frozenset[bytes] = frozenset()) -> int:
    """Hits of the best choice, found by trying all that may be kept after each request."""
    if not requests:
        return 0
    keys, later = requests[0], requests[1:]
    had = held.union(keys)
    kept = combinations(had, min(capacity, len(had)))
    return len(held.intersection(keys)) + max(most_hits(later, capacity, frozenset(choice)) for choice in kept)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(1, 4))
def test_the_optimum_finds_as_much_as_the_best_of_all_choices(requests: list[Request], capacity: int) -> None:
    assert belady(requests, capacity) == most_hits(requests, capacity)


@given(REQUESTS, st.integers(1, 4))
def test_no_policy_finds_more_than_the_optimum(requests: list[Request], capacity: int) -> None:
    best = belady(requests, capacity)
    assert all(policy(requests, capacity) <= best for policy in POLICIES.values())


@given(REQUESTS)
def test_without_a_limit_all_find_whatever_was_asked_for_before(requests: list[Request]) -> None:
    asked = [key for keys in requests for key in keys]
    assert {policy(requests, len(KEYS)) for policy in POLICIES.values()} == {len(asked) - len(set(asked))}


def test_a_use_saves_a_page_under_lru_and_not_under_fifo() -> None:
    requests = [[b"a"], [b"b"], [b"a"], [b"c"], [b"a"]]
    assert lru(requests, 2) == 2
    assert fifo(requests, 2) == 1


def test_the_head_of_a_prompt_outlives_its_tail() -> None:
    requests = [[b"a", b"b", b"c"], [b"a", b"b", b"c"]]
    assert lru(requests, 2) == fifo(requests, 2) == 2


def test_sessions_take_turns_and_each_has_its_own_requests_in_their_order() -> None:
    turns = list(order(SMALL))
    assert set(turns) == set(range(SMALL.sessions))
    assert turns == list(order(SMALL))
    assert sum(a != b for a, b in pairwise(turns)) > SMALL.sessions, "interleaved"
    bodies = list(trace(SMALL, lambda body: [json.dumps(body["metadata"]).encode(), b"x" * len(body["messages"])]))
    assert sorted(Counter(keys[0] for keys in bodies).values()) == sorted(Counter(turns).values())
    for own in {keys[0] for keys in bodies}:
        lengths = [len(keys[1]) for keys in bodies if keys[0] == own]
        assert lengths == sorted(set(lengths)), "each request extends the one before"


def test_sessions_of_one_project_share_its_folder_and_group() -> None:
    assert len({(s.group, s.folder) for s in sessions(SMALL)}) == len({s.group for s in sessions(SMALL)}) > 1
    assert len({s.seed for s in sessions(SMALL)}) == SMALL.sessions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "model"
    write_demo_model(path, config=TINY)
    return path


def test_the_command_writes_its_figures_and_a_picture(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--policies", "--model", str(checkpoint), "--sessions", "3", "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "policies.json").read_text())
    assert summary["page_tokens"] == PAGE_TOKENS
    assert summary["machine"]
    last = summary["budgets"][-1]
    assert set(last["hit_rate"].values()) == {summary["unlimited_hit_rate"]}
    # Agents send the same again and again.
    assert summary["unlimited_hit_rate"] > 0.7
    assert (tmp_path / "policies.png").stat().st_size > 10_000
    assert "without a limit" in capsys.readouterr().out
