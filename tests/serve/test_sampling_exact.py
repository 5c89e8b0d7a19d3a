"""The very tokens that numpy finds with the promised noise, its independence, and what a token does not depend on."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from cmjax.mesh import EP_AXIS
from cmjax.schedule import NOT_FINITE, SamplingRows, SamplingShape
from cmjax.serve import SamplingParams
from cmjax.serve.steps.sampling import (
    _sampled,
    greedy,
    is_stop,
    logprobs,
    logprobs_where_asked,
    repeat,
    sample,
)
from cmjax.serve.steps.sampling_state import PackedSampling, SamplingState
from tests.helpers import assert_close

VOCABULARY = 12
DRAWS = 20_000
LOGITS = np.random.default_rng(5).normal(0, 1.2, VOCABULARY).astype(np.float32)
packed_jit = jax.jit(sample)
logprobs_jit = jax.jit(logprobs, static_argnums=2)


def sample_jit(logits, state, positions, history=None):
    return packed_jit(logits, PackedSampling.of(state), positions, history)


def state_of(*params, seeds=None, num_bias=4, num_stop=3):
    state = SamplingState.empty(len(params), num_bias, num_stop)
    state.write(
        np.arange(len(params)),
        SamplingRows.of(params, range(len(params)) if seeds is None else seeds, [()] * len(params)),
    )
    return state


def many(params, seeds):
    """One request's settings in as many rows as there are seeds."""
    pairs = np.stack([np.zeros_like(seeds), seeds], axis=1).astype(np.uint32)
    return repeat(state_of(params), len(seeds)).replace(seed=pairs)


# The reference: float64, one row, in the order of the definition.


def adjusted_row(logits, params, history):
    x = logits.astype(np.float64)
    for token, value in params.logit_bias.items():
        x[token] += value
    for token in set(history):
        x[token] -= params.presence_penalty + params.frequency_penalty * history.count(token)
    return x


def kept_row(x, params, slack=0.0):
    """Which tokens may be drawn, `bool[vocabulary]`, `x` over temperature; `slack` widens every limit by so much."""
    is_kept = np.ones(len(x), bool)
    if params.min_p > 0:
        is_kept = (x >= x.max() + math.log(params.min_p) - slack) | (x == x.max())
    order = [i for i in np.argsort(-x, kind="stable") if is_kept[i]]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        p = np.exp(x[order] - x.max())
        p /= p.sum()
        before = np.cumsum(p) - p
        order = order[: max(int((before < params.top_p + slack).sum()), 1)]
    return is_kept & (x >= x[order[-1]])


def noise_row(seed, position, vocabulary):
    """The noise as it is promised: of nothing but seed and position."""
    key = jax.random.fold_in(jax.random.key(seed), position)
    return np.asarray(jax.random.gumbel(key, (vocabulary,), np.float32), np.float64)


def check_token(token, logits, params, history, noise):
    """`token` is the reference's, but for float32's rounding at the edge of a filter or between two that tie."""
    x = adjusted_row(logits, params, history)
    if params.temperature == 0:
        assert x[token] >= x.max() - 1e-5
        return
    x /= params.temperature
    surely, perhaps = (kept_row(x, params, slack) for slack in (-1e-5, 1e-5))
    assert perhaps[token]
    assert (x + noise)[token] >= (x + noise)[surely].max() - 1e-4 / params.temperature


settings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 0, 1, 2, 7, 39, 1000]),
    top_p=st.sampled_from([1.0]) | st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 1.0]) | st.floats(0.0, 0.5),
    presence_penalty=st.sampled_from([0.0]) | st.floats(-2, 2),
    frequency_penalty=st.sampled_from([0.0]) | st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 39), st.floats(-100, 100) | st.floats(-3, 3), max_size=4),
)


