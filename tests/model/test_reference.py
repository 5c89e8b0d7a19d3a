"""The slow reference against the independent implementation, and its parts against what can be worked out by hand."""

import dataclasses

import numpy as np
import pytest

from cmjax.model import ModelConfig, init_params, reference
from tests.parity import CASES, MTP_CASES, load_case


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    case = load_case(name)
    np.testing.assert_allclose(
        reference.logits(case.config, case.params, case.input_ids), case.logits, atol=1e-5, rtol=0
    )


def test_logits_in_float32():
    case = load_case("v3-small")
    found = reference.logits(case.config, case.params, case.input_ids, np.float32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, case.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MTP_CASES)
def test_mtp_logits(name):
    case = load_case(name)
    found = reference.mtp_logits(case.config, case.params, case.input_ids)
    np.testing.assert_allclose(found, case.mtp_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name != "v3-fp8"])
def test_greedy_tokens(name):
    case = load_case(name)
    tokens = np.concatenate([case.prompt, case.generated], axis=1)
    best = reference.logits(case.config, case.params, tokens).argmax(-1)[:, case.prompt.shape[1] - 1 : -1]
    for row, expected in enumerate(case.generated):
        num = case.num_clear(row)
        assert num > 0
        np.testing.assert_array_equal(best[row, :num], expected[:num])


def test_greedy_feeds_its_own_tokens_back():
    case = load_case("v3-odd")
    found = reference.greedy(case.config, case.params, case.prompt, 5)
    np.testing.assert_array_equal(found, case.generated[:, :5])


def test_every_case_with_mtp_logits_is_listed():
    assert tuple(name for name in CASES if load_case(name).mtp_logits is not None) == MTP_CASES


def test_later_tokens_do_not_change_earlier_logits(rng):
    case = load_case("v2-groups")
    changed = case.input_ids.copy()
    changed[:, 15:] = rng.integers(0, case.config.vocab_size, changed[:, 15:].shape)
    before = reference.logits(case.config, case.params, case.input_ids)
    after = reference.logits(case.config, case.params, changed)
    # Products of another number of rows may round differently.
    np.testing.assert_allclose(before[:, :15], after[:, :15], rtol=1e-12, atol=1e-12)
    assert np.abs(before[:, 15:] - after[:, 15:]).max() > 0.1


def router_config(**changes) -> ModelConfig:
    """Four experts in two groups; the router is the identity, so that a token is its own scores."""
    base = load_case("v3-small").config
    sizes = {"hidden_size": 4, "num_routed_experts": 4, "num_topk": 2, "num_expert_groups": 2, "num_topk_groups": 1}
    return dataclasses.replace(base, **sizes, **changes)


def test_route_excludes_other_groups_even_where_kept_scores_are_negative():
    x = np.array([[3.0, -3.0, -2.0, -1.5]])
    bias = np.array([-1.0, -1.0, -2.0, -2.0])
    # Biased scores: -0.05 -0.95 | -1.88 -1.82; the first group is best. A mask of 0 would choose 2 and 3.
    topk_idx, topk_weights = reference.route(router_config(), x, np.eye(4), bias)
    np.testing.assert_array_equal(topk_idx, [[0, 1]])
    scores = 1 / (1 + np.exp([-3.0, 3.0]))
    np.testing.assert_allclose(topk_weights, [scores / scores.sum() * 2.5])


def test_route_ranks_groups_by_their_two_best_in_v3_and_by_the_best_in_v2():
    x = np.log([[0.4, 0.1, 0.3, 0.25]])  # the best expert is in the first group, the best pair in the second
    v3 = router_config(norm_topk_prob=False, routed_scaling_factor=1.0)
    topk_idx, topk_weights = reference.route(v3, x, np.eye(4), np.zeros(4))
    np.testing.assert_array_equal(topk_idx, [[2, 3]])
    np.testing.assert_allclose(topk_weights, [[0.3 / 1.3, 0.25 / 1.25]])

    v2 = router_config(
        model_type="deepseek_v2", scoring="softmax", topk_method="group_limited_greedy", norm_topk_prob=False
    )
    topk_idx, topk_weights = reference.route(v2, x, np.eye(4))
    np.testing.assert_array_equal(topk_idx, [[0, 1]])
    np.testing.assert_allclose(topk_weights, 2.5 * np.array([[0.4, 0.1]]) / 1.05)

    greedy = dataclasses.replace(v2, topk_method="greedy")
    np.testing.assert_array_equal(reference.route(greedy, x, np.eye(4))[0], [[0, 2]])


