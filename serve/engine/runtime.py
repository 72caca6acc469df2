"""How JAX is set up in a process that serves."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder for files of this user that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenzero"


def set_up_jax() -> None:
    """Set JAX up, before it is imported: one pool gets the GPU's memory, and compiled steps are kept on disk."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    import jax

    jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
