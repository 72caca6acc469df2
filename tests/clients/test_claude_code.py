"""Claude Code itself, headless, on this server: what its requests share with the ones before, and that its tools run.

A session is one prompt after another, each in a process of its own that resumes the session from the client's files.
`test_claude_code_sessions` has pictures, searched tools, sub-agents, plans and compaction.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from experiments.harness.server import Server
from tests.clients.claude_code import Session, hold, prompt_tokens, shares, table
from tests.helpers.scripts import CLAUDE_CODE

pytestmark = pytest.mark.clients

THINKING = re.compile("<think>\n(.*?)\n</think>\n\n")


def check_conversation(session: Session) -> None:
    """The client showed every answer and ran every call, and no request was repeated."""
    said = [answer for answers in CLAUDE_CODE.values() for answer in answers]
    assert len(session.usages) == len(said)
    assert [block["thinking"] for block in session.blocks("thinking")] == THINKING.findall("".join(said))
    assert [run[-1]["result"] for run in session.runs] == [THINKING.sub("", said[-1]) for said in CLAUDE_CODE.values()]
    results = [block["content"] for block in session.blocks("tool_result")]
    assert len(results) == 3
    assert (session.folder / "answer.txt").read_text() == "42\n"
    assert "1 answer.txt" in results
    assert any(result.startswith("1\t42\n") for result in results)  # numbered lines


@pytest.mark.parametrize("claude_code", ["2.1.179", "2.1.331", "2.1.332"], indirect=True)
def test_each_request_reads_all_that_the_one_before_has_computed(
    claude_code: Path, dispatching_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = hold(claude_code, dispatching_server.url, tmp_path, CLAUDE_CODE)
    with capsys.disabled():
        Console().print("", table(f"Claude Code {claude_code.parent.name}, preamble stripped", session.usages))
    check_conversation(session)
    assert min(shares(session.usages)) >= 0.99
    # What was sampled is not computed again either; its last token never was.
    for before, after in pairwise(session.usages):
        assert after["cache_read_input_tokens"] >= prompt_tokens(before) + before["output_tokens"] - 1


@pytest.mark.parametrize("claude_code", ["2.1.179"], indirect=True)
def test_a_preamble_that_stays_leaves_nothing_to_read(
    claude_code: Path, dispatching_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = hold(claude_code, dispatching_server.url, tmp_path, CLAUDE_CODE, headers="x-tokenzero-normalize: none")
    with capsys.disabled():
        Console().print("", table("Claude Code 2.1.179, preamble kept", session.usages))
    check_conversation(session)
    assert max(shares(session.usages)) < 0.01
