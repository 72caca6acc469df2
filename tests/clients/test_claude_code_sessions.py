"""Claude Code on this server with pictures, PDFs, searched tools, helpers, plans and compaction."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments.harness.server import Server
from tests.clients.claude_code import Session, hold, shares, table
from tests.helpers import scripts
from tests.helpers.media import PNG, pdf

pytestmark = pytest.mark.clients

RELEASES = ["2.1.331", "2.1.332"]
MCP_SERVER = Path(__file__).parents[1] / "helpers" / "mcp_server.py"


def show(capsys: pytest.CaptureFixture[str], program: Path, what: str, session: Session) -> None:
    """Print what each request of a session read."""
    with capsys.disabled():
        Console().print("", table(f"Claude Code {program.parent.name}, {what}", session.usages))


@pytest.mark.parametrize("claude_code", RELEASES, indirect=True)
def test_a_picture_and_a_pdf_in_the_history_cost_no_turn(
    claude_code: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "dot.png").write_bytes(PNG)
    (work / "paper.pdf").write_bytes(pdf("A paper about prefix caches."))
    session = hold(claude_code, server.url, tmp_path, scripts.CLAUDE_CODE_MEDIA)
    show(capsys, claude_code, "a picture and a PDF", session)
    assert not session.failed
    assert session.results == [answers[-1] for answers in scripts.CLAUDE_CODE_MEDIA.values()]
    assert "image" in json.dumps(session.blocks("tool_result"))  # it was read as a picture
    assert min(shares(session.usages)) >= 0.99


@pytest.mark.parametrize("claude_code", RELEASES, indirect=True)
def test_a_tool_that_is_found_by_search_is_appended(
    claude_code: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"demo": {"command": sys.executable, "args": [str(MCP_SERVER)]}}}))
    flags = [["--mcp-config", str(config), "--strict-mcp-config"]] * 3
    session = hold(
        claude_code, server.url, tmp_path, scripts.CLAUDE_CODE_DEFERRED,
        tools="ToolSearch,NotebookEdit,mcp__demo__add", flags=flags,
    )  # fmt: skip
    show(capsys, claude_code, "tools found by search", session)
    assert session.results == [answers[-1] for answers in scripts.CLAUDE_CODE_DEFERRED.values()]
    assert "42" in json.dumps(session.blocks("tool_result"))  # the MCP server has added
    assert min(shares(session.usages)) >= 0.99


@pytest.mark.parametrize("claude_code", RELEASES, indirect=True)
def test_a_helper_does_not_cost_the_main_agent_its_prefix(
    claude_code: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [prompt for prompt in scripts.CLAUDE_CODE_SUBAGENT if prompt != "Count the files here."]
    session = hold(claude_code, server.url, tmp_path, prompts, tools="Bash,Read,Agent,Task")
    show(capsys, claude_code, "a sub-agent", session)
    assert session.results == [scripts.CLAUDE_CODE_SUBAGENT[prompt][-1] for prompt in prompts]
    assert "There are none." in json.dumps(session.blocks("text"))  # the helper said it
    assert min(shares(session.usages)) >= 0.99


@pytest.mark.parametrize("claude_code", RELEASES, indirect=True)
def test_a_plan_is_made_and_carried_out(
    claude_code: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [["--permission-mode", "plan"]]
    session = hold(claude_code, server.url, tmp_path, scripts.CLAUDE_CODE_PLAN, flags=flags)
    show(capsys, claude_code, "a plan", session)
    assert session.results == [answers[-1] for answers in scripts.CLAUDE_CODE_PLAN.values()]
    assert (session.folder / "plan.txt").read_text() == "42\n"


@pytest.mark.parametrize("claude_code", RELEASES, indirect=True)
def test_a_compacted_session_goes_on(
    claude_code: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = scripts.CLAUDE_CODE
    session = hold(claude_code, server.url, tmp_path, [first, "/compact", *rest])
    show(capsys, claude_code, "compacted", session)
    assert not session.failed
    assert session.results[-1] == "You are welcome."
