"""Engines of experiments share compiled steps within a file, as those of the server's tests do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.compiled_once import compiled_once


@pytest.fixture(scope="module", autouse=True)
def _compile_once() -> Iterator[None]:
    """The engines of a module share what is compiled for them."""
    with compiled_once():
        yield
