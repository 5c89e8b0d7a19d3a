"""Chaos on devices: whatever fails meanwhile, requests get the tokens of a run without faults, and nothing leaks."""

import collections
import json
import time

import numpy as np
import pytest

import cmjax
from cmjax.cli_options import BUNDLED_MODEL
from cmjax.schedule import MAX_FAILURES
from cmjax.serve import SamplingParams
from tests.helpers import tiny_model
from tests.serve.driving import make_engine
from tests.serve.faults import Faults, is_close_call


def make_load(rng, vocab_size, longest, count, max_tokens):
    """Short and long prompts, greedy and sampled ones, with penalties and without, all with a stop token."""
    load = []
    for index in range(count):
        length = int(rng.integers(1, longest if index % 4 == 0 else longest // 4))
        params = SamplingParams(
            max_tokens=int(rng.integers(1, max_tokens)),
            temperature=0.8 * (index % 3 == 1),
            seed=index,
            frequency_penalty=0.5 * (index % 5 == 2),
            stop_token_ids=(int(rng.integers(vocab_size)),),
        )
        load.append((rng.integers(0, vocab_size, length).tolist(), params))
    return load


def under_faults(engine, load, expected, faults, *, rounds, at_once, seed=0):
    """Submit the load again and again, some of it cancelled, and check every answer; how many ended in which way."""
    rng, outcomes = np.random.default_rng(seed), collections.Counter()
    under_way = collections.deque()
    sequence = [index for _ in range(rounds) for index in rng.permutation(len(load)).tolist()]
    for number, index in enumerate(sequence):
        handle = engine.submit(*load[index], priority=int(rng.integers(3)), tenant=str(number % 5))
        under_way.append((index, handle))
        if rng.random() < 0.05:
            under_way[rng.integers(len(under_way))][1].cancel()
        while len(under_way) >= at_once:
            outcomes[check_one(engine.model, load, expected, faults, *under_way.popleft())] += 1
    while under_way:
        outcomes[check_one(engine.model, load, expected, faults, *under_way.popleft())] += 1
    return outcomes


def check_one(model, load, expected, faults, index, handle):
    prompt, params = load[index]
    for _ in handle:  # to its end
        pass
    wanted = expected[index].token_ids
    is_whole = handle.finish_reason in ("stop", "length")
    # An error comes with the third hit, and with nothing else.
    assert (faults.hits[handle.request_id] == MAX_FAILURES) == (handle.finish_reason == "error")
    if handle.token_ids != (wanted if is_whole else wanted[: len(handle.token_ids)]):
        assert is_close_call(model, prompt, handle.token_ids, wanted, params), (index, handle.token_ids, wanted)
        return "close call"
    assert not is_whole or handle.finish_reason == expected[index].finish_reason
    return handle.finish_reason


def check_nothing_is_left(engine):
    """Blocks that a plan under way had are free when it has been committed."""
    deadline = time.monotonic() + 30
    while any(one.num_used_blocks for one in engine.stats().instances):
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.01)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert all(one.status in ("ready", "starting") for one in stats.instances)
    assert not engine.core.handles
    with engine.core.changed:
        engine.core.scheduler.check()


def test_faults_of_all_kinds_change_no_answer():
    model = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1)
    engine = make_engine(
        model,
        4,
        prefill_ep_size=2,
        num_prefill_instances=2,
        max_num_seqs_per_rank=2,
        max_num_batched_tokens=32,
        block_size=4,
        num_kv_blocks=30,
        num_speculative_tokens=1,
        handoff_timeout_s=0.5,
    )
    load = make_load(np.random.default_rng(1), 101, 72, 48, 20)
    engine.start()
    try:
        expected = [engine.submit(*one).result(timeout=120) for one in load]
        faults = Faults(engine, most=40, probability=0.08)
        outcomes = under_faults(engine, load, expected, faults, rounds=4, at_once=24)
        faults.remove()
        check_nothing_is_left(engine)
    finally:
        engine.shutdown(timeout=0)
    assert faults.total == 40
    assert {kind for kind, _ in faults.counts} >= {"PrefillPlan", "DecodePlan", "SendPlan", "ReceivePlan"}
    assert outcomes["length"] + outcomes["stop"] > 0.8 * outcomes.total()


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
        max_num_seqs_per_rank=2,
        max_model_len=160,
        max_num_batched_tokens=64,
        num_speculative_tokens=1,
        handoff_timeout_s=1.0,
    )
    load = make_load(np.random.default_rng(2), engine.model.config.vocab_size, 120, 400, 24)
    engine.start()
    try:
        handles = [engine.submit(*one) for one in load]
        expected = [handle.result(timeout=600) for handle in handles]
        faults = Faults(engine, most=1000, probability=0.06)
        outcomes = under_faults(engine, load, expected, faults, rounds=100, at_once=40)
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
