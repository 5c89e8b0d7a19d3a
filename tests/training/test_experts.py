"""The expert layer with a derivative: its blocks, against `MoeLayer`, and its gradient against a plain dense form's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from cmjax.moe import FabricExchange, LayerRouter, MlpParams, MoeLayer, route
from cmjax.training import block_layout, moe_ffn_blocks
from tests.helpers import TOLERANCES, assert_close, skewed_topk, tiny_config

NUM_EXPERTS, HIDDEN, FFN = 24, 32, 12
CONFIG = tiny_config().router
# Router biases: none; and one that no score outweighs, so that every token goes to the same experts.
BIASES = np.float32([[0] * 24, [9] * 5 + [0] * 19])
# (tokens, topk, experts, rows a block): blocks that divide nothing, of one row, and larger than all there is.
SHAPES = [(1, 1, 1, 1), (3, 2, 40, 7), (17, 5, 24, 8), (17, 5, 24, 1), (50, 3, 6, 11), (64, 8, 8, 64), (9, 1, 5, 100)]

jitted_layout = jax.jit(block_layout, static_argnums=(1, 2))


@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 2**32 - 1), skew=st.sampled_from([0.0, 1.5, 100.0]))
def test_every_choice_has_a_row_of_its_expert(shape, seed, skew):
    """At the largest skew every token goes to the same experts, and the others have none."""
    tokens, num_topk, num_experts, rows_per_block = shape
    topk_idx = skewed_topk(np.random.default_rng(seed), tokens, num_topk, num_experts, skew=skew)
    layout = jax.tree.map(np.asarray, jitted_layout(topk_idx, num_experts, rows_per_block))
    assert layout.row_token.shape == (len(layout.block_expert) * rows_per_block,)
    assert len(np.unique(layout.choice_row)) == topk_idx.size
    np.testing.assert_array_equal(layout.block_expert[layout.choice_row // rows_per_block], topk_idx)
    row_token = np.full(len(layout.row_token), tokens)
    row_token[layout.choice_row] = np.arange(tokens)[:, None]
    np.testing.assert_array_equal(layout.row_token, row_token)
    np.testing.assert_array_equal(layout.num_tokens_per_expert, np.bincount(topk_idx.ravel(), minlength=num_experts))
    assert ((layout.block_expert >= 0) & (layout.block_expert < num_experts)).all()


def make_layer(rng, tokens, dtype=np.float32):
    """`(x, router, experts of two layers, the second of which is used)`."""
    x = rng.normal(size=(tokens, HIDDEN))
    router = rng.normal(0, HIDDEN**-0.5, (NUM_EXPERTS, HIDDEN)).astype(np.float32)
    w13 = rng.normal(0, HIDDEN**-0.5, (2, NUM_EXPERTS, 2 * FFN, HIDDEN))
    w2 = rng.normal(0, FFN**-0.5, (2, NUM_EXPERTS, HIDDEN, FFN))
    return jnp.asarray(x, dtype), router, MlpParams(jnp.asarray(w13, dtype), jnp.asarray(w2, dtype))


def make_exchanged(mesh):
    """`MoeLayer` on one device."""

    def rank(x, router, bias, experts):
        exchange = FabricExchange(axis_name="ep", num_local_experts=NUM_EXPERTS)
        routed = LayerRouter(router, bias, jnp.arange(NUM_EXPERTS), CONFIG)
        return MoeLayer(routed, experts, 1, None, exchange, "test")(x, jnp.ones(len(x), bool))

    return jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))


@pytest.mark.parametrize(
    ("tokens", "rows_per_block", "dtype"),
    [(1, 4, "float32"), (23, 64, "float32"), (150, 32, "float32"), (150, 7, "bfloat16")],
)
def test_equals_the_layer_that_serves(make_mesh, rng, tokens, rows_per_block, dtype):
    """In bfloat16 `MoeLayer` rounds what is between the products, and this form does not."""
    x, router, experts = make_layer(rng, tokens, dtype)
    exchanged = make_exchanged(make_mesh(1))
    for bias in BIASES:
        y, load = moe_ffn_blocks(x, router, bias, experts, 1, config=CONFIG, rows_per_block=rows_per_block)
        expected, expected_load = exchanged(x, router, bias, experts)
        assert y.dtype == jnp.float32
        rtol, atol = TOLERANCES[dtype]
        np.testing.assert_allclose(y, expected, rtol=5 * rtol, atol=5 * atol)
        assert_close(load, expected_load)


def dense(x, router, w13, w2, topk_idx):
    """Every expert for every token, weighted by what the router gives the chosen ones and by zero."""
    is_chosen = (topk_idx[..., None] == jnp.arange(NUM_EXPERTS)).any(1)
    weights = jnp.where(is_chosen, jax.nn.sigmoid(x @ router.T), 0)
    weights = CONFIG.routed_scaling_factor * weights / weights.sum(-1, keepdims=True)
    gate, up = jnp.split(jnp.einsum("th,efh->tef", x, w13), 2, axis=-1)
    return jnp.einsum("tef,ehf,te->th", jax.nn.silu(gate) * up, w2, weights)


def test_gradient_equals_the_dense_forms(rng):
    """float32 beside float64: the router computes in float32 whatever it is given."""
    x, router, experts = make_layer(rng, 41)
    direction = rng.normal(size=x.shape).astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def gradient(x, router, bias, experts):
        y, _ = moe_ffn_blocks(x, router, bias, experts, 1, config=CONFIG, rows_per_block=7)
        return jnp.sum(y * direction)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def dense_gradient(x, router, w13, w2, topk_idx):
        return jnp.sum(dense(x, router, w13, w2, topk_idx) * direction)

    for bias in BIASES:
        dx, d_router, d_bias, d_experts = gradient(x, router, bias, experts)
        topk_idx = np.asarray(route(x, router, bias, CONFIG)[0])
        with jax.enable_x64(True):
            wide = (np.asarray(a, np.float64) for a in (x, router, experts.w13[1], experts.w2[1]))
            expected = dense_gradient(*wide, topk_idx)
            assert expected[0].dtype == jnp.float64
        for actual, wanted in zip((dx, d_router, d_experts.w13[1], d_experts.w2[1]), expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-6 * np.abs(wanted).max())
        assert not d_bias.any()
        assert not d_experts.w13[0].any()
        assert not d_experts.w2[0].any()
