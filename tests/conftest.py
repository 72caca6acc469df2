"""Compiled steps are kept between tests, servers and runs: what one test compiled, no other compiles again."""

import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "tests"

# In the environment, so that server processes find it too; set before anything imports JAX.
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "tokenzero" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
