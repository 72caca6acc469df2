"""What one key can learn of another's prompts, and who may ask for what: as on one server, on two replicas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.harness.server import Server, running_server
from tests.helpers.http import FLAGS
from tests.serve.cluster.conftest import PROGRAM, TWO
from tests.serve.server.test_isolation import (  # noqa: F401, as tests and fixtures
    TestAdmission,
    TestExtraction,
    TestShares,
    TestShown,
    key_file,
    log,
    of,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server(model_folder: Path, key_file: Path, log: Path) -> Iterator[Server]:  # noqa: F811
    """A cluster with several keys and a store."""
    store = ("--store", str(log.parent / "store"), "--flush-seconds", "0.05")
    flags = (*FLAGS, *TWO, "--api-key-file", str(key_file), *store)
    with running_server(model_folder, *flags, log=log, program=PROGRAM) as running:
        yield running
    assert "Traceback" not in log.read_text()
