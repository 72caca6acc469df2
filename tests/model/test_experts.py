"""Mixtures of experts: router and experts against loops that say what they must compute, and what is not read."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ExpertsConfig
from model.experts import block_size, choose, chosen_bias, in_blocks, mixture
from model.params import Experts

EMBED = 12
SOFTMAX = ExpertsConfig(count=6, per_token=2, ffn_size=10)
GPT_OSS = replace(SOFTMAX, router_bias=True, biases=True, clamp=(1.702, 0.5))
GLM = ExpertsConfig(
    count=8,
    per_token=3,
    ffn_size=6,
    shared_ffn_size=7,
    scoring="sigmoid",
    scaling=1.5,
    groups=4,
    chosen_groups=2,
    correction=True,
)
CONFIGS = {
    "softmax": SOFTMAX,
    "not renormalised": replace(SOFTMAX, renormalize=False, scaling=0.5),
    "gpt-oss": GPT_OSS,
    "groups": GLM,
    "all of them": replace(SOFTMAX, per_token=6),
}


def random_experts(config: ExpertsConfig) -> Experts:
    """Weights of one layer, all random."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, there: bool = True) -> jax.Array | None:
        return jnp.asarray(rng.standard_normal(shape, np.float32)) if there else None

    x, f, shared = config.count, config.ffn_size, config.shared_ffn_size
    return Experts(  # type: ignore[arg-type]
        router=draw(x, EMBED),
        gate_up=draw(x, 2, f, EMBED),
        down=draw(x, EMBED, f),
        router_bias=draw(x, there=config.router_bias),
        correction=draw(x, there=config.correction),
        gate_up_bias=draw(x, 2, f, there=config.biases),
        down_bias=draw(x, EMBED, there=config.biases),
        shared_gate_up=draw(2, shared, EMBED, there=shared > 0),
        shared_down=draw(EMBED, shared, there=shared > 0),
    )


