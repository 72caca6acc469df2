"""The versions of what is installed."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def installed(name: str) -> str:
    """The version of a package; `unknown` for one that is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def versions() -> str:
    """The versions of this program, of JAX and of Python, in a line."""
    return f"tokenzero {installed('tokenzero')}, jax {installed('jax')}, Python {platform.python_version()}"
