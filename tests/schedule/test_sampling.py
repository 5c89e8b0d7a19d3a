"""Settings of sampling: what a batch of requests needs of a step, and their settings as arrays."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.errors import UserError
from cmjax.schedule import (
    MAX_BAD_WORD_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STEP_STOPS,
    SERVING_SHAPES,
    LogprobArrays,
    SamplingParams,
    SamplingRows,
    SamplingShape,
    TokenLogprobs,
)


@st.composite
def settings_of_requests(draw):
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0])),
        stop_token_ids=tuple(range(draw(st.sampled_from([0, 1, 3, MAX_STEP_STOPS, 20])))),
        logit_bias=dict.fromkeys(range(draw(st.sampled_from([0, 1, 5, 200, MAX_LOGIT_BIAS]))), 1.0),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.5])),
        bad_words=draw(st.sampled_from([(), (), ((1,),), ((1, 2), (3,)), ((1,) * MAX_BAD_WORD_TOKENS,)])),
        allowed_token_ids=draw(st.sampled_from([None, None, (1, 2)])),
        logprobs=draw(st.sampled_from([None, None, 0, 3, MAX_LOGPROBS])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0, 2])),
    )


BATCHES = st.lists(settings_of_requests(), max_size=4)


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ({}, SamplingShape()),
        ({"top_p": 0.5, "top_k": 3, "min_p": 0.1}, SamplingShape()),  # the best token, whatever else is left
        ({"temperature": 0.5}, SamplingShape(is_sampled=True)),
        ({"presence_penalty": 0.5}, SamplingShape(is_sampled=True, has_penalties=True)),
        ({"logit_bias": {1: 1.0, 2: 1.0, 3: 1.0}}, SamplingShape(is_sampled=True, num_bias=4)),
        ({"stop_token_ids": (1, 2, 3, 4, 5)}, SamplingShape(num_stop=8)),
        ({"stop_token_ids": tuple(range(50))}, SamplingShape(num_stop=MAX_STEP_STOPS)),
        ({"stop_token_ids": (1,), "min_tokens": 2}, SamplingShape(is_sampled=True, num_stop=1)),
        ({"bad_words": ((1,), (2,), (3,))}, SamplingShape(is_sampled=True, num_word_tokens=4)),
        ({"bad_words": ((1, 2),)}, SamplingShape(is_sampled=True, has_penalties=True, num_word_tokens=2)),
        ({"allowed_token_ids": (1,)}, SamplingShape(is_sampled=True, has_masks=True)),
        ({"repetition_penalty": 1.1}, SamplingShape(is_sampled=True, has_penalties=True, has_masks=True)),
        ({"logprobs": 0, "prompt_logprobs": 4}, SamplingShape(num_logprobs=0, num_prompt_logprobs=4)),
    ],
)
def test_the_shape_of_one_request(params, shape):
    assert SamplingShape.for_all([SamplingParams(**params)]) == shape


@given(one=BATCHES, other=BATCHES)
def test_a_shape_does_for_all_of_its_requests_and_no_more(one, other):
    shapes = [SamplingShape.for_all(batch) for batch in (one, other)]
    both = SamplingShape.for_all(one + other)
    assert both == shapes[0].union(shapes[1]) == shapes[1].union(shapes[0])
    assert both.covers(both)
    for shape in shapes:
        assert both.covers(shape)
        assert shape.covers(SamplingShape())
        # What each covers of the other is all that it needs: joining it changes nothing but stop tokens that a step
        # which samples nothing leaves to others.
        assert shape.covers(both) == (
            shape.is_sampled == both.is_sampled
            and shape.num_bias == both.num_bias
            and shape.has_penalties == both.has_penalties
            and shape.num_word_tokens == both.num_word_tokens
            and shape.has_masks == both.has_masks
            and shape.num_logprobs == both.num_logprobs
            and shape.num_prompt_logprobs == both.num_prompt_logprobs
            and (shape.num_stop == both.num_stop or not both.is_sampled)
        )
    assert SERVING_SHAPES[-1].covers(both)


def test_where_nothing_is_sampled_stop_tokens_are_left_to_those_who_take_the_tokens():
    assert SERVING_SHAPES[0].covers(SamplingShape.for_all([SamplingParams(stop_token_ids=(1, 2))]))
    sampled = SamplingShape.for_all([SamplingParams(stop_token_ids=(1, 2), temperature=1.0)])
    assert not SERVING_SHAPES[0].covers(sampled)
    assert not SamplingShape(is_sampled=True).covers(sampled)
    assert SamplingShape(is_sampled=True, num_stop=2).covers(sampled)
    assert not SamplingShape(num_logprobs=2).covers(SamplingShape(num_logprobs=3))
    assert not SamplingShape().covers(SamplingShape(num_logprobs=0))


def test_settings_as_rows():
    first = SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 2.0, 9: -100.0},
        stop_token_ids=(4, 5),
    )
    rows = SamplingRows.of([first, SamplingParams(top_k=-1)], [(5 << 32) + 7, 2**64 - 1], [(), ()])
    floats = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
    for name in floats:
        column = getattr(rows, name)
        assert column.dtype == np.float32
        np.testing.assert_array_equal(column, np.float32([getattr(first, name), getattr(SamplingParams(), name)]))
    assert rows.top_k.tolist() == [5, 0]
    assert rows.seed.dtype == np.uint32
    assert rows.seed.tolist() == [[5, 7], [2**32 - 1, 2**32 - 1]]
    assert [ids.tolist() for ids in rows.bias_ids] == [[3, 9], []]
    assert [values.tolist() for values in rows.bias_values] == [[2.0, -100.0], []]
    assert rows.bias_values.values.dtype == np.float32
    assert [ids.tolist() for ids in rows.stop_ids] == [[4, 5], []]
    again = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(again.seed, rows.seed)


def test_no_rows():
    rows = SamplingRows.of([], [], [])
    words = SamplingParams(
        bad_words=((4, 5, 6), (7,)), allowed_token_ids=(8, 9), repetition_penalty=1.5, min_tokens=2, max_tokens=3
    )
    own = SamplingRows.of([words, SamplingParams()], [0, 0], [[3, 1, 3], [2, 2]])
    assert own.repetition_penalty.tolist() == [1.5, 1.0]
    assert own.min_positions.tolist() == [5, 0]
    assert [row.tolist() for row in own.word_ids] == [[4, 5, 6, 7], []]
    assert [row.tolist() for row in own.word_ends] == [[2, 1, 0, 0], []]
    assert [row.tolist() for row in own.prompt_ids] == [[1, 3], []]
    assert [row.tolist() for row in own.allowed_ids] == [[8, 9], []]
    assert rows.seed.shape == (0, 2)
    assert rows.temperature.shape == rows.top_k.shape == (0,)
    assert list(rows.stop_ids) == []


def test_settings_at_the_ends_of_their_ranges_stay_finite_numbers():
    """Next to no temperature is none, a huge one has an inverse, and a huge top_k fits 32 bits."""
    many = [SamplingParams(temperature=value, top_k=2**40) for value in (0.0, 1e-6, 1e-5, 1e300)]
    rows = SamplingRows.of(many, [0] * 4, [()] * 4)
    assert rows.temperature.tolist() == [0.0, 0.0, float(np.float32(1e-5)), float(np.float32(1e30))]
    assert np.isfinite(1 / rows.temperature[2:]).all()
    assert rows.top_k.tolist() == [2**31 - 1] * 4


def test_a_step_gets_as_many_stop_tokens_as_it_can_look_for():
    params = SamplingParams(stop_token_ids=tuple(range(MAX_STEP_STOPS + 5)))
    rows = SamplingRows.of([params], [0], [()])
    assert rows.stop_ids.values.tolist() == list(range(MAX_STEP_STOPS))
    assert SamplingShape.for_all([params]).num_stop == MAX_STEP_STOPS


def test_more_biases_than_a_step_has_room_for_are_refused():
    SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0))
    message = f"logit_bias of {MAX_LOGIT_BIAS + 1} tokens: at most {MAX_LOGIT_BIAS} are supported"
    with pytest.raises(UserError, match=message):
        SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0))


def test_log_probabilities_of_a_place():
    arrays = LogprobArrays(
        chosen=np.float32([-0.5, -2.0]),
        rank=np.int32([1, 3]),
        top_ids=np.int32([[4, 5, 6], [7, 8, 9]]),
        top=np.float32([[-0.5, -1.0, -3.0], [-1.0, -1.5, -2.0]]),
    )
    assert arrays.at(1, 9, 2) == TokenLogprobs(9, -2.0, 3, ((7, -1.0), (8, -1.5)))
    assert arrays.at(0, 4, 0) == TokenLogprobs(4, -0.5, 1, ())
