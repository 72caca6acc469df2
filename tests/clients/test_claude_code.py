"""Claude Code itself, headless, on this server: what its requests share with the ones before, and that its tools run.

A session is one prompt after another, each in a process of its own that resumes the session from the client's files.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from experiments.harness.server import Server
from tests.helpers.scripted_process import SCRIPT

pytestmark = pytest.mark.clients

Json = dict[str, Any]

THINKING = re.compile("<think>\n(.*?)\n</think>\n\n")


@dataclass(frozen=True)
class Session:
    """What the client printed, prompt by prompt, and the folder that it worked in."""

    folder: Path
    runs: list[list[Json]]

    @property
    def usages(self) -> list[Json]:
        """The server's usage of each request, in order."""
        events = [e["event"] for run in self.runs for e in run if e["type"] == "stream_event"]
        return [event["usage"] for event in events if event["type"] == "message_delta"]

    def blocks(self, kind: str) -> list[Json]:
        """The blocks of a kind that the client printed: what the model said, and what its tools returned."""
        printed = [e["message"]["content"] for run in self.runs for e in run if e["type"] in ("assistant", "user")]
        return [block for content in printed for block in content if block["type"] == kind]


def hold(program: Path, url: str, folder: Path, headers: str = "") -> Session:
    """Type the prompts of SCRIPT one after another, in a session isolated from this machine's user."""
    home, work, session = folder / "home", folder / "work", str(uuid.uuid4())
    home.mkdir()
    work.mkdir()
    environment = {
        "HOME": str(home),
        "PATH": os.defpath,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "any",
        "ANTHROPIC_CUSTOM_HEADERS": headers,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_TELEMETRY": "1",
    }
    how = ["--output-format", "stream-json", "--include-partial-messages", "--verbose", "--allowed-tools", "Bash,Read"]
    runs = []
    for prompt in SCRIPT:
        command = [program, "-p", prompt, "--model", "any-model", "--resume" if runs else "--session-id", session, *how]
        done = subprocess.run(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        runs.append([json.loads(line) for line in done.stdout.splitlines()])
    return Session(work, runs)


def prompt_tokens(usage: Json) -> int:
    """The sum of the three input counts of a usage."""
    return usage["input_tokens"] + usage["cache_creation_input_tokens"] + usage["cache_read_input_tokens"]


def shares(usages: list[Json]) -> list[float]:
    """From the second request on: tokens read, as a share of the prompt before."""
    return [after["cache_read_input_tokens"] / prompt_tokens(before) for before, after in pairwise(usages)]


def table(title: str, usages: list[Json]) -> Table:
    """The requests of a session."""
    shown = Table("request", "prompt tokens", "read", "of the prompt before", title=title)
    for i, (usage, share) in enumerate(zip(usages, [None, *shares(usages)], strict=True), 1):
        counts = (prompt_tokens(usage), usage["cache_read_input_tokens"])
        shown.add_row(str(i), *(f"{count:,}" for count in counts), "" if share is None else f"{share:.2%}")
    return shown


def check_conversation(session: Session) -> None:
    """The client showed every answer and ran every call, and no request was repeated."""
    said = [answer for answers in SCRIPT.values() for answer in answers]
    assert len(session.usages) == len(said)
    assert [block["thinking"] for block in session.blocks("thinking")] == THINKING.findall("".join(said))
    assert [run[-1]["result"] for run in session.runs] == [THINKING.sub("", said[-1]) for said in SCRIPT.values()]
    results = [block["content"] for block in session.blocks("tool_result")]
    assert len(results) == 3
    assert (session.folder / "answer.txt").read_text() == "42\n"
    assert "1 answer.txt" in results
    assert any(result.startswith("1\t42\n") for result in results)  # numbered lines


@pytest.mark.parametrize("claude_code", ["2.1.179", "2.1.331"], indirect=True)
def test_each_request_reads_all_that_the_one_before_has_computed(
    claude_code: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = hold(claude_code, server.url, tmp_path)
    with capsys.disabled():
        Console().print("", table(f"Claude Code {claude_code.parent.name}, preamble stripped", session.usages))
    check_conversation(session)
    assert min(shares(session.usages)) >= 0.99
    # What was sampled is not computed again either; its last token never was.
    for before, after in pairwise(session.usages):
        assert after["cache_read_input_tokens"] >= prompt_tokens(before) + before["output_tokens"] - 1


@pytest.mark.parametrize("claude_code", ["2.1.179"], indirect=True)
def test_a_preamble_that_stays_leaves_nothing_to_read(
    claude_code: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = hold(claude_code, server.url, tmp_path, headers="x-tokenzero-normalize: none")
    with capsys.disabled():
        Console().print("", table("Claude Code 2.1.179, preamble kept", session.usages))
    check_conversation(session)
    assert max(shares(session.usages)) < 0.01
