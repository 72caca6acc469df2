"""How the CPU kernels are built: for which processors, with which compilers, once, and what happens without them."""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.kernels.cpu import build

has_compiler = any(shutil.which(name) for name in build.COMPILERS)
needs_kernel = pytest.mark.skipif(not build.available(), reason="the CPU kernel cannot be built here")
FOLDER = Path(__file__).parent
# Processors that this one is not: what the compiler takes them for, and what this one must have to run their code.
# Tuned for Zen 3, GCC leaves long sums unfused where it may decide; whoever sets CXX may ask for loose arithmetic.
PROCESSORS = {
    "AVX2": ("x86-64-v3", "-mtune=znver3 -ffast-math", {"avx2", "fma"}),
    "SSE": ("x86-64-v2", "", {"sse4_2"}),
}

# Which of them every run of the tests repeats: those of equal bits, and one with weights of 8 and of 4 bits.
QUICK = "same_bits or bits_are or (dequantised and not (deep or experts or clamped or groups))"


@pytest.mark.skipif(not has_compiler, reason=f"none of {', '.join(build.COMPILERS)} is installed")
def test_the_kernels_build_where_there_is_a_compiler() -> None:
    assert build.available()


def features():
    """What this machine's processor can do, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@needs_kernel
@pytest.mark.parametrize(
    ("name", "tests"),
    [
        ("AVX2", QUICK),
        pytest.param("AVX2", "", marks=pytest.mark.slow),
        pytest.param("SSE", "", marks=pytest.mark.slow),
    ],
    ids=["AVX2, in short", "AVX2", "SSE"],
)
def test_the_kernels_are_as_right_and_as_exact_when_built_for_another_processor_and_with_loose_flags(name, tests):
    march, tuning, wanted = PROCESSORS[name]
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip(f"{name} is for x86-64 under Linux; this is {platform.machine()} under {platform.system()}")
    if missing := wanted - features():
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    environment = os.environ | {
        "TOKENZERO_CPU_MARCH": march,
        "CXX": f"{build.compiler_command()[0]} {tuning}",
        "JAX_PLATFORMS": "cpu",
    }
    files = [str(FOLDER / f"test_cpu_{kernel}.py") for kernel in ("layers", "attention", "quantized")]
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-k", tests, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout, done.stdout


def test_a_library_is_named_after_the_processor_that_it_is_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "c++"
    fake.write_text('#!/bin/sh\nfor last; do :; done; [ "$last" = --version ] || echo "$*" > "$last"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TOKENZERO_CPU_MARCH", raising=False)
    native = build.built()
    assert "native" in native.read_text()
    monkeypatch.setenv("TOKENZERO_CPU_MARCH", "x86-64-v3")
    other = build.built()
    assert "-march=x86-64-v3" in other.read_text()
    assert other != native
    monkeypatch.delenv("TOKENZERO_CPU_MARCH")
    assert build.built() == native


ATTEND = """
import logging
import jax
from model.attention import paged_attention
from model.batch import Batch
from model.kernels.cpu.build import available
from model.kernels.reference import reference
from model.kv import KVPool
logging.basicConfig(format="%(message)s")
pool = KVPool(*jax.random.normal(jax.random.key(0), (2, 1, 2, 1, 16, 16)))
batch = Batch(*(jax.numpy.asarray(x, int) for x in ([1], [0, 1], [3], [[1]], [0])), max_chunk=1)
q = 3 * jax.random.normal(jax.random.key(1), (1, 1, 2, 16))
found = paged_attention(q, pool.k[0, 1, :, 3][None], pool.v[0, 1, :, 3][None], pool, 0, batch)
print(bool(abs(found - reference(q, pool, 0, batch)).max() < 1e-5), available())
"""


def attend(cache, **variables):
    """Whether attention is right in a process that keeps its kernels in `cache`, and they are there; what it logs."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-c", ATTEND], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CXX": "/nonexistent/c++"}, "CXX is '/nonexistent/c++', which is not a program"),
        ({"CXX": "", "PATH": ""}, "no C++ compiler is installed: expected one of c++, g++, clang++"),
        ({"CXX": "false"}, "false failed"),
        ({"CXX": 'g++ "'}, "No closing quotation"),
        ({"TOKENZERO_CPU_KERNEL": "off"}, None),
    ],
)
def test_without_a_kernel_xla_does_the_work_and_the_log_says_why(tmp_path, variables, said):
    output, errors = attend(tmp_path, **variables)
    assert output == "True False"
    lines = [line for line in errors.splitlines() if "XLA alone" in line]
    assert len(lines) == (1 if said else 0)
    assert said is None or said in lines[0]
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_costs_the_kernel_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output, errors = attend(tmp_path / "file")
    assert output == "True False"
    assert "XLA alone" in errors


def test_an_empty_cache_variable_means_the_users_own_cache(tmp_path: Path) -> None:
    attend("", HOME=str(tmp_path), CXX="false")
    assert (tmp_path / ".cache" / "tokenzero" / "kernels").is_dir()


def waited_for(folder):
    """Whether a process waits for a lock on this folder, as Linux lists them."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f":{folder.stat().st_ino} " in line for line in lines)


BUILD = """
import logging, os, sys, threading
from model.kernels.cpu import build
logging.basicConfig(format="%(message)s")
found = []
threads = [threading.Thread(target=lambda: found.append(build.available())) for _ in range(8)]
[thread.start() for thread in threads]
print("asking", flush=True)
[thread.join() for thread in threads]
print(found.count(True), flush=True)
"""


@needs_kernel
@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux lists who waits for a lock")
def test_one_compiler_runs_however_many_threads_and_processes_need_the_kernels(tmp_path: Path) -> None:
    # The stand-in says that it has begun to link, and copies the finished library when the event is there.
    started, event = tmp_path / "started", tmp_path / "event"
    os.mkfifo(event)
    fake = tmp_path / "c++"
    fake.write_text(
        f"""#!/bin/sh
for last; do :; done
[ "$last" = --version ] && exit
case "$*" in *" -c "*) exit 0;; esac
echo started >> {started}
read line < {event}
cp {build.built()} "$last"
"""
    )
    fake.chmod(0o755)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(fake), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", BUILD]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert all(process.stdout is not None and process.stdout.readline() == "asking\n" for process in processes)
        while not (started.exists() and waited_for(tmp_path / "tokenzero" / "kernels")):
            time.sleep(0.01)
        event.write_text("go\n")
        assert [process.communicate(timeout=120)[0] for process in processes] == ["8\n", "8\n"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert started.read_text() == "started\n"
    assert [path.suffix for path in (tmp_path / "tokenzero").rglob("*") if path.is_file()] == [".so"]
