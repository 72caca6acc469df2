"""The comparisons with torch and llama.cpp: their sums by hand, and the weights that the others get."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.bench import prefill_decode
from experiments.bench.ceilings import Ceilings, best, measure
from experiments.bench.llama_cpp import LAYER, interleaved, judged, main, table, write_gguf
from experiments.bench.prefill_decode import Rates, Size, ratios, repeats_of, with_ceilings, work, write_llama
from model import checkpoint

TOY = Size(hidden=128, layers=2, heads=2, kv_heads=1, ffn=96, vocab=256)
has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None


def test_work_is_what_is_counted_by_hand(tmp_path: Path) -> None:
    write_llama(tmp_path, TOY, 64)
    config, _ = checkpoint.load(tmp_path, "float32")
    matrices = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 96)
    made = work(config, prompt_tokens=32, output_tokens=8)
    head, pairs = 256 * 128, 32 * 32 / 2
    assert made["prefill_gflop"] == pytest.approx((2 * matrices * 32 + 2 * head + 2 * 4 * 128 * pairs) / 1e9, abs=1e-3)
    kept = 2 * 2 * 64 * (32 + 4)
    assert made["decode_mb"]["tokenzero"] == pytest.approx(4 * (matrices + head + kept) / 1e6, abs=1e-3)
    assert made["decode_mb"]["torch bf16"] == pytest.approx(2 * (matrices + head + kept) / 1e6, abs=1e-3)


def test_shares_are_of_the_better_librarys_ceiling() -> None:
    row = {
        "prompt_tokens": 100,
        "tokens_per_second": {"tokenzero": {"prefill": [10.0, 50.0, 20.0], "decode": [2.0]}},
        "work": {"prefill_gflop": 200.0, "decode_mb": {"tokenzero": 3000.0}},
    }
    made = with_ceilings(row, Ceilings({"xla": 50.0, "torch": 80.0}, {"xla": 12.0, "torch": 8.0}))["achieved"]
    assert made["tokenzero"] == {
        "prefill_gflops": 40.0,
        "of_matmul_ceiling": 0.5,
        "decode_gbs": 6.0,
        "of_read_ceiling": 0.5,
    }


def test_ratios_are_taken_prompt_by_prompt_and_to_the_faster_dtype() -> None:
    def runs(*speeds: float) -> list[Rates]:
        return [Rates(speed, 1 / speed, (1,)) for speed in speeds]

    sides = {"tokenzero": runs(10, 20, 30), "torch f32": runs(5, 5, 5), "torch bf16": runs(10, 10, 10)}
    made = ratios(sides, "torch at best")
    assert made["prefill"] == {"torch f32": 4, "torch bf16": 2, "torch at best": 2}
    assert made["decode"]["torch at best"] == made["decode"]["torch f32"] == 0.25
    assert [repeats_of(tokens, 5) for tokens in (1024, 4096, 16_384, 10**6)] == [5, 5, 1, 1]


def test_each_ratio_is_judged_by_its_phases_goal() -> None:
    goals = judged({"prefill": 1.6, "decode": 1.04})
    assert (goals["prefill"]["reached"], goals["decode"]["reached"]) == (True, False)
    speeds = {"prefill": [2.0], "decode": [1.0]}
    sides = ("tokenzero", "llama.cpp", "llama.cpp, flash attention")
    row = {"model": "28M", "prompt_tokens": 1024, "goals": goals, "same_output": dict.fromkeys(sides[1:], "1 of 1")}
    grid = table([row | {"tokens_per_second": dict.fromkeys(sides, speeds)}], threads=2)
    assert list(grid.columns[-2].cells) == ["reached", "missed"]


def test_ceilings_are_positive_and_the_best_of_all() -> None:
    measured = [measure([(64, 32, 16)], repeats=2, sum_bytes=4096) for _ in range(2)]
    together = best(measured)
    for library in ("xla", "torch"):
        assert together.gflops[library] == max(m.gflops[library] for m in measured) > 0
        assert together.read_gbs[library] == max(m.read_gbs[library] for m in measured) > 0


def test_both_sides_of_torch_run_and_agree_at_toy_size(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(prefill_decode.SIZES, "28M", TOY)
    monkeypatch.setattr(prefill_decode, "CUBES", ())
    out = tmp_path / "out.json"
    flags = ["--models", "28M", "--prompts", "40", "--output", "4", "--repeats", "2", "--sum-bytes", "4096"]
    prefill_decode.main([*flags, "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["same_output"] == "2 of 2"
    assert set(row["achieved"]) == {"tokenzero", "torch f32", "torch bf16"}


def rotated(x: np.ndarray, angles: np.ndarray, pairs: str) -> np.ndarray:
    """One head, [head_dim], rotated by an angle for each pair of channels, [head_dim / 2]."""
    half = len(x) // 2
    first, second = (slice(0, half), slice(half, None)) if pairs == "halves" else (slice(0, None, 2), slice(1, None, 2))
    out = np.empty_like(x)
    out[first] = x[first] * np.cos(angles) - x[second] * np.sin(angles)
    out[second] = x[second] * np.cos(angles) + x[first] * np.sin(angles)
    return out


def test_permuted_projections_give_the_same_scores_under_the_other_pairing() -> None:
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 2 * 8, 5))  # two heads of 8 channels
    x, y = rng.standard_normal((2, 5))
    angles = [rng.uniform(0, 6, 4) for _ in range(2)]
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        scores = [
            rotated((q @ x)[rows], angles[0], pairs) @ rotated((k @ y)[rows], angles[1], pairs)
            for pairs, q, k in (("halves", query, key), ("neighbours", interleaved(query, 2), interleaved(key, 2)))
        ]
        assert scores[0] == pytest.approx(scores[1])


def test_the_gguf_file_holds_every_weight_of_the_checkpoint(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'tokenzero[test]'")
    write_llama(tmp_path, TOY, 64)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    reader, tensors = gguf.GGUFReader(tmp_path / "model.gguf"), load_file(tmp_path / "model.safetensors")
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("llama.attention.head_count_kv").contents() == 1
    assert reader.get_field("llama.rope.freq_base").contents() == 10_000
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(read) == len(tensors) == 2 + TOY.layers * len(LAYER)
    assert np.array_equal(read["token_embd.weight"], tensors["model.embed_tokens.weight"])
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(read["blk.1.ffn_down.weight"], down)
    queries = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(read["blk.1.attn_q.weight"][64 + 3], queries[64 + 32 + 1]), "row 2i + 1 is row i + 32"
    assert all(values.dtype == np.float32 for values in read.values())


@pytest.mark.skipif(has_llama_cpp, reason="llama-cpp-python is installed: its benchmark runs instead")
def test_without_llama_cpp_the_command_says_how_to_get_it() -> None:
    with pytest.raises(SystemExit, match=r"tokenzero\[llama-cpp,test\]"):
        main([])


@pytest.mark.skipif(not has_llama_cpp, reason="llama-cpp-python is not installed: pip install 'tokenzero[llama-cpp]'")
def test_llama_cpp_continues_prompts_as_ours_does(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(prefill_decode.SIZES, "28M", TOY)
    out = tmp_path / "out.json"
    main(["--models", "28M", "--prompts", "40", "--output", "4", "--repeats", "2", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["same_output"].values()) == {"2 of 2"}
