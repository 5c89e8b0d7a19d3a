"""`Engine.generate`: greedy continuations, whatever the sizes, the company and the order."""

import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.model import reference
from cmjax.serve import SamplingParams
from tests.helpers import max_error, tiny_model
from tests.parity import load_case
from tests.schedule.invariants import check_scheduler
from tests.serve.driving import make_engine, model_of, step_through


def check_greedy(model, output):
    """Every token is the best one, or within a close call of it, by the slow form on the tokens before it."""
    sequence = np.array([output.prompt_ids + output.token_ids])
    logits = reference.logits(model.config, model.params, sequence)[0, len(output.prompt_ids) - 1 : -1]
    chosen = logits[np.arange(len(logits)), output.token_ids]
    assert (logits.max(1) - chosen).max() < 1e-3


def check_all_free(engine):
    check_scheduler(engine.core.scheduler)
    assert len(engine.core.scheduler.waiting) == engine.core.scheduler.num_running == 0
    for planner in engine.core.scheduler.planners:
        assert planner.is_idle
        assert planner.stats().num_used_blocks == 0


@pytest.mark.parametrize(
    ("name", "ep_size", "num_prefill_instances"),
    # With drafts, test_mtp has the last at its size; and without, so has the demo, for 320 prompts.
    [("v2-lite", 1, 1), ("v3-mtp", 8, 2), pytest.param("v3-ep320", 320, 2, marks=pytest.mark.soak)],
)
def test_tokens_are_the_references(name, ep_size, num_prefill_instances):
    case = load_case(name)
    engine = make_engine(
        model_of(case), ep_size, num_prefill_instances=num_prefill_instances, max_num_seqs_per_rank=4, steps_per_call=8
    )
    result = engine.generate(case.prompt.tolist(), SamplingParams(max_tokens=case.generated.shape[1]))
    for row, output in enumerate(result.outputs):
        num = case.num_clear(row)
        assert num > 3
        np.testing.assert_array_equal(output.token_ids[:num], case.generated[row, :num])
        assert output.prompt_ids == case.prompt[row].tolist()
    check_all_free(engine)


@pytest.fixture(scope="module")
def small():
    """A model with an MTP module; 8 decode ranks with 2 places each, two prefill instances of 4 ranks."""
    model = tiny_model(num_nextn_predict_layers=1, num_hidden_layers=2)
    return make_engine(
        model,
        8,
        prefill_ep_size=4,
        num_prefill_instances=2,
        max_model_len=48,
        max_num_seqs_per_rank=2,
        max_num_batched_tokens=32,
    )


def make_prompts(rng, lengths):
    return [rng.integers(0, 101, length).tolist() for length in lengths]


def test_more_prompts_than_places_of_all_lengths(small, rng):
    """20 prompts for 16 places: single tokens, whole blocks, more than a step can take, and up to the last slot."""
    lengths = [1, 47, 16, 32, 33, 2, 40, 1, 15, 17, 45, 7, 31, 8, 3, 24, 46, 5, 12, 1]
    limits = [9, 1, 5, 16, 2, 1, 8, 47, 3, 7, 3, 6, 5, 1, 4, 24, 2, 5, 12, 1]
    prompts = make_prompts(rng, lengths)
    result = small.generate(prompts, [SamplingParams(max_tokens=limit) for limit in limits])
    for prompt, limit, output in zip(prompts, limits, result.outputs, strict=True):
        assert output.prompt_ids == prompt
        assert len(output.token_ids) == limit
        assert output.finish_reason == "length"
        check_greedy(small.model, output)
    check_all_free(small)
    timings = result.timings
    assert timings.prefill_tokens == sum(lengths)
    assert small.generate(prompts[:3], SamplingParams(max_tokens=1)).timings.prefill_tokens == sum(lengths[:3])
    assert timings.decode_tokens == sum(limits) - len(limits)
    # Each token of the prompts, and each decoded one, visited 5 experts a layer; the last prompt token skips the MTP's.
    num_topk = small.model.config.num_topk
    np.testing.assert_array_equal(
        result.prefill_load.sum(1), [sum(lengths) * num_topk, (sum(lengths) - len(lengths)) * num_topk]
    )
    np.testing.assert_array_equal(result.decode_load.sum(1), [timings.decode_tokens * num_topk, 0])


