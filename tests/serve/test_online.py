"""The engine with requests that come and go: tokens as from each prompt alone, whatever happens beside them."""

import asyncio
import threading
import time

import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.schedule import CompilePlan, DecodePlan, PrefillPlan, SendPlan
from cmjax.serve import RequestError, SamplingParams
from tests.helpers import tiny_model
from tests.serve.driving import make_engine
from tests.serve.faults import Faults, check_nothing_is_left, make_load, under_faults

pytestmark = pytest.mark.usefixtures("one_shape_of_sampling")
PROMPTS = [[1 + index, 2, 3 + index % 5] * (1 + index % 9) for index in range(24)]
SAMPLINGS = [
    SamplingParams(
        max_tokens=4 + index % 13,
        temperature=0.8 * (index % 3 == 1),
        top_p=0.9,
        seed=index,
        presence_penalty=0.5 * (index % 4 == 2),
        repetition_penalty=1.5 if index % 8 == 3 else 1.0,
        bad_words=((1, 2), (3,)) if index % 8 == 5 else (),
        allowed_token_ids=tuple(range(40)) if index % 8 == 7 else None,
        logprobs=2 if index % 5 == 0 else None,
        prompt_logprobs=1 if index % 7 == 0 else None,
    )
    for index in range(24)
]


# Two of these fill the blocks of a rank, and nine of them on four ranks are three on one.
LONG, NUM_LONG = ([5, 6, 7] * 3, SamplingParams(max_tokens=27)), 9


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def outputs(model):
    """Those of a batch run on one device."""
    engine = make_engine(model, 1, max_num_seqs_per_rank=8, max_model_len=64)
    return engine.generate([*PROMPTS, LONG[0]], [*SAMPLINGS, LONG[1]]).outputs


@pytest.fixture(scope="module")
def expected(outputs):
    return outputs[:-1]


@pytest.fixture(scope="module")
def engine(model):
    """Four ranks with few blocks: sequences are preempted; one draft a step."""
    engine = make_engine(
        model,
        4,
        prefill_ep_size=2,
        num_prefill_instances=2,
        max_num_seqs_per_rank=4,
        max_model_len=64,
        block_size=4,
        num_kv_blocks=18,
        num_speculative_tokens=1,
        handoff_timeout_s=5.0,
    )
    engine.start()
    yield engine
    engine.shutdown(timeout=0)


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert all(one.num_used_blocks == 0 for one in stats.instances)
    assert all(one.status == "ready" for one in stats.instances)


def submit_all(engine, **fields):
    return [engine.submit(*pair, **fields) for pair in zip(PROMPTS, SAMPLINGS, strict=True)]


