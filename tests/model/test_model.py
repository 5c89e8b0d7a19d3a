"""`Model`: the engine's layer code on one device, against the references and against the slow form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import cmjax
from cmjax.errors import UserError
from cmjax.model import (
    PrefillBatch,
    RankSpec,
    expert_maps,
    lm_head,
    mtp_head,
    place_params,
    plan_placement,
    prefill_pass,
    reference,
)
from cmjax.moe import FabricExchange
from tests.helpers import max_error, tiny_model
from tests.parity import CASES, FOLDER, MTP_CASES, load_case
from tests.serve.driving import model_of

# Configurations of the same architectures that no case has.
OTHERS = {
    "every_second_layer_is_moe": {"num_hidden_layers": 5, "moe_layer_freq": 2},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "more_dense_than_layers": {"first_k_dense_replace": 7},
    "no_shared_expert": {"n_shared_experts": 0},
    "four_shared_experts": {"n_shared_experts": 4, "q_lora_rank": None, "attention_bias": True},
    "topk_1": {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
}


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    case = load_case(name)
    logits = model_of(case).logits(case.input_ids)
    assert logits.dtype == jnp.float32
    assert max_error(logits, case.logits) < 2e-4


@pytest.mark.parametrize("name", MTP_CASES)
def test_mtp_logits(name):
    case = load_case(name)
    mtp_logits = model_of(case).mtp_logits(case.input_ids)
    assert mtp_logits.dtype == jnp.float32
    assert max_error(mtp_logits, case.mtp_logits) < 2e-4


@pytest.mark.parametrize("name", OTHERS)
def test_other_configs(name, rng):
    model = tiny_model(**OTHERS[name])
    input_ids = rng.integers(0, model.config.vocab_size, (2, 19))
    assert max_error(model.logits(input_ids), reference.logits(model.config, model.params, input_ids)) < 2e-4


def test_load_is_the_front_door():
    case = load_case("v3-small")
    model = cmjax.load(FOLDER / "v3-small")
    assert model.digest == case.digest
    assert model.dtype == np.float32
    np.testing.assert_array_equal(model.logits(case.input_ids), model_of(case).logits(case.input_ids))


def test_bfloat16_is_near_float32():
    case = load_case("v3-small")
    model = cmjax.load(FOLDER / "v3-small", dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    logits = np.asarray(model.logits(case.input_ids))
    # A token whose router choice flips is far off by right; the typical one is not.
    error = np.abs(logits - case.logits).max(-1)
    assert 0 < np.median(error) < 0.1 * case.logits.std()


def test_sequences_of_any_length_and_number(rng):
    """Lengths around the blocks, query tiles and key chunks of attention."""
    model = tiny_model(num_hidden_layers=2)
    input_ids = rng.integers(0, 101, (1, 150))
    whole = np.asarray(model.logits(input_ids))
    assert max_error(whole, reference.logits(model.config, model.params, input_ids)) < 2e-4
    for length in (1, 16, 129):
        np.testing.assert_allclose(model.logits(input_ids[:, :length]), whole[:, :length], atol=1e-5)


def test_nothing_in_an_uninitialized_cache_is_read(make_mesh):
    """Cache memory full of NaN, as memory may be, changes no logit, not even where the MTP module has no row yet."""
    model = tiny_model(num_nextn_predict_layers=1, num_hidden_layers=2)
    mesh, placement = make_mesh(1), plan_placement(model.config, 1)
    exchange = FabricExchange(axis_name="ep", num_local_experts=placement.num_local_experts)
    spec = RankSpec(config=model.config, axis_name="ep", block_size=16, exchange=exchange)
    params, maps = place_params(model.params, placement, mesh), expert_maps(placement, 1)
    ids = np.arange(40, dtype=np.int32)
    ends = np.array([0, 17, 33, 34, 34])  # one sequence of a single token, an unused one, and padding after them
    positions = np.concatenate([*(np.arange(n) for n in np.diff(ends)), np.zeros(6)]).astype(np.int32)
    blocks = np.array([[3, 0, -1], [5, 2, -1], [1, -1, -1], [-1, -1, -1]], np.int32)
    seq = np.searchsorted(ends[1:], np.arange(40), side="right").clip(max=3)
    slots = np.where(np.arange(40) < 34, blocks[seq, positions // 16] * 16 + positions % 16, -1)
    following = np.append(ids[1:], -1)
    following[ends[1:] - 1] = -1
    following[34:] = -1
    batch = PrefillBatch(ids, following, positions, slots.astype(np.int32), ends.astype(np.int32), blocks)

    def rank(params, maps, cache, batch):
        output, mtp_hidden = prefill_pass(params, maps[:, 0], cache, batch, spec)
        return lm_head(params, output.hidden), mtp_head(params, mtp_hidden), output.cache

    step = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    shape = (model.config.num_cache_layers, 6 * 16, model.config.latent_width)
    zeros, nans = (step(params, maps, np.full(shape, fill, np.float32), batch) for fill in (0, np.nan))
    known = following >= 0
    np.testing.assert_array_equal(nans[0][:34], zeros[0][:34])
    np.testing.assert_array_equal(np.asarray(nans[1])[known], np.asarray(zeros[1])[known])
    assert np.isfinite(np.asarray(nans[1])[known]).all()
    # Rows were written for every token, in the MTP layer for those with a successor, and nowhere else.
    written = np.zeros(shape[:2], bool)
    written[: model.config.num_hidden_layers, slots[:34]] = True
    written[model.config.num_hidden_layers, slots[known]] = True
    np.testing.assert_array_equal(~np.isnan(np.asarray(nans[2])).any(-1), written)


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        ([[3, 101]], "token id 101 is outside the vocabulary"),
        ([[3, -1]], "token id -1 is outside the vocabulary"),
        ([3, 4], r"input_ids has shape \[2\]"),
        (np.zeros((2, 0), np.int32), r"input_ids has shape \[2, 0\]"),
        ([[0.5, 1.0]], "token ids are float64"),
    ],
)
def test_bad_input(input_ids, message):
    with pytest.raises(UserError, match=message):
        tiny_model().logits(input_ids)


def test_mtp_logits_need_a_module_and_two_tokens():
    with pytest.raises(UserError, match="no MTP module"):
        tiny_model().mtp_logits([[1, 2]])
    with pytest.raises(UserError, match="at least 2 tokens"):
        tiny_model(num_nextn_predict_layers=1).mtp_logits([[1]])
