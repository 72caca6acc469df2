"""Codex itself, headless, on this server: that its tools run, and what its prompts share with the ones before.

A session is one prompt after another, each in a process of its own that resumes the session from the client's files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.harness.server import Server
from tests.clients.records import requests_of, table
from tests.helpers.media import PNG
from tests.helpers.scripts import CODEX, CODEX_IMAGE, CODEX_MCP

pytestmark = pytest.mark.clients

Json = dict[str, Any]

MCP_SERVER = Path(__file__).parents[1] / "helpers" / "mcp_server.py"

CONFIG = """
model = "any-model"
model_provider = "local"
sandbox_mode = "danger-full-access"
[model_providers.local]
name = "local"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "LOCAL_KEY"
request_max_retries = 0
stream_max_retries = 0
"""


def hold(program: Path, url: str, folder: Path, prompts: Iterable[str], config: str = CONFIG) -> list[list[Json]]:
    """Type the prompts one after another; what the client printed, prompt by prompt."""
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir(exist_ok=True)
    (home / "config.toml").write_text(config.format(url=url))
    environment = {"HOME": str(home), "CODEX_HOME": str(home), "PATH": os.defpath, "LOCAL_KEY": "any"}
    runs: list[list[Json]] = []
    for prompt in prompts:
        how = ["resume", "--last"] if runs else []
        command = [program, "exec", *how, "--json", "--skip-git-repo-check", prompt]
        done = subprocess.run(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        runs.append([json.loads(line) for line in done.stdout.splitlines()])
    return runs


def items(runs: list[list[Json]], kind: str) -> list[Json]:
    """What the client printed of a kind."""
    return [e["item"] for run in runs for e in run if e["type"] == "item.completed" and e["item"]["type"] == kind]


def shares(runs: list[list[Json]]) -> list[float]:
    """Tokens read as a share of all tokens that were sent, for each prompt."""
    totals = [run[-1]["usage"] for run in runs]  # of the whole session so far
    usages = [totals[0]] + [{key: b[key] - a[key] for key in b} for a, b in pairwise(totals)]
    return [usage["cached_input_tokens"] / usage["input_tokens"] for usage in usages]


@pytest.mark.parametrize("codex", ["0.169.0", "0.171.0"], indirect=True)
def test_a_session_runs_its_tools_and_reads_all_that_came_before(
    codex: Path, dispatching_server: Server, tmp_path: Path
) -> None:
    runs = hold(codex, dispatching_server.url, tmp_path, CODEX)
    said = [item["text"] for item in items(runs, "agent_message")]
    assert said == ["I write it.", *(answers[-1].split("</think>\n\n")[-1] for answers in CODEX.values())]
    assert (tmp_path / "work" / "number.txt").read_text() == "42\n"
    assert [item["aggregated_output"] for item in items(runs, "command_execution")] == ["", "42\n", "1 number.txt\n"]
    first, *later = shares(runs)
    assert first > 0.49  # all of the second prompt, none of the first
    assert min(later) > 0.95


@pytest.mark.parametrize("codex", ["0.171.0"], indirect=True)
def test_a_picture_in_the_history_costs_no_turn(
    codex: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {record["id"] for record in requests_of(server)}
    work = tmp_path / "work"
    work.mkdir()
    (work / "dot.png").write_bytes(PNG)
    runs = hold(codex, server.url, tmp_path, CODEX_IMAGE)
    said = [item["text"] for item in items(runs, "agent_message")]
    assert said == [answers[-1] for answers in CODEX_IMAGE.values()]
    records = [record for record in reversed(requests_of(server)) if record["id"] not in known]
    with capsys.disabled():
        Console().print("", table("Codex 0.171.0, a picture", records))
    for before, after in pairwise(records):
        assert after["reused_tokens"] >= 0.99 * before["prompt_tokens"]
    assert min(shares(runs)[1:]) > 0.95


@pytest.mark.parametrize("codex", ["0.171.0"], indirect=True)
def test_the_tools_of_a_session_without_a_model_name_run(codex: Path, server: Server, tmp_path: Path) -> None:
    config = "\n".join(line for line in CONFIG.splitlines() if not line.startswith("model ="))
    runs = hold(codex, server.url, tmp_path, CODEX, config)
    assert (tmp_path / "work" / "number.txt").read_text() == "42\n"
    assert min(shares(runs)[1:]) > 0.95


@pytest.mark.parametrize("codex", ["0.171.0"], indirect=True)
def test_a_tool_of_an_mcp_server_runs(codex: Path, server: Server, tmp_path: Path) -> None:
    mcp = f'[mcp_servers.demo]\ncommand = "{sys.executable}"\nargs = ["{MCP_SERVER}"]\n'
    runs = hold(codex, server.url, tmp_path, CODEX_MCP, CONFIG + mcp)
    assert "42" in json.dumps(items(runs, "mcp_tool_call"))
    assert [item["text"] for item in items(runs, "agent_message")] == [CODEX_MCP[prompt][-1] for prompt in CODEX_MCP]
