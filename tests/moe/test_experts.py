"""The expert FFN over received rows against a plain loop over experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.model import reference
from cmjax.moe import MlpParams, ReceivedRows, block_rows, expert_ffn, pack_rows, swiglu
from tests.helpers import TOLERANCES, assert_close

HIDDEN, FFN, NUM_LOCAL, NUM_LAYERS = 12, 7, 5, 3


def make_experts(rng, dtype=np.float32, num_local=NUM_LOCAL):
    w13 = rng.normal(0, HIDDEN**-0.5, (NUM_LAYERS, num_local, 2 * FFN, HIDDEN))
    w2 = rng.normal(0, FFN**-0.5, (NUM_LAYERS, num_local, HIDDEN, FFN))
    return MlpParams(jnp.asarray(w13, dtype), jnp.asarray(w2, dtype))


@functools.partial(jax.jit, static_argnames=("rows_per_block", "wire", "dtype"))
def run(messages, counts, experts, layer, *, rows_per_block, wire=None, dtype=jnp.float32):
    received = ReceivedRows(messages, counts, wire)
    return expert_ffn(received, experts, layer, rows_per_block=rows_per_block, expected_rows=60, dtype=dtype)


def plain_loop(x, counts, experts, layer):
    out, begin = [], 0
    for expert, count in enumerate(counts):
        rows = x[begin : begin + count].astype(np.float64)
        out.append(reference.mlp(rows, experts.w13[layer, expert], experts.w2[layer, expert]))
        begin += count
    return np.concatenate(out)


def split(rng, total, parts):
    """`total` rows among `parts` experts, some of them with none."""
    bounds = np.sort(rng.integers(0, total + 1, parts - 1))
    return np.diff([0, *bounds, total]).astype(np.int32)


@pytest.mark.parametrize("rows_per_block", [8, 32, 128])
@given(seed=st.integers(0, 2**32 - 1), total=st.sampled_from([0, 1, 17, 100, 149, 150]))
def test_equals_a_plain_loop(rows_per_block, seed, total):
    """The capacity, 150, is no multiple of a block: the last block of a full buffer must be moved back to fit."""
    rng = np.random.default_rng(seed)
    experts = make_experts(rng)
    counts = split(rng, total, NUM_LOCAL)
    x = rng.normal(size=(150, HIDDEN)).astype(np.float32)
    x[total:] = np.nan  # rows that were never received hold anything
    layer = int(rng.integers(NUM_LAYERS))
    out = np.asarray(run(x, counts, experts, layer, rows_per_block=rows_per_block))[:total]
    assert_close(out, plain_loop(x, counts, experts, layer), scale=3)


@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_a_buffer_smaller_than_a_block(rng, capacity):
    experts = make_experts(rng)
    counts = split(rng, capacity, NUM_LOCAL)
    x = rng.normal(size=(capacity, HIDDEN)).astype(np.float32)
    out = run(x, counts, experts, 1, rows_per_block=8)
    assert_close(out, plain_loop(x, counts, experts, 1), scale=3)


@pytest.mark.parametrize("counts", [[0, 0, 0, 0, 150], [150, 0, 0, 0, 0], [33, 0, 32, 1, 84], [31, 33, 31, 33, 22]])
def test_counts_around_the_block_size(rng, counts):
    experts = make_experts(rng)
    x = rng.normal(size=(150, HIDDEN)).astype(np.float32)
    for rows_per_block in (8, 32, 64):
        out = run(x, np.array(counts, np.int32), experts, 2, rows_per_block=rows_per_block)
        assert_close(out, plain_loop(x, counts, experts, 2), scale=3)


def test_garbage_of_another_expert_does_not_leak(rng):
    """A block reads beyond its expert's rows: NaN and infinity there must not reach them."""
    experts = make_experts(rng)
    x = rng.normal(size=(40, HIDDEN)).astype(np.float32)
    x[11:21] = [[np.nan], [np.inf]] * 5
    counts = np.array([11, 10, 0, 4, 15], np.int32)
    out = np.asarray(run(x, counts, experts, 0, rows_per_block=16))
    clean = np.delete(x, np.s_[11:21], axis=0)
    expected = plain_loop(clean, [11, 0, 0, 4, 15], experts, 0)
    assert_close(np.delete(out, np.s_[11:21], axis=0), expected, scale=3)


def test_int8_messages_are_unpacked_block_by_block(rng):
    experts = make_experts(rng)
    counts = np.array([3, 0, 20, 8, 5], np.int32)
    x = rng.normal(size=(50, HIDDEN)).astype(np.float32)
    messages = pack_rows(jnp.asarray(x), "int8")
    out = np.asarray(run(messages, counts, experts, 1, rows_per_block=8, wire="int8"))[:36]
    scale = np.abs(x).max(-1, keepdims=True) / 127
    assert_close(out, plain_loop(np.round(x / scale) * scale, counts, experts, 1), scale=3)


def test_bfloat16(rng):
    experts = make_experts(rng, jnp.bfloat16)
    counts = np.array([3, 0, 20, 8, 5], np.int32)
    x = jnp.asarray(rng.normal(size=(36, HIDDEN)), jnp.bfloat16)
    out = run(x, counts, experts, 1, rows_per_block=8, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, experts))
    expected = plain_loop(wide[0], counts, wide[1], 1)
    rtol, atol = TOLERANCES["bfloat16"]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2 * rtol, atol=2 * atol)


def test_swiglu(rng):
    x, w13, w2 = (rng.normal(size=s).astype(np.float32) * 0.3 for s in ((4, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN)))
    assert_close(swiglu(x, w13, w2), reference.mlp(x.astype(np.float64), w13, w2), scale=3)


@given(num_rows=st.integers(0, 10**6), num_experts=st.integers(1, 400), max_rows=st.integers(1, 10**5))
def test_block_rows_is_one_or_a_power_of_two_from_8_to_128_unless_there_are_fewer(num_rows, num_experts, max_rows):
    rows = block_rows(num_rows, num_experts, max_rows)
    assert rows.bit_count() == 1
    assert rows <= 128
    assert rows < 2 * max_rows
    assert rows >= min(8, max_rows) or (rows == 1 and 2 * num_rows <= num_experts)
