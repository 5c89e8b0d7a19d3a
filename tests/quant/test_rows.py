"""Symmetric int8 rows."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cmjax.quant import dequantize_rows, quantize_rows


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-30, 30))
def test_the_largest_value_of_a_row_is_127_steps(seed, power):
    x = (np.random.default_rng(seed).normal(size=(6, 11)) * 10.0**power).astype(np.float32)
    qvalue, scale = (np.asarray(a) for a in quantize_rows(x))
    assert qvalue.dtype == np.int8
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(np.abs(qvalue.astype(int)).max(-1), 127)
    np.testing.assert_allclose(scale, np.abs(x).max(-1) / 127, rtol=1e-6)
    assert (np.abs(qvalue * scale[:, None] - x) <= 0.5001 * scale[:, None]).all()


def test_a_row_of_zeros_stays_zero():
    qvalue, scale = quantize_rows(jnp.zeros((2, 7)))
    np.testing.assert_array_equal(qvalue, 0)
    np.testing.assert_array_equal(scale, 0)
    np.testing.assert_array_equal(dequantize_rows(qvalue, scale, jnp.bfloat16), 0)


def test_rows_do_not_share_a_scale():
    x = jnp.array([[1.0, 0.5], [1000.0, -1000.0]])
    qvalue, scale = quantize_rows(x)
    np.testing.assert_array_equal(qvalue, [[127, 64], [127, -127]])
    np.testing.assert_allclose(dequantize_rows(qvalue, scale, jnp.float32), x, rtol=1e-2)


def test_bfloat16_rows_are_quantized_from_their_float32_values(rng):
    x = jnp.asarray(rng.normal(size=(4, 33)), jnp.bfloat16)
    for low, high in zip(quantize_rows(x), quantize_rows(x.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(low, high)
