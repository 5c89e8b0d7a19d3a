"""Quantized matrices: their products in int8 and as floats, and how they stand in for arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.quant import (
    QUANT_MODES,
    QuantArray,
    QuantizedRows,
    dequantize,
    dequantize_host,
    dequantize_rows,
    linear,
    matrix_at,
    quantize,
    quantize_rows,
    split_inputs,
)
from tests.helpers import assert_close


def exact(x: np.ndarray, weight: QuantArray) -> np.ndarray:
    """The product of the rounded values, in float64."""
    qvalue, scale = (np.asarray(part, np.float64) for part in quantize_rows(jnp.asarray(x)))
    values = qvalue * scale[:, None]
    return values @ (np.asarray(weight.qvalue, np.float64) * np.asarray(weight.scale, np.float64)[:, None]).T


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from(QUANT_MODES))
def test_linear_is_the_product_of_the_rounded_values(rows, width, out, seed, mode):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)).astype(np.float32) * np.logspace(-3, 3, rows, dtype=np.float32)[:, None]
    weight = quantize(rng.normal(size=(out, width)), mode)
    wanted = exact(x, weight)
    found = np.asarray(linear(jnp.asarray(x), weight), np.float64)
    largest = np.abs(x).max(-1, keepdims=True) * np.abs(dequantize_host(weight, np.float32)).max() * width
    assert (np.abs(found - wanted) <= 1e-6 * largest + 1e-30).all()


@pytest.mark.parametrize("mode", QUANT_MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_may_come_quantized(rng, mode, dtype):
    x = jnp.asarray(rng.normal(size=(6, 48)), dtype)
    weight = quantize(rng.normal(size=(10, 48)), mode)
    rows = QuantizedRows(*quantize_rows(x), x.dtype)
    np.testing.assert_array_equal(linear(rows, weight), linear(x, weight))
    assert linear(rows, weight).dtype == x.dtype
    # A float weight takes such rows as well.
    floats = jnp.asarray(rng.normal(size=(10, 48)), dtype)
    assert_close(linear(rows, floats), linear(dequantize_rows(rows.qvalue, rows.scale, x.dtype), floats))


def test_leading_axes_and_bias(rng):
    weight, bias = quantize(rng.normal(size=(10, 48))), jnp.asarray(rng.normal(size=10), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 3, 48)), jnp.float32)
    y = linear(x, weight, bias)
    assert y.shape == (2, 3, 10)
    assert_close(y.reshape(6, 10), linear(x.reshape(6, 48), weight) + bias)


def test_rounding_is_by_half_a_step_at_most(rng):
    values = rng.normal(size=(3, 7, 24)) * np.logspace(-6, 6, 7)[:, None]
    weight = quantize(values)
    assert weight.shape == (3, 7, 24)
    assert (np.abs(dequantize_host(weight, np.float64) - values) <= 0.5001 * weight.scale[..., None]).all()
    np.testing.assert_array_equal(np.abs(weight.qvalue).max(-1), 127)
    assert_close(np.asarray(dequantize(weight)), dequantize_host(weight, np.float32))


def test_a_channel_of_zeros_stays_zero():
    values = np.zeros((3, 8), np.float32)
    values[1] = 1.0
    weight = quantize(values)
    assert weight.scale.tolist()[::2] == [0, 0]
    for mode in QUANT_MODES:
        y = np.asarray(linear(jnp.ones((2, 8)), weight.replace(mode=mode)))
        np.testing.assert_allclose(y, [[0, 8, 0]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(linear(jnp.zeros((2, 8)), weight), 0)


def test_stands_in_for_an_array(rng):
    weight = quantize(rng.normal(size=(2, 3, 4, 8)))
    assert (len(weight), weight.ndim) == (2, 4)
    assert weight[1].shape == (3, 4, 8)
    np.testing.assert_array_equal(weight[1, 2, 1:3].scale, weight.scale[1, 2, 1:3])
    assert [one.shape for one in weight] == [(3, 4, 8)] * 2
    assert weight[0].reshape(-1, 8).shape == (12, 8)
    with pytest.raises(ValueError, match="the input axis stays 8, not 4"):
        weight.reshape(-1, 4)
    taken = jax.jit(lambda i: matrix_at(jax.tree.map(jnp.asarray, weight), i, i + 1))(1)
    np.testing.assert_array_equal(taken.qvalue, weight.qvalue[1, 2])
    np.testing.assert_array_equal(taken.scale, weight.scale[1, 2])
    assert taken.mode == "int8"


def test_parts_of_the_inputs_sum_up_to_the_whole(rng):
    weight = quantize(rng.normal(size=(1, 5, 12)))
    parts = split_inputs(weight, 3)
    assert parts.shape == (1, 3, 5, 4)
    x = rng.normal(size=12)
    whole = dequantize_host(weight, np.float64)[0] @ x
    np.testing.assert_allclose(
        sum(dequantize_host(parts, np.float64)[0, i] @ x[4 * i : 4 * i + 4] for i in range(3)), whole
    )
