"""The differentiable pass against the references, its gradient against differences of the slow form, and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.model import init_params, named_leaves, reference
from cmjax.training import cross_entropy, training_pass
from cmjax.training import decoder as training
from tests.helpers import max_error, tiny_config
from tests.parity import MTP_CASES, load_case

# The others have nothing that one of these has not, where this pass differs from the served ones.
NAMES = ("v3-ep320", "v3-tied", "v3-bias", "v3-half-rope", "v3-noqlora", "v3-dense", "v2-groups")
# 24 and 80 tokens, the references' lengths, are no multiples of it.
QUERY_BLOCK = 9


@pytest.fixture(autouse=True)
def _several_query_blocks(monkeypatch):
    monkeypatch.setattr(training, "_QUERY_BLOCK", QUERY_BLOCK)


def jitted_pass(config, **options):
    return jax.jit(lambda params, ids: training_pass(params, ids, config, rows_per_block=5, **options))


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name, monkeypatch):
    """Logits, MTP logits, and how many tokens each expert gets."""
    case = load_case(name)
    config, route, counts = case.config, reference.route, []
    output = jitted_pass(config)(case.params, case.input_ids)
    assert output.logits.dtype == jnp.float32
    assert max_error(output.logits, case.logits) < 2e-4

    def counting_route(*args):
        topk_idx, weights = route(*args)
        counts.append(np.bincount(topk_idx.ravel(), minlength=config.num_routed_experts))
        return topk_idx, weights

    monkeypatch.setattr(reference, "route", counting_route)
    reference.hidden_states(config, case.params, case.input_ids)
    num_moe = len(config.moe_layer_ids)
    assert len(output.expert_load) == num_moe + config.num_mtp_layers
    np.testing.assert_array_equal(np.ravel(output.expert_load[:num_moe]), np.ravel(counts))
    assert (output.mtp_logits is not None) == (name in MTP_CASES)
    if output.mtp_logits is not None:
        assert max_error(output.mtp_logits[:, :-1], case.mtp_logits) < 2e-4
        reference.mtp_logits(config, case.params, case.input_ids)
        # The last position, which has no successor, goes through the module too, and its output is not used.
        beyond = np.asarray(output.expert_load[-1]) - counts[-1]
        assert beyond.min() >= 0
        assert beyond.sum() == len(case.input_ids) * config.num_topk


def test_without_the_mtp_module():
    case = load_case("v3-tied")
    output = jax.eval_shape(jitted_pass(case.config, with_mtp=False), case.params, case.input_ids)
    assert output.mtp_logits is None
    assert len(output.expert_load) == len(case.config.moe_layer_ids)


def slow_cross_entropy(logits, token_ids, ahead):
    """Mean of -log p over the tokens that are there, one at a time."""
    nats = []
    for row, ids in zip(np.asarray(logits, np.float64), token_ids, strict=True):
        for t in range(len(ids) - ahead):
            probabilities = np.exp(row[t] - row[t].max())
            nats.append(-np.log(probabilities[ids[t + ahead]] / probabilities.sum()))
    return np.mean(nats)


@pytest.mark.parametrize("ahead", [1, 2])
def test_cross_entropy(rng, ahead):
    logits = rng.normal(0, 30, (3, 6, 11)).astype(np.float32)
    token_ids = rng.integers(0, 11, (3, 6))
    expected = slow_cross_entropy(logits, token_ids, ahead)
    np.testing.assert_allclose(cross_entropy(logits, token_ids, ahead), expected, rtol=1e-5)


GRADIENT_CONFIGS = {
    "v3 with MTP, tied, biases, no q_lora": {
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "q_lora_rank": None,
    },
    "v2 with groups": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 2,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "n_shared_experts": 0,
    },
}


@pytest.mark.parametrize("name", GRADIENT_CONFIGS)
def test_gradient_equals_differences_of_the_slow_form(name, rng):
    """The gradient of each leaf along a random direction, beside the float64 loss a millionth on either side."""
    config = tiny_config(**GRADIENT_CONFIGS[name])
    params = init_params(config, seed=5)
    ids = rng.integers(0, config.vocab_size, (2, 13))

    @jax.jit
    @jax.grad
    def gradient(params):
        output = training_pass(params, ids, config, rows_per_block=4)
        loss = cross_entropy(output.logits, ids, 1)
        return loss if output.mtp_logits is None else loss + 0.3 * cross_entropy(output.mtp_logits, ids, 2)

    def slow_loss(leaves):
        params = jax.tree.unflatten(structure, leaves)
        loss = slow_cross_entropy(reference.logits(config, params, ids), ids, 1)
        if params.mtp is None:
            return loss
        mtp_logits = np.pad(reference.mtp_logits(config, params, ids), ((0, 0), (0, 1), (0, 0)))
        return loss + 0.3 * slow_cross_entropy(mtp_logits, ids, 2)

    structure = jax.tree.structure(params)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    for index, (leaf_name, slope) in enumerate(named_leaves(gradient(params)).items()):
        direction = rng.normal(size=slope.shape)
        sides = [[*leaves[:index], leaves[index] + h * direction, *leaves[index + 1 :]] for h in (1e-6, -1e-6)]
        difference = (slow_loss(sides[0]) - slow_loss(sides[1])) / 2e-6
        size = np.linalg.norm(slope)
        assert (size > 0) == (not leaf_name.endswith("router_bias")), leaf_name
        assert abs(np.vdot(slope, direction) - difference) <= 1e-4 * size, leaf_name
