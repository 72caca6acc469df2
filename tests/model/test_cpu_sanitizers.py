"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over random shapes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from model.kernels.cpu import build

FOLDER = Path(__file__).parent
CASE_COUNT = 60
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2100),  # longer than its processes have
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or shutil.which("g++") is None,
        reason="the sanitizers' libraries are loaded ahead of Python as GCC has them under Linux",
    ),
]

CASES = """
import ctypes, sys
import jax, jax.numpy as jnp, numpy as np
from dataclasses import replace
from model.kernels.cpu import build

library = ctypes.CDLL(sys.argv[1])
build.library = lambda: library
assert build.available()

from model.batch import NO_WINDOW
from model.decoder import forward
from model.kernels.cpu.packing import pack
from model.kernels.cpu.paged_attention import paged_attention
from model.kv import empty_pool
from model.kv_rows import encode, pool_dtype
from tests.helpers import batches
from tests.helpers.quantized import quantized_params
from tests.model.test_cpu_layers import ODD, ODD_EXPERTS, SINKS, random_params

for seed in range(int(sys.argv[2])):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 5))
    q, pool, batch = batches.ragged(
        [int(n) for n in rng.choice([0, 1, 15, 63, 64, 65, 400, 1500, 2500], count)],
        [int(n) for n in rng.choice([1, 1, 2, 3, 33, 64, 150], count)],
        kv_heads=int(rng.integers(1, 4)),
        group=int(rng.choice([1, 2, 3, 4, 7, 8])),
        head_dim=int(rng.choice([4, 8, 20, 64, 80, 128])),
        page=int(rng.choice([4, 12, 16, 64, 128])),
        dtype=jnp.float32,
        spare_seqs=int(rng.integers(0, 3)),
        spare_tokens=int(rng.integers(0, 9)),
        seed=seed,
    )
    # No page beyond the used ones, and none of the table's columns: what lies behind them is not the kernel's to read.
    used = sorted({int(n) for s in range(count) for n in batch.block_table[s, : -(-int(batch.prefix[s] +
        batch.starts[s + 1] - batch.starts[s]) // pool.page_size)]})
    table = np.searchsorted(used, np.minimum(np.asarray(batch.block_table), used[-1]))[:, :-2].astype(np.int32)
    pool = type(pool)(*(jnp.asarray(np.asarray(side)[:, used]) for side in (pool.k, pool.v)))
    batch = batch.replace(block_table=jnp.asarray(table))
    window, sinks = int(rng.choice([1, 5, 16, 70, 1000, NO_WINDOW])), jnp.zeros(q.shape[1:3])
    kept = pool_dtype(("float32", "int8", "fp8")[seed // 12 % 3])
    rows = type(pool)(*(encode(side, kept) for side in (pool.k, pool.v)))
    jax.jit(paged_attention)(q, rows, 1, batch, window, sinks).block_until_ready()
    heads, dim, page = pool.k.shape[2:3] + pool.k.shape[:2:-1]
    shape = (ODD, ODD_EXPERTS, SINKS)[seed % 3]
    experts = shape.experts and replace(shape.experts, ffn_size=int(rng.integers(1, 100)))
    config = replace(
        shape,
        embed_size=int(rng.integers(1, 300)),
        ffn_size=int(rng.integers(1, 300)),
        experts=experts,
        num_kv_heads=heads,
        num_heads=heads * q.shape[2],
        head_dim=dim,
    )
    pool = empty_pool(config, len(used), page, kept)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, q.shape[0]), jnp.int32)
    indices = jnp.asarray(rng.integers(0, int(batch.starts[-1]), 3), jnp.int32)
    step = jax.jit(lambda params, batch, pool: forward(params, batch, pool, config))
    batch = batch.replace(tokens=tokens, logit_indices=indices)
    params = random_params(config)
    if scheme := (None, (8, 13), (4, 16), (4, 4000))[seed // 3 % 4]:
        params = quantized_params(params, *scheme, offsets=seed % 2 == 0)
    jax.block_until_ready(step(pack(params, page), batch, pool))
print("done")
"""


def sanitized(sources, march, library):
    """Build the kernels from these sources for a processor, with the sanitizers in them."""
    command = ["g++", *build.FLAGS, *SANITIZERS, "-w", march, "-I", jax.ffi.include_dir(), *map(str, sources)]
    subprocess.run([*command, "-o", str(library)], check=True, timeout=500)


def run(library, cases):
    """A process that calls the kernels of a library with random shapes."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own would be all that is found
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(FOLDER.parent.parent),
    }
    command = [sys.executable, "-c", CASES, str(library), str(cases)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)


@pytest.mark.parametrize("march", ["-march=native", "-march=x86-64-v3", "-march=x86-64-v2"])
def test_the_kernels_touch_nothing_that_is_not_theirs(tmp_path, march):
    if march != "-march=native" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    sanitized(build.SOURCES, march, tmp_path / "kernels.so")
    done = run(tmp_path / "kernels.so", CASE_COUNT)
    assert done.stdout == "done\n", done.stderr[-5000:]
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        ("matmul.h", "load(w + v * LANES)", "load(w + v * LANES + 1)"),
        ("matmul.h", "load_words(values + v * LANES * 4)", "load_words(values + v * LANES * 4 + 4)"),
        ("attention_task.h", "load(keys + slot * p.dim + i * LANES)", "load(keys + slot * p.dim + i * LANES + 1)"),
        ("attention_task.h", "all(values[s * dim + c])", "all(values[s * dim + c + 1])"),
        ("attention_task.h", "table[s * width + position", "table[(s + 1) * width + position"),
        ("kv_rows.h", "from + i * bytes + dim", "from + i * bytes + dim + SCALE_BYTES"),
        ("experts.h", "order[s.first + i]) / c.per_token", "order[s.first + i] + c.per_token) / c.per_token"),
    ],
)
def test_a_read_beyond_the_end_would_be_found(tmp_path, source, right, wrong):
    sources = [Path(shutil.copy(path, tmp_path)) for path in (*build.SOURCES, *build.HEADERS)]
    sources = [path for path in sources if path.suffix == ".cc"]
    text = (tmp_path / source).read_text()
    assert right in text
    (tmp_path / source).write_text(text.replace(right, wrong))
    sanitized(sources, "-march=native", tmp_path / "kernels.so")
    done = run(tmp_path / "kernels.so", CASE_COUNT)
    assert "AddressSanitizer" in done.stderr, done.stdout
