"""The server of these tests is a cluster: two replicas that Ray runs, with the same flags."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.harness.server import Server, running_server
from tests.helpers.http import FLAGS

PROGRAM = ("-m", "serve", "cluster")
# Together, the two are as large as the one server.
TWO = ("--replicas", "2", "--cpus-per-replica", "1", "--kv-pool-bytes", "8MiB", "--max-num-seqs", "2")


@pytest.fixture(scope="session")
def server(model_folder: Path, server_log: Path) -> Iterator[Server]:
    """A real cluster with the flags of `tests.helpers.http.FLAGS`."""
    with running_server(model_folder, *FLAGS, *TWO, log=server_log, program=PROGRAM) as running:
        yield running
