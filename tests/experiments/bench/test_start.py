"""The benchmark of starts: one real start of a tiny model, and medians of several."""

from __future__ import annotations

import os
from pathlib import Path

from experiments.bench.start import LATER, Start, start, summarise
from experiments.workloads.demo_model import write_demo_model
from experiments.workloads.random_checkpoint import write_random_checkpoint
from model.checkpoint import load
from tests.helpers.http import FLAGS, MODEL

TINY = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512}
SIZES = {"intermediate_size": 64, "max_position_embeddings": 2048, "tie_word_embeddings": True}


def test_a_start_has_its_times_in_order_and_the_servers_own_phases(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model", config=MODEL)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    one = start(tmp_path / "model", LATER, cache, tmp_path / "log", FLAGS)
    assert 0 < one.health_s <= one.ready_s
    assert {"imports", "weights", "fingerprint", "tokenizer", "steps"} <= one.phases.keys()
    assert all(0 <= seconds < one.ready_s for seconds in one.phases.values())
    assert min(one.cpu_s, one.first_ttft_s, one.later_ttft_s) > 0


def test_medians_are_taken_for_each_model_and_way() -> None:
    starts = [Start("m", way, 1.0, ready, 5.0, 0.4, 0.2, {"steps": ready}) for way in "ab" for ready in (3.0, 9.0, 4.0)]
    first, second = summarise(starts)
    assert (first["way"], second["way"]) == ("a", "b")
    assert (first["starts"], first["ready_s"], first["ttft_ratio"], first["phases"]) == (3, 4.0, 2.0, {"steps": 4.0})


def test_a_random_checkpoint_loads_and_is_written_once(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "demo", config=MODEL)
    folder = tmp_path / "llama"
    write_random_checkpoint(folder, TINY | SIZES, tmp_path / "demo")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    write_random_checkpoint(folder, TINY | SIZES, tmp_path / "demo")
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    config, params = load(folder, "float32")
    assert (config.num_layers, params.embed.shape) == (2, (512, 32))
    assert (folder / "tokenizer.json").is_file()
