"""Releases of Claude Code, fetched once from npm, and a server whose answers are scripted."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.demo_model import DemoConfig, write_demo_model
from experiments.server import Server, running_server

PACKAGE = "@anthropic-ai/claude-code-linux-x64"  # the native program, hundreds of MB
RELEASES = Path.home() / ".cache" / "tokenzero" / "clients" / "claude-code"
OFFLINE = re.compile("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|EHOSTUNREACH|ETIMEDOUT")

# As small as it gets, as the clients' prompts take tens of thousands of tokens.
MODEL = DemoConfig(32, 1, 1, 1, 32, 64, vocab=8192, positions=65_536, corpus_chars=2_000_000)
# With an event that is not the API's: clients that do not know it must not mind.
FLAGS = ("--kv-pool-bytes", "128MiB", "--max-batch", "4", "--enable-streaming-tool-dispatch")


@pytest.fixture(scope="session")
def claude_code(request: pytest.FixtureRequest) -> Path:
    """The program of the release that is the parameter; fetched once, and skips where it cannot be."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip(f"Claude Code is run on Linux on x86_64 only, not on {sys.platform} on {platform.machine()}")
    release = request.param
    folder = RELEASES / release
    if not folder.is_dir():
        if not shutil.which("npm"):
            pytest.skip("npm is not installed, which Claude Code is fetched with")
        RELEASES.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=RELEASES) as scratch:
            # Moved to its place when it is complete.
            command = ["npm", "install", "--ignore-scripts", "--fetch-retries=0", "--no-audit", "--prefix", scratch]
            npm = subprocess.run([*command, f"{PACKAGE}@{release}"], capture_output=True, text=True)
            if npm.returncode and OFFLINE.search(npm.stderr):
                pytest.skip(f"npm cannot be reached, which Claude Code {release} is fetched from: {npm.stderr:.300}")
            assert npm.returncode == 0, npm.stderr
            Path(scratch, "node_modules", PACKAGE).rename(folder)
    return folder / "claude"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server process that says what SCRIPT says, and logs no traceback."""
    folder = tmp_path_factory.mktemp("clients")
    model, log = folder / "model", folder / "server.log"
    write_demo_model(model, config=MODEL)
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(here.parent))
        with running_server(model, *FLAGS, log=log, program=(str(here / "scripted_server.py"),)) as server:
            yield server
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
