"""What recorded agents ask of a cache: each count against a plain one, and the command on files of the format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from experiments.wild.__main__ import main
from experiments.wild.classify import Cause, rows
from experiments.wild.costs import machines, prefill_ms
from experiments.wild.granularity import Placement, by_block_size, from_states
from experiments.wild.ttl import LIFETIMES_S, kept
from experiments.workloads.agentx import Agent, Trace, TraceRequest
from tests.experiments.wild.made import asked, session, sessions, write

LONG = list(range(1, 301))  # 19,200 tokens
SUB = Agent("sub", "", 64, 0)


def shared(a: TraceRequest, b: TraceRequest) -> int:
    """Leading blocks that two prompts of one model share."""
    if a.model != b.model:
        return 0
    both = zip(a.hash_ids.tolist(), b.hash_ids.tolist(), strict=False)
    return next((n for n, (x, y) in enumerate(both) if x != y), min(len(a.hash_ids), len(b.hash_ids)))


def reusable(trace: Trace) -> list[int]:
    """Blocks of each prompt that an earlier one of the same model has, counted plainly."""
    return [max((shared(r, old) for old in trace.requests[:n]), default=0) for n, r in enumerate(trace.requests)]


def causes(*requests: TraceRequest) -> list[Cause]:
    """The cause of each request of a session."""
    return [Cause(cause) for cause in rows(session(*requests), 0)["cause"]]


@settings(max_examples=40)
@given(sessions())
def test_reuse_is_the_longest_prefix_of_any_earlier_prompt_of_the_model(trace: Trace) -> None:
    assert rows(trace, 0)["reused"].tolist() == reusable(trace)


@settings(max_examples=40)
@given(sessions())
def test_a_long_lifetime_keeps_all_and_a_short_one_what_was_just_used(trace: Trace) -> None:
    found, wanted = kept(trace), np.zeros(len(LIFETIMES_S) + 1, np.int64)
    for number, request in enumerate(trace.requests):
        for at, limit in enumerate((*LIFETIMES_S, np.inf)):
            alive = [old for old in trace.requests[:number] if request.t_s - old.t_s - 2.0 <= limit]
            wanted[at] += max((shared(request, old) for old in alive), default=0)
    assert (found == 64 * wanted).all()


@settings(max_examples=40)
@given(sessions())
def test_states_at_every_block_reuse_all_and_at_ends_only_whole_prompts(trace: Trace) -> None:
    (every, ends, both) = from_states(
        trace, [Placement("", every=64), Placement("", end=True), Placement("", end=True, divergence=True)]
    )[:, 0].tolist()
    assert every == 64 * sum(reusable(trace))
    plain = sum(
        max((len(old.hash_ids) for old in trace.requests[:n] if shared(r, old) == len(old.hash_ids)), default=0)
        for n, r in enumerate(trace.requests)
    )
    assert ends == 64 * plain
    assert ends <= both <= every


def test_a_prompt_that_extends_the_one_before_is_an_append() -> None:
    assert causes(asked([1, 2]), asked([1, 2, 3]), asked([1, 2, 4, 5])) == [Cause.FIRST, Cause.APPEND, Cause.APPEND]


def test_a_prompt_that_extends_an_older_one_is_a_branch() -> None:
    assert causes(asked(LONG[:200]), asked(LONG), asked([*LONG[:200], 500, 501]))[-1] is Cause.BRANCH


def test_a_much_shorter_prompt_follows_a_compaction() -> None:
    assert causes(asked(LONG), asked([1, 2, *range(500, 600)]))[-1] is Cause.COMPACTION


@pytest.mark.parametrize(
    ("matching", "cause"),
    [(1, Cause.BEHIND_HEAD), (20, Cause.BEHIND_HEAD), (27, Cause.LATER), (290, Cause.LATER)],
)
def test_a_break_is_named_by_its_place_behind_tools_and_system_text(matching: int, cause: Cause) -> None:
    assert causes(asked(LONG), asked([*LONG[:matching], *range(500, 800)]))[-1] is cause


def test_a_break_within_long_tools_is_one_in_the_head() -> None:
    agent = Agent("", None, 9_000, 1_000)
    broken = [*LONG[:100], *range(500, 700)]
    assert causes(asked(LONG, agent=agent), asked(broken, agent=agent))[-1] is Cause.HEAD


def test_another_model_has_nothing_of_what_the_first_one_computed() -> None:
    found = rows(session(asked(LONG), asked(LONG, model="other"), asked([900, 901], model="third")), 0)
    assert found["cause"].tolist() == [Cause.FIRST, Cause.MODEL, Cause.FIRST]
    assert found["reused"].tolist() == [0, 0, 0]
    assert found["reused_text"].tolist() == [0, 300, 0]


def test_each_agent_is_compared_with_its_own_prompt_before_in_the_order_of_times() -> None:
    sub = asked([8, 9], 5, agent=SUB), asked([8, 9, 10], 20, agent=SUB)
    found = rows(session(asked([1, 2], 0), *sub, asked([1, 2, 3], 10)), 0)
    assert found["cause"].tolist() == [Cause.FIRST, Cause.FIRST, Cause.APPEND, Cause.APPEND]
    assert found["subagent"].tolist() == [False, True, False, True]
    assert found["idle_s"][2:].tolist() == [9.0, 14.0]


def test_the_pause_is_that_of_the_clock_where_an_answers_duration_is_not_known() -> None:
    requests = (
        asked([1], 0, stop="end_turn"),
        asked([1, 2], 50, api_time_s=None),
        asked([1, 2, 3], 60, think_time_s=59.0),
    )
    found = rows(session(*requests), 0)
    assert found["idle_s"][1:].tolist() == [49.0, 10.0]
    assert found["think_s"][2] == 59.0
    assert found["waits_for_person"].tolist() == [-1, 1, 0]


def test_blocks_of_a_size_reuse_whole_ones_and_an_exact_cache_the_rest_of_the_prompt_before() -> None:
    found = rows(session(asked(LONG[:100]), asked(LONG[:120])), 0)
    reused = {name: each.tolist()[1] for name, each in by_block_size(found).items()}
    assert reused == {"token-exact": 6405, "16": 6400, "64": 6400, "528": 6336, "1,600": 6400, "2,048": 6144}


def test_time_is_that_of_the_cost_model() -> None:
    found = rows(session(asked(LONG[:100]), asked(LONG[:120])), 0)
    for costs in machines().values():
        assert prefill_ms(costs, found).tolist() == pytest.approx(
            [1000 * costs.compute_s(0, 6400), 1000 * costs.compute_s(6400, 7680)]
        )


def test_the_command_counts_a_folder_and_leaves_out_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = session(asked(LONG, 0), asked([*LONG, 301], 30), asked([*LONG[:2], *range(500, 800)], 900), asked([1], 990))
    path = write(tmp_path / "traces", one, session(asked([1, 2]), asked([1, 2, 3], 9)))
    (path / "bad.json").write_text("{")
    main([str(path), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["left_out"] == 1
    assert found["overall"]["requests"] == 6
    assert found["overall"]["reused"] == pytest.approx((300 + 2 + 1 + 2) / (300 + 301 + 302 + 1 + 2 + 3), abs=1e-5)
    assert {each["cause"]: each["requests"] for each in found["causes"] if each["requests"]} == {
        "first request": 2, "append": 2, "compaction": 1, "break behind the head": 1,
    }  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    assert "bad.json, line 1" in capsys.readouterr().out


def test_a_path_without_traces_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "no trace could be read" in capsys.readouterr().err
