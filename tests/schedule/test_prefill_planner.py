"""What a prefill instance computes next, and what becomes of it: host code alone, without steps."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.schedule import (
    NOT_FINITE,
    CompilePlan,
    LogprobArrays,
    PrefillPlan,
    PrefillPlanner,
    PrefillResult,
    PrefillVariant,
    RestartPlan,
    SamplingShape,
    SendPlan,
)
from cmjax.schedule.autotune import StepTimes
from cmjax.schedule.blocks import BlockPool
from cmjax.schedule.request import DecodeHold
from tests.schedule.clusters import BLOCK, Recorder, attempt_at, make_request, make_transfer, prefill_sizes
from tests.schedule.invariants import check_planner

ROWS = np.ones((2, 4), np.int64)


def make_planner(num_blocks=64, **sizes):
    owner = Recorder()
    owner.planner = PrefillPlanner("prefill0", "", 2, prefill_sizes(num_blocks, **sizes), owner)
    owner.planner.is_compiled = True
    return owner.planner, owner


def add(planner, *prompts, max_tokens=1, **fields):
    """Requests, each with an attempt in the planner's queue; with one token they end with their prefill."""
    requests = [make_request(index, prompt, max_tokens, **fields) for index, prompt in enumerate(prompts)]
    for request in requests:
        planner.add(attempt_at(request, target=None if max_tokens == 1 else "decode0"))
    return requests


def result_of(plan, token=7, seconds=0.0, **fields):
    return PrefillResult(np.full(len(plan.attempt_ids), token, np.int32), ROWS, seconds, **fields)


def steps_of(planner, seconds=lambda num_tokens: 0.0):
    """All steps until the queue is empty; each is committed before the next, with the seconds of its size."""
    now = 0.0
    while (plan := planner.plan(now)) is not None:
        yield plan
        planner.commit(plan, result_of(plan, seconds=seconds(plan.variant.num_tokens)), now + 1)
        check_planner(planner)
        now += 1


