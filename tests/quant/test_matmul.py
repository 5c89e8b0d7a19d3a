"""The matrix products of the layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.quant import InputMajor, einsum_f32, linear
from tests.helpers import assert_close


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_is_x_times_weight_transposed_plus_bias(rng, dtype):
    x, weight = (jnp.asarray(rng.normal(size=shape) * 0.2, dtype) for shape in ((3, 5, 24), (7, 24)))
    bias = jnp.asarray(rng.normal(size=7), "float32")
    wide = [np.asarray(a, np.float64) for a in (x, weight, bias)]
    for result, expected in (
        (linear(x, weight), wide[0] @ wide[1].T),
        (linear(x, weight, bias), wide[0] @ wide[1].T + wide[2]),
        (linear(x, InputMajor(weight.T), bias), wide[0] @ wide[1].T + wide[2]),
    ):
        assert result.dtype == dtype
        assert_close(result, expected)


def test_float32_products_are_true_float32(rng):
    """Fails by orders of magnitude where the platform multiplies in TF32 or bfloat16."""
    x, weight = rng.normal(size=(16, 512)).astype(np.float32), rng.normal(size=(8, 512)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert np.abs(linear(x, weight) - exact).max() < 1e-4
    assert np.abs(einsum_f32("td,fd->tf", x, weight) - exact).max() < 1e-4


def test_einsum_f32_adds_narrow_products_in_float32(rng):
    a, b = (jnp.asarray(rng.normal(size=(4, 400)), jnp.bfloat16) for _ in range(2))
    result = einsum_f32("tk,sk->ts", a, b)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, np.asarray(a, np.float64) @ np.asarray(b, np.float64).T, atol=1e-4)
