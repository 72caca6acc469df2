"""How a process that serves is set up: JAX, and what it does without."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path

from cache.private import close_to_others, make_folder

# Triton's matrix products read a layer's slice of the stacked weights from a copy: 14 GB of copies in each step of an
# 8B llama. From JAX 0.11.2 on, cuBLAS's read the slice where it is (`experiments.gpu.launches` counts both).
GPU_FLAG = "--xla_gpu_enable_triton_gemm"


def user_cache() -> Path:
    """The folder for files of this user that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenzero"


def set_up_jax() -> None:
    """Set JAX up, before it is imported: one pool gets the GPU's memory, and small functions are kept on disk.

    The engine's programs are kept by serve.engine.executables.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        os.environ["XLA_FLAGS"] = with_gpu_flag(os.environ.get("XLA_FLAGS", ""))
    import jax

    make_folder_of_this_user(user_cache())
    jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def make_folder_of_this_user(folder: Path) -> None:
    """Make a folder, and close it to others, as far as that is possible; whoever writes there finds out if not."""
    with suppress(OSError):
        make_folder(folder)
    close_to_others(folder)


def with_gpu_flag(flags: str) -> str:
    """XLA_FLAGS with cuBLAS for matrix products, unless they say who computes them."""
    return flags if GPU_FLAG in flags else f"{flags} {GPU_FLAG}=false".strip()


def leave_out_torch() -> None:
    """Keep transformers, of which only tokenizers are used, from importing torch where that is installed: it takes 1 s.

    A module that is None cannot be imported: https://docs.python.org/3/library/sys.html#sys.modules
    """
    if "transformers" not in sys.modules:  # where it is, it may know already that torch is there
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
