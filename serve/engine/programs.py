"""The engine's compiled programs: what is ready, what is compiled next, and where it comes from.

A program is loaded from disk, or traced, lowered and compiled, once. Who calls one that is not ready compiles it, or
waits for whoever is at it. The rest is compiled by one thread in the background, one program at a time: first those
that a step could have used, the latest first, then by rank. A low priority of this thread would change nothing: XLA
compiles on threads of its own. Only `Programs` writes the state of a program.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from serve.engine.executables import Compilation, Executables, compile_lowered, digest, first_line, source_of
from serve.engine.runtime import user_cache

log = logging.getLogger("tokenzero.engine")

# The order in the background: greedy sampling and copies of pages are quick to compile, and the first requests are
# faster with them, steps have ranks from here on, and an audit waits for idle time anyway.
GREEDY_RANK, COPIES_RANK, STEPS_RANK, LAST_RANK = 10, 20, 30, 10_000
# The background waits for an idle moment before each program, and no longer than this where there is none.
GIVE_WAY_SECONDS = 2.0
HEAD_START_SECONDS = 0.5  # of a first request that comes as soon as the server is ready
POLL_SECONDS = 0.01


class ProgramState(Enum):
    """Where a program is between its declaration and its first call."""

    PENDING = "pending"
    COMPILING = "compiling"  # or being read from disk
    READY = "ready"
    FAILED = "failed"  # for good: the engine does without it


PENDING, COMPILING, READY, FAILED = ProgramState


class CompileError(RuntimeError):
    """A program cannot be compiled; the message names it and the reason."""


class Program:
    """A pure function for arguments of fixed shapes; a call waits until it is compiled.

    A call raises CompileError for a program that has failed.
    """

    def __init__(
        self,
        programs: Programs,
        rank: int,
        name: str,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        result: Any,
        donate: tuple[int, ...],
        static: Mapping[str, Any],
    ) -> None:
        self.programs, self.rank, self.name, self.function, self.static = programs, rank, name, function, static
        self.arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=programs.place(leaf)), arguments
        )
        self.result, self.donate = result, donate
        # Now: once the source file has changed, its hash would name what is not in this process.
        self.key = self._key()
        self.state = PENDING
        self.needed = 0  # the number of the latest step that could have used it
        self.on_disk = True  # until it was looked for there in vain
        self.compiled: Callable[..., Any] | None = None
        self.error = ""

    def __call__(self, *arguments: Any) -> Any:
        """Run it."""
        return (self.compiled or self.programs.get(self))(*arguments)

    def _key(self) -> str:
        """All that distinguishes it from other programs of one environment; static values by their `repr`."""
        module = sys.modules[self.function.__module__].__file__ or ""
        leaves, structure = jax.tree.flatten(self.arguments)
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        static = sorted((name, repr(value)) for name, value in self.static.items())
        parts = (self.function.__qualname__, source_of(module), str(structure), shapes, static, self.donate)
        if self.programs.mesh is None:
            return repr(parts)
        return repr((*parts, [leaf.sharding for leaf in leaves], self._places()))

    def _places(self) -> Any:
        """Where the result lies on a mesh."""
        return jax.tree.map(self.programs.place, self.result)

    def lower(self, salt: str = "") -> jax.stages.Lowered:
        """Trace and lower it, under a name by which JAX's own cache knows it; it knows none with a fresh salt."""
        function = partial(self.function, **self.static)
        function.__name__ = f"{self.function.__name__}_{digest(self.key + salt)[:8]}"  # type: ignore[attr-defined]
        places = {} if self.programs.mesh is None else {"out_shardings": self._places()}
        return jax.jit(function, donate_argnums=self.donate, **places).lower(*self.arguments)


