import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a program of storage_children.py in a process of its own."""
    started = []

    def start(*arguments: object) -> subprocess.Popen:
        here = Path(__file__).parent
        command = [sys.executable, str(here / "storage_children.py"), *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(here.parent.parent)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)
