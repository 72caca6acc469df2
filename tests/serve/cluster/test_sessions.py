"""Agents' sessions on four replicas: how often their prompts find their pages, beside one server and round robin."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx
import pytest

from experiments.harness.client import Timing, measure
from experiments.harness.server import running_server
from experiments.workloads.sessions import Session, http_headers, requests
from tests.serve.cluster.conftest import PROGRAM

pytestmark = pytest.mark.cluster

AGENTS, TURNS = 8, 5
SIZES = ("--max-model-len", "12288", "--page-size", "16", "--max-num-seqs", "4", "--max-prefill-tokens", "256")
FOUR = ("--replicas", "4", "--cpus-per-replica", "0.5", "--kv-pool-bytes", "64MiB")


def converse(url: str, number: int) -> list[Timing]:
    """One agent's session; all agents have the same tools and prompt, each a folder of its own."""
    session = Session(number, f"/home/dev/project-{number}", group="agents", scale=0.05)
    with httpx.Client(timeout=300) as client:
        return [
            measure(client, url, body | {"max_tokens": 4, "temperature": 1, "top_k": 50}, http_headers(session))
            for body in islice(requests(session, header=False), TURNS)
        ]


def hit_rate(model: Path, log: Path, flags: Sequence[str], program: Sequence[str]) -> float:
    """The share of all prompts' tokens that was reused; all agents talk at the same time."""
    with running_server(model, *SIZES, *flags, log=log, program=program) as server, ThreadPoolExecutor(AGENTS) as pool:
        timings = [t for talk in pool.map(lambda number: converse(server.url, number), range(AGENTS)) for t in talk]
    assert len(timings) == AGENTS * TURNS
    return sum(t.cached_tokens for t in timings) / sum(t.prompt_tokens for t in timings)


def test_sessions_find_their_pages_as_on_one_server(model_folder: Path, tmp_path: Path) -> None:
    one = hit_rate(model_folder, tmp_path / "one.log", ("--kv-pool-bytes", "256MiB"), ("-m", "serve"))
    ours = hit_rate(model_folder, tmp_path / "ours.log", FOUR, PROGRAM)
    in_turn = hit_rate(model_folder, tmp_path / "turn.log", (*FOUR, "--routing", "round-robin"), PROGRAM)
    print(f"hit rates: one server {one:.3f}, four replicas {ours:.3f}, in turn {in_turn:.3f}")
    assert ours > in_turn + 0.1
    assert ours > one - 0.01
