"""Builds the CPU kernels with the system's C++ compiler, once for each machine, and hands them to JAX.

The library is kept in the user's cache under a name that says what it was built from and for. It is built for this
machine's processor; `TOKENZERO_CPU_MARCH` names another one as the compiler spells it, such as x86-64-v3 for AVX2.
Without a compiler, or with `TOKENZERO_CPU_KERNEL=off`, there are none, and XLA does their work.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import jax

log = logging.getLogger("tokenzero.kernels")

SOURCES = sorted(Path(__file__).parent.glob("*.cc"))
HEADER = Path(__file__).with_name("common.h")
PAGED_ATTENTION, LINEAR = "tokenzero_paged_attention", "tokenzero_linear"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-fast-math", "-fno-math-errno", "-ffp-contract=off")
BUILD_SECONDS = 300


def available() -> bool:
    """Whether JAX can call the kernels here; builds and registers them the first time. Logs once why it cannot.

    Threads that ask while one builds wait for it, and so do other processes of the same user.
    """
    with once:
        return registered()


once = threading.Lock()  # a cache alone would let every thread that comes before the first result build, too


@functools.cache
def registered() -> bool:
    """Build and register the kernels; whether that went well."""
    if os.environ.get("TOKENZERO_CPU_KERNEL") == "off":
        return False
    try:
        library = ctypes.CDLL(str(built()))
        for target in (PAGED_ATTENTION, LINEAR):
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except Exception as error:  # whatever it is, XLA can do without
        log.warning("the model runs on XLA alone, without the CPU kernels: %s", error)
        return False
    return True


def built() -> Path:
    """The kernels' library, built unless the cache has it. Raises RuntimeError where it cannot be built."""
    compiler = compiler_command()
    command = [*compiler, *FLAGS, target(), "-I", jax.ffi.include_dir()]
    files = (path.read_bytes() for path in (*SOURCES, HEADER))
    parts = (*files, repr(command[1:]).encode(), compiler_version(compiler), processor().encode())
    name = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenzero" / "kernels"
    library = cache / f"kernels-{version('jaxlib')}-{name}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    # Under a name of its own first: not every file system has locks, and a process may end at any time.
    with locked(cache), tempfile.TemporaryDirectory(dir=cache) as folder:
        if library.exists():  # built while this process waited
            return library
        log.info("building the CPU kernels: once on this machine, a few seconds")
        made = Path(folder) / library.name
        try:
            subprocess.run(
                [*command, *map(str, SOURCES), "-o", str(made)],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=BUILD_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
            raise RuntimeError(f"{compiler[0]} failed: {lines[0] if lines else error}") from None
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{compiler[0]} was not done after {BUILD_SECONDS} s") from None
        with made.open("rb+") as file:
            os.fsync(file.fileno())  # a library that a crash has cut short would take down whoever loads it
        made.replace(library)
    return library


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, where its file system has locks; the lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def target() -> str:
    """The compiler's option for the processor to build for: $TOKENZERO_CPU_MARCH, or this machine's."""
    if march := os.environ.get("TOKENZERO_CPU_MARCH"):
        return f"-march={march}"
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def compiler_command() -> list[str]:
    """$CXX, or the first C++ compiler in the path. Raises RuntimeError where there is none."""
    if given := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(given[0]) is None:
            raise RuntimeError(f"CXX is {given[0]!r}, which is no program: install it, or unset CXX")
        return given
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise RuntimeError(f"no C++ compiler is installed: expected one of {', '.join(COMPILERS)}, or CXX to name one")


def compiler_version(compiler: list[str]) -> bytes:
    """What the compiler says of itself; nothing if it says nothing."""
    return subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout


def processor() -> str:
    """What `native` means here: the machine and, where the system tells it, what its processor can."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return " ".join([platform.machine(), platform.processor(), *sorted(set(features))])
