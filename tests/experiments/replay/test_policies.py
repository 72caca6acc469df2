"""Replaying calls through a store: against a brute-force prefix matcher, at every size, from files good and bad."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cache.prefix_cache import PrefixCache
from experiments.harness.server import running_server
from experiments.replay.__main__ import main
from experiments.replay.capacity import PAGE_TOKENS, compare_capacities, replay
from experiments.workloads.demo_model import TINY, write_demo_model
from experiments.workloads.traces import Agents, Call, generate, read_mooncake
from serve.cost.model import Constants

# Few ids, so that prompts share prefixes, split inside blocks and diverge inside pages.
BLOCKS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=6)
SMALL = Agents(agents=2, calls=12, subagents=0.2, subagent_calls=3, sides=0.2, window=40_000)
COSTS = Constants(fixed=0.001, linear=1e-5, attention=1e-9)


def as_blocks(rows: list[tuple[int, int]]) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, 2)


def brute_force(prompts: list[list[int]]) -> list[int]:
    """Of each prompt but its last token, which always runs: the longest prefix that any earlier prompt begins with."""
    found = []
    for number, prompt in enumerate(prompts):
        lengths = range(len(prompt))
        found.append(max(n for n in lengths if n == 0 or any(prompt[:n] == other[:n] for other in prompts[:number])))
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(BLOCKS, BLOCKS), min_size=1, max_size=8), st.sampled_from((1, 2, 3, 8)), st.booleans())
def test_the_store_finds_what_brute_force_finds_token_for_token(
    trace: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]], page: int, header: bool
) -> None:
    calls = [Call("one", 0.0, as_blocks(blocks), as_blocks(front)) for blocks, front in trace]
    prompts = [
        [token for token, length in (front if header else []) + blocks for _ in range(length)]
        for blocks, front in trace
    ]
    store = PrefixCache(400, page)
    found = replay((call.tokens(header) for call in calls), store)
    assert found[:, 0].tolist() == [len(prompt) for prompt in prompts]
    assert found[:, 1].tolist() == brute_force(prompts)
    store.check()


@settings(max_examples=50, deadline=None)
@given(st.lists(BLOCKS, min_size=1, max_size=8), st.integers(25, 60))
def test_a_small_store_finds_no_more_than_brute_force(trace: list[list[tuple[int, int]]], pages: int) -> None:
    prompts = [Call("one", 0.0, as_blocks(blocks)).tokens() for blocks in trace]
    found = replay(prompts, PrefixCache(pages, 1))
    assert (found[:, 1] <= brute_force([prompt.tolist() for prompt in prompts])).all()


def test_agents_grow_their_history_fold_it_and_send_for_others() -> None:
    calls = generate(SMALL)
    again = generate(SMALL)
    assert [call.tokens().tolist() for call in calls] == [call.tokens().tolist() for call in again]
    assert [call.time_s for call in calls] == sorted(call.time_s for call in again)
    own = [call.blocks for call in calls if call.session == "0"]
    assert len(own) == SMALL.calls
    grew = [len(b) > len(a) and np.array_equal(b[: len(a)], a) for a, b in pairwise(own)]
    assert grew.count(True) >= len(grew) // 2
    assert all(call.blocks[:, 1].sum() <= SMALL.window for call in calls)
    assert {call.session.split()[1] for call in calls if " " in call.session} == {"sub", "side"}


def test_a_history_beyond_the_window_gives_way_to_a_summary() -> None:
    own = [call.blocks for call in generate(Agents(agents=1, calls=40, subagents=0, sides=0, window=40_000))]
    shrank = [b for a, b in pairwise(own) if len(b) < len(a)]
    assert shrank
    assert all(np.array_equal(prompt[:30], own[0][:30]) for prompt in shrank), "tools and prompt stay"


def test_a_kept_header_costs_what_stripping_saves_and_room_helps() -> None:
    calls = generate(SMALL)
    rows = compare_capacities(calls, (60_000, 100_000), COSTS, Console(quiet=True))["rows"]
    stripped = [row for row in rows if row["header"] == "stripped"]
    kept = [row for row in rows if row["header"] == "kept"]
    assert [row["capacity"] for row in stripped] == [row["capacity"] for row in kept]
    assert len(stripped) == 3
    rates = [row["hit_rate"] for row in stripped]
    assert rates == sorted(rates)
    assert rates[-1] > 0.7
    assert max(row["hit_rate"] for row in kept) < 0.01
    assert stripped[-1]["ms_saved_per_call"] > 50 * kept[-1]["ms_saved_per_call"]
    largest = PrefixCache(stripped[-1]["capacity"] // PAGE_TOKENS, PAGE_TOKENS)
    replay((call.tokens() for call in calls), largest)
    assert largest.stats().pages_evicted == 0, "the last holds everything"
    assert largest.stats().pages_free == 1


def mooncake(tmp_path: Path, *lines: dict[str, object] | str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


FIRST = {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}
SECOND = {"timestamp": 1500, "input_length": 1536, "output_length": 5, "hash_ids": [7, 8, 10]}


def test_a_mooncake_trace_is_read_and_equal_ids_are_found(tmp_path: Path) -> None:
    calls = read_mooncake(mooncake(tmp_path, SECOND, FIRST))
    assert [call.time_s for call in calls] == [0.0, 1.5]
    found = replay((call.tokens() for call in calls), PrefixCache(100, 64))
    assert found.tolist() == [[1100, 0], [1536, 1024]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "truncated"),
        (FIRST | {"input_length": "many"}, "input_length"),
        (FIRST | {"hash_ids": [7]}, "1 hash_ids, expected 3"),
        (FIRST | {"hash_ids": [7, 8, -1]}, "hash_ids"),
        ({"timestamp": 0}, "missing required field"),
        ("", "truncated"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, bad: dict[str, object] | str, message: str) -> None:
    path = mooncake(tmp_path, FIRST, bad)
    with pytest.raises(ValueError, match=f"trace.jsonl, line 2: .*{message}"):
        read_mooncake(path)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        read_mooncake(mooncake(tmp_path))


def test_ten_thousand_calls_take_seconds(tmp_path: Path) -> None:
    """A hundred sessions of a hundred calls in turn, each call a block of 512 tokens longer than its last."""
    lines = [
        {"timestamp": 0, "input_length": 512 * n, "output_length": 1, "hash_ids": [s * 1000 + b for b in range(n)]}
        for n in range(1, 101)
        for s in range(100)
    ]
    calls = read_mooncake(mooncake(tmp_path, *lines))
    start = time.process_time()
    found = replay((call.tokens() for call in calls), PrefixCache(100_000, 64))
    assert time.process_time() - start < 30
    assert found[:, 1].sum() == 100 * 512 * sum(range(100))


def test_the_command_reports_agents_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--agents", "2", "--calls", "5", "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "agents.json").read_text())
    assert summary["machine"]
    assert summary["trace"]["agents"] == 2
    assert {row["header"] for row in summary["rows"]} == {"kept", "stripped"}
    assert "published" in capsys.readouterr().out
    main(["--trace", str(mooncake(tmp_path, FIRST, SECOND)), "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "trace.json").read_text())["rows"]
    assert row["tokens_saved"] == 1024


@pytest.mark.slow
def test_a_live_server_finds_what_the_store_predicts(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_demo_model(model, config=TINY)
    path = mooncake(tmp_path, FIRST, SECOND, FIRST | {"timestamp": 2000})
    with running_server(model, log=tmp_path / "log") as server:
        main(["--trace", str(path), "--live", server.url, "--speed", "100", "--out", str(tmp_path)])
    predicted, live = json.loads((tmp_path / "trace.json").read_text())["rows"]
    assert live["header"] == "live"
    assert abs(live["hit_rate"] - predicted["hit_rate"]) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "none.jsonl"], "none.jsonl"),
        (["--cost-model", "pyproject.toml"], "not a cost model"),
        (["--agents", "1", "--calls", "2", "--capacity", "100"], "--capacity 100: expected at least"),
        (
            ["--agents", "1", "--calls", "1", "--live", "http://127.0.0.1:9"],
            "--live http://127.0.0.1:9: expected a Mess",
        ),
        (["--calls", "0"], "--calls 0: expected more than 0"),
        (["--policies"], "--policies needs --model"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
