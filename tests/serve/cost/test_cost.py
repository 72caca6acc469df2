"""The cost model: its fit finds a model that is known, its file is checked, and what it says decides on restores."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from model.config import LayerKind, ModelConfig, RopeConfig
from serve.cost.file import file_contents, load_constants
from serve.cost.fit import TERMS, Sample, accuracy, fit_cost_model, held_out, intervals
from serve.cost.model import (
    REMEMBERED,
    Constants,
    CostModel,
    cost_model,
    weighted_median,
)

TRUE = Constants(fixed=4e-3, linear=2e-5, attention=8e-9, match=3e-7, restore=2e-6)
SHAPE = ModelConfig("llama", 100, 32, 64, 2, 4, 2, 8, 512, 1e-6, RopeConfig())


def samples(noise: float, constants: Constants = TRUE, restored: bool = True, seed: int = 0) -> list[Sample]:
    """What a sweep over lengths and positions would measure if `constants` were the truth."""
    rng, made = np.random.default_rng(seed), []
    for prompt in (1024, 2048, 4096, 8192, 16384, 32768):
        for share in (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
            cached = round(share * prompt)
            for back in (0, cached) if restored and cached else (0,):
                seconds = constants.ttft_s(prompt, cached, back) * (1 + noise * rng.standard_normal())
                made.append(Sample(prompt, cached, back, seconds))
    return made


def test_the_formula_adds_what_each_token_costs() -> None:
    n, p, r = 1000, 400, 100
    expected = 4e-3 + 2e-5 * (n - p) + 8e-9 * (n**2 - p**2) / 2 + 3e-7 * p + 2e-6 * r
    assert TRUE.ttft_s(n, p, r) == pytest.approx(expected)
    # The price of a mismatch is what the cached part would have cost to compute.
    assert TRUE.compute_s(p, n) + TRUE.compute_s(0, p) == pytest.approx(TRUE.compute_s(0, n))


def test_the_fit_recovers_a_known_model_exactly_without_noise() -> None:
    found = fit_cost_model(samples(0))
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(getattr(TRUE, term), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_recovers_a_known_model_from_noisy_samples(seed: int) -> None:
    found = fit_cost_model(samples(0.03, seed=seed))
    for term in ("fixed", "linear", "attention"):
        assert getattr(found, term) == pytest.approx(getattr(TRUE, term), rel=0.1)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    drawn = [intervals(samples(0.03, seed=seed), rounds=100) for seed in range(40)]
    for term in TERMS:
        held = [low <= getattr(TRUE, term) <= high for low, high in (spread[term] for spread in drawn)]
        assert np.mean(held) >= 0.85
        assert all(spread[term][0] < spread[term][1] for spread in drawn)


def test_held_out_points_are_predicted_as_well_as_the_noise_allows() -> None:
    noisy = samples(0.03)
    result = accuracy(np.array([s.seconds for s in noisy]), held_out(noisy))
    assert 0.005 < result["median_relative_error"] < 0.04
    assert result["r_squared"] > 0.99
    assert result["largest_relative_error"] > result["median_relative_error"]


def test_a_prediction_that_knows_nothing_explains_nothing() -> None:
    measured = np.array([1.0, 2.0, 3.0])
    assert accuracy(measured, np.full(3, 2.0))["r_squared"] == 0


def test_points_that_the_fit_has_not_seen_are_predicted_by_the_others() -> None:
    # One point is far off: its own prediction must not follow it.
    odd = samples(0)
    odd[7] = replace(odd[7], seconds=10 * odd[7].seconds)
    assert held_out(odd)[7] < 0.2 * odd[7].seconds


def test_no_constant_is_negative() -> None:
    # A request that gets quicker with every cached token beyond what it saves.
    odd = [replace(s, seconds=s.seconds - 2e-7 * s.cached) for s in samples(0, replace(TRUE, match=0.0), False)]
    found = fit_cost_model(odd)
    assert min(asdict(found).values()) >= 0
    assert found.match == 0


def test_a_term_that_no_sample_has_stays_zero() -> None:
    assert fit_cost_model(samples(0, restored=False)).restore == 0


def test_one_length_at_one_position_settles_no_model() -> None:
    with pytest.raises(ValueError, match="more lengths and positions: 3 samples"):
        fit_cost_model([Sample(1024, 0, 0, 0.1)] * 3)


def test_after_the_crossover_a_restored_token_is_cheaper_than_a_computed_one() -> None:
    restore_s = 1e-4
    at = TRUE.crossover(restore_s)
    assert (
        TRUE.compute_s(round(at) - 100, round(at) - 99) < restore_s < TRUE.compute_s(round(at) + 100, round(at) + 101)
    )
    assert TRUE.crossover(1e-6) == 0
    assert replace(TRUE, attention=0.0).crossover(1e-4) == float("inf")


def test_measured_constants_take_the_place_of_the_rate() -> None:
    measured = cost_model(SHAPE).prefilled(0, 1000, 1.0)
    assert measured.prefill_s(0, 1000) == pytest.approx(1.0)
    fitted = replace(measured, constants=TRUE)
    assert fitted.prefill_s(500, 1000) == TRUE.compute_s(500, 1000)
    assert fitted.flops(500, 1000) == measured.flops(500, 1000)
    assert cost_model(SHAPE, TRUE).prefill_s(0, 10) == TRUE.compute_s(0, 10)


def test_a_page_late_in_a_prompt_is_restored_where_an_early_one_is_computed() -> None:
    model = CostModel(1.0, 1.0, constants=TRUE).was_read("disk", 64_000, 64 * 1e-4)  # 1e-4 s a token
    assert not model.worth_restoring("disk", 0, 64, 64_000)
    assert model.worth_restoring("disk", 20_000, 20_064, 64_000)


def test_a_layer_with_a_window_costs_no_more_than_its_window_for_a_token() -> None:
    windowed = replace(SHAPE, layers=(LayerKind(window=100), LayerKind()))
    full, model, pair = cost_model(SHAPE), cost_model(windowed), 4 * SHAPE.num_heads * SHAPE.head_dim
    assert model.flops(0, 100) == full.flops(0, 100)
    of_window = [min(i + 0.5, 100) for i in range(250)]  # keys of each query, the diagonal counted half
    saved = sum(i + 0.5 - keys for i, keys in enumerate(of_window)) * pair
    assert model.flops(0, 250) == pytest.approx(full.flops(0, 250) - saved)
    assert model.flops(30, 250) + model.flops(0, 30) == pytest.approx(model.flops(0, 250))


def test_constants_and_files_count_a_full_window_with_each_token(tmp_path) -> None:
    windowed = replace(SHAPE, layers=(LayerKind(window=100), LayerKind()))
    model = cost_model(windowed).prefilled(200, 1000, 1.0)
    assert model.known is not None
    assert model.known.compute_s(200, 1000) == pytest.approx(1.0)
    path = tmp_path / "cost_model.json"
    path.write_text(json.dumps(file_contents(TRUE, windowed)))
    assert load_constants(path, windowed) == TRUE
    with pytest.raises(ValueError, match="fit one to this model"):
        load_constants(path, replace(SHAPE, layers=(LayerKind(window=50), LayerKind())))


@pytest.mark.parametrize("stalled_s", [1.0, 60.0, 3600.0])
def test_a_read_or_a_step_that_stalls_says_nothing_of_the_rate(stalled_s: float) -> None:
    model = CostModel(1.0, 0.0).prefilled(0, 1000, 1.0).was_read("disk", 1 << 20, 0.01)
    for _ in range(5):
        stalled = model.was_read("disk", 1 << 20, stalled_s).prefilled(0, 1000, stalled_s)
        assert stalled.read_s("disk", 1 << 20) == pytest.approx(0.01)
        assert stalled.prefill_s(0, 1000) == pytest.approx(1.0)
        model = stalled.was_read("disk", 1 << 20, 0.01).prefilled(0, 1000, 1.0)


def test_what_has_become_slow_is_known_to_be_after_a_while() -> None:
    model = CostModel(1.0, 0.0).was_read("disk", 1000, 1.0)
    for _ in range(50):
        model = model.was_read("disk", 1000, 1.0)
    for _ in range(REMEMBERED):
        model = model.was_read("disk", 1000, 10.0)
    assert model.read_s("disk", 1000) == pytest.approx(10.0)


def test_many_small_measurements_do_not_outvote_a_large_one() -> None:
    assert weighted_median([(5.0, 100.0), *[(1.0, 1.0)] * 15]) == 5.0
    assert weighted_median([(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)]) == 2.0


def test_a_server_loads_the_file_that_a_fit_writes(tmp_path) -> None:
    path = tmp_path / "cost_model.json"
    path.write_text(json.dumps(file_contents(TRUE, SHAPE, points=48, anything=[1, 2])))
    assert load_constants(path, SHAPE) == TRUE


def test_another_models_file_is_refused(tmp_path) -> None:
    path = tmp_path / "cost_model.json"
    path.write_text(json.dumps(file_contents(TRUE, replace(SHAPE, ffn_size=128))))
    with pytest.raises(ValueError, match=r"cost_model\.json was fitted to a model of"):
        load_constants(path, SHAPE)
    path.write_text(json.dumps(file_contents(TRUE, None)))
    with pytest.raises(ValueError, match="fit one to this model"):
        load_constants(path, SHAPE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "truncated"),
        ("{}", "missing required field `constants`"),
        (json.dumps(file_contents(replace(TRUE, linear=-1.0), SHAPE)), r">= 0.*\$\.constants\.linear"),
        (json.dumps(file_contents(TRUE, SHAPE)).replace("0.004", '"4 ms"'), r"\$\.constants\.fixed"),
        (json.dumps(file_contents(TRUE, SHAPE)).replace("0.004", "1e999"), r"Number out of range|\$\.constants\.fixed"),
    ],
)
def test_a_file_that_is_no_cost_model_is_refused_by_its_field(tmp_path, text, message) -> None:
    path = tmp_path / "cost_model.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)cost_model.json is not a cost model: .*{message}"):
        load_constants(path, SHAPE)
