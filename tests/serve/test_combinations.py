"""Features beside each other: with all of them on, requests get what one device gives them without any.

A run with everything on holds every pair; runs with one thing off say that nothing needs another. docs/combinations.md
is the table; what is refused is refused by name.
"""

import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.model import Model, convert_params, params_digest
from cmjax.moe import FabricExchange
from cmjax.serve import EngineSettings, SamplingParams
from cmjax.serve.caching import CacheSettings
from tests.helpers import tiny_model
from tests.serve.driving import make_engine

PROMPTS = [[1 + index, 2, 3 + index % 5] * (1 + index % 11) for index in range(20)]
SAMPLINGS = [
    SamplingParams(
        max_tokens=8 + index % 9,
        temperature=0.8 * (index % 2),
        top_k=20,
        min_p=0.01,
        seed=index,
        frequency_penalty=0.5 * (index % 3 == 0),
        logit_bias={5: 2.0} if index % 4 == 0 else {},
        logprobs=2 if index % 3 == 1 else None,
        prompt_logprobs=1 if index % 5 == 2 else None,
        stop_token_ids=(7, 11),
    )
    for index in range(20)
]


class OwnExchange(FabricExchange):
    """One of the user's own; counts the layers that were traced with it."""

    num_traced = 0

    def dispatch_start(self, *args, **kwargs):
        type(self).num_traced += 1
        return super().dispatch_start(*args, **kwargs)


# What is on, and what a run without it has instead.
FEATURES = {
    "EP size that divides nothing": ({"ep_size": 3}, {"ep_size": 4}),
    "prefill instances": ({"num_prefill_instances": 2}, {"num_prefill_instances": 1}),
    "chunked prefill": ({"max_num_batched_tokens": 16}, {"max_num_batched_tokens": 512}),
    "microbatches": ({"microbatches": 2}, {"microbatches": 1}),
    "drafts": ({"num_speculative_tokens": 2}, {"num_speculative_tokens": 0}),
    "few blocks": ({"num_kv_blocks": 13, "block_size": 4}, {"block_size": 16}),
    "an exchange of one's own": ({"exchange": OwnExchange}, {}),
    "TPOT target": ({"tpot_slo_ms": 1e4}, {"tpot_slo_ms": None}),
    "prefix cache": ({"cache": CacheSettings(cache_block_size=16, fetch="always")}, {"cache": None}),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1, num_attention_heads=4)


@pytest.fixture(scope="module")
def expected(model):
    engine = make_engine(model, 1, max_num_seqs_per_rank=8, max_model_len=64)
    return engine.generate(PROMPTS, SAMPLINGS).outputs


def streamed(model, off=None):
    """All requests at once on an engine with every feature but one; the tokens as they came, and the outputs."""
    chosen: dict = {"ep_size": 4, "prefill_ep_size": 2, "max_num_seqs_per_rank": 4, "max_model_len": 64}
    chosen["steps_per_call"] = 2  # many calls, so that the controller lets more and more run together
    for name, (on, otherwise) in FEATURES.items():
        chosen |= otherwise if name == off else on
    engine = make_engine(model, chosen.pop("ep_size"), **chosen)
    engine.start()
    try:
        for _ in range(2):
            handles = [engine.submit(*pair) for pair in zip(PROMPTS, SAMPLINGS, strict=True)]
            streams = [[token for update in handle for token in update.token_ids] for handle in handles]
            outputs = [handle.result() for handle in handles]
            assert [output.token_ids for output in outputs] == streams
        stats = engine.stats()
        assert (sum(handle.num_cached_tokens for handle in handles) > 0) == (off != "prefix cache")
        assert (stats.num_drafts > 0) == (off != "drafts")
        assert (stats.num_preemptions > 0) == (off != "few blocks")
        return outputs
    finally:
        engine.shutdown(timeout=0)


def assert_same(outputs, expected):
    for one, other in zip(outputs, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        for name in ("logprobs", "prompt_logprobs"):
            found, wanted = getattr(one, name), getattr(other, name)
            assert (found is None) == (wanted is None)
            values = [[0.0 if p is None else p.logprob for p in some or []] for some in (found, wanted)]
            np.testing.assert_allclose(*values, atol=1e-3)


@pytest.mark.soak
def test_all_features_together(model, expected):
    assert_same(streamed(model), expected)


@pytest.mark.soak
@pytest.mark.parametrize("off", FEATURES)
def test_all_features_but_one(model, expected, off):
    assert_same(streamed(model, off), expected)


@pytest.mark.soak
def test_all_features_together_in_int8(model):
    """Sums in another order may move a rounding: most requests have the very tokens of one device."""
    params = convert_params(model.params, "int8", np.float32)
    quantized = Model(model.config, params, params_digest(model.config, params))
    plain = make_engine(quantized, 1, max_num_seqs_per_rank=8, max_model_len=64, dispatch_dtype="int8")
    expected = plain.generate(PROMPTS, SAMPLINGS).outputs
    same = [a.token_ids == b.token_ids for a, b in zip(streamed(quantized), expected, strict=True)]
    assert np.mean(same) >= 0.8


def test_what_does_not_go_together_is_refused_by_name(model):
    class Whole:
        """An exchange without halves."""

        def __init__(self, **settings):
            self.inner = FabricExchange(**settings)

        def dispatch(self, *args, **kwargs):
            return self.inner.dispatch(*args, **kwargs)

        def combine(self, *args, **kwargs):
            return self.inner.combine(*args, **kwargs)

    without_mtp = tiny_model(num_hidden_layers=2)
    refused = [
        (lambda: EngineSettings(microbatches=2, max_num_seqs_per_rank=3), "microbatches 2 do not divide"),
        (lambda: make_engine(without_mtp, 2, num_speculative_tokens=1), "no MTP module"),
        (
            lambda: make_engine(model, 2, microbatches=2, max_num_seqs_per_rank=2, exchange=Whole),
            "microbatches must be 1",
        ),
        (lambda: EngineSettings(num_speculative_tokens=64, max_model_len=64), "leaves no room in max_model_len"),
        (lambda: EngineSettings(tpot_slo_ms=0.0), "tpot_slo_ms 0.0 is not positive"),
        (lambda: EngineSettings(num_kv_blocks=0), "num_kv_blocks 0 is not positive"),
    ]
    for make, message in refused:
        with pytest.raises(UserError, match=message):
            make()
