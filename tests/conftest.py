"""Compiled steps are kept between tests, servers and runs; the shapes that model/ states are checked."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from tests.helpers.shapes import checked

CACHE = Path(__file__).parent.parent / ".cache" / "tests"
MOST_MAPPINGS = 20_000  # that modules leave to the next

# In the environment, so that server processes find it too; set before anything imports JAX.
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "tokenzero" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Nothing here leaves the loopback address, and each HTTP client would read all certificates, for 20 ms.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(CACHE)
if sys.version_info >= (3, 12):  # whose JAX interprets the GPU kernels
    # The size of XLA's thread pool, in which the interpreter's warpgroups wait for each other: with two they starve.
    os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))


# Before anything imports model/.
jaxtyping.install_import_hook("model", f"{checked.__module__}.{checked.__name__}")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    """Unmap what modules compiled before it is too much: an engine takes 1,400 mappings, and at 65,530 Linux ends the
    process."""
    yield
    if mapping_count() < MOST_MAPPINGS:
        return
    gc.collect()
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    gc.collect()


def mapping_count() -> int:
    """The memory mappings of this process; none where the system does not list them."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0