@given(rows=st.lists(settings, min_size=7, max_size=7), seed=st.integers(0, 2**32 - 1))
def test_each_row_by_its_own_settings_as_numpy_does(rows, seed):
    rng = np.random.default_rng(seed)
    times, vocabulary, length = 5, 40, 9
    # Quarters: ties are common, at the edges of the filters too.
    logits = np.round(rng.normal(0, 2, (7 * times, vocabulary)) * 4).astype(np.float32) / 4
    histories = [rng.integers(0, vocabulary, rng.integers(0, length + 1)).tolist() for _ in range(7 * times)]
    history = np.full((7 * times, length), -1, np.int32)
    for row, tokens in enumerate(histories):
        history[row, : len(tokens)] = tokens
    positions = rng.integers(0, 2**31 - 1, 7 * times).astype(np.int32)
    seeds = rng.integers(0, 2**32, 7).tolist()

    tokens = sample_jit(logits, repeat(state_of(*rows, seeds=seeds), times), positions, history)

    chex.assert_shape(tokens, (7 * times,))
    chex.assert_type(tokens, jnp.int32)
    for row, token in enumerate(np.asarray(tokens).tolist()):
        params = rows[row // times]
        noise = noise_row(seeds[row // times], int(positions[row]), vocabulary) if params.temperature else None
        check_token(token, logits[row], params, histories[row], noise)


def test_a_nucleus_of_a_large_vocabulary(rng):
    vocabulary = 129_280
    rows = [SamplingParams(temperature=1.0, top_p=top_p) for top_p in (0.1, 0.9, 0.999)]
    logits = rng.normal(0, 3, (3, vocabulary)).astype(np.float32)
    tokens = np.asarray(sample_jit(logits, state_of(*rows), np.arange(3)))
    for row, token in enumerate(tokens.tolist()):
        check_token(token, logits[row], rows[row], [], noise_row(row, row, vocabulary))


def test_temperature_zero_is_the_best_token(rng):
    logits = rng.normal(size=(6, VOCABULARY)).astype(np.float32)
    # What only changes a draw changes nothing here; nor does a temperature so low that it could overflow.
    rows = [SamplingParams(top_k=3, top_p=0.2, min_p=0.4), *[SamplingParams()] * 4, SamplingParams(temperature=1e-6)]
    best = logits.argmax(1).astype(np.int32)
    assert_close(sample_jit(logits, state_of(*rows), np.arange(6)), best)
    assert_close(greedy(logits), best)
    # The first of equals, whether another row draws or not.
    mixed = state_of(*rows[:5], SamplingParams(temperature=1.0))
    assert_close(sample_jit(np.zeros_like(logits), mixed, np.arange(6))[:5], np.zeros(5, np.int32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_spoil_their_row_alone(rng, bad, temperature):
    logits = rng.normal(size=(4, VOCABULARY)).astype(np.float32)
    state = state_of(*[SamplingParams(temperature=temperature, top_p=0.7)] * 4)
    wanted = np.array(sample_jit(logits, state, np.arange(4)))
    logits[1, 5], logits[3] = bad, -np.inf
    wanted[[1, 3]] = NOT_FINITE
    assert_close(sample_jit(logits, state, np.arange(4)), wanted)


# float32 has no such numbers: 1e-39 and 1 / 1e39 are flushed to zero.
@pytest.mark.parametrize("temperature", [0.5, 1e30, 1e38, 1e300])
def test_a_masked_token_is_never_drawn(temperature):
    logits = np.tile(np.array([0, 0, -np.inf, 0], np.float32), (500, 1))
    tokens = sample_jit(logits, many(SamplingParams(temperature=temperature), np.arange(500)), np.zeros(500, np.int32))
    assert np.unique(tokens).tolist() == [0, 1, 3]


@pytest.mark.parametrize("top_p", [1e-6, 1e-39, 1e-300])
def test_the_smallest_nucleus_holds_the_best_token(top_p):
    logits = np.tile(np.array([0, 1, 3, 2], np.float32), (50, 1))
    params = SamplingParams(temperature=1.0, top_p=top_p)
    assert_close(sample_jit(logits, many(params, np.arange(50)), np.zeros(50, np.int32)), np.full(50, 2, np.int32))


def test_a_top_k_beyond_every_vocabulary_keeps_all(rng):
    logits = rng.normal(size=(50, VOCABULARY)).astype(np.float32)
    first, *others = (
        sample_jit(logits, many(SamplingParams(temperature=1.0, top_k=top_k), np.arange(50)), np.arange(50))
        for top_k in (0, VOCABULARY + 1, 2**31 - 1, 2**40)
    )
    for other in others:
        assert_close(other, np.asarray(first))


# Statistics. A true claim fails by chance in one of ten thousand seeds; these are fixed.


def check_distribution(tokens, expected):
    """Pearson's chi-square of `tokens` against the probabilities `expected`; the rare are put together."""
    counts, expected = np.bincount(tokens, minlength=len(expected)), expected * len(tokens)
    assert not counts[expected == 0].any()
    is_rare = expected < 5
    counts, expected = (np.append(a[~is_rare], a[is_rare].sum()) for a in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    # What one in ten thousand exceeds, by Wilson and Hilferty's cube root (0 to 5 % above the tables).
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((counts - expected) ** 2 / expected).sum() <= quantile


def probabilities(logits, params):
    x = logits.astype(np.float64) / params.temperature
    p = np.where(kept_row(x, params), np.exp(x - x.max()), 0)
    return p / p.sum()


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1)], ids=str)
def test_neighbours_in_seed_and_position_are_independent(step):
    """The pairs of tokens are distributed as the product: a draw says nothing of the next, nor of a neighbour's."""
    params, index = SamplingParams(temperature=1.0, top_k=4), np.arange(DRAWS)
    logits = np.tile(LOGITS, (DRAWS, 1))
    seeds, positions = 2 * (10 + index // 100), 10 + index % 100 * 2
    first = np.asarray(sample_jit(logits, many(params, seeds), positions.astype(np.int32)))
    second = np.asarray(sample_jit(logits, many(params, seeds + step[0]), (positions + step[1]).astype(np.int32)))
    p = probabilities(LOGITS, params)
    check_distribution(first, p)
    check_distribution(first * VOCABULARY + second, np.outer(p, p).reshape(-1))


@pytest.mark.parametrize("scale", [0.1, 0.4, 1.0])
def test_how_often_drafts_by_the_same_noise_are_accepted(scale, rng):
    """With exponentials E for noise, both take i where E[j] / E[i] >= max(p[j] / p[i], q[j] / q[i]) for all j: the rate
    is the sum over i of 1 / sum_j max(...)."""
    params, seeds = SamplingParams(temperature=1.0), np.arange(DRAWS)
    off = LOGITS + scale * rng.normal(size=VOCABULARY).astype(np.float32)
    sampled, drafts = (
        np.asarray(sample_jit(np.tile(x, (DRAWS, 1)), many(params, seeds), np.full(DRAWS, 11))) for x in (LOGITS, off)
    )
    p, q = (probabilities(x, params) for x in (LOGITS, off))
    ratio = np.maximum(p[None] / p[:, None], q[None] / q[:, None])
    expected, rate = (1 / ratio.sum(1)).sum(), (drafts == sampled).mean()
    error = math.sqrt(expected * (1 - expected) / DRAWS)
    assert rate == pytest.approx(expected, abs=4 * error)
    assert rate > p[q.argmax()] + 4 * error  # the draft's best token
    assert rate > p @ q + 4 * error  # a draft by noise of its own
    assert rate <= np.minimum(p, q).sum() + 4 * error  # what no draft can exceed
    check_distribution(drafts, q)
    check_distribution(np.where(drafts == sampled, drafts, sampled), p)


# What a token does not depend on.

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_k=5),
    SamplingParams(temperature=1.2, top_p=0.9),
    SamplingParams(temperature=0.7, min_p=0.1, logit_bias={3: 1.5}),
    SamplingParams(presence_penalty=1.0),
    SamplingParams(temperature=1.0, frequency_penalty=0.6, top_p=0.7, top_k=8),
    SamplingParams(temperature=1.5, logit_bias={1: -2, 2: 4, 9: 0.5}),
]


def test_a_token_depends_on_its_request_alone(rng):
    rows = len(MIXED)
    logits = rng.normal(size=(rows, VOCABULARY)).astype(np.float32)
    history = rng.integers(-1, VOCABULARY, (rows, 5)).astype(np.int32)
    positions = rng.integers(0, 1000, rows).astype(np.int32)
    seeds = rng.integers(0, 2**63, rows).tolist()
    state = state_of(*MIXED, seeds=seeds)

    def take(index):
        part = jax.tree.map(lambda a: a[index], state)
        return np.asarray(sample_jit(logits[index], part, positions[index], history[index]))

    tokens = take(np.arange(rows))
    for row in range(rows):
        assert take([row]).tolist() == [tokens[row]]
    order = rng.permutation(rows)
    assert_close(take(order), tokens[order])
    # Wider room for biases than the batch needs, and a longer history.
    longer = np.pad(history, ((0, 0), (0, 3)), constant_values=-1)
    assert_close(sample_jit(logits, state_of(*MIXED, seeds=seeds, num_bias=16, num_stop=0), positions, longer), tokens)
    # A request without penalties does not notice whether there is a history.
    is_free = [not params.has_penalties for params in MIXED]
    assert_close(sample_jit(logits, state, positions)[np.array(is_free)], tokens[is_free])


def test_ranks_and_steps_do_not_matter(rng, make_mesh):
    """Cut by rank, several steps a call: the tokens of one batch on one device, a step at a time."""
    rows, steps = len(MIXED), 3
    logits = rng.normal(size=(steps, rows, VOCABULARY)).astype(np.float32)
    history = rng.integers(-1, VOCABULARY, (rows, 5)).astype(np.int32)
    state = state_of(*MIXED)

    def rank(logits, state, history):
        def step(position, logits):
            return position + 1, sample(logits, state, jnp.full(len(logits), position), history)

        return lax.scan(step, jnp.int32(4), logits)[1]

    by_rank, by_step = PartitionSpec(EP_AXIS), PartitionSpec(None, EP_AXIS)
    mapped = jax.shard_map(
        rank, mesh=make_mesh(4), in_specs=(by_step, by_rank, by_rank), out_specs=by_step, check_vma=False
    )
    tokens = jax.jit(mapped)(logits, PackedSampling.of(state), history)
    for step in range(steps):
        assert_close(tokens[step], np.asarray(sample_jit(logits[step], state, np.full(rows, 4 + step), history)))


def primitives(jaxpr, depth=0):
    """`(name, number of conditions around it)` of each primitive of a program."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, depth
        is_choice = equation.primitive.name == "cond"
        for inner in equation.params["branches"] if is_choice else equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, depth + is_choice)


def test_neither_noise_nor_filters_where_no_row_asks():
    state = state_of(SamplingParams())
    logits, positions = np.zeros((1, VOCABULARY), np.float32), np.zeros(1, np.int32)
    program = jax.make_jaxpr(lambda *values: _sampled(*values, history=None))(logits, state, positions)
    found = list(primitives(program.jaxpr))
    # Noise where a row draws; a bisection each where, besides, a row has top-k, or top-p.
    assert {depth for name, depth in found if name.startswith(("random", "threefry"))} == {1}
    assert [depth for name, depth in found if name in ("scan", "while")] == [2, 2]
    assert "sort" not in {name for name, _ in found}


def test_logprobs_of_equals_and_of_extremes():
    logits = np.array([[2, 2, 2, 0], [1e4, 0, -1e4, 0], [0, -np.inf, 0, 0]], np.float32)
    found = logprobs_jit(logits, np.array([2, 2, 1], np.int32), 2)
    assert np.asarray(found.rank).tolist() == [1, 4, 4]
    assert np.asarray(found.top_ids).tolist() == [[0, 1], [0, 1], [0, 2]]
    assert np.asarray(found.chosen)[1:].tolist() == [-2e4, -np.inf]


def test_no_token_stops_without_stop_tokens():
    none = state_of(*[SamplingParams()] * 3, num_bias=0, num_stop=0)
    assert_close(is_stop(np.zeros((3, 4), np.int32), none), np.zeros((3, 4), bool))


def test_repeat_puts_a_rows_copies_side_by_side():
    state = state_of(*MIXED)
    tripled = repeat(state, 3)
    chex.assert_tree_shape_prefix(tripled, (3 * len(MIXED),))
    for copy in range(3):
        chex.assert_trees_all_equal(jax.tree.map(lambda a, copy=copy: np.asarray(a[copy::3]), tripled), state)


def test_rows_are_cut_to_what_a_step_has_room_for():
    state = state_of(SamplingParams(), SamplingParams(temperature=0.5, logit_bias={4: 1.0}, stop_token_ids=(1, 2)))
    shape = SamplingShape(is_sampled=True, num_bias=1, num_stop=2)
    found = state.rows(np.array([1, 0, 1]), shape, VOCABULARY)
    assert found.bias_ids.tolist() == [[4], [-1], [4]]
    assert found.stop_ids.tolist() == [[1, 2], [-1, -1], [1, 2]]
    found.clear(np.array([True, False, False]))
    chex.assert_trees_all_equal(found.rows(np.array([0]), shape, VOCABULARY), SamplingState.empty(1, 1, 2))
    assert found.temperature.tolist() == [0.0, 0.0, 0.5]


@given(
    shape=st.builds(
        SamplingShape,
        is_sampled=st.just(True),
        num_bias=st.integers(0, 3),
        num_stop=st.integers(0, 3),
        num_word_tokens=st.integers(0, 3),
        has_masks=st.booleans(),
    ),
    vocabulary=st.integers(1, 70),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_packed_state_is_the_same_in_a_step(shape, vocabulary, rows, seed):
    rng = np.random.default_rng(seed)
    empty = SamplingState.for_shape(rows, shape, vocabulary)
    full = jax.tree.map(lambda a: rng.integers(0, 256, (*a.shape, a.itemsize), np.uint8).view(a.dtype)[..., 0], empty)
    for state in (empty, full):
        packed = PackedSampling.of(state)
        assert packed.words.shape[0] == rows
        found = packed.unpacked()
        chex.assert_trees_all_equal_shapes_and_dtypes(found, state)
        as_bytes = [jax.tree.map(lambda a: np.asarray(a).tobytes(), one) for one in (found, state)]
        assert as_bytes[0] == as_bytes[1]  # NaN has many forms


def test_log_probabilities_that_nobody_asks_for_are_not_computed():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 1, (3, VOCABULARY)), jnp.float32)
    ids, computed = jnp.array([2, 0, 5]), []

    def make(asked):
        def logits_of_rows():
            jax.debug.callback(lambda: computed.append(1))
            return logits

        return jax.jit(lambda is_asked: logprobs_where_asked(is_asked, ids, 4, logits_of_rows))(jnp.asarray(asked))

    found = make([False, True, False])
    chex.assert_trees_all_close(found, logprobs(logits, ids, 4))
    jax.effects_barrier()
    assert len(computed) == 1
    nothing = make([False] * 3)
    jax.effects_barrier()
    assert len(computed) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(nothing, found)
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, found))
