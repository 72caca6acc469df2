"""Agent frameworks, each in an environment of its own, on this server: tools run, and answers satisfy their schemas."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from experiments.harness.server import Server

pytestmark = pytest.mark.clients

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-frameworks" / "bin" / "python"
# As in `frameworks.py`, which only that environment can import.
FRAMEWORKS = ["pydantic-ai", "langchain-anthropic", "langchain-openai", "openai-agents", "instructor", "litellm"]


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-frameworks: run `make test-frameworks`")
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_runs_its_tool_and_reads_structured_answers(name: str, server: Server) -> None:
    command = [str(PYTHON), str(Path(__file__).with_name("frameworks.py")), name, server.url]
    environment = os.environ | {"PYTHONPATH": "", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    if name != "instructor":
        assert printed["said"] == "The sum of two and forty is 42."
    assert printed["chosen"]["colour"] in ("red", "green")
    assert printed["chosen"]["sure"] in (True, False)
