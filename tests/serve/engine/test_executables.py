"""Executables on disk: the same bits without tracing, and whatever is wrong with files or folder costs time only."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serve.engine.executables import Executables, environment, write_whole
from serve.engine.programs import Program, Programs

SIZE = 64
MATRIX = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def _compile_once() -> None:
    """Each test here compiles its own."""


def stepped(pool: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A small step: a result, and a pool that is donated and updated in place."""
    return jnp.tanh(x @ pool["k"]), {"k": pool["k"].at[3].set(x[0])}


def declared(folder: Path, most_bytes: int = 1 << 30) -> tuple[Programs, Program]:
    """A process that starts: its programs, none of them compiled."""
    programs = Programs(Executables(folder, most_bytes))
    return programs, programs.add(1, "the step", stepped, ({"k": MATRIX}, MATRIX), (0, {"k": 0}), donate=(0,))


def run(program: Program) -> tuple[np.ndarray, np.ndarray, bool]:
    """The result, the new pool, and whether it lies where the donated one was."""
    rng = np.random.default_rng(0)
    pool, x = ({"k": jnp.asarray(rng.normal(size=MATRIX.shape), jnp.float32)} for _ in range(2))
    place = pool["k"].unsafe_buffer_pointer()
    result, after = program(pool, x["k"])
    assert pool["k"].is_deleted()
    return np.asarray(result), np.asarray(after["k"]), after["k"].unsafe_buffer_pointer() == place


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, tuple[np.ndarray, np.ndarray, bool]]:
    """A folder that has the executable, and what it computes."""
    programs, program = declared(tmp_path / "executables")
    computed = run(program)
    programs.wait()
    assert len(list((tmp_path / "executables").iterdir())) == 1
    return tmp_path / "executables", computed


def test_a_loaded_executable_is_not_traced_and_has_the_same_bits_and_donates(
    kept: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (result, pool, in_place) = kept
    monkeypatch.setattr(Program, "lower", lambda self: pytest.fail("it was lowered again"))
    programs, program = declared(folder)
    found = run(program)
    assert np.array_equal(found[0], result)
    assert np.array_equal(found[1], pool)
    assert found[2] == in_place
    assert (programs.loaded, programs.compiled) == (1, 0)


def test_only_this_user_may_read_what_is_kept(kept: tuple[Path, Any]) -> None:
    folder, _ = kept
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def replaced(name: str, value: str) -> Callable[[bytes], bytes]:
    def change(contents: bytes) -> bytes:
        line, _, payload = contents.partition(b"\n")
        head = json.loads(line)
        (head["environment"] if name in head["environment"] else head)[name] = value
        return json.dumps(head).encode() + b"\n" + payload

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda contents: b"", "does not begin with a line that describes it"),
        (lambda contents: os.urandom(1000), "does not begin with a line that describes it"),
        (lambda contents: contents[:-1], "its checksum is wrong"),
        (lambda contents: contents[:-500] + bytes([contents[-500] ^ 1]) + contents[-499:], "its checksum is wrong"),
        (replaced("jax", "0.1.0"), "it was compiled for jax 0.1.0, expected "),
        (replaced("processor", "another"), "it was compiled for processor another, expected "),
        (replaced("format", "0"), "its format is 0, expected 1"),
    ],
    ids=["empty", "garbage", "truncated", "a flipped bit", "another version", "another processor", "another format"],
)
def test_a_file_that_is_not_whole_or_not_for_here_is_ignored_with_one_line_and_made_again(
    kept: tuple[Path, Any], change: Callable[[bytes], bytes], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, (result, _, _) = kept
    (path,) = folder.iterdir()
    path.write_bytes(change(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        programs, program = declared(folder)
        assert np.array_equal(run(program)[0], result)
        programs.wait()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the step in {path} is ignored, and compiled again: ")
    assert reason in record.getMessage()
    programs, program = declared(folder)
    run(program)
    assert programs.loaded == 1


def test_a_folder_that_cannot_be_used_costs_time_only_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        programs, program = declared(tmp_path / "file" / "executables")
        programs.add(2, "another", stepped, ({"k": MATRIX}, MATRIX), (0, {"k": 0}))
        run(program)
        programs.wait()
    kinds = [record.getMessage().split(" in ")[0].split(" from ")[0] for record in caplog.records]
    assert sorted(kinds) == ["executables are not kept", "executables are not read"]


def test_a_folder_that_others_may_write_to_is_not_used(
    kept: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    kept[0].chmod(0o777)
    programs, program = declared(kept[0])
    run(program)
    assert programs.loaded == 0
    assert "can be written by others" in caplog.text


def test_beyond_the_limit_the_files_go_that_were_used_longest_ago(tmp_path: Path) -> None:
    programs, program = declared(tmp_path)
    for i in range(4):
        path = tmp_path / f"{i}.executable"
        path.write_bytes(bytes(1000))
        os.utime(path, (1000 + i, 1000 + i))
    (tmp_path / "left.part").write_bytes(bytes(9))
    os.utime(tmp_path / "left.part", (1000, 1000))
    run(program)
    programs.wait()
    size = next(p for p in tmp_path.iterdir() if len(p.stem) > 4).stat().st_size
    executables = Executables(tmp_path, size + 2000)
    executables.trim()
    assert sorted(p.name for p in tmp_path.iterdir() if len(p.stem) <= 4) == ["2.executable", "3.executable"]


def test_a_file_that_another_process_deletes_meanwhile_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gone.part").symlink_to("nowhere")  # listed, and not there
    programs, program = declared(tmp_path)
    with caplog.at_level(logging.WARNING):
        run(program)
        programs.wait()
    assert not caplog.records


@pytest.mark.parametrize(("option", "value"), [("jax_random_seed_offset", 1), ("jax_high_dynamic_range_gumbel", True)])
def test_an_option_that_changes_what_is_computed_changes_the_name(option: str, value: Any) -> None:
    before, found = environment(), getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        assert environment() != before
    finally:
        jax.config.update(option, found)


CHILD = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from serve.engine.executables import write_whole
{body}
"""


def child(body: str, **values: Any) -> subprocess.Popen[bytes]:
    code = CHILD.format(root=str(ROOT), body=body.format(**values))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    body = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(Path({folder!r}) / "a.executable", bytes(5000))
except OSError:
    sys.exit(7)
"""
    assert child(body, folder=str(tmp_path)).wait(60) == 7
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_while_it_writes_leaves_whole_files_only(tmp_path: Path) -> None:
    body = """
print("begun", flush=True)
while True:
    write_whole(Path({folder!r}) / "a.executable", b"x" * 3_000_000)
"""
    writing = child(body, folder=str(tmp_path))
    assert writing.stdout
    assert writing.stdout.readline() == b"begun\n"
    deadline = time.monotonic() + 30
    while not (tmp_path / "a.executable").exists():
        assert time.monotonic() < deadline
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    assert (tmp_path / "a.executable").stat().st_size == 3_000_000
    assert all(path.suffix == ".part" for path in tmp_path.iterdir() if path.name != "a.executable")


def test_a_file_that_cannot_be_replaced_leaves_no_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "a.executable" / "inner").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.executable"):
        write_whole(tmp_path / "a.executable", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.executable"]
