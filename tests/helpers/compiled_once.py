"""Engines of one model and shape share what is compiled for them, so that a module of tests compiles it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serve.engine.programs import Program, Programs


@contextmanager
def compiled_once() -> Iterator[None]:
    """A context in which equal programs are compiled once, and an engine's all before its first request."""
    known: dict[str, Any] = {}
    load_or_compile, compile = Programs._load_or_compile, Programs.compile

    def remembered(programs: Programs, program: Program, run: Callable[..., Any]) -> Any:
        if program.key not in known:
            known[program.key] = load_or_compile(programs, program, run)
        return known[program.key]

    def compile_all(programs: Programs, wanted: Any, *rest: Any) -> None:
        compile(programs, wanted, *rest)
        programs.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "_load_or_compile", remembered)
        patch.setattr(Programs, "compile", compile_all)
        yield
