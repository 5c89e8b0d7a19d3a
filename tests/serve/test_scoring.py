"""Scoring: windows cover each token once, and what is expected there is what `Model.logits` says, on any ranks."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.errors import UserError
from cmjax.mesh import carve
from cmjax.model import Model
from cmjax.serve import EngineSettings, Scorer, plan_windows, score_together
from tests.helpers import tiny_model

CONTEXT, STRIDE = 24, 9
# The shortest there is, one window, two, and many with a short one at the end.
LENGTHS = (2, 24, 33, 70, 24, 33)


@given(st.lists(st.integers(2, 90), max_size=5), st.integers(2, 40), st.data())
def test_windows_cover_each_token_once(lengths, context, data):
    stride = data.draw(st.integers(1, context - 1))
    scored = [[] for _ in lengths]
    for w in plan_windows(lengths, context, stride):
        assert 0 <= w.start < w.first_scored < w.stop <= lengths[w.text]
        assert w.stop - w.start <= context
        # All that comes before, or the context that the stride leaves.
        assert w.start == 0 or w.first_scored - w.start >= context - stride
        scored[w.text] += range(w.first_scored, w.stop)
    assert scored == [list(range(1, length)) for length in lengths]


@pytest.fixture(scope="module")
def model():
    # So few tokens that random drafts are right now and then.
    return tiny_model(seed=5, num_nextn_predict_layers=1, vocab_size=7)


@pytest.fixture(scope="module")
def texts(model):
    rng = np.random.default_rng(7)
    return [rng.integers(0, model.config.vocab_size, length).tolist() for length in LENGTHS]


def scorer(model: Model, ranks: int, **changes: object) -> Scorer:
    pools = carve(jax.devices()[:ranks], ep_size=ranks, num_prefill_instances=0)
    sizes = {"context": CONTEXT, "stride": STRIDE} | changes
    # Steps of fewer tokens than a window, so that windows are cut into chunks as well.
    return Scorer(model, pools.decode[0], settings=EngineSettings(max_num_batched_tokens=16), **sizes)


def expected(model: Model, text: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same by `Model.logits` and `Model.mtp_logits`, window by window.

    Each has zeros behind it: every length would be a compilation of its own.
    """
    logprobs, top1 = np.zeros(len(text) - 1, np.float32), np.zeros(len(text) - 1, bool)
    agrees = np.zeros(len(text) - 1, bool)
    for w in plan_windows([len(text)], CONTEXT, STRIDE):
        window = np.zeros((1, CONTEXT), np.int32)
        window[0, : w.stop - w.start] = text[w.start : w.stop]
        logits = np.asarray(jax.nn.log_softmax(model.logits(window)))[0]
        best = logits.argmax(-1)
        drafts = np.asarray(model.mtp_logits(window))[0].argmax(-1)
        for token in range(w.first_scored, w.stop):
            at = token - 1 - w.start
            logprobs[token - 1] = logits[at, text[token]]
            top1[token - 1] = best[at] == text[token]
            agrees[token - 1] = at >= 1 and drafts[at - 1] == best[at]
    return logprobs, top1, agrees


@pytest.fixture(scope="module")
def wanted(model, texts):
    return [expected(model, text) for text in texts]


@pytest.mark.parametrize("ranks", [1, 8])
def test_equals_the_logits(model, texts, wanted, ranks):
    done = []
    found = score_together([scorer(model, ranks)], texts, done.append)[0]
    assert sum(done) == sum(LENGTHS) - len(LENGTHS)
    for (logprobs, top1, agrees), scores in zip(wanted, found, strict=True):
        np.testing.assert_allclose(scores.logprobs, logprobs, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(scores.is_top1, top1)
        np.testing.assert_array_equal(scores.draft_agrees, agrees)
    assert any(scores.draft_agrees.any() for scores in found)  # or the comparison would say nothing


def test_without_a_draft_nothing_agrees(texts):
    plain = tiny_model(seed=5, vocab_size=7)
    for scores in score_together([scorer(plain, 1)], texts)[0]:
        assert not scores.draft_agrees.any()
        assert np.isfinite(scores.logprobs).all()


def test_counts_the_rows_of_the_experts(model, texts):
    instance = scorer(model, 8)
    score_together([instance], texts)
    load = instance.expert_load()
    tokens = sum(w.stop - w.start for w in plan_windows(LENGTHS, CONTEXT, STRIDE))
    num_windows = len(plan_windows(LENGTHS, CONTEXT, STRIDE))
    topk = model.config.num_topk
    # The MTP module, last, sees no last token: it has no successor.
    assert load.sum(1).tolist() == [tokens * topk] * (len(load) - 1) + [(tokens - num_windows) * topk]


def test_logits_that_are_not_finite_are_an_error(model, texts):
    norm = model.params.norm.copy()
    norm[3] = np.nan
    broken = Model(model.config, dataclasses.replace(model.params, norm=norm), "broken")
    with pytest.raises(UserError, match="not finite"):
        score_together([scorer(broken, 1)], texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "context 1: must be 2 to the model's max_position_embeddings, 256"),
        ({"context": 257}, "context 257: must be 2 to"),
        ({"stride": 24}, "stride 24: must be 1 to 23"),
        ({"stride": 0}, "stride 0: must be"),
    ],
)
def test_sizes_that_cannot_be(model, changes, message):
    with pytest.raises(UserError, match=message):
        scorer(model, 1, **changes)
