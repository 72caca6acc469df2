"""The CPU kernel for matrix products of few tokens, beside numpy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.decoder import product
from model.kernels import dispatch
from model.kernels.cpu import build
from model.kernels.cpu.linear import MAX_TOKENS, linear

needs_kernel = pytest.mark.skipif(not build.available(), reason="the CPU kernels cannot be built here")
compiled = jax.jit(linear)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@needs_kernel
@pytest.mark.parametrize("tokens", [*range(1, 18), MAX_TOKENS, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (5, 48), (97, 64), (1024, 512), (2816, 512), (512, 1408)])
def test_products_of_any_shape_match_numpys(tokens, outputs, inputs):
    x, weight = random(tokens, tokens, inputs), random(outputs, outputs, inputs)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(np.asarray(compiled(x, weight)), expected, atol=2e-6 * inputs**0.5 * 4)


@needs_kernel
def test_a_token_gets_the_same_bits_in_any_company() -> None:
    x, weight = random(0, 20, 512), random(1, 999, 512)
    together = np.asarray(compiled(x, weight))
    for count in (1, 2, 7, 8, 9, 19):
        assert np.array_equal(np.asarray(compiled(x[-count:], weight)), together[-count:])


@needs_kernel
def test_what_is_no_number_stays_with_its_token_and_output() -> None:
    x, weight = random(0, 3, 64), random(1, 10, 64)
    x[1, 5], weight[7, 3] = np.inf, np.nan
    found = np.asarray(compiled(x, weight))
    assert np.isnan(found[:, 7]).all()
    assert np.isinf(np.delete(found[1], 7)).all()
    assert np.isfinite(np.delete(found[[0, 2]], 7, axis=1)).all()


@needs_kernel
def test_what_it_cannot_take_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="dtype of weight is bfloat16, supported is float32"):
        linear(jnp.zeros((2, 16)), jnp.zeros((3, 16), jnp.bfloat16))
    with pytest.raises(ValueError, match="x has 20 inputs, supported are multiples of 16"):
        linear(jnp.zeros((2, 20)), jnp.zeros((3, 20)))
    with pytest.raises(ValueError, match="x has 0 inputs"):
        linear(jnp.zeros((2, 0)), jnp.zeros((3, 0)))
    with pytest.raises(ValueError, match="x has 32 inputs, weight 16"):
        linear(jnp.zeros((2, 32)), jnp.zeros((3, 16)))


@needs_kernel
@pytest.mark.parametrize(
    ("x", "taken"),
    [((1, 64), True), ((MAX_TOKENS, 64), True), ((MAX_TOKENS + 1, 64), False), ((1, 60), False)],
)
def test_few_tokens_go_to_the_kernel_and_the_rest_to_xla(x, taken):
    x = jnp.asarray(random(0, *x))
    weight = jnp.asarray(random(1, 7, x.shape[1]))
    assert (dispatch.linear_for(x, weight) is linear) is taken
    np.testing.assert_allclose(product(x, weight, jnp.float32), x @ weight.T, atol=1e-5)


def test_bfloat16_and_other_devices_go_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.zeros((1, 64), jnp.bfloat16)
    assert dispatch.linear_for(x, x) is None
    monkeypatch.setattr(dispatch, "on_cpu", lambda: False)
    assert dispatch.linear_for(jnp.zeros((1, 64)), jnp.zeros((1, 64))) is None
