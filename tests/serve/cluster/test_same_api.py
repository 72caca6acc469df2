"""The tests of one server's API, unchanged, on a cluster's endpoint."""

import pytest

from tests.serve.server.test_app import *  # noqa: F403
from tests.serve.server.test_schemas import *  # noqa: F403
from tests.serve.server.test_sdk import *  # noqa: F403

pytestmark = pytest.mark.cluster
