"""Floors against figures worked out by hand."""

import pytest

from experiments.roofline import DEVICES, MODELS, decode, main, prefill

LLAMA, H200 = MODELS["Llama-3.1-8B"], DEVICES["H200"]


def test_a_cold_prompt_of_an_8b_model_is_bound_by_arithmetic() -> None:
    floor = prefill(LLAMA, H200, 52_000)
    assert floor.flops == pytest.approx(7.3e14 + 7.1e14, rel=0.01)
    assert floor.ms == floor.compute_ms == pytest.approx(1_450, rel=0.01)


def test_a_decoded_token_is_bound_by_memory() -> None:
    floor = decode(LLAMA, H200, 52_000)
    # 128 KiB of KV a token, and 7.5e9 weights of layers and head in two bytes each.
    assert floor.bytes == pytest.approx(52_001 * 128 * 1024 + 2 * 7.505e9, rel=0.001)
    assert floor.ms == floor.memory_ms > 100 * floor.compute_ms


def test_what_is_cached_is_not_computed_again() -> None:
    cold, warm = prefill(LLAMA, H200, 52_000), prefill(LLAMA, H200, 52_000, 51_872)
    assert warm.flops == pytest.approx(5.3e12, rel=0.01)
    assert warm.bytes == cold.bytes
    halves = prefill(LLAMA, H200, 26_000).flops + prefill(LLAMA, H200, 52_000, 26_000).flops
    head = 2 * LLAMA.vocab_size * LLAMA.embed_size
    assert halves == pytest.approx(cold.flops + head, rel=1e-9)


@pytest.mark.parametrize(("name", "weights"), [("Llama-3.1-8B", 8.03e9), ("Qwen3-8B", 8.19e9), ("Qwen3-0.6B", 0.596e9)])
def test_each_model_has_the_parameters_that_its_name_says(name, weights) -> None:
    config = MODELS[name]
    embedding = config.vocab_size * config.embed_size
    attention = 2 * config.embed_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    layers = config.num_layers * (attention + 3 * config.embed_size * config.ffn_size)
    assert layers + embedding * (1 if config.tie_embeddings else 2) == pytest.approx(weights, rel=0.002)


def test_the_table_names_models_devices_and_sources(capsys) -> None:
    main(["--prompt", "8000", "--suffix", "64"])
    printed = capsys.readouterr().out
    for word in (*MODELS, *DEVICES, "8,000 tokens, cold", "data sheet"):
        assert word in printed


def test_a_suffix_longer_than_the_prompt_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--prompt", "10", "--suffix", "11"])
    assert "--suffix: expected 1 to 10, got 11" in capsys.readouterr().err
