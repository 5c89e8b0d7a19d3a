"""The router against the slow reference: which experts, in which order, with what weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.model import ModelConfig, reference
from cmjax.moe import route, route_to_slots
from tests.helpers import assert_close, tiny_config

NUM_TOKENS, NUM_EXPERTS = 40, 24
V2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False}
KINDS = {
    "v3": {"n_group": 4, "topk_group": 2},
    "v3_one_group": {"n_group": 1, "topk_group": 1},
    "v3_pairs": {"n_group": 12, "topk_group": 5, "num_experts_per_tok": 3},
    "v3_not_normalized": {"n_group": 6, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "v3_all_of_the_groups": {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 6},
    "v2_greedy": {**V2, "topk_method": "greedy"},
    "v2_greedy_ignores_groups": {**V2, "topk_method": "greedy", "n_group": 4, "topk_group": 2},
    "v2_groups": {**V2, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
}


def config_of(kind: str) -> ModelConfig:
    return tiny_config(hidden_size=NUM_EXPERTS, n_routed_experts=NUM_EXPERTS, **KINDS[kind])


jitted_route = jax.jit(route, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def jitted_slots(x, weight, bias, config):
    """Every expert in the slot of its number: `route`, by the kernel."""
    slots, is_valid = jnp.arange(NUM_EXPERTS, dtype=jnp.int32), jnp.ones(len(x), bool)
    return route_to_slots(x, weight, bias, config, slots, is_valid)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_equals_the_reference(kind, data):
    """The router is the identity, so a token is its own scores; a coarse grid makes ties frequent and exact."""
    config = config_of(kind)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    spread = data.draw(st.sampled_from([0.25, 1.0, 8.0]), label="spread")
    shift = data.draw(st.sampled_from([-6.0, -1.0, 0.0, 2.0]), label="bias")
    x = np.round(rng.normal(0, spread, (NUM_TOKENS, NUM_EXPERTS)) * 8).astype(np.float32) / 8
    bias = None
    if config.scoring == "sigmoid":
        bias = (shift + np.round(rng.normal(0, 0.3, NUM_EXPERTS) * 16) / 16).astype(np.float32)
    identity = np.eye(NUM_EXPERTS, dtype=np.float32)
    expected_idx, expected_weights = reference.route(config, x, identity, bias)
    # Where rounding decides between two experts (grids added to a sigmoid rarely meet), both orders are right.
    clear = _is_clear(config, x, bias)
    assert clear.mean() > 0.5
    for function in (jitted_route, jitted_slots):
        topk_idx, topk_weights = function(x, identity, bias, config=config.router)
        assert topk_weights.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(topk_idx)[clear], expected_idx[clear])
        assert_close(topk_weights[clear], expected_weights[clear])


def _is_clear(config: ModelConfig, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Tokens without two different expert or group scores closer than float32 rounding."""
    x = x.astype(np.float64)
    scores = 1 / (1 + np.exp(-x)) if config.scoring == "sigmoid" else reference.softmax(x)
    choice = scores if bias is None else scores + bias
    groups = np.sort(choice.reshape(len(x), config.num_expert_groups, -1), axis=-1)
    merit = groups[..., -2:].sum(-1) if config.topk_method == "noaux_tc" else groups[..., -1]
    clear = np.ones(len(x), bool)
    for values in (choice, merit):
        ordered = np.sort(values, axis=1)
        gap = np.diff(ordered, axis=1)
        # Equal logits with equal biases are equal on both sides, and go to the lower index; others must be apart.
        rounding = 1e-5 * ordered[:, 1:] + 1e-30 if bias is None else 3e-6
        clear &= ((gap > rounding) | (gap == 0)).all(1)
    if bias is not None:
        # Equal sums of different logits and biases may round apart.
        for row in range(len(x)):
            order = np.argsort(choice[row], kind="stable")
            same = np.diff(choice[row][order]) == 0
            clear[row] &= bool(np.all(x[row][order][1:][same] == x[row][order][:-1][same]))
    return clear


@pytest.mark.parametrize("kind", KINDS)
def test_choices_lie_in_the_best_groups_and_differ(kind, rng):
    config = config_of(kind)
    x = rng.normal(0, 3, (NUM_TOKENS, NUM_EXPERTS)).astype(np.float32)
    bias = None if config.scoring == "softmax" else np.full(NUM_EXPERTS, -2.0, np.float32)
    topk_idx, topk_weights = jitted_route(x, np.eye(NUM_EXPERTS, dtype=np.float32), bias, config=config.router)
    for choices in np.asarray(topk_idx):
        assert len(set(choices)) == config.num_topk
        if config.topk_method != "greedy":
            assert len(set(choices * config.num_expert_groups // NUM_EXPERTS)) <= config.num_topk_groups
    total = np.asarray(topk_weights).sum(1)
    if config.norm_topk_prob:
        np.testing.assert_allclose(total, config.routed_scaling_factor, rtol=1e-5)
    else:
        assert total.max() < config.num_topk * config.routed_scaling_factor


def test_scores_are_float32_whatever_the_activations_are(rng):
    config = config_of("v3")
    x = jnp.asarray(rng.normal(size=(NUM_TOKENS, NUM_EXPERTS)), jnp.bfloat16)
    weight = rng.normal(size=(NUM_EXPERTS, NUM_EXPERTS)).astype(np.float32)
    run = functools.partial(jitted_route, config=config.router)
    low, high = run(x, weight, None), run(x.astype(jnp.float32), weight, None)
    np.testing.assert_array_equal(low[0], high[0])
    np.testing.assert_array_equal(low[1], high[1])