def test_company_does_not_matter(small, rng):
    """The same continuation alone, last among others, and among the same prompt again."""
    prompts = make_prompts(rng, [21, 30, 4, 11, 25])
    sampling = SamplingParams(max_tokens=8)
    alone = [small.generate([prompt], sampling).outputs[0].token_ids for prompt in prompts[:2]]
    crowd = small.generate(prompts, sampling).outputs
    backwards = small.generate(prompts[::-1] * 3, sampling).outputs
    for index, expected in enumerate(alone):
        assert crowd[index].token_ids == expected
        for turn in range(3):
            assert backwards[5 * turn + 4 - index].token_ids == expected


def test_stop_tokens_end_a_request_and_stay_in_it(small, rng):
    prompts = make_prompts(rng, [20, 9, 14])
    free = [output.token_ids for output in small.generate(prompts, SamplingParams(max_tokens=10)).outputs]
    stops = [(free[0][0],), (free[1][4], 100), ()]
    sampling = [SamplingParams(max_tokens=10, stop_token_ids=stop) for stop in stops]
    result = small.generate(prompts, sampling)
    for tokens, stop, output in zip(free, stops, result.outputs, strict=True):
        at = min((tokens.index(token) for token in stop if token in tokens), default=9)
        assert output.token_ids == tokens[: at + 1]
        assert output.finish_reason == ("stop" if stop else "length")
    check_all_free(small)


def test_progress_counts_up_to_all_tokens(small, rng):
    seen = []
    sampling = [SamplingParams(max_tokens=n) for n in (5, 9, 1)]
    small.generate(make_prompts(rng, [30, 20, 3]), sampling, progress=lambda *args: seen.append(args))
    stages, counts, totals = zip(*seen, strict=True)
    assert stages[0] == "compile"
    assert set(stages) == {"compile", "prefill", "decode"}
    assert list(counts) == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 15
    assert set(totals) == {15}


def test_no_prompts_no_outputs(small):
    assert small.generate([]).outputs == []


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([[1, 2], []], None, "prompt 1 is empty"),
        ([[1, 101]], None, "token id 101 is outside the vocabulary"),
        ([[-1]], None, "token id -1 is outside"),
        ([[0.5]], None, "token ids are float64"),
        ([[True]], None, "token ids are bool"),
        ([[2**70]], None, "token ids are object"),
        (["text"], None, "token ids are <U4"),
        ([1, 2], None, "prompt 0 is no list of token ids"),
        ([[[1, 2], [3, 4]]], None, "prompt 0 is no list of token ids"),
        ([[1], [1, [2]]], None, "prompt 1: the lists of token ids differ in length"),
        ([[1] * 48], SamplingParams(max_tokens=1), "prompt 0 of 48 tokens with max_tokens 1 exceeds max_model_len 48"),
        ([[1] * 40], SamplingParams(max_tokens=9), "max_tokens 9 exceeds max_model_len 48"),
        ([[1], [2]], [SamplingParams()], "2 prompts, but 1 sampling params"),
        ([[1]], [], "1 prompts, but 0 sampling params"),
    ],
)
def test_bad_requests_are_named_and_change_nothing(small, prompts, sampling, message):
    with pytest.raises(UserError, match=message):
        small.generate(prompts, sampling)
    check_all_free(small)


@pytest.mark.parametrize("stage", ["compile", "prefill", "decode"])
def test_an_interrupted_call_leaves_a_fresh_engine(small, rng, stage):
    prompts = make_prompts(rng, [20, 30, 9])
    expected = [output.token_ids for output in small.generate(prompts, SamplingParams(max_tokens=6)).outputs]

    def interrupt(now, *_):
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.generate(prompts, SamplingParams(max_tokens=6), progress=interrupt)
    check_all_free(small)
    result = small.generate(prompts, SamplingParams(max_tokens=6))
    assert [output.token_ids for output in result.outputs] == expected
    assert result.prefill_load[0].sum() == 59 * small.model.config.num_topk  # nothing left over from the lost call


