"""A session of Claude Code, as on one server, on a cluster's endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.harness.server import Server
from tests.clients.conftest import claude_code, scripted_server  # noqa: F401, as a fixture
from tests.clients.test_claude_code import (
    test_each_request_reads_all_that_the_one_before_has_computed as each_request_reads_all,
)

pytestmark = pytest.mark.cluster

TWO = ("--replicas", "2", "--cpus-per-replica", "1", "--enable-streaming-tool-dispatch")


@pytest.fixture(scope="module")
def dispatching_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas with scripted answers."""
    with scripted_server(tmp_path_factory.mktemp("claude-code"), *TWO, command=("cluster",)) as server:
        yield server


@pytest.mark.parametrize("claude_code", ["2.1.332"], indirect=True)
def test_claude_code_finds_all_that_its_session_has_computed(
    claude_code: Path,  # noqa: F811
    dispatching_server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    each_request_reads_all(claude_code, dispatching_server, tmp_path, capsys)
