"""Engines of one model and shape share what is compiled for them, so that a module of tests compiles it once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest

import serve.engine.engine  # noqa: F401  # the modules whose compilers are replaced

COMPILERS = ("compile_steps", "compile_page_copies", "compile_comparison")


def shape_of(argument: Any) -> Any:
    """What compiled code depends on: the shapes and dtypes of arrays, and anything else by its value."""
    if callable(argument):
        return None  # reports progress
    leaves, structure = jax.tree.flatten(argument)
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        return structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    return tuple(argument) if isinstance(argument, list) else argument


def remembered(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """The compiler, which returns what it returned for arguments of the same shapes before."""
    known: dict[Any, Any] = {}

    def compile_once(*arguments: Any) -> Any:
        key = tuple(map(shape_of, arguments))
        if key not in known:
            known[key] = compiler(*arguments)
        return known[key]

    return compile_once


@contextmanager
def compiled_once() -> Iterator[None]:
    """A context in which each of COMPILERS runs once for arguments of the same shapes, whichever module calls it."""
    modules = [module for name, module in sys.modules.items() if name.startswith("serve.")]
    with pytest.MonkeyPatch.context() as patch:
        for name in COMPILERS:
            users = [module for module in modules if name in vars(module)]
            for compiler in {vars(module)[name] for module in users}:
                once = remembered(compiler)
                for module in users:
                    if vars(module)[name] is compiler:
                        patch.setattr(module, name, once)
        yield
