"""One MoE layer over ranks against the slow reference, and a dispatch of one's own in its place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from cmjax.mesh import fabric
from cmjax.model import init_params, reference
from cmjax.moe import (
    ExpertPlacement,
    FabricExchange,
    LayerRouter,
    MlpParams,
    MoeLayer,
    ReceivedRows,
    RouterConfig,
    route_to_slots,
)
from tests.helpers import assert_close, tiny_config

NUM_TOKENS = 5


def run_layer(mesh, config, moe, x, is_valid, make_exchange=FabricExchange, **counts):
    """`(y [ranks, tokens, hidden], load by logical expert)` of layer 1, without a shared MLP that runs locally."""
    p = ExpertPlacement.plan(
        num_routed_experts=config.num_routed_experts,
        num_shared_experts=config.num_shared_experts,
        ep_size=mesh.size,
        num_layers=2,
        **counts,
    )
    hidden, ffn = config.hidden_size, config.moe_intermediate_size
    shared13 = np.asarray(moe.shared.w13).reshape(2, 2, -1, ffn, hidden).transpose(0, 2, 1, 3, 4)
    shared2 = np.asarray(moe.shared.w2).reshape(2, hidden, -1, ffn).transpose(0, 2, 1, 3)
    w13 = np.concatenate([moe.experts.w13, shared13.reshape(2, -1, 2 * ffn, hidden)], axis=1)
    w2 = np.concatenate([moe.experts.w2, shared2], axis=1)
    by_slot = MlpParams(*(np.stack([w[i][p.physical_to_logical[i]] for i in range(2)]) for w in (w13, w2)))
    exchange = make_exchange(axis_name="ep", num_local_experts=p.num_local_experts)

    def rank(x, is_valid, experts, maps):
        router = LayerRouter(moe.router[1], moe.router_bias[1], maps[1, 0], config.router)
        y, load = MoeLayer(router, experts, 1, None, exchange, "test")(x[0], is_valid[0])
        return y[None], load[None]

    specs = (P("ep"), P("ep"), P(None, "ep"), P(None, "ep"))
    step = jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=P("ep"), check_vma=False)
    y, load = jax.jit(step)(x, is_valid, by_slot, p.expert_to_slot)
    return np.asarray(y), p.expert_load(np.stack([np.zeros(p.num_physical_experts, int), np.ravel(load)]))[1]


@pytest.fixture(scope="module")
def layer():
    config = tiny_config(n_shared_experts=2)
    return config, init_params(config, seed=3).moe.mlp


@pytest.mark.parametrize(
    ("ep_size", "counts"),
    [
        (1, {}),
        (3, {}),
        (8, {}),
        (8, {"num_shared_replicas": 4, "num_redundant_experts": 4}),
        (40, {}),
    ],
)
def test_equals_the_reference(make_mesh, rng, layer, ep_size, counts):
    config, moe = layer
    x = rng.normal(size=(ep_size, NUM_TOKENS, config.hidden_size)).astype(np.float32)
    is_valid = rng.random((ep_size, NUM_TOKENS)) < 0.8
    y, load = run_layer(make_mesh(ep_size), config, moe, x, is_valid, **counts)
    flat = x.reshape(-1, config.hidden_size).astype(np.float64)
    topk_idx, weights = reference.route(config, flat, moe.router[1], moe.router_bias[1])
    expected = reference.moe(flat, topk_idx, weights, moe.experts.w13[1], moe.experts.w2[1])
    valid = is_valid.reshape(-1)
    assert_close(load[:24], np.bincount(topk_idx[valid].reshape(-1), minlength=24))
    if ep_size == 40 or counts:
        expected += reference.mlp(flat, moe.shared.w13[1], moe.shared.w2[1])
        np.testing.assert_array_equal(load[24:], valid.sum())
    expected[~valid] = 0
    assert_close(y.reshape(expected.shape), expected, scale=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EverythingEverywhere:
    """An exchange of one's own: every rank gets all the rows of all ranks, and keeps those of its experts."""

    axis_name: str
    num_local_experts: int

    def dispatch(self, x, slot_idx, *, channel):
        everyone = fabric.all_gather(x, self.axis_name, tiled=True, channel=f"{channel}/rows")
        slots = fabric.all_gather(slot_idx, self.axis_name, tiled=True, channel=f"{channel}/slots")
        local = slots - lax.axis_index(self.axis_name) * self.num_local_experts
        local = jnp.where((local < 0) | (local >= self.num_local_experts), self.num_local_experts, local)
        order = jnp.argsort(local.reshape(-1), stable=True)
        counts = (local.reshape(-1, 1) == jnp.arange(self.num_local_experts)).sum(0, dtype=jnp.int32)
        return ReceivedRows(everyone[order // slots.shape[1]], counts), (order, counts.sum())

    def combine(self, rows, topk_weights, handle, *, channel):
        order, num_rows = handle
        weights = fabric.all_gather(topk_weights, self.axis_name, tiled=True, channel=f"{channel}/weights")
        exists = jnp.arange(len(order)) < num_rows
        rows = jnp.where(exists[:, None], rows.astype(jnp.float32) * weights.reshape(-1)[order][:, None], 0)
        total = jnp.zeros((weights.shape[0], rows.shape[1])).at[order // weights.shape[1]].add(rows)
        return fabric.psum_scatter(total, self.axis_name, tiled=True, channel=f"{channel}/sum")


def test_a_dispatch_of_ones_own_takes_the_place(make_mesh, rng, layer):
    config, moe = layer
    x = rng.normal(size=(8, NUM_TOKENS, config.hidden_size)).astype(np.float32)
    is_valid = rng.random((8, NUM_TOKENS)) < 0.8
    own, own_load = run_layer(make_mesh(8), config, moe, x, is_valid, EverythingEverywhere)
    y, load = run_layer(make_mesh(8), config, moe, x, is_valid)
    assert_close(own, y, scale=10)
    np.testing.assert_array_equal(own_load, load)


@pytest.mark.parametrize("ep_size", [1, 8])
def test_the_stages_with_work_between_them_are_the_layer(make_mesh, rng, layer, ep_size):
    """Bit for bit, with a shared MLP that every rank has; that MLP is what the layer without it lacks."""
    config, moe = layer
    num_local = config.num_routed_experts // ep_size
    x = rng.normal(size=(ep_size, NUM_TOKENS, config.hidden_size)).astype(np.float32)

    def rank(x, experts):
        x, is_valid = x[0], jnp.arange(NUM_TOKENS) > 0
        router = LayerRouter(moe.router[1], moe.router_bias[1], jnp.arange(config.num_routed_experts), config.router)
        exchange = FabricExchange(axis_name="ep", num_local_experts=num_local)
        shared = MlpParams(moe.shared.w13[1], moe.shared.w2[1])
        whole = MoeLayer(router, experts, 1, shared, exchange, "whole")
        stages = dataclasses.replace(whole, channel="stages")
        routed = stages.route(x, is_valid)
        returning = stages.run(routed, stages.dispatch(routed), jnp.sin(x))
        without = dataclasses.replace(whole, shared=None, channel="without")
        outputs = (whole(x, is_valid), (stages.combine(returning, jnp.cos(x)), returning.num_tokens_per_expert))
        return jax.tree.map(lambda a: a[None], (*outputs, without(x, is_valid)[0]))

    step = jax.shard_map(
        rank, mesh=make_mesh(ep_size), in_specs=(P("ep"), P(None, "ep")), out_specs=P("ep"), check_vma=False
    )
    whole, stages, without = jax.jit(step)(x, MlpParams(moe.experts.w13, moe.experts.w2))
    jax.tree.map(np.testing.assert_array_equal, whole, stages)
    flat = x.reshape(-1, config.hidden_size).astype(np.float64)
    shared = reference.mlp(flat, moe.shared.w13[1], moe.shared.w2[1])
    assert_close((whole[0] - without).reshape(flat.shape), shared, scale=10)


def test_choices_in_slots_have_the_shared_experts():
    """Experts 0 to 3 in slots 5, 3, 1, 0, the two shared ones in slots 7 and 9; the second token is padding."""
    expert_to_slot = np.array([5, 3, 1, 0, 7, 9], np.int32)
    config = RouterConfig(num_experts=4, num_topk=2, scoring="softmax", topk_method="greedy", norm_topk_prob=False)
    x = np.log(np.array([[0.25, 0.125, 0.5, 0.125], [0.1, 0.3, 0.1, 0.5]], np.float32))
    router = (x, np.eye(4, dtype=np.float32), None, config)
    slot_idx, weights = route_to_slots(*router, expert_to_slot, np.array([True, False]))
    np.testing.assert_array_equal(slot_idx, [[1, 5, 7, 9], [-1, -1, -1, -1]])
    np.testing.assert_allclose(weights[0], [0.5, 0.25, 1, 1], rtol=1e-6)
    slot_idx, weights = route_to_slots(*router, expert_to_slot[:4], np.array([True, True]))
    np.testing.assert_array_equal(slot_idx, [[1, 5], [0, 3]])
    np.testing.assert_allclose(weights, [[0.5, 0.25], [0.5, 0.3]], rtol=1e-6)
