"""The sampler against a plain one, row by row: filters, penalties and biases, the distribution, and the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.errors import UserError
from cmjax.schedule import NOT_FINITE, NOTHING_ALLOWED, SERVING_SHAPES, SamplingRows, SamplingShape
from cmjax.serve import SamplingParams
from cmjax.serve.steps.sampling import is_stop, logprobs, repeat, sample
from cmjax.serve.steps.sampling_state import PackedSampling, SamplingState

V = 23
packed_jit = jax.jit(sample)


def sample_jit(logits, state, positions, history=None):
    return packed_jit(logits, PackedSampling.of(state), positions, history)


def make_state(params, seeds=None, prompts=None):
    state = SamplingState.for_shape(len(params), SamplingShape.for_all(params), V)
    return write_all(state, params, seeds, prompts)


def write_all(state, params, seeds=None, prompts=None):
    seeds = [one.seed or 0 for one in params] if seeds is None else seeds
    state.write(np.arange(len(params)), SamplingRows.of(params, seeds, prompts or [()] * len(params)))
    return state


def history_of(rows, width=8):
    table = np.full((len(rows), width), -1, np.int32)
    for row, tokens in enumerate(rows):
        table[row, : len(tokens)] = tokens
    return table


def forbidden(params, history):
    """Tokens that bad words and `min_tokens` forbid."""
    early = params.stop_token_ids if len(history) < params.min_tokens else ()
    begun = [word for word in params.bad_words if history[max(len(history) + 1 - len(word), 0) :] == list(word[:-1])]
    return {*early, *(word[-1] for word in begun)}


def distribution(logits, params, history=(), prompt=()):
    """Probabilities of the tokens by the settings of one request (float64, one step after another)."""
    logits = logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        logits[[token for token in range(len(logits)) if token not in params.allowed_token_ids]] = -np.inf
    logits[sorted(forbidden(params, list(history)))] = -np.inf
    for token, value in params.logit_bias.items():
        logits[token] += value
    for token in {*prompt, *history}:
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    for token in set(history):
        logits[token] -= params.presence_penalty + params.frequency_penalty * list(history).count(token)
    if params.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    p = scipy.special.softmax(logits / params.temperature)
    p[p < params.min_p * p.max()] = 0
    if params.top_k > 0:
        p[p < np.sort(p)[::-1][min(params.top_k, len(p)) - 1]] = 0
    p /= p.sum()
    if params.top_p < 1:
        order = np.argsort(-p)
        num_kept = int((np.cumsum(p[order]) - p[order] < params.top_p).sum())
        p[order[num_kept:]] = 0
    return p / p.sum()


@st.composite
def requests(draw):
    tokens = st.integers(0, V - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        top_k=draw(st.sampled_from([-1, 0, 1, 2, 5, V, 99])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, -2.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, -1.0, 2.0])),
        logit_bias=draw(st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 3.0, 100.0]), max_size=3)),
        seed=draw(st.integers(0, 2**64 - 1)),
    ), draw(st.lists(tokens, max_size=8))


@st.composite
def restricted(draw):
    """A request with any of what forbids tokens or makes them unlikely, what it has generated, and its prompt."""
    tokens = st.integers(0, 5)  # few, so that bad words are about to come and stop tokens are the best
    word = st.lists(tokens, min_size=1, max_size=3).map(tuple)
    return (
        SamplingParams(
            temperature=draw(st.sampled_from([0.0, 1.0])),
            min_tokens=draw(st.integers(0, 6)),
            stop_token_ids=tuple(draw(st.lists(tokens, max_size=2))),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5, 5.0])),
            bad_words=tuple(draw(st.lists(word, max_size=4))),
            allowed_token_ids=draw(st.none() | st.lists(st.integers(0, V - 1), min_size=1, max_size=9).map(tuple)),
            logit_bias=draw(st.dictionaries(tokens, st.sampled_from([-3.0, 100.0]), max_size=2)),
            presence_penalty=draw(st.sampled_from([0.0, 1.0])),
            seed=draw(st.integers(0, 2**64 - 1)),
        ),
        draw(st.lists(tokens, max_size=8)),
        draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=5)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(restricted(), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_what_is_forbidden_is_not_drawn_and_what_was_there_counts(batch, seed):
    logits = (3 * np.random.default_rng(seed).normal(size=(len(batch), V))).astype(np.float32)
    params, histories, prompts = zip(*batch, strict=True)
    state = write_all(SamplingState.empty(len(batch), 2, 2, 12, 3), params, prompts=prompts)
    positions = np.array([len(prompt) + len(history) for _, history, prompt in batch])
    found = np.asarray(sample_jit(logits, state, positions, history_of(histories)))
    first = np.asarray(sample_jit(logits, state, np.array(list(map(len, prompts)))))  # as prefill does: no history
    for row, (one, history, prompt) in enumerate(batch):
        for token, before in ((found[row], history), (first[row], [])):
            with np.errstate(invalid="ignore"):
                p = distribution(logits[row], one, before, prompt)
            if token == NOTHING_ALLOWED:
                assert np.isnan(p).any() or one.temperature == 0
                assert all(t in forbidden(one, before) for t in one.allowed_token_ids)
            else:
                assert p[token] > 0


@settings(max_examples=40, deadline=None)
@given(st.lists(requests(), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_only_what_the_settings_leave_is_drawn(batch, seed):
    """All kinds of requests in one batch, each with its own settings; and greedy ones take the one token left."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(len(batch), V))).astype(np.float32)
    params, histories = zip(*batch, strict=True)
    # One shape for every example: room for the most that a request can have.
    state = write_all(SamplingState.empty(len(batch), 4, 0), params)
    for position in range(3):
        found = np.asarray(sample_jit(logits, state, np.full(len(batch), position), history_of(histories)))
        for row, token in enumerate(found):
            p = distribution(logits[row], params[row], histories[row])
            # Where a filter's edge falls between values that rounding may order otherwise, either side may be kept.
            assert (
                p[token] > 0 or np.abs(distribution(logits[row] * (1 - 1e-6), params[row], histories[row])[token]) > 0
            )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 8, "top_p": 0.9, "min_p": 0.02},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": {3: 2.0, 5: -100.0}},
    ],
)
def test_draws_follow_the_distribution(options, rng):
    """Chi-square over 20,000 seeds."""
    params = SamplingParams(**{"temperature": 1.0} | options)
    logits = (1.5 * rng.normal(size=V)).astype(np.float32)
    history = [3, 3, 7]
    state = make_state([params] * 2)
    num = 20_000
    many = jax.tree.map(lambda a: np.repeat(a[:1], num, axis=0), state)
    many.seed[:, 1] = np.arange(num)
    tokens = sample_jit(np.tile(logits, (num, 1)), many, np.full(num, 11), np.tile(history_of([history]), (num, 1)))
    counts = np.bincount(np.asarray(tokens), minlength=V)
    wanted = distribution(logits, params, history)
    assert counts[wanted == 0].sum() == 0
    kept = wanted * num >= 5
    found, expected = np.append(counts[kept], counts[~kept].sum()), np.append(wanted[kept], wanted[~kept].sum()) * num
    found, expected = found[expected > 0], expected[expected > 0]
    assert scipy.stats.chisquare(found, expected).pvalue > 1e-4


