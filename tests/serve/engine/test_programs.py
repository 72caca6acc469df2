"""Programs: each is compiled once, what is needed comes first, and one that fails is done without."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serve.engine.executables import Executables, source_of
from serve.engine.programs import COMPILING, FAILED, PENDING, READY, CompileError, Program, Programs

VECTOR = jax.ShapeDtypeStruct((4,), jnp.float32)
ONES = np.ones(4, np.float32)


@pytest.fixture(scope="module", autouse=True)
def _compile_once() -> None:
    """Each test here compiles its own."""


def scaled(x: jax.Array, by: float) -> jax.Array:
    """A small program."""
    return x * by


def broken(x: jax.Array) -> jax.Array:
    """One that cannot be traced."""
    raise ValueError("a fault of the test\nand more of it")


def add(programs: Programs, rank: int, by: float = 2.0, function: Callable[..., Any] = scaled) -> Program:
    static = {"by": by} if function is scaled else {}
    return programs.add(rank, f"program {rank}", function, (VECTOR,), 0, static=static)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the programs as they are made."""
    made: list[str] = []
    load_or_compile = Programs._load_or_compile

    def noted(programs: Programs, program: Program) -> Any:
        made.append(program.name)
        return load_or_compile(programs, program)

    monkeypatch.setattr(Programs, "_load_or_compile", noted)
    return made


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Programs that wait as they are made: the event that one has begun, and the event on which all go on."""
    begun, go = threading.Event(), threading.Event()
    load_or_compile = Programs._load_or_compile

    def held(programs: Programs, program: Program) -> Any:
        begun.set()
        assert go.wait(60)
        return load_or_compile(programs, program)

    monkeypatch.setattr(Programs, "_load_or_compile", held)
    return begun, go


def test_a_call_compiles_what_is_pending_and_only_once(order: list[str]) -> None:
    programs = Programs()
    program = add(programs, 1)
    assert program.state is PENDING
    assert [program(ONES).tolist() for _ in range(2)] == [[2.0] * 4] * 2
    assert program.state is READY
    assert order == ["program 1"]
    assert programs.by_state() == {"pending": 0, "compiling": 0, "ready": 1, "failed": 0}
    assert programs.compiled == 1
    assert programs.compile_seconds > 0


def test_the_background_gives_way_to_requests_and_goes_on_where_they_never_end(
    order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, running = Programs(), threading.Event()
    for rank in range(3):
        add(programs, rank)
    running.set()
    programs.busy = running.is_set
    programs.start()
    assert programs.thread
    programs.thread.join(0.2)
    assert order == []
    running.clear()
    programs.thread.join(60)
    assert len(order) == 3

    monkeypatch.setattr("serve.engine.programs.GIVE_WAY_SECONDS", 0.05)
    busy = Programs()
    for rank in range(3):
        add(busy, rank, 3.0)
    busy.busy = lambda: True
    busy.start()
    assert busy.thread
    busy.thread.join(60)
    assert len(order) == 6


def test_in_the_background_the_latest_need_comes_first_and_then_the_rank(order: list[str]) -> None:
    programs = Programs()
    made = [add(programs, rank, rank) for rank in (3, 1, 2, 4, 5)]
    programs.need([made[3]])
    programs.need([made[4]])
    assert [program.name for program in programs.remaining()] == [f"program {i}" for i in (5, 4, 1, 2, 3)]
    programs.start()
    assert programs.thread
    programs.thread.join(60)
    assert order == [f"program {i}" for i in (5, 4, 1, 2, 3)]
    assert not programs.remaining()


def test_who_needs_a_program_that_is_being_compiled_waits_for_it(held: tuple[threading.Event, threading.Event]) -> None:
    programs, (begun, go) = Programs(), held
    program, found = add(programs, 1), []
    programs.start()
    assert begun.wait(60)
    assert program.state is COMPILING
    asking = threading.Thread(target=lambda: found.append(program(ONES).tolist()))
    asking.start()
    asking.join(0.05)
    assert not found
    go.set()
    asking.join(60)
    assert found == [[2.0] * 4]
    assert programs.compiled == 1


def test_a_program_that_fails_is_logged_once_and_the_others_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    programs = Programs()
    wrong, right = add(programs, 1, function=broken), add(programs, 2)
    with caplog.at_level(logging.WARNING):
        programs.start()
        assert programs.thread
        programs.thread.join(60)
        for _ in range(2):
            with pytest.raises(CompileError, match=r"program 1 cannot be compiled: ValueError: a fault of the test$"):
                wrong(ONES)
    assert (wrong.state, right.state) == (FAILED, READY)
    assert [record.getMessage() for record in caplog.records] == [
        "program 1 cannot be compiled, and is done without: ValueError: a fault of the test"
    ]


def test_a_program_that_a_start_needs_fails_it() -> None:
    programs = Programs()
    with pytest.raises(CompileError, match="a fault of the test"):
        programs.compile([add(programs, 1), add(programs, 2, function=broken)])


def test_stopping_ends_the_background_after_the_program_under_way(
    held: tuple[threading.Event, threading.Event],
) -> None:
    programs, (begun, go) = Programs(), held
    first, second = add(programs, 1), add(programs, 2)
    programs.start()
    assert begun.wait(60)
    programs.stop()
    go.set()
    assert programs.thread
    programs.thread.join(60)
    assert (first.state, second.state) == (READY, PENDING)


def test_waiting_compiles_all_that_is_left_and_outlives_what_fails() -> None:
    programs = Programs()
    add(programs, 1, function=broken)
    add(programs, 2)
    programs.wait()
    assert programs.by_state() == {"pending": 0, "compiling": 0, "ready": 1, "failed": 1}


def test_the_key_tells_programs_apart_by_code_shape_and_static_values() -> None:
    programs = Programs()
    wide = programs.add(1, "wide", scaled, (jax.ShapeDtypeStruct((8,), jnp.float32),), 0, static={"by": 2.0})
    donated = programs.add(1, "donated", scaled, (VECTOR,), 0, donate=(0,), static={"by": 2.0})
    others = [add(programs, 1, 3.0), add(programs, 1, function=broken), wide, donated]
    keys = {program.key for program in (add(programs, 1), *others)}
    assert len(keys) == 5
    assert add(programs, 9).key == add(programs, 1).key


def test_the_key_is_of_the_source_that_this_process_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "edited_meanwhile.py"
    source.write_text("def double(x):\n    return x * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("edited_meanwhile").double
    programs = Programs()
    before = programs.add(1, "before", function, (VECTOR,), 0)
    source.write_text("def double(x):\n    return x + x\n")
    source_of.cache_clear()
    assert programs.add(1, "after", function, (VECTOR,), 0).key != before.key
    source_of.cache_clear()


def test_what_is_kept_is_loaded_without_compiling_and_the_rest_stays_pending(tmp_path: Path) -> None:
    first_life = Programs(Executables(tmp_path / "executables"))
    add(first_life, 1)
    first_life.wait()
    programs = Programs(Executables(tmp_path / "executables"))
    kept, new = add(programs, 1), add(programs, 2, 3.0)
    assert [program.name for program in programs.load_kept()] == ["program 1"]
    assert (kept.state, new.state) == (READY, PENDING)
    assert (programs.loaded, programs.compiled) == (1, 0)
    assert list(programs.load_kept()) == [], "there is one look for each"
    assert kept(ONES).tolist() == [2.0] * 4
    assert new(ONES).tolist() == [3.0] * 4


def test_what_cannot_be_kept_does_not_keep_the_others_from_being_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs(Executables(tmp_path / "executables"))
    first, second = add(programs, 1), add(programs, 2, 3.0)

    def full(*_: Any) -> None:
        raise MemoryError("a fault of the test")

    monkeypatch.setattr(Executables, "save", full)
    programs.start()
    assert programs.thread
    programs.thread.join(60)
    assert (first.state, second.state) == (READY, READY)