class Programs:
    """The programs of one engine."""

    def __init__(self, executables: Executables | None = None, mesh: Mesh | None = None) -> None:
        """`executables`: where programs are kept from one process to the next; `mesh`: their devices, if several."""
        self.executables, self.mesh = executables, mesh
        self.all: list[Program] = []
        self.changed = threading.Condition()  # guards the states
        self.unsaved: list[tuple[Program, Compilation]] = []
        self.stopping = False
        self.busy: Callable[[], bool] = lambda: False  # whether requests run, to whom the background gives way
        self.thread: threading.Thread | None = None
        self.requests = 0
        self.compile_seconds = 0.0  # of tracing, lowering and compiling
        self.loaded = 0  # from disk
        self.compiled = 0

    def add(
        self,
        rank: int,
        name: str,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        result: Any,
        donate: tuple[int, ...] = (),
        static: Mapping[str, Any] | None = None,
    ) -> Program:
        """Declare a program. `function(*arguments, **static)` returns the structure of `result`.

        `arguments` are pytrees of arrays, or of their shapes; those that `donate` numbers are donated. On several
        devices, each array lies as its sharding says, in `result` too; what has none lies on each device. The function
        is one of a module's, and it depends on the source of its module and of the model only.
        """
        self.all.append(Program(self, rank, name, function, arguments, result, donate, static or {}))
        return self.all[-1]

    def place(self, leaf: Any) -> NamedSharding | None:
        """Where an argument or a result lies on the devices of the mesh; None without a mesh."""
        if self.mesh is None:
            return None
        given = getattr(leaf, "sharding", None)
        return given if isinstance(given, NamedSharding) else NamedSharding(self.mesh, PartitionSpec())

    def put(self, array: np.ndarray) -> jax.Array:
        """An array on the device, or on each device of the mesh."""
        placed: jax.Array = jax.device_put(array, self.place(None))
        return placed

    # Called from any thread.

    def need(self, programs: Iterable[Program]) -> None:
        """Compile these next: a step could have used them."""
        with self.changed:
            self.requests += 1
            for program in programs:
                program.needed = self.requests

    def get(self, program: Program) -> Callable[..., Any]:
        """The compiled program; compiles it, or waits until it is compiled. Raises CompileError."""
        with self.changed:
            self.changed.wait_for(lambda: program.state is not COMPILING)
            mine = self._take(program)
        if mine:
            self._make(program)
        if program.compiled is None:
            raise CompileError(f"{program.name} cannot be compiled: {program.error}")
        return program.compiled

    def compile(
        self, programs: Iterable[Program], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Compile these now, as many at a time as there are processors. Raises CompileError."""
        wanted = list(programs)
        on_progress(0, len(wanted))
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # XLA compiles without Python's lock
            for done, _ in enumerate(threads.map(self.get, wanted), 1):
                on_progress(done, len(wanted))

    def load_kept(self) -> Iterator[Program]:
        """Load what is kept on disk, one program a turn: each once it is ready."""
        for program in self.remaining():
            if program.on_disk and self._take(program):
                compiled = None
                try:
                    compiled = self._load(program)
                finally:
                    self._set(program, READY if compiled else PENDING, compiled)
                if compiled:
                    yield program

    def wait(self) -> None:
        """Compile all that is left, for a measurement or a test; what fails is left out, as in the background."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for compiled in [threads.submit(self.get, program) for program in self.remaining()]:
                compiled.exception()
        self._save()

    def start(self) -> None:
        """Begin to compile in the background."""
        # Not a daemon: to end Python's threads within XLA would end the process with an error.
        self.thread = threading.Thread(target=self._work, name="tokenzero-compile", daemon=False)
        self.thread.start()

    def stop(self) -> None:
        """End the background thread after the program under way; does not wait for it."""
        self.stopping = True

    def remaining(self) -> list[Program]:
        """What is not compiled yet, the next one first."""
        left = [program for program in self.all if program.state in (PENDING, COMPILING)]
        return sorted(left, key=lambda program: (-program.needed, program.rank))

    def by_state(self) -> dict[str, int]:
        """How many programs are in each state."""
        count = Counter(program.state for program in list(self.all))
        return {state.value: count[state] for state in ProgramState}

    # The background thread.

    def _work(self) -> None:
        begin = time.monotonic() + HEAD_START_SECONDS
        while self._goes_on() and time.monotonic() < begin:
            time.sleep(POLL_SECONDS)
        while self._gives_way() and (program := self._next()):
            self._make(program)
            self._save()
        self._save()

    def _gives_way(self) -> bool:
        """Wait while requests run, for GIVE_WAY_SECONDS at most; False if the thread has to end."""
        end = time.monotonic() + GIVE_WAY_SECONDS
        while self._goes_on() and self.busy() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return self._goes_on()

    def _goes_on(self) -> bool:
        return not self.stopping and threading.main_thread().is_alive()

    def _next(self) -> Program | None:
        with self.changed:
            return next((each for each in self.remaining() if self._take(each)), None)

    # What any thread does with a program that it has taken.

    def _take(self, program: Program) -> bool:
        """Whether the program is the caller's now, to load or to compile: others wait for it."""
        with self.changed:
            mine = program.state is PENDING
            if mine:
                program.state = COMPILING
            return mine

    def _make(self, program: Program) -> None:
        """Load or compile a program that this thread has taken."""
        compiled, error = None, "it was interrupted"
        try:
            compiled = self._load_or_compile(program)
        except Exception as failure:
            error = f"{type(failure).__name__}: {first_line(failure)}"
            log.warning("%s cannot be compiled, and is done without: %s", program.name, error)
        finally:
            self._set(program, READY if compiled else FAILED, compiled, "" if compiled else error)

    def _set(self, program: Program, state: ProgramState, compiled: Callable[..., Any] | None, error: str = "") -> None:
        """Say what has become of a program, to all who wait for it."""
        with self.changed:
            program.state, program.compiled, program.error = state, compiled, error
            self.changed.notify_all()

    def _load(self, program: Program) -> Callable[..., Any] | None:
        """The program as it is kept on disk, where it is; there is one look."""
        devices = jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)
        found = None
        if self.executables and program.on_disk:
            found = self.executables.load(program.key, program.name, program.arguments, program.result, devices)
        program.on_disk = found is not None
        if found:
            with self.changed:
                self.loaded += 1
        return found

    def _load_or_compile(self, program: Program) -> Callable[..., Any]:
        return self._load(program) or self._compile(program)

    def _compile(self, program: Program) -> Callable[..., Any]:
        begin = time.perf_counter()
        compilation = compile_lowered(program.lower())
        with self.changed:
            self.compiled += 1
            self.compile_seconds += time.perf_counter() - begin
            if self.executables:
                self.unsaved.append((program, compilation))
        return compilation.compiled

    def _save(self) -> None:
        """Write to disk what was compiled."""
        while True:
            with self.changed:
                if not self.unsaved:
                    return
                program, compilation = self.unsaved.pop(0)
            try:
                if compilation.found:
                    compilation = compile_lowered(program.lower(salt=os.urandom(8).hex()))
                if self.executables and compilation.payload:
                    self.executables.save(program.key, program.name, compilation.payload)
            except Exception as error:  # it costs a later start time, and nobody else anything
                log.warning("%s is not kept: %s: %s", program.name, type(error).__name__, first_line(error))


def user_programs(mesh: Mesh | None = None) -> Programs:
    """Programs that are kept in the cache of this user."""
    return Programs(Executables(user_cache() / "executables"), mesh)
