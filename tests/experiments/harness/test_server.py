"""A server as its own process: what a terminal's Ctrl-C reaches."""

from __future__ import annotations

import subprocess
import sys

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
CALLER = f"""
import os, signal, time, httpx
from experiments.harness.server import running_server

with running_server("any", program=("-c", {SERVER!r}), own_group=True) as server:
    try:
        os.killpg(os.getpgrp(), signal.SIGINT)  # as a terminal does
        time.sleep(10)
    except KeyboardInterrupt:
        time.sleep(0.3)
    print(httpx.get(server.url).status_code)
print(server.process.returncode)
"""


def test_ctrl_c_ends_what_the_caller_does_and_leaves_a_server_of_its_own_group_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALLER], capture_output=True, text=True, timeout=60, start_new_session=True, check=False
    )
    assert done.stdout.split() == ["200", "-15"], done.stderr