def test_noise_is_new_at_every_position_and_seed(rng):
    logits = np.zeros((64, 1000), np.float32)
    one = [SamplingParams(temperature=1.0)] * 64
    by_position = sample_jit(logits, make_state(one, [5] * 64), np.arange(64))
    by_seed = sample_jit(logits, make_state(one, np.arange(64).tolist()), np.zeros(64, int))
    by_high_half = sample_jit(logits, make_state(one, [n << 32 for n in range(64)]), np.zeros(64, int))
    for tokens in (by_position, by_seed, by_high_half):
        assert len(set(np.asarray(tokens).tolist())) > 55


def test_a_row_does_not_depend_on_the_others(rng):
    logits = rng.normal(size=(3, V)).astype(np.float32)
    mine = SamplingParams(temperature=0.9, top_p=0.8, seed=17)
    others = SamplingParams(temperature=2.0, top_k=3, logit_bias={1: 5.0}, presence_penalty=1.0, seed=18)
    greedy = SamplingParams()
    alone = [int(sample_jit(logits[1:2], make_state([mine]), np.array([p]))[0]) for p in range(20)]
    state = make_state([others, mine, greedy])
    histories = history_of([[1, 2], [], [4]])
    together = [int(sample_jit(logits, state, np.array([9, p, 3]), histories)[1]) for p in range(20)]
    assert together == alone
    assert len(set(alone)) > 2


def test_equal_logits_at_an_edge_are_all_kept():
    logits = np.tile(np.float32([2, 1, 1, 1, 0]), (4000, 1))
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        state = make_state([SamplingParams(temperature=1.0, **options)] * 4000, range(4000))
        counts = np.bincount(np.asarray(sample_jit(logits, state, np.zeros(4000, int))), minlength=5)
        assert counts[4] == 0
        assert (counts[1:4] > 400).all()


def test_a_guess_by_the_same_noise_is_right_more_often():
    """And what is drawn does not depend on it: the guess of a model that is close is mostly the token itself."""
    rng = np.random.default_rng(3)
    logits = np.tile(rng.normal(size=V).astype(np.float32), (4000, 1))
    near = logits + 0.3 * rng.normal(size=V).astype(np.float32)
    state = make_state([SamplingParams(temperature=1.0)] * 4000, range(4000))
    position = np.full(4000, 6)
    drawn, guessed = (np.asarray(sample_jit(x, state, position)) for x in (logits, near))
    p, q = scipy.special.softmax(logits[0]), scipy.special.softmax(near[0])
    agreement = (drawn == guessed).mean()
    assert agreement > (drawn == near[0].argmax()).mean() + 0.1
    assert agreement > 0.85 * np.minimum(p, q).sum()