def assert_same(outputs, expected):
    for one, other in zip(outputs, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        for name in ("logprobs", "prompt_logprobs"):
            found, wanted = getattr(one, name), getattr(other, name)
            assert (found is None) == (wanted is None)
            if found is not None:
                assert [p and p.token_id for p in found] == [p and p.token_id for p in wanted]
                values = [[0.0 if p is None else p.logprob for p in some] for some in (found, wanted)]
                np.testing.assert_allclose(*values, atol=1e-3)


def test_requests_that_share_places_and_blocks_get_the_tokens_of_a_batch_run(engine, outputs, monkeypatch):
    (decoding,) = engine.fleet.decode.values()
    sent, are_together = set(), threading.Event()

    def send(run, plan):
        planners = engine.core.scheduler.prefill.values()
        attempts = [one.attempts[i] for one in planners for i in plan.attempt_ids.tolist() if i in one.attempts]
        result = run(plan)
        sent.update(one.id for one in attempts if one.request.prompt_ids == LONG[0])
        if len(sent) == NUM_LONG:
            are_together.set()
        return result

    def step(run, plan):
        are_together.wait(60)
        return run(plan)

    # However fast the machine is, nothing is decoded before so many long sequences are there that three of them share a
    # rank, which has the blocks of two. (Every hand-off is given the time that this takes.)
    engine.core.scheduler.handoff_timeout_s = 60.0
    wrap(monkeypatch, decoding, DecodePlan, step)
    for source in engine.prefill:
        wrap(monkeypatch, source, SendPlan, send)
    before = engine.stats()
    handles = [engine.submit(*LONG, priority=-1) for _ in range(NUM_LONG)] + submit_all(engine)
    wanted = [outputs[-1]] * NUM_LONG + outputs[:-1]
    assert_same([handle.result(timeout=120) for handle in handles], wanted)
    assert are_together.is_set()
    after = engine.stats()
    assert after.num_preemptions > before.num_preemptions
    assert after.num_handoffs > before.num_handoffs
    assert after.num_drafts > before.num_drafts
    assert after.num_accepted_tokens <= after.num_draft_tokens
    assert after.num_prompt_tokens - before.num_prompt_tokens == sum(len(one.prompt_ids) for one in wanted)
    num_generated = sum(len(output.token_ids) for output in wanted)
    assert after.num_generation_tokens - before.num_generation_tokens == num_generated
    engine.core.scheduler.handoff_timeout_s = engine.settings.handoff_timeout_s


def test_updates_are_the_tokens_once_and_in_order(engine, expected):
    handles = submit_all(engine)
    for handle, wanted in zip(handles, expected, strict=True):
        updates = list(handle)
        assert [token for update in updates for token in update.token_ids] == wanted.token_ids
        assert [update.finish_reason for update in updates] == [None] * (len(updates) - 1) + [wanted.finish_reason]
        times = handle.times
        assert times.arrival <= times.scheduled <= times.prefilled <= times.first_token <= times.last_token
        assert times.last_token <= times.finished


def test_an_event_loop_reads_many_at_once(engine, expected):
    async def read(handle):
        return [token async for update in handle for token in update.token_ids]

    async def read_all():
        return await asyncio.gather(*map(read, submit_all(engine)))

    assert asyncio.run(read_all()) == [output.token_ids for output in expected]


def test_cancelled_requests_free_what_they_hold_and_disturb_nobody(engine, expected):
    handles = submit_all(engine)
    for index, handle in enumerate(handles):
        if index % 3 == 0:
            handle.cancel()
        elif index % 3 == 1:
            threading.Timer(0.02 * index, handle.cancel).start()
    for index, (handle, wanted) in enumerate(zip(handles, expected, strict=True)):
        if index % 3 == 2:
            assert handle.result(timeout=120).token_ids == wanted.token_ids
            continue
        list(handle)  # to its end
        if handle.finish_reason == "abort":
            with pytest.raises(RequestError, match="was cancelled"):
                handle.result()
        assert handle.token_ids == wanted.token_ids[: len(handle.token_ids)]
    assert any(handle.finish_reason == "abort" for handle in handles)


def wrap(monkeypatch, executor, kind, function):
    """Have `function(run, plan)` run the plans of a kind in place of the executor."""
    run = executor.run
    monkeypatch.setattr(executor, "run", lambda plan: function(run, plan) if isinstance(plan, kind) else run(plan))


def test_a_handoff_that_fails_is_sent_again_and_at_last_an_error(engine, expected, monkeypatch):
    failures = iter([True, False, True, True])

    def send(run, plan):
        if next(failures, False):
            raise RuntimeError("the link is down")
        return run(plan)

    for source in engine.prefill:
        wrap(monkeypatch, source, SendPlan, send)
    handles = submit_all(engine)
    assert_same([handle.result(timeout=120) for handle in handles], expected)
    assert engine.stats().num_failed_handoffs > 0
    failures = iter([True] * 100)
    handle = engine.submit(PROMPTS[0], SAMPLINGS[0])
    with pytest.raises(RequestError, match=r"its KV could not be sent to decode0: the link is down"):
        handle.result(timeout=120)
    assert handle.token_ids == expected[0].token_ids[:1]


def test_a_handoff_that_never_arrives_is_noticed(engine, expected, monkeypatch):
    lost = iter([True, False])

    def send(run, plan):
        run(plan)
        if next(lost, False):
            engine.decode._wire.take(engine.decode, (plan.transfer_id, plan.round))  # read, and gone

    for source in engine.prefill:
        wrap(monkeypatch, source, SendPlan, send)
    monkeypatch.setattr(engine.core.scheduler, "handoff_timeout_s", 0.3)
    handle = engine.submit(PROMPTS[1], SAMPLINGS[1])
    assert handle.result(timeout=120).token_ids == expected[1].token_ids
    assert engine.stats().num_failed_handoffs > 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_instance_whose_step_fails_starts_afresh_and_its_requests_go_on(engine, expected, role, monkeypatch, caplog):
    executor, kind = (engine.decode, DecodePlan) if role == "decode" else (engine.prefill[0], PrefillPlan)
    calls = iter(range(100))

    def fails_once(run, plan):
        if next(calls) == 1:
            raise RuntimeError("a device fell out")
        return run(plan)

    wrap(monkeypatch, executor, kind, fails_once)
    handles = submit_all(engine)
    assert_same([handle.result(timeout=120) for handle in handles], expected)
    assert "a step failed" in caplog.text


def test_an_instance_can_be_compiled_while_it_works(engine, expected):
    """A change is a plan between two others: the sequences go on as they were."""
    handles = submit_all(engine)
    while not any(handle.token_ids for handle in handles):
        time.sleep(0.001)
    engine.fleet.compile({"decode0": CompilePlan(engine.decode.serving_variants())})
    engine.fleet.compile({"decode0": CompilePlan(())})
    assert_same([handle.result(timeout=120) for handle in handles], expected)


def test_a_compilation_that_fails_costs_nobody_anything(engine, expected):
    """As often as it likes: what sends to an instance that is not there takes no cache along."""
    handles = submit_all(engine)
    for _ in range(4):
        with pytest.raises(RuntimeError, match="there is no decode instance gone"):
            engine.fleet.compile({"prefill0": CompilePlan((), ("gone",))})
    assert_same([handle.result(timeout=120) for handle in handles], expected)


def test_a_listener_may_fail_or_cancel_and_others_hear_all(engine, expected):
    def fails(update):
        raise RuntimeError("the loop is closed")

    handles = submit_all(engine)
    handles[0].listen(fails)
    cancelled = engine.submit([5] * 3, SamplingParams(max_tokens=50))
    while not cancelled.token_ids:
        time.sleep(0.001)
    heard = []
    cancelled.listen(lambda update: (heard.append(update), cancelled.cancel()))
    assert_same([handle.result(timeout=120) for handle in handles], expected)
    deadline = time.monotonic() + 30
    while not heard or heard[-1].finish_reason is None:
        assert time.monotonic() < deadline, heard
    assert [token for update in heard for token in update.token_ids] == cancelled.token_ids
    assert [update.finish_reason for update in heard[:-1]] == [None] * (len(heard) - 1)


def test_faults_of_all_kinds_change_no_answer(engine, monkeypatch):
    """Before, inside and after what runs, of both roles and of hand-offs, beside cancellations and preemptions."""
    load = make_load(np.random.default_rng(1), engine.model.config.vocab_size, 44, 48, 20)
    expected = [handle.result(timeout=120) for handle in [engine.submit(*one) for one in load]]
    monkeypatch.setattr(engine.core.scheduler, "handoff_timeout_s", 0.5)
    faults = Faults(engine, most=40, probability=0.08)
    outcomes = under_faults(engine, load, expected, faults, at_once=24)
    faults.remove()
    check_nothing_is_left(engine)
    assert faults.total == 40
    assert {kind for kind, _ in faults.counts} >= {"PrefillPlan", "DecodePlan", "SendPlan", "ReceivePlan"}
    assert outcomes["length"] + outcomes["stop"] > 0.8 * outcomes.total()


def test_bad_requests_are_refused_by_name(engine):
    for prompt, sampling, message in [
        ([], SamplingParams(), "r is empty"),
        ([1, 10**6], SamplingParams(), "r"),
        ([1], SamplingParams(stop_token_ids=(101,)), "r: stop_token_ids of token 101, outside the vocabulary"),
        ([1] * 60, SamplingParams(max_tokens=10), "r of 60 tokens with max_tokens 10 exceeds max_model_len 64"),
    ]:
        with pytest.raises(UserError, match=message):
            engine.submit(prompt, sampling, request_id="r")
    with pytest.raises(UserError, match="has been started"):
        engine.generate([[1]])


def test_an_engine_that_shuts_down_finishes_what_runs(model, expected):
    engine = make_engine(model, 1, max_num_seqs_per_rank=8, max_model_len=64)
    with pytest.raises(UserError, match="has not been started"):
        engine.submit([1])
    engine.start()
    handles = submit_all(engine)
    loops = engine.fleet.loops
    engine.shutdown()
    assert_same([handle.result(timeout=0) for handle in handles], expected)
    with pytest.raises(UserError, match="shutting down"):
        engine.submit([1])
    assert not any(loop.is_alive for loop in loops)
    with pytest.raises(RuntimeError, match="prefill0 does not run"):  # and nobody waits for ever
        engine.fleet.compile({"prefill0": CompilePlan(())})
