"""Compiled executables kept on disk, so that a later start neither traces nor lowers.

A file is one line of JSON, which says what the executable was compiled for, then the executable as
`jax.experimental.serialize_executable` makes it. Its name is a hash of the program and of its environment: the source
code, the versions, the device and the options of the compiler. Whatever is wrong with a file or the folder costs time
only: the file is ignored, and the program compiled again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

import model
from cache.private import make_folder
from model.kernels.cpu import build
from model.kernels.dispatch import on_cpu

log = logging.getLogger("tokenzero.engine")

FORMAT = 1
# All files together; beyond it, those that were used longest ago are deleted.
MOST_BYTES = 2 << 30
# A temporary file that is older belongs to a process that was killed.
ABANDONED_SECONDS = 3600
# Options of JAX that change what is compiled.
OPTIONS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel",
)
# Environment variables that do: XLA's own, and the size of its thread pool.
VARIABLES = ("XLA_FLAGS", "NPROC")

Environment = Mapping[str, str]


def environment() -> Environment:
    """What an executable depends on besides its program, by name; registers the kernels that it may call."""
    device = jax.devices()[0]
    kernels = on_cpu() and build.available()
    options = {name: getattr(jax.config, name, None) for name in OPTIONS}
    return {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "tokenzero": own_version(),
        "device": f"{device.platform} {device.device_kind} {device.client.platform_version} x{jax.device_count()}",
        "processor": digest(build.processor()),
        "processors": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "options": repr(options),
        "variables": repr([os.environ.get(name) for name in VARIABLES]),
        "kernels": "on" if kernels else "off",
        "model": model_sources(),
    }


class Compilation(NamedTuple):
    """A compiled program, and its executable as bytes."""

    compiled: jax.stages.Compiled
    payload: bytes  # empty where the backend cannot serialise it
    found: bool  # JAX's own cache had it: then there is no payload


def compile_lowered(lowered: jax.stages.Lowered) -> Compilation:
    """Compile on this thread, and serialise the executable before it runs for the first time.

    XLA on CPUs serialises only what it has compiled itself and not run yet: of an executable from JAX's own cache the
    functions are missing, and a sort that has run holds the address of its comparison.
    """
    hits.seen = False
    compiled = lowered.compile()
    if hits.seen:
        return Compilation(compiled, b"", found=True)
    try:
        payload: bytes = serialize_executable.serialize(compiled)[0]
    except Exception as error:  # JAX's own cache is left then
        log.debug("an executable cannot be serialised: %s", first_line(error))
        payload = b""
    return Compilation(compiled, payload, found=False)


hits = threading.local()  # `seen`: whether JAX's own cache had what this thread compiled


def note_hit(event: str, **_: object) -> None:
    """Take note of a hit in JAX's own cache; JAX calls it on the thread that compiles."""
    if event == "/jax/compilation_cache/cache_hits":
        hits.seen = True


jax.monitoring.register_event_listener(note_hit)


def own_version() -> str:
    """This package's version; empty where it runs without being installed."""
    try:
        return version("tokenzero")
    except PackageNotFoundError:
        return ""


@cache
def model_sources() -> str:
    """A hash of all source files of the model, those of its kernels included."""
    folder = Path(model.__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cc", ".h"))
    return digest("".join(f"{path.relative_to(folder)} {digest(path.read_bytes())}\n" for path in files))


@cache
def source_of(path: str) -> str:
    """A hash of one source file."""
    return digest(Path(path).read_bytes())


def digest(data: str | bytes) -> str:
    """A short SHA-256 in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:32]


class Executables:
    """A folder of executables of this user, mode 0700. Its methods never raise: each kind of trouble is logged once."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.environment = environment()
        self.troubles: set[str] = set()  # kinds that were logged

    def path(self, key: str) -> Path:
        """The file of a program."""
        return self.folder / f"{digest(key + repr(sorted(self.environment.items())))}.executable"

    def load(
        self, key: str, name: str, arguments: Any, result: Any, devices: Sequence[jax.Device]
    ) -> Callable[..., Any] | None:
        """The executable of a program, ready to call on `devices`; None if there is none that can be used.

        `arguments` and `result` are pytrees of the structures that it takes and returns.
        """
        path = self.path(key)
        try:
            contents = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.trouble("read", f"executables are not read from {self.folder}: {error}")
            return None
        try:
            self.check_owner()
            payload = checked(contents, self.environment)
            trees = jax.tree.structure((arguments, {})), jax.tree.structure(result)
            loaded: Callable[..., Any] = serialize_executable.deserialize_and_load(
                payload, *trees, execution_devices=devices
            )
        except Exception as error:  # whatever XLA makes of it, the program can be compiled
            log.warning("%s in %s is ignored, and compiled again: %s", name, path, first_line(error))
            return None
        with suppress(OSError):
            os.utime(path)
        return loaded

    def save(self, key: str, name: str, payload: bytes) -> None:
        """Keep the serialised executable of a program."""
        head = {"format": FORMAT, "program": name, "sha256": full_digest(payload), "environment": self.environment}
        try:
            make_folder(self.folder)
            self.check_owner()
            write_whole(self.path(key), json.dumps(head).encode() + b"\n" + payload)
            self.trim()
        except OSError as error:
            self.trouble("write", f"executables are not kept in {self.folder}: {error}; each start compiles them again")

    def check_owner(self) -> None:
        """Raise OSError if others may write to the folder: to load an executable is to run it."""
        found = self.folder.stat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
            raise PermissionError(f"{self.folder} can be written by others, expected this user's own with mode 0700")

    def trim(self) -> None:
        """Delete the files that were used longest ago, as many as are beyond the limit."""
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process has renamed or deleted it
                found.append((path, path.stat()))
        abandoned = time.time() - ABANDONED_SECONDS
        for path, stat in found:
            if path.suffix == ".part" and stat.st_mtime < abandoned:
                path.unlink(missing_ok=True)
        kept = sorted(((p, s) for p, s in found if p.suffix == ".executable"), key=lambda each: -each[1].st_mtime)
        total = 0
        for path, stat in kept:
            total += stat.st_size
            if total > self.most_bytes:
                path.unlink(missing_ok=True)

    def trouble(self, kind: str, message: str) -> None:
        """Log a kind of trouble the first time."""
        if kind not in self.troubles:
            self.troubles.add(kind)
            log.warning("%s", message)


def checked(contents: bytes, expected: Environment) -> bytes:
    """The executable in a file's contents. Raises ValueError for a file that is torn, or of another environment."""
    line, _, payload = contents.partition(b"\n")
    try:
        head = json.loads(line)
        form, found, sha256 = head["format"], dict(head["environment"]), head["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("it does not begin with a line that describes it") from None
    if form != FORMAT:
        raise ValueError(f"its format is {form}, expected {FORMAT}")
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(f"it was compiled for {name} {found.get(name)}, expected {value}")
    if full_digest(payload) != sha256:
        raise ValueError("it is torn: its checksum is wrong")
    return payload


def full_digest(payload: bytes) -> str:
    """The checksum of a file's executable."""
    return hashlib.sha256(payload).hexdigest()


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file of mode 0600 that appears complete or not at all. Raises OSError."""
    handle, name = tempfile.mkstemp(suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
