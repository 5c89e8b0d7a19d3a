"""Calibration techniques: none changes the function before rounding, and each lessens the loss it is there for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.quant import dequantize_host
from cmjax.quant.calibrate import (
    blended_gram,
    orthogonal_matrix,
    output_error,
    quantized_rows,
    round_compensated,
    round_to,
    rounded,
    search_clip,
    search_scale,
)

ROWS, WIDTH, OUT = 200, 48, 20


def rows_and_weight(rng, outliers=0):
    """Correlated rows, some channels of which are 100 times as large as the others."""
    inputs = rng.normal(size=(ROWS, 12)) @ rng.normal(size=(12, WIDTH)) + 0.3 * rng.normal(size=(ROWS, WIDTH))
    inputs[:, rng.choice(WIDTH, outliers, replace=False)] *= 100
    return inputs.astype(np.float32), rng.normal(size=(OUT, WIDTH)).astype(np.float32)


def total_error(gram, weight, seen):
    """`sum over rows of || (seen - weight) x ||^2`, from their Gram matrix."""
    loss = (seen - weight).astype(np.float64)
    return float(np.sum((loss @ gram) * loss))


def int8_error(inputs, weight):
    return output_error(inputs, weight, quantized_rows(inputs), rounded(weight))


def test_scales_leave_the_function_and_take_outliers_out(rng):
    inputs, weight = rows_and_weight(rng, outliers=3)
    other = rng.normal(size=(7, WIDTH)).astype(np.float32)
    scale = search_scale(inputs, [weight, other])
    np.testing.assert_allclose((inputs / scale) @ (weight * scale).T, inputs @ weight.T, rtol=2e-4, atol=2e-3)
    plain = int8_error(inputs, weight) + int8_error(inputs, other)
    scaled = int8_error(inputs / scale, weight * scale) + int8_error(inputs / scale, other * scale)
    assert scaled < 0.3 * plain


def test_scales_never_lose(rng):
    # No scale at all is among the candidates.
    inputs, weight = rows_and_weight(rng)
    scale = search_scale(inputs, [weight], grid=(1.0,))
    assert int8_error(inputs / scale, weight * scale) <= int8_error(inputs, weight)


def test_channels_that_are_zero_keep_their_scale(rng):
    inputs, weight = rows_and_weight(rng, outliers=2)
    inputs[:, 4], weight[:, 9] = 0, 0
    scale = search_scale(inputs, [weight])
    assert (scale[[4, 9]] == 1).all()
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


@given(st.integers(1, 96), st.integers(0, 100))
def test_rotations_are_orthogonal(width, seed):
    rotation = orthogonal_matrix(width, seed)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-5)


@pytest.mark.parametrize("width", [48, 64])
def test_rotations_spread_outliers(rng, width):
    inputs = rng.normal(size=(ROWS, width)).astype(np.float32)
    inputs[:, 5] *= 100
    weight = rng.normal(size=(OUT, width)).astype(np.float32)
    rotation = orthogonal_matrix(width)
    turned, turned_weight = inputs @ rotation, weight @ rotation
    np.testing.assert_allclose(turned @ turned_weight.T, inputs @ weight.T, rtol=1e-3, atol=2e-2)
    assert int8_error(turned, turned_weight) < 0.3 * int8_error(inputs, weight)


def test_clipping_gives_up_a_value_for_the_others(rng):
    inputs, weight = rows_and_weight(rng)
    weight[:, 0] *= 8
    inputs[:, 0] *= 0.01  # large weights that hardly matter
    gram = inputs.T @ inputs
    clipped = dequantize_host(round_to(weight, search_clip(gram, weight)), np.float32)
    assert total_error(gram, weight, clipped) < 0.6 * total_error(gram, weight, rounded(weight))
    # Channels that share a block share the share; a block of one cannot lose to it.
    shared = dequantize_host(round_to(weight, search_clip(gram, weight, block_channels=6)), np.float32)
    assert total_error(gram, weight, clipped) <= total_error(gram, weight, shared) * 1.0001
    ratio = search_clip(gram, weight, block_channels=6) / np.abs(weight).max(1)
    assert len({round(float(one), 5) for one in ratio[:6]}) == 1


def test_compensation_makes_up_for_rounding(rng):
    inputs, weight = rows_and_weight(rng)
    gram = inputs.T @ inputs
    reach = np.abs(weight).max(1)
    found = round_compensated(gram, weight, reach)
    assert found.qvalue.dtype == np.int8
    np.testing.assert_allclose(found.scale, reach / 127, rtol=1e-6)
    compensated = dequantize_host(found, np.float32)
    assert total_error(gram, weight, compensated) < 0.5 * total_error(gram, weight, rounded(weight))
    # Without correlations there is nothing to make up with.
    np.testing.assert_array_equal(
        round_compensated(np.eye(WIDTH), weight, reach).qvalue, round_to(weight, reach).qvalue
    )


def test_a_channel_of_zeros_stays_zero(rng):
    inputs, weight = rows_and_weight(rng)
    weight[3] = 0
    gram = inputs.T @ inputs
    for found in (round_to(weight, search_clip(gram, weight)), round_compensated(gram, weight, np.abs(weight).max(1))):
        assert not found.qvalue[3].any()
        assert found.scale[3] == 0


def test_an_expert_without_rows_takes_those_of_its_layer(rng):
    inputs, weight = rows_and_weight(rng)
    whole = inputs.T @ inputs
    own = inputs[:4].T @ inputs[:4]
    np.testing.assert_array_equal(blended_gram(own, 4, whole, ROWS, least_rows=4), own)
    np.testing.assert_allclose(blended_gram(0 * own, 0, whole, ROWS, least_rows=ROWS), whole)
    found = round_compensated(blended_gram(own, 4, whole, ROWS, least_rows=64), weight, np.abs(weight).max(1))
    assert total_error(whole, weight, dequantize_host(found, np.float32)) < total_error(whole, weight, rounded(weight))
