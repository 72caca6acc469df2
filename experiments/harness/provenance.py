"""Where a result comes from: machine, versions and commit, written next to every measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("tokenzero", "jax", "jaxlib", "numpy", "transformers", "tokenizers", "torch")
ROOT = Path(__file__).parents[2]


def provenance(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Machine, versions and commit as plain JSON values; packages that are not installed are left out."""
    return {"machine": machine(), "versions": versions(packages), "commit": commit()}


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, and memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": usable,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def processor() -> str:
    """The processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by package, and Python's."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout this runs from, marked `+` where tracked files have changed; None outside one."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed else "")
