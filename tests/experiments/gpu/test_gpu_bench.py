import json
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import gpu_bench
from experiments.gpu import sections
from experiments.gpu.baselines import jax_attention, torch_attention
from experiments.gpu.figure import draw
from experiments.gpu.sections import add_shares, paged, poisoned
from experiments.gpu.sizes import FULL, MODELS, SMOKE
from experiments.gpu_bench import main, run
from model.kernels.cpu import build


def test_the_smoke_run_writes_numbers_with_their_provenance(tmp_path):
    main(["--smoke", "--only", "correctness", "ceilings", "decode", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu_bench.json").read_text())
    where = result["provenance"]
    assert where["smoke"]
    assert {"device", "versions", "commit", "when", "dtype"} <= where.keys()
    assert [row["largest_error"] < 1e-4 for row in result["correctness"]] == [True, True]
    (limits,), (row,) = result["ceilings"], result["decode"]
    assert row["kernel"] == ("paged_attention" if build.available() else "blockwise")
    assert row["of_copy_bandwidth"] == pytest.approx(row["bytes_per_s"] / limits["bytes_per_s"])
    assert row["torch"].keys() <= {"missing", "best", "flash", "cudnn", "bytes_per_s", "of_copy_bandwidth"}
    picture = tmp_path / "gpu_bench.png"
    picture.unlink()
    main(["--redraw", "--out", str(tmp_path)])
    assert picture.exists()
    assert json.loads((tmp_path / "gpu_bench.json").read_text()) == result


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_forward_and_through_the_engine_in_tiny(tmp_path, name):
    main(["--smoke", "--model", name, "--only", "forward", "arms", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert [row["pass"] for row in result["forward"]] == ["cold", "warm", "decode"] * 2
    assert [row["arm"] for row in result["arms"]] == ["stable", "varying", "stripped"]


def test_a_picture_is_drawn_of_whatever_was_measured(tmp_path):
    result = {
        "provenance": {"device": "test", "dtype": "bfloat16", "versions": {"jax": "0"}, "when": "2026-01-01T00:00"},
        "ceilings": [{"flops": 8e14, "bytes_per_s": 4e12}],
        "prefill": [{"length": 4096, "prefix": 0, "flops": 5e14, "torch": {"flops": 4e14}, "jax": {"refused": "x"}}],
        "decode": [{"batch": 1, "bytes_per_s": 3e12, "torch": {"missing": "x"}}, {"failed": "out of memory"}],
        "arms": [{"failed": "out of memory"}],
    }
    draw(result, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000


def test_a_failure_keeps_the_figures_before_it_and_the_next_section_runs(tmp_path):
    broken = replace(SMOKE, decode_batches=(2, -1))
    result = run(broken, True, tmp_path, Console(quiet=True), ("decode", "ceilings"))
    measured, failed = result["decode"]
    assert measured["batch"] == 2
    assert failed["failed"].startswith("ValueError")
    assert result["ceilings"][0]["flops"] > 0
    assert json.loads((tmp_path / "gpu_bench.json").read_text()) == result


def test_a_section_that_takes_too_long_is_ended(tmp_path):
    result = run(replace(SMOKE, figure_s=0.01), True, tmp_path, Console(quiet=True), ("ceilings",))
    assert result["ceilings"] == [{"failed": "no figure within 0.01 s, or the budget of 520 s was spent"}]


def test_a_wrong_result_is_kept_with_all_others_and_fails_the_run(tmp_path, monkeypatch):
    def wrong(q, pool, layer, batch):
        return jnp.zeros_like(q)

    monkeypatch.setattr(sections, "attention", lambda *_: (wrong, "a kernel"))
    found = list(sections.correctness(SMOKE))
    assert [row["wrong"].startswith("a kernel is off by") for row in found] == [True, True]
    monkeypatch.setattr(gpu_bench, "section", lambda name, *_, **__: iter(found if name == "correctness" else [{}]))
    with pytest.raises(AssertionError, match="a kernel is off by"):
        run(SMOKE, True, tmp_path, Console(quiet=True), ("correctness", "decode"))
    result = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert (result["correctness"], result["decode"]) == (found, [{}])


def test_a_pool_has_as_many_layers_as_the_memory_holds():
    assert [sections.layers_for(FULL, seqs * FULL.context) for seqs in (1, 8, 64)] == [8, 8, 1]


def test_it_starts_without_the_packages_of_the_server():
    code = "import sys, experiments.gpu_bench, experiments.gpu.tune; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"lmdb", "llguidance", "starlette", "transformers", "torch", "serve.engine.engine"} & set(loaded)


def test_poison_covers_what_no_query_sees():
    _, pool, _, batch = paged(SMOKE, [5, 40], [3, 1])
    marked = np.isnan(np.asarray(poisoned(pool, batch).k)).any((0, 2, 4))
    assert (~marked).sum() == 8 + 41


def test_shares_are_of_the_ceilings_of_the_run():
    row = {"flops": 4.0, "torch": {"flops": 2.0}}
    add_shares(row, {"flops": 8.0})
    assert row == {"flops": 4.0, "mfu": 0.5, "torch": {"flops": 2.0, "mfu": 0.25}}


def test_baselines_without_a_gpu_say_so():
    assert "missing" in torch_attention(1, 8, 1, 4, 2, 64)
    assert "refused" in jax_attention(128, 4, 2, 64, lambda function, *arrays: function(*arrays))
