"""Agents' sessions on four replicas: how often their prompts find their pages, beside one server and round robin."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import httpx
import pytest

from experiments.harness.client import Timing, measure
from experiments.harness.server import running_server
from experiments.workloads.sessions import Session, http_headers, requests
from tests.serve.cluster.conftest import PROGRAM

pytestmark = pytest.mark.cluster

AGENTS, TURNS = 8, 3
SIZES = ("--max-model-len", "16384", "--page-size", "16", "--max-num-seqs", "4", "--max-prefill-tokens", "256")
FOUR = ("--replicas", "4", "--cpus-per-replica", "0.5", "--kv-pool-bytes", "64MiB")


def hit_rate(model: Path, log: Path, flags: Sequence[str], program: Sequence[str]) -> float:
    """The share of all prompts' tokens that was reused. In each turn every agent asks once, one after another.

    Their sessions share nothing, so that only its own requests can warm an agent's prompt.
    """
    sessions = [Session(number, f"/home/dev/project-{number}", scale=0.02) for number in range(AGENTS)]
    talks = [list(islice(requests(session, header=False), TURNS)) for session in sessions]
    rng, timings = random.Random(0), list[Timing]()
    with running_server(model, *SIZES, *flags, log=log, program=program) as server, httpx.Client(timeout=300) as client:
        for turn in range(TURNS):
            for number in rng.sample(range(AGENTS), AGENTS):
                body = talks[number][turn] | {"max_tokens": 4, "temperature": 1, "top_k": 50}
                timings.append(measure(client, server.url, body, http_headers(sessions[number])))
    return sum(t.cached_tokens for t in timings) / sum(t.prompt_tokens for t in timings)


def test_sessions_find_their_pages_as_on_one_server(model_folder: Path, tmp_path: Path) -> None:
    one = hit_rate(model_folder, tmp_path / "one.log", ("--kv-pool-bytes", "256MiB"), ("-m", "serve"))
    ours = hit_rate(model_folder, tmp_path / "ours.log", FOUR, PROGRAM)
    in_turn = hit_rate(model_folder, tmp_path / "turn.log", (*FOUR, "--routing", "round-robin"), PROGRAM)
    print(f"hit rates: one server {one:.3f}, four replicas {ours:.3f}, in turn {in_turn:.3f}")
    assert ours > in_turn + 0.1
    assert ours > one - 0.01
