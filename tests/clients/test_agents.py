"""Agents from npm, headless, on this server: a tool loop and a second prompt each, and what their requests read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from experiments.harness.server import Server
from tests.clients.conftest import with_modules
from tests.clients.records import requests_of, table
from tests.helpers import scripts

pytestmark = pytest.mark.clients


@dataclass(frozen=True)
class Agent:
    """How an agent is fetched, configured and prompted."""

    package: str
    release: str
    program: str  # within node_modules
    script: scripts.Script
    command: Callable[[str, bool], list[str]]  # the arguments for a prompt, and whether it is not the first
    configure: Callable[[str, Path, Path], None]  # writes files for a URL into the home and the folder of work
    environment: Callable[[str], dict[str, str]] = lambda url: {}
    aside: int = 0  # requests before the session's own, such as for a title
    resumed_share: float = 0.99  # of the prompt before that the last request reads at least

    @property
    def name(self) -> str:
        """The agent and its release."""
        return f"{self.package} {self.release}"


def configure_opencode(url: str, home: Path, work: Path) -> None:
    """Name the server as Anthropic's; its tools run unasked."""
    options = {"baseURL": f"{url}/v1", "apiKey": "any"}
    config = {"provider": {"anthropic": {"options": options}}, "permission": {"bash": "allow"}}
    (work / "opencode.json").write_text(json.dumps({"$schema": "https://opencode.ai/config.json"} | config))


def configure_pi(url: str, home: Path, work: Path) -> None:
    """Name the server as a provider of its own."""
    provider = {"baseUrl": url, "api": "anthropic-messages", "apiKey": "any", "models": [{"id": "local-model"}]}
    folder = home / ".pi" / "agent"
    folder.mkdir(parents=True)
    (folder / "models.json").write_text(json.dumps({"providers": {"local": provider}}))


def configure_nothing(url: str, home: Path, work: Path) -> None:
    """The environment says all."""


def configure_cline(url: str, home: Path, work: Path) -> None:
    """Have the agent write its own file of providers."""
    program = with_modules(CLINE.package, CLINE.release) / CLINE.program
    how = ["auth", "-p", "openai-compatible", "-b", f"{url}/v1", "-k", "any", "-m", "local-model"]
    run([str(program), *how], work, home, {})


OPENCODE = Agent(
    "opencode-linux-x64",
    "1.18.33",
    "opencode-linux-x64/bin/opencode",
    scripts.OPENCODE,
    lambda prompt, goes_on: ["run", *["--continue"] * goes_on, "--model", "anthropic/claude-sonnet-4-5", prompt],
    configure_opencode,
    aside=1,
)
PI = Agent(
    "@earendil-works/pi-coding-agent",
    "0.74.2",
    "@earendil-works/pi-coding-agent/dist/cli.js",
    scripts.PI,
    lambda prompt, goes_on: [*["--continue"] * goes_on, "--provider", "local", "--model", "local-model", "-p", prompt],
    configure_pi,
)
QWEN_CODE = Agent(
    "@qwen-code/qwen-code",
    "0.24.4",
    "@qwen-code/qwen-code/cli-entry.js",
    scripts.QWEN_CODE,
    lambda prompt, goes_on: ["--auth-type", "openai", "--yolo", *["--continue"] * goes_on, "-p", prompt],
    configure_nothing,
    lambda url: {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "any", "OPENAI_MODEL": "local-model"},
    resumed_share=0.94,  # a resumed session lists the folder's files again, in its first message
)
CLINE = Agent(
    "cline",
    "3.0.65",
    "@cline/cli-linux-x64/bin/cline",
    scripts.CLINE,
    lambda prompt, goes_on: [prompt],
    configure_cline,
)
AGENTS = [OPENCODE, PI, QWEN_CODE, CLINE]


def run(command: list[str], work: Path, home: Path, environment: dict[str, str]) -> str:
    """Run a command in a folder, isolated from this machine's user; what it printed."""
    node = Path(shutil.which("node") or "node").parent
    isolated = {"HOME": str(home), "PATH": f"{node}:{os.defpath}", "NO_COLOR": "1"} | environment
    done = subprocess.run(
        command, cwd=work, env=isolated, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def end_processes(home: Path) -> None:
    """End what an agent has left running: Cline starts a process that outlives it."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                process.kill()


@pytest.mark.parametrize("agent", AGENTS, ids=[agent.name for agent in AGENTS])
def test_an_agent_runs_its_tool_and_reads_all_that_came_before(
    agent: Agent, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = with_modules(agent.package, agent.release) / agent.program
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    agent.configure(server.url, home, work)
    start = ["node", str(program)] if program.suffix == ".js" else [str(program)]
    known = {record["id"] for record in requests_of(server)}
    try:
        printed = [
            run([*start, *agent.command(prompt, i > 0)], work, home, agent.environment(server.url))
            for i, prompt in enumerate(agent.script)
        ]
    finally:
        end_processes(home)
    assert (work / "number.txt").read_text() == "42\n"
    for text, answers in zip(printed, agent.script.values(), strict=True):
        assert answers[-1] in text
    records = [record for record in reversed(requests_of(server)) if record["id"] not in known]
    with capsys.disabled():
        Console().print("", table(agent.name, records))
    session = records[agent.aside : agent.aside + 3]
    shares = [after["reused_tokens"] / before["prompt_tokens"] for before, after in pairwise(session)]
    assert shares[0] >= 0.99
    assert shares[1] >= agent.resumed_share
