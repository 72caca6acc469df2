"""A real server as its own process: started on a free port, awaited, ended."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A running server: where it listens and the process it is."""

    url: str
    process: subprocess.Popen[bytes]

    def resident_bytes(self) -> int:
        """Memory that the process holds now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def running_server(
    model: str | Path,
    *flags: str,
    log: Path | None = None,
    program: Sequence[str] = ("-m", "serve"),
    compiled: bool = False,
    own_group: bool = False,
) -> Iterator[Server]:
    """`python -m serve`, or a program with its flags, on a free port: ready when entered, ended when left.

    With `compiled`, it has also compiled every batch shape, so that what is timed runs in the smallest. In an
    `own_group` of processes, a terminal's Ctrl-C goes to the caller alone.
    Raises RuntimeError with the end of its log if it stops before it is ready.
    """
    port = free_port()
    command = [sys.executable, *program, "--model", str(model), "--port", str(port), *flags]
    with open(log, "w") if log else open("/dev/null", "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, process_group=0 if own_group else None
        )
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        wait_until_ready(server, log)
        if compiled:
            wait_until_compiled(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A free port of the loopback address, below those that Linux gives to connections, which could take it again."""
    while True:
        port = secrets.randbelow(12_000) + 20_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until_ready(server: Server, log: Path | None) -> None:
    """Return once the server is ready for requests: `/ready` says so, or `/health` of one that has no such route."""
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(base_url=server.url, timeout=2) as client:  # one: making it takes longer than asking
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                tail = log.read_text()[-2000:] if log else "(no log kept)"
                status = server.process.returncode
                raise RuntimeError(f"the server ended with status {status} before it was ready:\n{tail}")
            if is_ready(client):
                return
            time.sleep(0.05)
    raise RuntimeError(f"the server was not ready after {START_SECONDS} s")


def is_ready(client: httpx.Client) -> bool:
    """Whether a server says that it is ready for requests."""
    try:
        status = client.get("/ready").status_code
        return (client.get("/health").status_code if status == 404 else status) == 200
    except httpx.TransportError:
        return False


def wait_until_compiled(server: Server) -> None:
    """Return once the server has no program left to compile; at once if it does not say."""
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(base_url=server.url, timeout=30) as client:
        while time.monotonic() < deadline:
            if not left_to_compile(client):
                return
            time.sleep(0.2)
    raise RuntimeError(f"the server had not compiled all of its shapes after {START_SECONDS} s")


def left_to_compile(client: httpx.Client) -> float:
    """How many programs a server has not compiled yet, by its metrics; by /ready, where those want a key."""
    metrics = client.get("/metrics")
    if metrics.status_code == 401:
        ready = client.get("/ready").json()
        return float(ready["shapes"] - ready["compiled"])
    left = re.findall(r'^tokenzero_programs\{state="(?:pending|compiling)"\} (\S+)$', metrics.text, re.MULTILINE)
    return sum(map(float, left))