def test_logits_that_are_not_finite():
    logits = np.zeros((4, V), np.float32)
    logits[0, 3], logits[1, 3], logits[2, 3] = np.nan, np.inf, -np.inf
    params = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(), SamplingParams()]
    tokens = np.asarray(sample_jit(logits, make_state(params), np.zeros(4, int)))
    assert (tokens[:2] == NOT_FINITE).all()
    assert (tokens[2:] == 0).all()


def test_stop_tokens():
    state = make_state([SamplingParams(stop_token_ids=(4, 9)), SamplingParams(stop_token_ids=(2,)), SamplingParams()])
    ids = np.array([[4, 2, -1], [9, 2, NOT_FINITE], [4, 2, -1]])
    wanted = [[True, False, False], [False, True, False], [False] * 3]
    np.testing.assert_array_equal(is_stop(jnp.asarray(ids), state), wanted)
    np.testing.assert_array_equal(repeat(state, 2).stop_ids, np.repeat(state.stop_ids, 2, axis=0))


def test_a_bad_word_is_forbidden_where_its_beginning_stands():
    words = ((3,), (1, 2), (1, 1, 4), (9, 5))
    for history, ends in (([], {3}), ([1], {3, 2}), ([1, 1], {3, 2, 4}), ([1, 9], {3, 5}), ([9, 1], {3, 2})):
        logits = np.zeros((V, V), np.float32)
        logits[np.arange(V), np.arange(V)] = 1  # each row's best is another token
        state = make_state([SamplingParams(bad_words=words)] * V)
        found = np.asarray(sample_jit(logits, state, np.zeros(V, int), history_of([history] * V)))
        assert {token for token in range(V) if found[token] != token} == ends


def test_the_steps_of_a_server_have_room_for_all_of_it():
    words, stops = ((1, 2),) * 128, tuple(range(8))
    everything = SamplingParams(
        bad_words=words, allowed_token_ids=(1,), repetition_penalty=2.0, min_tokens=3, stop_token_ids=stops
    )
    assert SERVING_SHAPES[1].covers(SamplingShape.for_all([everything]))
    for one in ({"bad_words": ((1,),)}, {"allowed_token_ids": (1,)}, {"repetition_penalty": 2.0}):
        assert not SERVING_SHAPES[0].covers(SamplingShape.for_all([SamplingParams(**one)]))
    ended = SamplingShape.for_all([SamplingParams(min_tokens=3, stop_token_ids=stops)])
    assert ended.is_sampled
    # Nothing can end it before: as fast as without.
    assert SERVING_SHAPES[0].covers(SamplingShape.for_all([SamplingParams(min_tokens=3)]))


def test_logprobs(rng):
    logits = (4 * rng.normal(size=(5, V))).astype(np.float32)
    ids = np.array([0, 22, 7, 7, -1])
    found = logprobs(jnp.asarray(logits), jnp.asarray(ids), 3)
    every = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(found.chosen[:4], every[np.arange(4), ids[:4]], atol=1e-5)
    order = np.argsort(-every, axis=-1)
    np.testing.assert_array_equal(found.top_ids, order[:, :3])
    np.testing.assert_allclose(found.top, np.take_along_axis(every, order[:, :3], -1), atol=1e-5)
    np.testing.assert_array_equal(found.rank[:4], [np.flatnonzero(order[i] == ids[i])[0] + 1 for i in range(4)])
    assert logprobs(jnp.asarray(logits), jnp.asarray(ids), 0).top.shape == (5, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens 0 is not positive"),
        ({"top_k": 1.5}, "top_k 1.5 is no integer"),
        ({"max_tokens": "3"}, "max_tokens '3' is no integer"),
        ({"temperature": "hot"}, "temperature 'hot' is no number"),
        ({"logprobs": True}, "logprobs True is no integer"),
        ({"temperature": -0.1}, "temperature -0.1 is out of range: it must be from 0"),
        ({"temperature": float("nan")}, "temperature nan is out of range"),
        ({"temperature": float("inf")}, "temperature inf is out of range"),
        ({"top_p": 0.0}, "top_p 0.0 is out of range: it must be above 0 to 1"),
        ({"top_p": 1.1}, "top_p 1.1 is out of range"),
        ({"min_p": -0.1}, "min_p -0.1 is out of range: it must be from 0 to 1"),
        ({"top_k": -2}, "top_k -2 is out of range: it must be positive, or 0 or -1 for all tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty 2.1 is out of range: it must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty -3 is out of range"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101: it must be from -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 is nan"),
        ({"seed": -1}, "seed -1 is out of range: it must be from 0 to 2\\^64 - 1"),
        ({"logprobs": 21}, "logprobs 21 is out of range: it must be from 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs -1 is out of range"),
        ({"min_tokens": 17}, "min_tokens 17 is more than max_tokens 16"),
        ({"min_tokens": 1, "stop_token_ids": tuple(range(9))}, "min_tokens with 9 stop tokens: at most 8"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is"),
        ({"bad_words": ((1,), ())}, "bad_words: one of them is empty"),
        ({"bad_words": ((1,) * 300,)}, "bad_words of 300 tokens: at most 256"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**options)