@pytest.mark.parametrize("max_tokens", [0, -3])
def test_max_tokens_must_be_positive(max_tokens):
    with pytest.raises(UserError, match=f"max_tokens {max_tokens} is not positive"):
        SamplingParams(max_tokens=max_tokens)


ODD = {
    "ep5_prefill_on_7_blocks_of_7": (5, 7, {"block_size": 7}, {"moe_layer_freq": 2, "num_hidden_layers": 4}),
    "ep40_more_ranks_than_experts": (40, 3, {}, {"n_shared_experts": 3, "first_k_dense_replace": 0}),
    "ep24_without_shared_experts": (24, 5, {"block_size": 1}, {"n_shared_experts": 0}),
    "ep3_all_dense": (3, 4, {}, {"first_k_dense_replace": 5}),
    "ep1_v2": (1, 6, {"block_size": 1}, {"model_type": "deepseek_v2", "scoring_func": "softmax"}),
}


# The others, each a model to compile, are long tests.
QUICK = {"ep5_prefill_on_7_blocks_of_7", "ep40_more_ranks_than_experts"}


@pytest.mark.parametrize("kind", [pytest.param(one, marks=() if one in QUICK else pytest.mark.soak) for one in ODD])
def test_odd_sizes(kind, rng):
    ep_size, prefill_ep_size, settings, changes = ODD[kind]
    if "model_type" in changes:
        changes = {**changes, "topk_method": "group_limited_greedy", "norm_topk_prob": False}
    model = tiny_model(**{"num_hidden_layers": 2, **changes})
    engine = make_engine(
        model, ep_size, prefill_ep_size=prefill_ep_size, max_model_len=40, max_num_batched_tokens=16, **settings
    )
    prompts = make_prompts(rng, [1, 33, 14, 7, 20])
    result = engine.generate(prompts, SamplingParams(max_tokens=7))
    for output in result.outputs:
        assert len(output.token_ids) == 7
        check_greedy(model, output)
    check_all_free(engine)


def test_prefill_can_share_the_devices_of_decode(rng):
    model = tiny_model(num_hidden_layers=2)
    engine = make_engine(model, 4, num_prefill_instances=0, max_num_batched_tokens=16)
    assert engine.pools.is_shared
    result = engine.generate(make_prompts(rng, [5, 20, 9, 3, 12]), SamplingParams(max_tokens=5))
    for output in result.outputs:
        check_greedy(model, output)


def test_several_decode_instances_share_the_requests(rng):
    model = tiny_model(num_hidden_layers=2)
    engine = make_engine(model, 4, num_decode_instances=2, max_num_batched_tokens=16)
    result = engine.generate(make_prompts(rng, [5, 20, 9, 3, 12, 7, 30, 4]), SamplingParams(max_tokens=5))
    for output in result.outputs:
        check_greedy(model, output)
    planners = engine.core.scheduler.decode
    assert [name for name, planner in planners.items() if planner.calls] == ["decode0", "decode1"]
    assert len(engine.fleet.decode) == 2
    check_all_free(engine)


def test_logits_do_not_depend_on_company_rank_or_place(rng):
    """A sequence among others, in another place, and alone: the same logits up to rounding in the last bits."""
    model = tiny_model(num_hidden_layers=2)
    engine = make_engine(model, 8, prefill_ep_size=4, max_num_seqs_per_rank=2, max_num_batched_tokens=128)
    rows = rng.integers(0, 101, (12, 26))
    expected = step_through(engine, rows[:1], 14)[0]
    for others in (rows[1:3], rows[1:8], rows[1:12]):
        found = step_through(engine, [*others, rows[0]], 14)[-1]
        assert max_error(found, expected) < 2e-6
    assert max_error(expected, reference.logits(model.config, model.params, rows[:1])[0]) < 5e-5