@given(
    lengths=st.lists(st.integers(1, 60), max_size=20),
    max_tokens=st.integers(1, 50),
    num_places=st.integers(1, 8),
    num_blocks=st.integers(15, 40),
    a_step=st.floats(0, 1),
    a_token=st.floats(0, 1),
)
def test_steps_cover_every_prompt_once_in_order(lengths, max_tokens, num_places, num_blocks, a_step, a_token):
    planner, owner = make_planner(num_blocks, step_tokens=max_tokens, num_places=num_places)
    requests = add(planner, *(range(100 * index, 100 * index + length) for index, length in enumerate(lengths)))
    index_of = {request.attempt.id: index for index, request in enumerate(requests)}
    assert planner.load == sum(lengths)
    covered, load, held = [], planner.load, {}
    for plan in steps_of(planner, lambda num_tokens: a_step + a_token * num_tokens):
        sizes = plan.stops - plan.starts
        assert 0 < sizes.sum() == len(plan.token_ids) <= min(max_tokens, plan.variant.num_tokens)
        assert len(plan.places) <= num_places
        assert len(set(plan.attempt_ids.tolist())) == len(set(plan.places.tolist())) == len(plan.places)
        assert plan.joins.tolist() == np.flatnonzero(plan.starts == 0).tolist()
        for row, blocks in zip(plan.joins.tolist(), plan.blocks, strict=True):
            held[index_of[plan.attempt_ids[row]]] = blocks.tolist()
            assert len(blocks) == -(-lengths[index_of[plan.attempt_ids[row]]] // BLOCK)
        indices = [index_of[attempt_id] for attempt_id in plan.attempt_ids.tolist()]
        taken = [block for index in indices for block in held[index]]
        assert len(set(taken)) == len(taken)
        bounds = np.cumsum(sizes)[:-1]
        tokens, following = np.split(plan.token_ids, bounds), np.split(plan.next_token_ids, bounds)
        for row, index in enumerate(indices):
            start, stop = int(plan.starts[row]), int(plan.stops[row])
            assert plan.is_last[row] == (stop == lengths[index])
            assert tokens[row].tolist() == requests[index].prompt_ids[start:stop]
            assert following[row].tolist() == [*requests[index].prompt_ids, -1][start + 1 : stop + 1]
            covered += [(index, token) for token in range(start, stop)]
        load -= int(sizes.sum())
    assert covered == [(index, token) for index, length in enumerate(lengths) for token in range(length)]
    assert load == planner.load == 0
    assert owner.told == [("finish", request) for request in requests]
    assert all(request.token_ids == [7] for request in requests)
    assert planner.stats().num_used_blocks == 0
    assert planner.is_idle


def spans(plan):
    return list(zip(plan.attempt_ids.tolist(), plan.starts.tolist(), plan.stops.tolist(), strict=True))


def test_the_example_of_the_next_step():
    planner, _ = make_planner(8, step_tokens=6)
    first, second = (request.attempt.id for request in add(planner, range(5), range(4)))
    assert [spans(plan) for plan in steps_of(planner)] == [[(first, 0, 5), (second, 0, 1)], [(second, 1, 4)]]


def test_a_prompt_that_ends_under_way_leaves_nothing():
    planner, owner = make_planner(8, step_tokens=10)
    first, second = add(planner, range(20), range(4))
    plan = planner.plan(0.0)
    owner.end(first.attempt)  # cancelled while the step ran
    assert planner.stats().num_used_blocks == 5  # nobody else's before the step is over
    planner.commit(plan, result_of(plan), 1.0)
    assert first.token_ids == []
    assert planner.load == 4
    assert planner.stats().num_used_blocks == 0
    plan = planner.plan(1.0)
    assert spans(plan) == [(second.attempt.id, 0, 4)]
    planner.commit(plan, result_of(plan), 2.0)
    check_planner(planner)
    assert planner.is_idle


def test_a_prompt_without_blocks_waits_and_those_behind_it():
    planner, owner = make_planner(8, step_tokens=64)
    first, second, third = add(planner, range(20), range(16), range(4), max_tokens=2)
    plan = planner.plan(0.0)
    assert plan.attempt_ids.tolist() == [first.attempt.id]
    planner.commit(plan, result_of(plan), 1.0)
    assert planner.plan(1.0) is None  # the first one's blocks are still to be read
    owner.end(first.attempt)
    plan = planner.plan(1.0)
    assert plan.attempt_ids.tolist() == [second.attempt.id, third.attempt.id]


def test_prompts_that_share_a_step_are_as_many_as_there_are_places():
    planner, _ = make_planner(64, step_tokens=64, num_places=3)
    add(planner, *[[1]] * 8)
    assert [len(plan.places) for plan in steps_of(planner)] == [3, 3, 2]


def test_what_waits_is_cut_into_the_steps_that_compute_it_soonest():
    planner, _ = make_planner(64, step_tokens=64)

    def cut(seconds, length=40):
        add(planner, range(length))
        return [len(plan.token_ids) for plan in steps_of(planner, seconds.get)]

    slow, quick = {16: 0.1, 64: 1.0}, {16: 0.1, 64: 0.15}
    assert cut(slow, 64) == [64]  # nothing is known yet
    assert cut(slow, 16) == [16]
    assert cut(slow) == [16, 16, 8]
    # The large step is tried again after a while, and found to be quick now.
    for _ in range(StepTimes.MOST_AGE):
        cut(quick, 16)
    assert cut(quick, 64) == [64]
    assert cut(quick) == [40]


def test_the_smallest_step_that_can_do_what_is_needed():
    shapes = (SamplingShape(), SamplingShape(is_sampled=True, num_stop=8))
    planner, _ = make_planner(64, step_tokens=64, shapes=shapes)
    small, large = 16, 64
    for prompt, fields, size, shape in (
        (range(10), {}, small, shapes[0]),
        (range(17), {}, large, shapes[0]),
        (range(10), {"temperature": 1.0}, small, shapes[1]),
        (range(40), {"temperature": 1.0, "stop_token_ids": (3,)}, large, shapes[1]),
        (range(10), {"stop_token_ids": (3, 4)}, small, shapes[0]),
    ):
        add(planner, prompt, **fields)
        [plan] = steps_of(planner)
        assert plan.variant == PrefillVariant(size, shape)
        assert (plan.sampling is None) == (not shape.is_sampled)
    add(planner, range(3), temperature=1.0, presence_penalty=1.0)
    with pytest.raises(ValueError, match="prefill0: no step is compiled for 3 tokens with SamplingShape"):
        planner.plan(0.0)


def test_rows_bring_their_settings_where_any_of_them_is_sampled():
    planner, _ = make_planner()
    add(planner, range(3), temperature=0.5, seed=5)
    add(planner, range(3), seed=6)
    [plan] = steps_of(planner)
    assert plan.sampling.temperature.tolist() == [0.5, 0.0]
    assert plan.sampling.seed.tolist() == [[0, 5], [0, 6]]


def decoding_place(attempt, rank=0):
    pool = BlockPool(100)
    attempt.decode = DecodeHold(rank, pool.take(1), pool.take(-(-attempt.num_prefill // BLOCK)))


def test_what_a_step_has_ended_is_sent_before_the_next_step():
    planner, owner = make_planner(64, step_tokens=16)
    requests = add(planner, range(10), range(6), range(9), max_tokens=4)
    first, second, third = (request.attempt for request in requests)
    plan = planner.plan(0.0)
    planner.commit(plan, result_of(plan), 1.0)
    assert owner.handed == [("prefill0", "decode0", plan.number, [(first, 0), (second, 1)])]
    assert requests[0].token_ids == requests[1].token_ids == [7]
    decoding_place(first, rank=0)
    decoding_place(second, rank=1)
    transfer = make_transfer([first, second], max_tokens=8, step=plan.number)
    planner.send(transfer)
    sends = [planner.plan(1.0)]
    planner.commit(sends[0], None, 1.5)
    assert planner.stats().num_used_blocks == 3  # the second one is whole
    assert second.prefill is None
    assert first.prefill is not None
    sends.append(planner.plan(1.5))
    assert all(isinstance(one, SendPlan) for one in sends)
    assert [(one.round, one.attempt_ids.tolist()) for one in sends] == [(0, [first.id, second.id]), (1, [first.id])]
    planner.commit(sends[1], None, 2.0)
    assert planner.stats().num_used_blocks == 0
    step = planner.plan(2.0)
    assert isinstance(step, PrefillPlan)
    assert step.attempt_ids.tolist() == [third.id]
    assert step.oldest_step == step.number  # nobody waits for what earlier steps have left


def test_of_those_that_are_over_nothing_is_sent():
    planner, owner = make_planner(64, step_tokens=16)
    first, second = (request.attempt for request in add(planner, range(4), range(4), max_tokens=4))
    plan = planner.plan(0.0)
    planner.commit(plan, result_of(plan), 1.0)
    for attempt in (first, second):
        decoding_place(attempt)
    transfer = make_transfer([first, second])
    owner.transfers[transfer.id] = transfer
    planner.send(transfer)
    owner.end(first)
    plan = planner.plan(1.0)
    assert plan.attempt_ids.tolist() == [second.id]
    assert plan.segments.begins.tolist() == [4]  # where the target expects it
    owner.end(second)
    planner.commit(plan, None, 2.0)
    assert planner.plan(2.0) is None
    check_planner(planner)


def test_a_resumed_prompt_is_computed_with_its_tokens_and_gets_no_other_first_one():
    planner, owner = make_planner(64, step_tokens=4)
    request = make_request(0, [1, 2, 3], 9)
    request.append([4, 5, 6])
    planner.add(attempt_at(request))
    tokens, following = [], []
    for plan in steps_of(planner):
        tokens += plan.token_ids.tolist()
        following += plan.next_token_ids.tolist()
    assert tokens == [1, 2, 3, 4, 5]
    assert following == [2, 3, 4, 5, -1]
    assert request.token_ids == [4, 5, 6]
    assert [ended for *_, ended in owner.handed] == [[(request.attempt, 0)]]
    assert owner.num_tokens == {}


def test_logits_that_are_not_finite_end_the_request_alone():
    planner, owner = make_planner(64)
    bad, good = add(planner, range(5), range(6), max_tokens=3)
    plan = planner.plan(0.0)
    planner.commit(plan, PrefillResult(np.array([NOT_FINITE, 9], np.int32), ROWS, 0.1), 1.0)
    assert owner.told == [("refuse", bad)]
    assert "request 0: its logits are not finite" in owner.errors[0]
    assert bad.token_ids == []
    assert good.token_ids == [9]
    assert [ended for *_, ended in owner.handed] == [[(good.attempt, 1)]]


def logprobs_for(values):
    shape = len(values), 4
    return LogprobArrays(np.float32(values), np.ones(len(values), np.int32), np.zeros(shape, np.int32), np.zeros(shape))


def test_log_probabilities_of_prompts_and_first_tokens():
    """A prompt's come chunk by chunk; those of what is computed once more replace what was there."""
    planner, owner = make_planner(64, step_tokens=5)
    [plain] = add(planner, range(10, 13), max_tokens=2)
    [asking] = add(planner, range(20, 26), max_tokens=2, logprobs=1, prompt_logprobs=2)
    for _ in range(2):  # the second time after a failure
        plan = planner.plan(0.0)
        assert plan.prompt_logprob_rows.tolist() == [1]
        assert plan.logprob_rows.tolist() == []
        planner.commit(plan, result_of(plan, prompt_logprobs=logprobs_for([-21, -22])), 1.0)
        plan = planner.plan(1.0)
        assert spans(plan) == [(asking.attempt.id, 2, 6)]
        assert plan.next_token_ids.tolist() == [23, 24, 25, -1]
        found = {"logprobs": logprobs_for([-7]), "prompt_logprobs": logprobs_for([-23, -24, -25, 0])}
        planner.commit(plan, result_of(plan, **found), 2.0)
        first, *others = asking.prompt_logprobs
        assert first is None
        assert [(one.token_id, one.logprob, len(one.top)) for one in others] == [(t, -t, 2) for t in range(21, 26)]
        assert [(one.token_id, one.logprob, len(one.top)) for one in asking.logprobs] == [(7, -7, 1)]
        for request in (plain, asking):
            owner.end(request.attempt)
            request.token_ids.clear()
            planner.add(attempt_at(request))


def test_it_has_room_for_about_two_steps():
    planner, _ = make_planner(64, step_tokens=10)
    for size, has_room in ((19, True), (1, False)):
        add(planner, range(size))
        assert planner.has_room == has_room
    plan = planner.plan(0.0)
    assert not planner.has_room
    planner.commit(plan, result_of(plan), 1.0)
    assert planner.load == 10
    assert planner.has_room
    planner.is_draining = True
    assert not planner.has_room


def test_compiling_comes_before_anything_else_and_changes_the_steps():
    planner, _ = make_planner(64, step_tokens=16)
    add(planner, range(16))
    variants = (PrefillVariant(4, SamplingShape()),)
    change = planner.change(CompilePlan(variants, targets=("decode0",)))
    plan = planner.plan(0.0)
    assert isinstance(plan, CompilePlan)
    assert not change.is_over
    planner.commit(plan, None, 3.0)
    assert change.is_over
    assert change.error is None
    assert [len(plan.token_ids) for plan in steps_of(planner)] == [4] * 4
    assert planner.busy_s == 3 + 4
    empty = planner.change(CompilePlan((), targets=("decode1",)))
    planner.commit(planner.plan(9.0), None, 10.0)
    assert empty.is_over
    assert planner.variants == variants


def test_what_travels_goes_before_a_change():
    """It has a deadline, which a compilation may not keep."""
    planner, _ = make_planner(64, step_tokens=16)
    first, second = (request.attempt for request in add(planner, range(10), range(12), max_tokens=4))
    plan = planner.plan(0.0)
    change = planner.change(CompilePlan(planner.variants))
    planner.commit(plan, result_of(plan), 1.0)
    decoding_place(first)
    planner.send(make_transfer([first], step=plan.number))
    plan = planner.plan(1.0)
    assert isinstance(plan, SendPlan)
    planner.commit(plan, None, 2.0)
    assert planner.plan(2.0) is change.plan
    planner.commit(change.plan, None, 3.0)
    assert planner.plan(3.0).attempt_ids.tolist() == [second.id]


def test_a_compilation_that_fails():
    """Of what sends to others it costs nobody anything; one that runs steps takes the cache along."""
    planner, owner = make_planner(64, step_tokens=8)
    [request] = add(planner, range(12), max_tokens=4)
    plan = planner.plan(0.0)
    planner.commit(plan, result_of(plan), 1.0)
    sends = planner.change(CompilePlan((), targets=("decode1",)))
    planner.fail(planner.plan(1.0), RuntimeError("no such target"), 2.0)
    assert str(sends.error) == "no such target"
    assert planner.status == "ready"
    assert request.attempt.num_computed == 8
    check_planner(planner)
    for _ in range(5):  # more often than steps may fail
        steps = planner.change(CompilePlan(planner.variants))
        planner.fail(planner.plan(2.0), RuntimeError("out of memory"), 3.0)
        assert str(steps.error) == "out of memory"
        assert planner.status == "starting"
        assert planner.is_idle
        restart = planner.plan(3.0)
        assert isinstance(restart, RestartPlan)
        planner.commit(restart, None, 4.0)
        assert planner.status == "ready"
    assert owner.told == [("hit", request)]
    assert owner.errors == ["prefill0 failed: out of memory"]


def test_nobody_waits_for_changes_of_an_instance_that_does_not_run():
    planner, _ = make_planner()
    before = planner.change(CompilePlan(planner.variants))
    planner.close(RuntimeError("stopped"))
    assert str(before.error) == "stopped"
    after = planner.change(CompilePlan(planner.variants))
    assert after.is_over
    assert "prefill0 does not run" in str(after.error)
    assert planner.plan(0.0) is None


def test_what_it_says_of_itself():
    planner, _ = make_planner(64, step_tokens=8)
    add(planner, range(6), range(9), range(9))
    before = planner.stats()
    assert (before.num_running, before.num_waiting, before.num_used_blocks, before.num_blocks) == (0, 3, 0, 64)
    assert (before.name, before.role, before.status, before.ep_size) == ("prefill0", "prefill", "ready", 2)
    plan = planner.plan(0.0)
    during = planner.stats()
    assert (during.num_running, during.num_waiting, during.num_used_blocks) == (2, 1, 2 + 3)
    planner.commit(plan, result_of(plan), 0.5)
    after = planner.stats()
    assert (after.num_calls, after.num_tokens, after.busy_s, after.num_used_blocks) == (1, 8, 0.5, 3)
    assert after.expert_imbalance == 1.0


def test_microbatches_are_chosen_anew_when_the_largest_step_grows():
    """By the times of the largest step alone: those of a small one say nothing of it."""
    planner, _ = make_planner(64, step_tokens=64)
    planner = PrefillPlanner("prefill0", "", 2, dataclasses.replace(planner.sizes, microbatches=(1, 2)), Recorder())
    planner.owner.planner, planner.is_compiled = planner, True
    for variants, seconds, expected in (
        (planner.sizes.variants[:1], {1: 0.1, 2: 0.2}, 1),
        (planner.sizes.variants, {1: 0.4, 2: 0.3}, 2),
    ):
        planner.change(CompilePlan(variants))
        planner.commit(planner.plan(0.0), None, 0.0)
        for _ in range(2 * planner.autotune.ROUNDS):
            add(planner, range(variants[-1].num_tokens))
            plan = planner.plan(0.0)
            planner.commit(plan, result_of(plan, seconds=seconds[plan.microbatches]), 0.0)
        assert planner.autotune.choice == expected
