"""Releases of Claude Code, Codex and Chromium, fetched once from npm, and a server whose answers are scripted."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.harness.server import Server, running_server
from experiments.screenshot import CHROMIUM
from experiments.workloads.demo_model import DemoConfig, write_demo_model

RELEASES = Path.home() / ".cache" / "tokenzero" / "clients"  # hundreds of MB each
OFFLINE = re.compile("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|EHOSTUNREACH|ETIMEDOUT")

# As small as it gets, as the clients' prompts take tens of thousands of tokens.
MODEL = DemoConfig(32, 1, 1, 1, 32, 64, vocab=8192, positions=65_536, corpus_chars=2_000_000)
FLAGS = ("--kv-pool-bytes", "128MiB", "--max-num-seqs", "4")


@pytest.fixture(scope="session")
def claude_code(request: pytest.FixtureRequest) -> Path:
    """The program of the release that is the parameter."""
    folder = RELEASES / "claude-code" / request.param
    return fetched("@anthropic-ai/claude-code-linux-x64", request.param, folder) / "claude"


@pytest.fixture(scope="session")
def codex(request: pytest.FixtureRequest) -> Path:
    """The program of the release that is the parameter."""
    folder = RELEASES / "codex" / request.param
    release = f"{request.param}-linux-x64"
    return fetched("@openai/codex", release, folder) / "vendor/x86_64-unknown-linux-musl/bin/codex"


@pytest.fixture(scope="session")
def chromium_program() -> Path:
    """A Chromium for machines without a screen."""
    folder = fetched("@sparticuz/chromium", CHROMIUM.parent.name, CHROMIUM.parent)
    if not CHROMIUM.is_file():
        packed, scratch = folder / "bin" / "chromium.br", CHROMIUM.with_suffix(".part")
        # Node, which comes with npm, reads Brotli.
        unpack = "const fs = require('fs'), [from, to] = process.argv.slice(1);"
        unpack += "fs.writeFileSync(to, require('zlib').brotliDecompressSync(fs.readFileSync(from)))"
        subprocess.run(["node", "-e", unpack, packed, scratch], check=True, timeout=120)
        scratch.chmod(0o755)
        scratch.rename(CHROMIUM)
    return CHROMIUM


def fetched(package: str, release: str, folder: Path) -> Path:
    """The folder, filled with a release from npm unless it is there; skips if it cannot be downloaded."""
    return installed(package, release, folder, Path(package))


def with_modules(package: str, release: str) -> Path:
    """A folder `node_modules` with a release from npm and all that it depends on; skips likewise."""
    return installed(package, release, RELEASES / package.rpartition("/")[2] / release / "node_modules", Path())


def installed(package: str, release: str, folder: Path, part: Path) -> Path:
    """The folder, filled with a part of `node_modules` after the installation of a release, unless it is there."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip(f"{package} is run on Linux on x86_64 only, not on {sys.platform} on {platform.machine()}")
    if not folder.is_dir():
        if not shutil.which("npm"):
            pytest.skip(f"npm is not installed, which {package} is fetched with")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            # Moved to its place when it is complete.
            command = ["npm", "install", "--ignore-scripts", "--fetch-retries=0", "--no-audit", "--prefix", scratch]
            npm = subprocess.run([*command, f"{package}@{release}"], capture_output=True, text=True)
            if npm.returncode and OFFLINE.search(npm.stderr):
                pytest.skip(f"npm cannot be reached, which {package}@{release} is fetched from: {npm.stderr:.300}")
            assert npm.returncode == 0, npm.stderr
            Path(scratch, "node_modules", part).rename(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server process with scripted answers; it must not log a traceback."""
    with scripted_server(tmp_path_factory.mktemp("clients")) as server:
        yield server


@pytest.fixture(scope="session")
def dispatching_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with an event that is not the API's: the vendor's own clients must not mind."""
    with scripted_server(tmp_path_factory.mktemp("clients"), "--enable-streaming-tool-dispatch") as server:
        yield server


@contextmanager
def scripted_server(folder: Path, *flags: str, command: tuple[str, ...] = ()) -> Iterator[Server]:
    """A server with the answers of `tests.helpers.scripts`, its model and its log in a folder; `command` as serve's."""
    model, log = folder / "model", folder / "server.log"
    write_demo_model(model, config=MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        program = ("-m", "tests.helpers.scripted_process", *command)
        with running_server(model, *FLAGS, *flags, log=log, program=program) as server:
            yield server
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
