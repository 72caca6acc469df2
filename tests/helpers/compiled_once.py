"""Engines of one model and shape share what is compiled for them, so that a module of tests compiles it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serve.engine.programs import Program, Programs


@contextmanager
def compiled_once() -> Iterator[None]:
    """A context in which equal programs are compiled once."""
    known: dict[str, Any] = {}
    load_or_compile = Programs._load_or_compile

    def remembered(programs: Programs, program: Program) -> Any:
        if program.key not in known:
            known[program.key] = load_or_compile(programs, program)
        return known[program.key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "_load_or_compile", remembered)
        yield
