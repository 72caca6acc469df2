"""Codex itself, headless, on this server: that its tools run, and what its prompts share with the ones before.

A session is one prompt after another, each in a process of its own that resumes the session from the client's files.
"""

from __future__ import annotations

import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from experiments.harness.server import Server
from tests.helpers.scripted_process import CODEX_SCRIPT

pytestmark = pytest.mark.clients

Json = dict[str, Any]

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


def hold(program: Path, url: str, folder: Path) -> list[list[Json]]:
    """Type the prompts one after another; what the client printed, prompt by prompt."""
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    (home / "config.toml").write_text(CONFIG.format(url=url))
    environment = {"HOME": str(home), "CODEX_HOME": str(home), "PATH": os.defpath, "LOCAL_KEY": "any"}
    runs = []
    for prompt in CODEX_SCRIPT:
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


@pytest.mark.parametrize("codex", ["0.169.0"], indirect=True)
def test_a_session_runs_its_tools_and_reads_all_that_came_before(codex: Path, server: Server, tmp_path: Path) -> None:
    runs = hold(codex, server.url, tmp_path)
    said = [item["text"] for item in items(runs, "agent_message")]
    assert said == ["I write it.", *(answers[-1].split("</think>\n\n")[-1] for answers in CODEX_SCRIPT.values())]
    assert (tmp_path / "work" / "number.txt").read_text() == "42\n"
    assert [item["aggregated_output"] for item in items(runs, "command_execution")] == ["", "42\n", "1 number.txt\n"]
    # Counts are those of the whole session so far.
    totals = [run[-1]["usage"] for run in runs]
    first, *later = [totals[0]] + [{key: b[key] - a[key] for key in b} for a, b in pairwise(totals)]
    assert first["cached_input_tokens"] / first["input_tokens"] > 0.49  # all of the second prompt, none of the first
    for usage in later:
        assert usage["cached_input_tokens"] / usage["input_tokens"] > 0.95
