"""Processes that share a store with the tests, and what they are asked to do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a program of tests/helpers/storage_children.py in a process of its own."""
    started = []

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.helpers.storage_children", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, env=env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Partner:
    """A process that runs the calls of an Actor that it is sent, one at a time."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            assert answer, self.process.stderr.read().decode()[-2000:]
            return json.loads(answer)

        return call


@pytest.fixture
def partners(child) -> list[Partner]:
    """Two such processes."""
    return [Partner(child("obey")) for _ in range(2)]


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
