"""Workloads: the traces' formats, lanes, arrivals, plans, configs, and the command."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.routing.__main__ import main
from experiments.routing.config import ConfigError, read_config
from experiments.routing.plan import read_plan, write_plan
from experiments.routing.workload import (
    Lane,
    Request,
    Workload,
    agents_at_work,
    bursty,
    in_order,
    poisson,
    read_agentx,
    read_open_loop,
    synthetic_agents,
)
from experiments.workloads.traces import Agents

CONFIG = """
seeds = [0]
policies = ["least loaded", "SGLang", "tokenzero"]
[engine]
fixed = 0.005
linear = 2e-5
attention = 1e-9
step = 0.008
decode_pair = 1e-8
capacity = 400_000
[[loads]]
trace = "synthetic"
rate = 1
replicas = 2
sessions = 4
[[loads]]
trace = "plan"
rate = 1
replicas = 2
"""


def asked(ids: list[int], **more: Any) -> dict[str, Any]:
    """A request of an AgentX trace."""
    return {"t": 0.0, "type": "n", "in": 64 * len(ids) + 10, "out": 50, "hash_ids": ids, "think_time": 4.0} | more


def archive(path: Path, traces: list[dict[str, Any]]) -> Path:
    """An archive of AgentX traces."""
    with tarfile.open(path, "w:xz") as file:
        for number, trace in enumerate(traces):
            text = json.dumps({"id": f"trace {number}", "tool_tokens": 100, "system_tokens": 28} | trace).encode()
            entry = tarfile.TarInfo(f"traces/{number}.json")
            entry.size = len(text)
            file.addfile(entry, io.BytesIO(text))
    return path


def test_agentx_prompts_share_what_their_ids_share_and_the_same_tools(tmp_path: Path) -> None:
    first = {"requests": [asked([1, 2, 3, 4]), asked([1, 2, 3, 4, 5]), asked([1, 2, 3, 9])]}
    other_tools = {"requests": [asked([1, 2, 3])], "tool_tokens": 200}
    sessions = read_agentx(archive(tmp_path / "a.tar.xz", [first, {"requests": [asked([1, 2, 3])]}, other_tools]), 3)
    long, same, other = sorted(sessions, key=lambda s: s[0].agent)
    a, b, c = (request.pages.tolist() for request in long)
    assert b[:4] == a
    assert c[:3] == a[:3]
    assert c[3] not in b
    # 128 tokens of tools and system text are two pages; the third page is the trace's own.
    assert same[0].pages.tolist()[:2] == a[:2]
    assert same[0].pages[2] != a[2]
    assert not {*other[0].pages.tolist()} & {*a, *b, *c}
    assert [(r.tokens, r.output, r.pause_s) for r in long] == [(266, 50, 4.0), (330, 50, 4.0), (266, 50, 4.0)]


def test_a_sub_agent_is_an_agent_of_its_own_for_whom_its_parent_waits(tmp_path: Path) -> None:
    sub = {"type": "subagent", "tool_tokens": 64, "system_tokens": 0, "requests": [asked([7, 8])]}
    path = archive(tmp_path / "a.tar.xz", [{"requests": [asked([1, 2]), sub, asked([1, 2, 3])]}])
    (session,) = read_agentx(path, 1)
    assert [len(request.pages) for request in session] == [2, 2, 3]
    assert session[0].agent == session[2].agent != session[1].agent


def test_more_agents_than_traces_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1 traces, expected at least 2"):
        read_agentx(archive(tmp_path / "a.tar.xz", [{"requests": [asked([1])]}]), 2)


def test_lanes_play_all_sessions_one_after_another() -> None:
    sessions = [[Request(i, np.array([i]), 70, 1)] * (i + 1) for i in range(5)]
    lanes = agents_at_work(sessions, 2, ramp_s=10.0)
    assert sorted(r.agent for lane in lanes for r in lane.requests) == sorted(r.agent for s in sessions for r in s)
    assert all(0 <= lane.start_s <= 10 for lane in lanes)


def test_synthetic_agents_extend_their_prompts_page_by_page() -> None:
    (session,) = synthetic_agents(Agents(agents=1, calls=5, subagents=0, sides=0))
    for before, after in pairwise(session):
        shared = min(len(before.pages), len(after.pages)) - 1
        assert np.array_equal(before.pages[:shared], after.pages[:shared])
        assert len(after.pages) == after.tokens // 64


def test_mooncakes_calls_come_at_their_times_and_belong_to_whom_they_extend(tmp_path: Path) -> None:
    lines = [(0, 1500, 20, [1, 2, 3]), (4000, 2000, 30, [1, 2, 4, 5]), (8000, 600, 9, [8, 9])]
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines))
    lanes = read_open_loop(path, speed=2.0)
    assert [lane.start_s for lane in lanes] == [0.0, 2.0, 4.0]
    requests = [lane.requests[0] for lane in lanes]
    assert [r.pages.tolist() for r in requests] == [[1, 2], [1, 2, 4], [8]]
    assert [r.output for r in requests] == [20, 30, 9]
    assert requests[0].agent == requests[1].agent != requests[2].agent


@pytest.mark.parametrize(("moved", "variation"), [(poisson, 1.0), (bursty, 3.16)])
def test_arrivals_keep_their_rate(moved: Any, variation: float) -> None:
    lanes = [Lane(0.5 * i, [Request(i, np.array([i]), 70, 1)]) for i in range(4000)]
    times = np.array([lane.start_s for lane in moved(lanes, seed=0)])
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.5, rel=0.15)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.15)


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    lanes = [Lane(1.5, [Request(3, np.array([0, 1], np.int32), 150, 7, 2.0)]), Lane(2.0, [])]
    write_plan(tmp_path / "p.json", Workload("mine", 64, lanes))
    read = read_plan(tmp_path / "p.json")
    assert (read.name, read.page_size, read.requests) == ("mine", 64, 1)
    (request,) = in_order(read)
    assert (request.agent, request.pages.tolist(), request.tokens, request.output, request.pause_s) == (
        3, [0, 1], 150, 7, 2.0,
    )  # fmt: skip


def test_a_plan_with_too_few_pages_is_an_error(tmp_path: Path) -> None:
    lanes = [Lane(0.0, [Request(0, np.array([0], np.int32), 150, 7)])]
    write_plan(tmp_path / "p.json", Workload("mine", 64, lanes))
    with pytest.raises(ValueError, match="1 pages for 150 tokens, expected 2"):
        read_plan(tmp_path / "p.json")


def test_a_config_with_an_unknown_policy_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.replace("SGLang", "SGL"))
    with pytest.raises(ConfigError, match=r"policies has \['SGL'\], expected some of"):
        read_config(path)


def test_the_committed_config_can_be_read() -> None:
    assert read_config(Path("experiments/configs/routing.toml")).loads


def test_the_command_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    cost_model = (
        '{"constants": {"fixed": 1.0, "linear": 1e-5, "attention": 0}, "linear_flops": 1, "attention_flops": 1}'
    )
    (tmp_path / "cost_model.json").write_text(cost_model)
    asked_for = ["--config", str(tmp_path / "c.toml"), "--out", str(tmp_path)]
    assert main(asked_for) == 0
    assert main([*asked_for, "--constants", str(tmp_path / "cost_model.json")]) == 0
    summary = json.loads((tmp_path / "synthetic.json").read_text())
    (run,) = summary["results"][0]["runs"]
    assert {*run["policies"]} == {"least loaded", "SGLang", "tokenzero"}
    assert run["policies"]["SGLang"]["ttft_p50"] > 1.0  # the cost model's file says so
    assert (tmp_path / "synthetic.png").stat().st_size > 10_000
    assert main([*asked_for, "--only", "SGLang"]) == 0
    again = json.loads((tmp_path / "synthetic.json").read_text())["results"][0]["runs"][0]["policies"]
    assert again["tokenzero"] == run["policies"]["tokenzero"]
    assert again["SGLang"]["ttft_p50"] < 1.0
    assert "SGLang" in capsys.readouterr().out


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    assert main(["--config", str(tmp_path / "c.toml"), "--trace", str(tmp_path / "x.jsonl")]) == 2
    assert "no load of trace = 'mooncake'" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.toml")]) == 2
    assert main(["--config", str(tmp_path / "c.toml"), "--trace", str(tmp_path / "x.json")]) == 2
