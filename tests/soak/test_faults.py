"""Chaos on devices: whatever fails meanwhile, requests get the tokens of a run without faults, and nothing leaks."""

import json

import numpy as np
import pytest

import cmjax
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.serve.caching import CacheSettings
from tests.serve.driving import make_engine
from tests.serve.faults import Faults, check_nothing_is_left, make_load, under_faults


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_faults():
    """The demonstration model at EP8: at least 95 % of the requests complete and are right, the others were hit three
    times."""
    engine = make_engine(
        cmjax.load(BUNDLED_MODEL),
        8,
        prefill_ep_size=4,
        num_prefill_instances=2,
        max_num_seqs_per_rank=1,
        max_model_len=160,
        max_num_batched_tokens=64,
        num_speculative_tokens=1,
        handoff_timeout_s=1.0,
        cache=CacheSettings(cache_block_size=16, fetch="always"),
    )
    load = make_load(np.random.default_rng(2), engine.model.config.vocab_size, 120, 300, 12)
    engine.start()
    try:
        handles = [engine.submit(*one) for one in load]
        expected = [handle.result(timeout=600) for handle in handles]
        faults = Faults(engine, most=1000, probability=0.045)
        outcomes = under_faults(engine, load, expected, faults, at_once=10)
        faults.remove()
        check_nothing_is_left(engine)
    finally:
        engine.shutdown(timeout=0)
    asked = outcomes.total() - outcomes["abort"]
    right = outcomes["length"] + outcomes["stop"]
    counts = {" ".join(kind): count for kind, count in sorted(faults.counts.items())}
    print(json.dumps({"outcomes": dict(outcomes), "faults": counts, "complete and right": right / asked}))
    assert faults.total == 1000
    assert right >= 0.95 * asked