def chosen_by_hand(experts: Experts, row: np.ndarray, config: ExpertsConfig) -> dict[int, float]:
    """The experts of one token and their weights."""
    logits = np.asarray(experts.router, np.float64) @ row
    if experts.router_bias is not None:
        logits = logits + np.asarray(experts.router_bias)
    if config.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    ranked = scores if experts.correction is None else scores + np.asarray(experts.correction)
    size = config.count // config.groups
    group = [sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(config.groups)]
    best = sorted(range(config.groups), key=lambda g: -group[g])[: config.chosen_groups]
    allowed = [x for x in range(config.count) if x // size in best]
    chosen = sorted(allowed, key=lambda x: -ranked[x])[: config.per_token]
    total = sum(scores[x] for x in chosen) if config.renormalize else 1.0
    return {x: scores[x] / total * config.scaling for x in chosen}


def block_by_hand(
    gate_up: np.ndarray, down: np.ndarray, row: np.ndarray, clamp: tuple[float, float] | None
) -> np.ndarray:
    """One feed-forward block of one token, [embed]; gate_up has the biases added."""
    gate, up = gate_up
    if clamp:
        factor, limit = clamp
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
        return down @ (gate / (1 + np.exp(-factor * gate)) * up)
    return down @ (gate / (1 + np.exp(-gate)) * up)


def by_hand(experts: Experts, x: np.ndarray, config: ExpertsConfig) -> np.ndarray:
    """What the mixture must compute, token by token and expert by expert."""
    made = np.zeros(x.shape)
    wide = jax.tree.map(lambda each: np.asarray(each, np.float64), experts)
    for token, row in enumerate(x):
        for number, weight in chosen_by_hand(wide, row, config).items():
            gate_up = wide.gate_up[number] @ row
            if wide.gate_up_bias is not None:
                gate_up = gate_up + wide.gate_up_bias[number]
            out = block_by_hand(gate_up, wide.down[number], row, config.clamp)
            made[token] += weight * (out if wide.down_bias is None else out + wide.down_bias[number])
        if wide.shared_gate_up is not None:
            made[token] += block_by_hand(wide.shared_gate_up @ row, wide.shared_down, row, None)
    return made


def rows(count: int) -> np.ndarray:
    """Inputs of some tokens."""
    return np.random.default_rng(count).standard_normal((count, EMBED)).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_router_chooses_what_a_loop_over_tokens_does(name):
    config, experts, x = CONFIGS[name], random_experts(CONFIGS[name]), rows(40)
    choice = choose(experts, jnp.asarray(x), config)
    for token, row in enumerate(x):
        expected = chosen_by_hand(experts, row, config)
        assert choice.experts[token].tolist() == list(expected)
        np.testing.assert_allclose(choice.weights[token], list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_mixture_is_that_of_a_loop_over_tokens_and_experts(name, count):
    config, experts, x = CONFIGS[name], random_experts(CONFIGS[name]), rows(count)
    mixed, choice = jax.jit(mixture, static_argnames="config")(
        experts, jnp.asarray(x), np.ones(count, bool), config=config
    )
    found = mixed + chosen_bias(experts.down_bias, choice, mixed.dtype)
    expected = by_hand(experts, x, config)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_of_equal_scores_the_first_experts_are_chosen() -> None:
    experts = replace(random_experts(SOFTMAX), router=jnp.zeros((6, EMBED)))
    assert choose(experts, jnp.ones((1, EMBED)), SOFTMAX).experts.tolist() == [[0, 1]]


def test_padding_takes_no_place_and_changes_no_real_token() -> None:
    experts, x = random_experts(SOFTMAX), rows(30)
    mix = jax.jit(mixture, static_argnames="config")
    real = np.arange(30) < 11
    alone, _ = mix(experts, jnp.asarray(x), real, config=SOFTMAX)
    other = np.where(real[:, None], x, x[0])
    beside, choice = mix(experts, jnp.asarray(other), real, config=SOFTMAX)
    np.testing.assert_array_equal(alone[:11], beside[:11])
    blocks = in_blocks(jnp.where(real[:, None], choice.experts, SOFTMAX.count), SOFTMAX.count)
    assert sorted(np.asarray(blocks.pairs[:22]) // 2) == sorted([*range(11)] * 2)


def test_experts_that_no_token_has_chosen_are_not_read() -> None:
    """What is no number would spread to every token of a product with it."""
    experts, x = random_experts(SOFTMAX), rows(3)
    chosen = set(np.asarray(choose(experts, jnp.asarray(x), SOFTMAX).experts).flat)
    others = np.asarray([number not in chosen for number in range(6)])
    assert others.any()
    broken = replace(
        experts,
        gate_up=jnp.where(others[:, None, None, None], jnp.nan, experts.gate_up),
        down=jnp.where(others[:, None, None], jnp.nan, experts.down),
    )
    mix = jax.jit(mixture, static_argnames="config")
    expected, _ = mix(experts, jnp.asarray(x), np.ones(3, bool), config=SOFTMAX)
    found, _ = mix(broken, jnp.asarray(x), np.ones(3, bool), config=SOFTMAX)
    np.testing.assert_array_equal(found, expected)


def test_a_loop_over_all_blocks_as_on_gpus_makes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x, real = random_experts(SOFTMAX), jnp.asarray(rows(30)), jnp.arange(30) < 11
    expected, _ = mixture(experts, x, real, SOFTMAX)
    monkeypatch.setattr("model.experts.on_cpu", lambda: False)
    found, _ = mixture(experts, x, real, SOFTMAX)
    np.testing.assert_array_equal(found[:11], expected[:11])


@pytest.mark.parametrize(("tokens", "count"), [(1, 4), (7, 4), (64, 4), (1000, 3)])
def test_every_pair_is_in_one_block_of_its_expert(tokens, count):
    chosen = np.random.default_rng(tokens).integers(0, count + 1, (tokens, 2)).astype(np.int32)  # some are padding
    blocks, size = in_blocks(jnp.asarray(chosen), count), block_size(tokens * 2, count)
    flat, owner = chosen.reshape(-1), np.full(tokens * 2 + size, -1)
    for number in range(int(blocks.used)):
        start = int(blocks.starts[number])
        owner[start : start + size] = blocks.experts[number]
    sorted_experts = flat[np.asarray(blocks.pairs)]
    real = sorted_experts < count
    np.testing.assert_array_equal(owner[: len(flat)][real], sorted_experts[real])
    assert int(blocks.used) <= len(blocks.experts)