def test_route_gives_equal_scores_to_the_lower_index():
    topk_idx, _ = reference.route(router_config(), np.zeros((3, 4)), np.eye(4), np.zeros(4))
    np.testing.assert_array_equal(topk_idx, [[0, 1]] * 3)


def test_moe_is_the_weighted_sum_over_each_tokens_experts(rng):
    tokens, hidden, width, experts, topk = 7, 10, 6, 5, 3
    x = rng.standard_normal((tokens, hidden))
    w13, w2 = rng.standard_normal((experts, 2 * width, hidden)), rng.standard_normal((experts, hidden, width))
    topk_idx = rng.integers(-1, experts, (tokens, topk))  # with repeats, and with -1 for no expert
    topk_idx[0], topk_idx[1] = -1, 2
    topk_weights = rng.standard_normal((tokens, topk))
    expected = np.zeros_like(x)
    for token in range(tokens):
        for expert, weight in zip(topk_idx[token], topk_weights[token], strict=True):
            if expert >= 0:
                gate, up = w13[expert, :width] @ x[token], w13[expert, width:] @ x[token]
                expected[token] += weight * (w2[expert] @ (gate / (1 + np.exp(-gate)) * up))
    np.testing.assert_allclose(reference.moe(x, topk_idx, topk_weights, w13, w2), expected, atol=1e-12)
    np.testing.assert_array_equal(expected[0], 0)


def test_rope_turns_pairs_by_position():
    config = dataclasses.replace(load_case("v3-half-rope").config, rope_theta=100.0, qk_rope_head_dim=4)
    halves = np.zeros((3, 4))
    halves[:, 0] = 1  # paired with dimension 2, at one radian a position
    expected = [[np.cos(t), 0, np.sin(t), 0] for t in range(3)]
    np.testing.assert_allclose(reference.rotate(config, halves), expected, atol=1e-15)
    interleaved = dataclasses.replace(config, rope_interleave=True)
    np.testing.assert_allclose(reference.rotate(interleaved, halves)[2], [np.cos(2), np.sin(2), 0, 0], atol=1e-15)


def test_frequencies_of_yarn():
    config = load_case("v3-dense").config
    plain, _ = reference.rope_frequencies(dataclasses.replace(config, yarn=None))
    stretched, scale = reference.rope_frequencies(config)
    assert scale == 1.25
    # The ramp, not rounded, is from 0 (clamped) to 10 ln(32 / 2 pi) / (2 ln 10000) = 0.884: pair 0 stays as it was.
    np.testing.assert_allclose(stretched, plain * [1, 0.25, 0.25, 0.25, 0.25])
    rounded, _ = reference.rope_frequencies(dataclasses.replace(config, yarn=load_case("v2-groups").config.yarn))
    np.testing.assert_allclose(rounded, stretched)  # to 1: the same
    longer = dataclasses.replace(config.yarn, original_max_position_embeddings=320)
    stretched, _ = reference.rope_frequencies(dataclasses.replace(config, yarn=longer))
    # From 10 ln(320 / 64 pi) / (2 ln 10000) = 0.252 to 2.134.
    assert stretched[1] / plain[1] == pytest.approx(1 - 0.75 * (1 - 0.252) / (2.134 - 0.252), rel=1e-3)


def test_init_params_gives_a_model_that_tells_tokens_apart():
    config = load_case("v3-bias").config
    params = init_params(config, seed=4)
    ids = np.arange(12).reshape(2, 6)
    found = reference.logits(config, params, ids)
    assert np.isfinite(found).all()
    assert found.std(axis=-1).min() > 0.3
    assert len(np.unique(found.argmax(-1))) > 6
    np.testing.assert_array_equal(found, reference.logits(config, init_params(config, seed=4), ids))
    assert np.abs(found - reference.logits(config, init_params(config, seed=5), ids)).max() > 0.1
