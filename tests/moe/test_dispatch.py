"""Dispatch and combine: every row lands where it must, bit for bit, and nothing is ever dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from cmjax import kernels
from cmjax.mesh import fabric
from cmjax.moe import FabricExchange, buffer_bytes, combine, dispatch, max_tokens, message_bytes
from tests.helpers import assert_close, rank_coded, skewed_topk

NUM_TOKENS, NUM_TOPK, HIDDEN, NUM_LOCAL = 6, 3, 10, 2


def on_ranks(mesh, function, num_out):
    """Jit a per-rank function over arrays `[ranks, ...]`; each of its outputs comes back stacked by rank."""
    specs = P("ep")

    def rank(*args):
        return tuple(out[None] for out in function(*(a[0] for a in args)))

    return jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=(specs,) * num_out, check_vma=False))


@functools.cache
def echo(mesh, num_local=NUM_LOCAL, wire=None, combine_dtype=None, halves=False):
    """Dispatch, let expert (slot) s multiply its rows by s + 1, combine: `(messages, counts, combined)`."""

    exchange = FabricExchange(
        axis_name="ep", num_local_experts=num_local, dispatch_dtype=wire, combine_dtype=combine_dtype
    )

    def rank(x, slot_idx, weights):
        if halves:
            in_flight = exchange.dispatch_start(x, slot_idx, channel="dispatch")
            behind = jnp.sin(x).sum()
            received, handle = in_flight.done(hide_behind=behind)
        else:
            received, handle = dispatch(x, slot_idx, axis_name="ep", num_local_experts=num_local, dispatch_dtype=wire)
        counts = received.num_tokens_per_expert
        ends = jnp.cumsum(counts)
        local = jnp.searchsorted(ends, jnp.arange(received.messages.shape[0]), side="right")
        slot = jax.lax.axis_index("ep") * num_local + local
        rows = received.unpack(received.messages, x.shape[-1], x.dtype) * (slot + 1)[:, None].astype(x.dtype)
        if halves:
            y = exchange.combine_start(rows, weights, handle, channel="combine").done(hide_behind=jnp.cos(behind))
        else:
            y = combine(rows, weights, handle, axis_name="ep", combine_dtype=combine_dtype)
        return received.messages, counts, y

    return on_ranks(mesh, rank, 3)


def check_delivery(x, slot_idx, messages, counts, num_local):
    """Each slot received exactly the rows of the tokens that chose it, grouped in slot order from row 0 on."""
    messages, counts = np.asarray(messages), np.asarray(counts)
    for rank in range(len(x)):
        begin = 0
        for local in range(num_local):
            source, token, _ = np.nonzero(slot_idx == rank * num_local + local)
            expected = x[source, token]
            assert counts[rank, local] == len(expected)
            rows = messages[rank, begin : begin + len(expected)]
            # The order inside a group is free: sort by what the payload says of its origin.
            rows, expected = (a[np.lexsort(a.T[::-1])] for a in (rows, expected))
            np.testing.assert_array_equal(rows, expected, err_msg=f"rank {rank}, local expert {local}")
            begin += len(expected)


def combined(x, slot_idx, weights):
    """What `echo` must return, in float64."""
    factor = np.where(slot_idx < 0, 0, slot_idx + 1) * weights.astype(np.float64)
    return x.astype(np.float64) * factor.sum(-1)[..., None]


def choose(kind, rng, num_ranks, num_slots, num_tokens=NUM_TOKENS, num_topk=NUM_TOPK):
    """`int32[ranks, tokens, topk]` of different slots a token."""
    shape = (num_ranks, num_tokens, num_topk)
    if kind == "none":
        return np.full(shape, -1, np.int32)
    if kind == "all_the_same":
        return np.broadcast_to(np.arange(num_slots - num_topk, num_slots, dtype=np.int32), shape).copy()
    if kind == "one_source":
        slot_idx = np.full(shape, -1, np.int32)
        slot_idx[num_ranks // 2] = skewed_topk(rng, num_tokens, num_topk, num_slots)
        return slot_idx
    skew, none = {"even": (0.0, 0.0), "skewed": (2.5, 0.0), "holes": (1.0, 0.5), "few": (0.5, 0.95)}[kind]
    flat = skewed_topk(rng, num_ranks * num_tokens, num_topk, num_slots, skew=skew, none=none)
    return flat.reshape(shape)


KINDS = ("none", "all_the_same", "one_source", "even", "skewed", "holes", "few")


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
def test_every_row_lands_in_its_place_and_comes_back(make_mesh, seed, kind):
    rng = np.random.default_rng(seed)
    x = rank_coded(8, NUM_TOKENS, HIDDEN)
    slot_idx = choose(kind, rng, 8, 8 * NUM_LOCAL)
    # Integers and halves: sums of them are exact, whatever the order.
    weights = rng.integers(-4, 5, slot_idx.shape).astype(np.float32) / 2
    messages, counts, y = echo(make_mesh(8))(x, slot_idx, weights)
    assert messages.shape[1] == 8 * max_tokens(NUM_TOKENS, NUM_TOPK, NUM_LOCAL)
    check_delivery(x, slot_idx, messages, counts, NUM_LOCAL)
    np.testing.assert_array_equal(y, combined(x, slot_idx, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_halves_equal_the_plain_forms(make_mesh, rng, kind):
    x = rank_coded(8, NUM_TOKENS, HIDDEN)
    slot_idx = choose(kind, rng, 8, 8 * NUM_LOCAL)
    weights = rng.normal(size=slot_idx.shape).astype(np.float32)
    messages, counts, y = echo(make_mesh(8), halves=True)(x, slot_idx, weights)
    check_delivery(x, slot_idx, messages, counts, NUM_LOCAL)
    np.testing.assert_array_equal(y, echo(make_mesh(8))(x, slot_idx, weights)[2])


@pytest.mark.parametrize("kind", ["all_the_same", "skewed", "holes"])
@pytest.mark.parametrize(("num_ranks", "num_local"), [(1, 5), (3, 2), (64, 1), (320, 1)])
def test_other_sizes(make_mesh, rng, num_ranks, num_local, kind):
    x = rank_coded(num_ranks, NUM_TOKENS, HIDDEN, np.int32).astype(np.float32)
    slot_idx = choose(kind, rng, num_ranks, num_ranks * num_local)
    weights = rng.integers(-4, 5, slot_idx.shape).astype(np.float32)
    messages, counts, y = echo(make_mesh(num_ranks), num_local)(x, slot_idx, weights)
    check_delivery(x, slot_idx, messages, counts, num_local)
    np.testing.assert_array_equal(y, combined(x, slot_idx, weights))


def test_more_choices_than_local_experts_fill_the_buffer_exactly(make_mesh):
    """Eight choices over four ranks of two experts: a token can send a rank two rows, never three."""
    x = rank_coded(4, NUM_TOKENS, HIDDEN)
    slot_idx = np.broadcast_to(np.arange(8, dtype=np.int32), (4, NUM_TOKENS, 8)).copy()
    messages, counts, y = echo(make_mesh(4))(x, slot_idx, np.ones(slot_idx.shape, np.float32))
    assert messages.shape[1] == 4 * NUM_TOKENS * 2
    np.testing.assert_array_equal(np.asarray(counts).sum(1), messages.shape[1])
    check_delivery(x, slot_idx, messages, counts, NUM_LOCAL)
    np.testing.assert_array_equal(y, x * 36)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_rows_travel_bit_for_bit(make_mesh, rng, dtype):
    x = rank_coded(8, NUM_TOKENS, HIDDEN, dtype)
    slot_idx = choose("skewed", rng, 8, 8 * NUM_LOCAL)
    messages, counts, _ = echo(make_mesh(8))(x, slot_idx, np.ones(slot_idx.shape, np.float32))
    assert messages.dtype == dtype
    check_delivery(x, slot_idx, messages, counts, NUM_LOCAL)


def test_int8_rows_arrive_with_their_scale(make_mesh, rng):
    x = rng.normal(0, 3, (8, NUM_TOKENS, HIDDEN)).astype(np.float32)
    x[0, 0] = 0
    slot_idx = choose("skewed", rng, 8, 8 * NUM_LOCAL)
    weights = rng.normal(size=slot_idx.shape).astype(np.float32)
    messages, _, y = echo(make_mesh(8), wire="int8")(x, slot_idx, weights)
    assert messages.dtype == jnp.int8
    # The slot of the scale begins at a multiple of its 4 bytes.
    assert messages.shape[2] == message_bytes(HIDDEN, x.dtype, "int8") == -(-HIDDEN // 4) * 4 + 4
    scale = np.abs(x).max(-1, keepdims=True) / 127
    rounded = np.round(x / np.where(scale == 0, 1, scale)) * scale
    expected = combined(rounded, slot_idx, weights)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
    assert np.abs(np.asarray(y) - combined(x, slot_idx, weights)).max() > 1e-3, "nothing was quantized"


def test_combine_dtype_rounds_what_travels_back(make_mesh, rng):
    x = rng.normal(size=(8, NUM_TOKENS, HIDDEN)).astype(np.float32)
    slot_idx = choose("even", rng, 8, 8 * NUM_LOCAL)
    weights = np.ones(slot_idx.shape, np.float32)
    rounded = echo(make_mesh(8), combine_dtype="bfloat16")(x, slot_idx, weights)[2]
    assert rounded.dtype == jnp.float32
    products = (x[:, :, None] * (slot_idx + 1)[..., None].astype(np.float32)).astype(jnp.bfloat16).astype(np.float32)
    assert_close(rounded, products.sum(2))


def test_one_axis_of_a_grid(make_mesh, rng):
    """Groups along "ep" exchange among themselves: the other axis never meets."""
    mesh = make_mesh(2, 4, axes=("dp", "ep"))
    x = rank_coded(8, NUM_TOKENS, HIDDEN).reshape(2, 4, NUM_TOKENS, HIDDEN)
    slot_idx = choose("skewed", rng, 8, 4 * NUM_LOCAL).reshape(2, 4, NUM_TOKENS, NUM_TOPK)

    def rank(x, slot_idx):
        received, handle = dispatch(x[0, 0], slot_idx[0, 0], axis_name="ep", num_local_experts=NUM_LOCAL)
        y = combine(received.messages, jnp.ones((NUM_TOKENS, NUM_TOPK)), handle, axis_name="ep")
        return tuple(a[None, None] for a in (received.messages, received.num_tokens_per_expert, y))

    specs = P("dp", "ep")
    step = jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=(specs,) * 3, check_vma=False)
    messages, counts, y = jax.jit(step)(x, slot_idx)
    for group in range(2):
        check_delivery(x[group], slot_idx[group], messages[group], counts[group], NUM_LOCAL)
    np.testing.assert_array_equal(y, x * NUM_TOPK)


def test_only_rows_that_exist_travel(make_mesh, rng):
    """One row a choice, nothing for -1, beside the two small exchanges of counts and offsets."""
    x = rank_coded(8, NUM_TOKENS, HIDDEN)
    slot_idx = choose("holes", rng, 8, 8 * NUM_LOCAL)
    step = echo(make_mesh(8))
    weights = np.ones(slot_idx.shape, np.float32)
    jax.block_until_ready(step(x, slot_idx, weights))
    fabric.traffic.reset()
    jax.block_until_ready(step(x, slot_idx, weights))
    traffic = fabric.traffic.snapshot()
    target = np.where(slot_idx < 0, 8, slot_idx // NUM_LOCAL)
    expected = np.stack([np.bincount(row.reshape(-1), minlength=9)[:8] for row in target]) * HIDDEN * 4
    np.testing.assert_array_equal(traffic.matrix("ub", "ragged_all_to_all")[:8, :8], expected + expected.T)
    assert traffic.calls("ub", "ragged_all_to_all") == 2
    assert traffic.calls("ub", "all_to_all") == 2


def test_too_many_choices_for_the_sort_key_is_an_error(make_mesh, monkeypatch):
    """Of the XLA form; the kernel counts."""
    monkeypatch.setattr(kernels.settings, "is_wanted", lambda: False)
    x, slot_idx = np.zeros((1, 2**15, 1), np.float32), np.zeros((1, 2**15, 4), np.int32)
    with pytest.raises(ValueError, match="overflow the 32-bit sort key"):
        echo(make_mesh(1), 2**14).lower(x, slot_idx, np.zeros(slot_idx.shape, np.float32))


def test_buffer_sizes_are_the_papers():
    """Section 3.4: 320 ranks, 96 tokens, one expert a rank; int8 messages of 7.5 KiB, bfloat16 ones of 14 KiB."""
    assert max_tokens(96, 8, 1) == 96
    assert max_tokens(96, 8, 10) == 768
    assert buffer_bytes(320, 96, 8, 1, 7680) == 225 * 2**20
    assert buffer_bytes(320, 96, 8, 1, message_bytes(7168, jnp.bfloat16, None)) == 420 * 2**20
    assert message_bytes(7168, jnp.float32, "bfloat16") == 14 * 2**10
