"""Builds the CPU kernels with the system's C++ compiler, once for each machine, and hands them to JAX.

The library is kept in the user's cache, with a hash of its sources, flags, compiler and processor in its name. It is
built for this machine's processor; `TOKENZERO_CPU_MARCH` names another one as the compiler spells it, such as x86-64-v3
for AVX2. Without a compiler, or with `TOKENZERO_CPU_KERNEL=off`, XLA does the kernels' work.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import jax

log = logging.getLogger("tokenzero.kernels")

SOURCES = sorted(Path(__file__).parent.glob("*.cc"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
PAGED_ATTENTION, LAYERS, HEAD, PACK, SCATTER_PAGES = TARGETS = (
    "tokenzero_paged_attention",
    "tokenzero_layers",
    "tokenzero_head",
    "tokenzero_pack",
    "tokenzero_scatter_pages",
)
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-fast-math", "-fno-math-errno", "-ffp-contract=off")
BUILD_SECONDS = 300


def available() -> bool:
    """Whether JAX can call the kernels here; builds and registers them the first time. If not, logs once why.

    Other threads, and other processes of the same user, wait for a build that is under way.
    """
    with once:
        return registered()


once = threading.Lock()  # functools.cache alone would let several threads build at once


@functools.cache
def registered() -> bool:
    """Build and register the kernels; return whether that succeeded."""
    if os.environ.get("TOKENZERO_CPU_KERNEL") == "off":
        return False
    try:
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library(), target)), platform="cpu")
    except Exception as error:  # XLA can do without the kernels, so no failure is fatal
        log.warning("the model runs on XLA alone, without the CPU kernels: %s", error)
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels' library. Raises RuntimeError if it cannot be built, OSError if it cannot be loaded."""
    return ctypes.CDLL(str(built()))


def built() -> Path:
    """The path of the kernels' library, built unless it is cached. Raises RuntimeError if it cannot be built."""
    compiler = compiler_command()
    command = [*compiler, *FLAGS, target(), "-I", jax.ffi.include_dir()]
    files = (path.read_bytes() for path in (*SOURCES, *HEADERS))
    inputs = (*files, repr(command[1:]).encode(), compiler_version(compiler), processor().encode())
    name = hashlib.sha256(b"\0".join(hashlib.sha256(data).digest() for data in inputs)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenzero" / "kernels"
    library = cache / f"kernels-{version('jaxlib')}-{name}.so"
    if library.exists():
        return library
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is loaded from there runs
    # Under a temporary name first: not every file system has locks, and a process may end at any time.
    with locked(cache), tempfile.TemporaryDirectory(dir=cache) as folder:
        if library.exists():  # built while this process waited
            return library
        log.info("building the CPU kernels: once on this machine, a few seconds")
        made = Path(folder) / library.name
        objects = [made.with_name(f"{source.stem}.o") for source in SOURCES]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda source, to: run(*command, "-c", str(source), "-o", str(to)), SOURCES, objects))
        run(*command, *map(str, objects), "-o", str(made))
        with made.open("rb+") as file:
            os.fsync(file.fileno())  # loading a library that a crash cut short would end the process
        made.replace(library)
    return library


def run(*command: str) -> None:
    """Run the compiler. Raises RuntimeError with its first error, or if it takes too long."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        raise RuntimeError(f"{command[0]} failed: {lines[0] if lines else error}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} was not done after {BUILD_SECONDS} s") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, if its file system has locks; the lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def target() -> str:
    """The compiler option that names the processor: $TOKENZERO_CPU_MARCH, or this machine's."""
    if march := os.environ.get("TOKENZERO_CPU_MARCH"):
        return f"-march={march}"
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def compiler_command() -> list[str]:
    """$CXX, or the first C++ compiler in the path. Raises RuntimeError if there is none."""
    if given := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(given[0]) is None:
            raise RuntimeError(f"CXX is {given[0]!r}, which is not a program: install it, or unset CXX")
        return given
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise RuntimeError(f"no C++ compiler is installed: expected one of {', '.join(COMPILERS)}, or CXX to name one")


def compiler_version(compiler: list[str]) -> bytes:
    """The compiler's output of --version; empty if it has none."""
    return subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout


def processor() -> str:
    """What `native` means here: the machine and, where the system lists them, its processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return " ".join([platform.machine(), platform.processor(), *sorted(set(features))])
