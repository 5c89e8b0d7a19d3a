"""The sampling kernel against its XLA form; `tests/serve/test_sampling*.py` hold it to float64."""

import jax
import numpy as np
import pytest

from cmjax.schedule import NOT_FINITE, NOTHING_ALLOWED, SamplingParams, SamplingRows, SamplingShape
from cmjax.serve.steps.sampling import greedy, sample
from cmjax.serve.steps.sampling_state import PackedSampling, SamplingState
from tests.forms import skip_without_kernels
from tests.kernels.test_kernels import compiled, in_both

skip_without_kernels()


def settings(rng, vocabulary, history, drafts):
    """Of one request, any of them; bad words that end what it has generated, or its drafts, among others."""

    def often(value, otherwise):
        return value if rng.random() < 0.4 else otherwise

    token = lambda: int(rng.integers(vocabulary))  # noqa: E731
    words = [(token(),), (token(), token(), token())]
    for count in range(len(drafts) + 1):
        words += [(*[*history, *drafts[:count]][-length:], token()) for length in (1, 2, 3)]
    stops = tuple(token() for _ in range(3))
    return SamplingParams(
        temperature=often(float(rng.uniform(0.1, 2)), 1.0) * float(rng.random() < 0.8),
        top_k=often(int(rng.integers(1, vocabulary + 5)), 0),
        top_p=often(float(rng.uniform(0.05, 1)), 1.0),
        min_p=often(float(rng.uniform(0, 0.3)), 0.0),
        presence_penalty=often(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=often(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=often(float(rng.uniform(0.5, 2)), 1.0),
        logit_bias=often({token(): float(rng.normal()) * 5 for _ in range(4)}, {}),
        bad_words=often(words, ()),
        min_tokens=often(int(rng.integers(1, 9)), 0),
        stop_token_ids=stops,
        allowed_token_ids=often(sorted({token() for _ in range(vocabulary // 2 + 1)}), None),
        max_tokens=10,
    )


def requests(rng, count, vocabulary, longest, width, num_drafts):
    """Logits, packed settings, positions, histories and drafts of so many requests with `width` rows each."""
    histories = [rng.integers(0, vocabulary, rng.integers(0, longest + 1)).tolist() for _ in range(count)]
    drafts = rng.integers(0, vocabulary, (count, num_drafts)).astype(np.int32)
    params = [settings(rng, vocabulary, *pair) for pair in zip(histories, drafts.tolist(), strict=True)]
    prompts = [rng.integers(0, vocabulary, 5).tolist() for _ in range(count)]
    state = SamplingState.for_shape(count, SamplingShape.for_all(params), vocabulary)
    seeds = rng.integers(0, 2**63, count).tolist()
    state.write(np.arange(count), SamplingRows.of(params, seeds, prompts))
    table = np.full((count, longest), -1, np.int32)
    for row, history in zip(table, histories, strict=True):
        row[: len(history)] = history
    positions = np.repeat([5 + len(history) for history in histories], width) + np.tile(np.arange(width), count)
    logits = rng.normal(0, 3, (count * width, vocabulary)).astype(np.float32)
    return logits, PackedSampling.of(state), positions.astype(np.int32), table, drafts


@pytest.mark.smoke
@pytest.mark.parametrize(("vocabulary", "longest", "width"), [(7, 4, 1), (53, 12, 3), (1000, 9, 1), (1031, 8, 2)])
def test_tokens_are_the_xla_form_s(rng, form, once, vocabulary, longest, width):
    """With whatever settings side by side, with drafts and without. Sums in another order may move a token over the
    edge of a filter, or let the other of two that tie win."""
    arguments, run, expected = once(lambda: in_both(sample, *requests(rng, 300, vocabulary, longest, width, width - 1)))
    found = np.asarray(run(*arguments))
    assert found.dtype == np.int32
    assert {*found[found < 0]} <= {NOTHING_ALLOWED}
    assert np.count_nonzero(found != expected) <= 1


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_guess_is_made_behind_the_drafts_before_it(rng, form, once, drafts):
    """As the MTP module's passes ask for them: one row a request, behind so many drafts."""

    def guess(*values):
        return sample(*values, first=drafts)

    arguments, run, expected = once(lambda: in_both(guess, *requests(rng, 300, 40, 6, 1, drafts)))
    assert np.count_nonzero(np.asarray(run(*arguments)) != expected) <= 1


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 1000])
def test_the_best_token(rng, form, once, vocabulary):
    logits = np.round(rng.normal(0, 2, (40, vocabulary))).astype(np.float32)  # with equals
    logits[3, -1], logits[4, 0], logits[5], logits[6, 0] = np.nan, np.inf, -np.inf, -np.inf
    best = logits.argmax(1)
    best[~np.isfinite(logits.max(1))] = NOT_FINITE
    run = once(lambda: compiled(greedy, logits))
    np.testing.assert_array_equal(run(logits), best)


def test_rows_that_are_not_finite_or_have_nothing_left(form, once):
    params = [SamplingParams(temperature=t, allowed_token_ids=[2], bad_words=[(2,)]) for t in (0.0, 1.0)] * 2
    state = SamplingState.for_shape(4, SamplingShape.for_all(params), 20)
    state.write(np.arange(4), SamplingRows.of(params, range(4), [()] * 4))
    logits = np.zeros((4, 20), np.float32)
    logits[2, 7], logits[3, 9] = np.nan, np.inf
    arguments = logits, PackedSampling.of(state), np.zeros(4, np.int32)
    run = once(lambda: compiled(sample, *arguments))
    assert np.asarray(run(*arguments)).tolist() == [NOTHING_ALLOWED] * 2 + [NOT_FINITE] * 2


def test_drafts_that_are_missing_are_an_error(rng):
    logits, sampling, positions, history, _ = requests(rng, 4, 40, 6, 3, 2)
    with pytest.raises(ValueError, match="3 rows a request from 0 drafts on need more than 0 drafts"):
        sample(logits, sampling, positions, history)


def test_other_types_take_the_xla_form(rng):
    logits = rng.normal(size=(3, 9)).astype(np.float16)
    assert np.asarray(jax.jit(greedy)(logits)).tolist() == logits.argmax(1).tolist()
    assert "kernels_sample" not in str(jax.make_jaxpr(greedy)(logits))
    assert "kernels_sample" in str(jax.make_jaxpr(greedy)(logits.astype(np.float32)))
