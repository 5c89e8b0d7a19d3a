"""Who decodes where, and what each call is told: host code alone, without steps."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.schedule import (
    NOT_FINITE,
    SERVING_SHAPES,
    CompilePlan,
    DecodePlan,
    DecodePlanner,
    DecodeResult,
    DecodeVariant,
    LogprobArrays,
    ReceivePlan,
    SamplingShape,
    SloController,
    choose_rank,
)
from cmjax.schedule.decode import MAX_ROUNDS_PER_CALL
from tests.schedule.clusters import Recorder, attempt_at, decode_sizes, make_request, make_transfer
from tests.schedule.invariants import check_planner

ROWS = np.ones((2, 4), np.int64)


def make_planner(*sizes, is_patient=False, **more_sizes):
    owner = Recorder()
    owner.planner = DecodePlanner("decode0", "", decode_sizes(*sizes, **more_sizes), owner, is_patient=is_patient)
    owner.planner.is_compiled = True
    return owner.planner, owner


def reserve(planner, length, max_tokens, **fields):
    """A request with its first token and a place; None where there is no room."""
    request = make_request(len(planner.attempts), [1] * length, max_tokens, **fields)
    request.append([5])
    return request if planner.reserve(attempt_at(request)) else None


def arrive(planner, owner, *requests, now=0.0):
    """Their latents are there, in one round."""
    transfer = make_transfer([request.attempt for request in requests], max_tokens=10_000)
    owner.transfers[transfer.id] = transfer
    planner._num_received = 0  # as after a call
    plan = planner.plan(now, [(transfer.id, 0)])
    assert isinstance(plan, ReceivePlan)
    planner.commit(plan, None, now)
    planner._num_received = 0


def decoding(planner, owner, length, max_tokens, **fields):
    """A request that has arrived."""
    request = reserve(planner, length, max_tokens, **fields)
    arrive(planner, owner, request)
    return request


def result_of(plan, num_drafts=0, **fields):
    shape = plan.variant.num_steps * (num_drafts + 1), len(plan.places)
    return DecodeResult(np.full(shape, 5, np.int32), ROWS, 0.1, **fields)


def call(planner, now=0.0):
    """A call, committed; its plan."""
    plan = planner.plan(now)
    assert isinstance(plan, DecodePlan)
    planner.commit(plan, result_of(plan, planner.sizes.num_drafts), now + 0.1)
    check_planner(planner)
    return plan


def num_blocks_of(request):
    return len(request.attempt.decode.blocks.ids)


def test_choose_rank_takes_the_fewest_requests_then_the_most_blocks():
    free = np.array([4, 4, 3, 1])

    def choose(num_requests, num_blocks, limit):
        return choose_rank(np.array(num_requests), free, num_blocks, limit)

    assert choose([1, 1, 1, 0], 1, 8) == 3
    assert choose([1, 1, 1, 0], 2, 8) == 0
    assert choose([2, 1, 1, 0], 3, 8) == 1
    assert choose([2, 2, 1, 0], 3, 8) == 2
    assert choose([2, 2, 1, 0], 5, 8) is None
    assert choose([2, 2, 1, 0], 3, 1) is None


def test_sequences_are_spread_over_the_ranks():
    planner, _ = make_planner(4, 3)
    for _ in range(8):
        assert reserve(planner, 3, 5)
    assert planner.num_per_rank.tolist() == [2, 2, 2, 2]
    assert planner.load == 8 / 12
    for _ in range(4):
        assert reserve(planner, 3, 5)
    assert reserve(planner, 3, 5) is None
    check_planner(planner)


def test_a_request_has_all_its_blocks_where_everybody_can_have_them():
    planner, owner = make_planner(1, 2, 2 * 5, max_blocks=5, num_steps=8)
    one, two = decoding(planner, owner, 3, 17), decoding(planner, owner, 3, 17)
    assert [num_blocks_of(request) for request in (one, two)] == [5, 5]
    assert len(call(planner).growth.places) == 0


def test_where_blocks_are_scarce_the_least_urgent_makes_room():
    planner, owner = make_planner(1, 3, 6, max_blocks=5, num_steps=2)
    # The first came first, and is the least urgent.
    requests = [decoding(planner, owner, 3, 17, at=float(index), priority=int(index == 0)) for index in range(3)]
    assert [num_blocks_of(request) for request in requests] == [2, 2, 2]
    for _ in range(2):
        call(planner)
    assert [request.num_cached for request in requests] == [7, 7, 7]
    first, second, third = requests
    plan = call(planner)
    assert owner.told == [("preempt", first)]
    assert first.attempt is None
    assert [num_blocks_of(request) for request in (second, third)] == [3, 3]
    assert plan.attempt_ids.tolist() == [second.attempt.id, third.attempt.id]
    assert plan.growth.places.tolist() == plan.places.tolist()


def test_blocks_that_one_does_not_need_yet_are_not_another_s():
    """A sequence with the blocks of its whole length had its spare ones counted as free: where a less urgent one found
    none, nobody made room, and taking blocks that were not there ended the engine."""
    planner, owner = make_planner(1, 3, 15, max_blocks=10, num_steps=2)
    short = [decoding(planner, owner, 3, 30, at=1.0), decoding(planner, owner, 3, 30, at=2.0)]
    whole = decoding(planner, owner, 3, 38, priority=-1)
    assert [num_blocks_of(request) for request in (*short, whole)] == [2, 2, 10]
    for now in range(6):
        call(planner, now)
    assert owner.told == [("preempt", short[1])]
    assert [num_blocks_of(request) for request in (short[0], whole)] == [4, 10]


def test_one_that_finds_no_room_at_all_leaves_itself():
    planner, owner = make_planner(1, 2, 4, max_blocks=4, num_steps=4)
    running = decoding(planner, owner, 7, 9)
    assert num_blocks_of(running) == 3
    assert reserve(planner, 1, 4) is not None  # on its way, with the last block
    call(planner)
    assert planner.plan(1.0) is None
    assert owner.told == [("preempt", running)]
    check_planner(planner)


@given(data=st.data())
def test_growth_never_shares_nor_loses_a_block(data):
    """Requests come, grow and go; the blocks of all and the free ones are always the pool; each has what it needs."""
    planner, owner = make_planner(2, 3, data.draw(st.integers(8, 20)), max_blocks=8, num_steps=3)
    alive = []
    for index in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["come", "grow", "go"]))
        if action == "come":
            request = make_request(index, [1] * data.draw(st.integers(1, 12)), 20, at=float(index))
            request.append([5])
            if planner.reserve(attempt_at(request)):
                arrive(planner, owner, request)
                alive.append(request)
        elif action == "go" and alive:
            owner.end(alive.pop(data.draw(st.integers(0, len(alive) - 1))).attempt)
        elif action == "grow" and alive:
            plan = planner.plan(0.0)
            for what, request in owner.told:
                assert what == "preempt"
                alive.remove(request)
            owner.told.clear()
            if plan is not None:
                for request in alive:
                    assert num_blocks_of(request) * 4 >= min(request.num_tokens, request.num_cached + 3)
                planner.commit(plan, result_of(plan), 0.1)
                alive = [request for request in alive if request.finish_reason is None]
                owner.told.clear()
        check_planner(planner)
        assert planner.num_attempts == len(alive)
        assert {attempt.request for attempt in planner.attempts.values()} == set(alive)


def test_a_plan_brings_what_is_new_alone():
    """A row joins once with all that it has; later plans bring its new blocks, and nothing where there are none."""
    planner, owner = make_planner(2, 2, 12, max_blocks=10, num_steps=2)
    first = decoding(planner, owner, 6, 30, temperature=0.5, seed=3, presence_penalty=1.0, stop_token_ids=(9,))
    plan = call(planner)
    joins, place = plan.joins, plan.places[0]
    assert (joins.places.tolist(), plan.places.tolist()) == ([place], [place])
    assert joins.token_ids.tolist() == [5]
    assert joins.positions.tolist() == [6]
    assert joins.last_positions.tolist() == [7]
    assert [blocks.tolist() for blocks in joins.blocks] == [first.attempt.decode.blocks.ids]
    assert joins.sampling.seed.tolist() == [[0, 3]]
    assert [tokens.tolist() for tokens in joins.history] == [[5]]
    assert len(plan.growth.places) == 0

    plan = call(planner)
    assert len(plan.joins.places) == len(plan.joins.blocks.values) == len(plan.joins.sampling.temperature) == 0
    assert plan.growth.places.tolist() == [place]
    assert plan.growth.first.tolist() == [2]
    assert [blocks.tolist() for blocks in plan.growth.blocks] == [first.attempt.decode.blocks.ids[2:]]
    assert plan.growth.last_positions.tolist() == [11]

    second = decoding(planner, owner, 4, 30)
    plan = call(planner)  # tokens 10 and 11 of the first: it goes on with what it has
    assert plan.attempt_ids.tolist() == [first.attempt.id, second.attempt.id]
    assert plan.joins.places.tolist() == [plan.places[1]]
    assert [tokens.tolist() for tokens in plan.joins.history] == [[]]
    assert len(plan.growth.places) == 0


def test_what_a_plan_costs_does_not_depend_on_how_long_its_rows_are():
    """Rows that just go on bring nothing: the plan has the same size after a thousand tokens as after one."""
    sizes = set()
    for length in (1, 1000):
        planner, owner = make_planner(2, 4, 4 * 300, max_blocks=300)
        for _ in range(8):
            decoding(planner, owner, length, 100, stop_token_ids=(9,), presence_penalty=1.0)
        call(planner)
        plan = call(planner)
        for part in (plan.joins, plan.growth):
            assert len(part.places) == len(part.last_positions) == len(part.blocks.values) == 0
        assert len(plan.joins.token_ids) == len(plan.joins.history.values) == len(plan.joins.sampling.seed) == 0
        sizes.add(len(pickle.dumps(plan)))
    assert max(sizes) - min(sizes) < 16  # the ids of attempts


def test_blocks_of_a_row_that_does_not_take_part_come_when_it_does():
    planner, owner = make_planner(1, 2, 12, max_blocks=12, num_steps=2)
    first = decoding(planner, owner, 3, 20, at=1.0)
    call(planner)
    call(planner)
    second = decoding(planner, owner, 3, 5, at=0.0)
    planner.controller = SloController(1.0, [1, 2])
    assert num_blocks_of(first) == 2
    for _ in range(2):
        plan = call(planner)
        assert plan.attempt_ids.tolist() == [second.attempt.id if second.attempt else plan.attempt_ids[0]]
        assert first.attempt.id not in plan.attempt_ids
        assert len(plan.growth.places) == 0
    assert second.finish_reason == "length"
    assert num_blocks_of(first) == 3  # it has grown all the same
    plan = call(planner)
    assert plan.attempt_ids.tolist() == [first.attempt.id]
    assert plan.growth.first.tolist() == [2]
    assert [blocks.tolist() for blocks in plan.growth.blocks] == [first.attempt.decode.blocks.ids[2:]]


def waiting_with_growth():
    """A sequence that has grown and does not take part in calls, since a more urgent one does."""
    planner, owner = make_planner(1, 2, 12, max_blocks=12, num_steps=2)
    waiting = decoding(planner, owner, 3, 20, at=1.0)
    call(planner)
    call(planner)
    urgent = decoding(planner, owner, 3, 20, at=0.0)
    planner.controller = SloController(1.0, [1, 2])
    assert call(planner).attempt_ids.tolist() == [urgent.attempt.id]
    assert num_blocks_of(waiting) == 3
    return planner, owner, waiting, urgent


def test_blocks_of_a_row_that_is_over_are_not_its_successor_s():
    planner, owner, waiting, urgent = waiting_with_growth()
    place = waiting.attempt.decode.place.ids[0]
    owner.end(waiting.attempt)
    owner.end(urgent.attempt)
    successor = decoding(planner, owner, 9, 20)
    if successor.attempt.decode.place.ids[0] != place:
        successor = decoding(planner, owner, 9, 20, at=-1.0)
    assert successor.attempt.decode.place.ids[0] == place
    planner.controller = None
    plan = call(planner)
    assert successor.attempt.id in plan.attempt_ids
    assert len(plan.growth.places) == 0


def test_what_a_row_has_grown_by_meanwhile_comes_as_one():
    planner, owner, waiting, urgent = waiting_with_growth()
    planner.change(CompilePlan((DecodeVariant(2, 8, SERVING_SHAPES[0]),)))
    planner.commit(planner.plan(0.0), None, 0.1)
    assert call(planner).attempt_ids.tolist() == [urgent.attempt.id]
    assert num_blocks_of(waiting) == 4  # calls have more steps
    owner.end(urgent.attempt)
    plan = call(planner)
    assert plan.growth.first.tolist() == [2]
    assert [blocks.tolist() for blocks in plan.growth.blocks] == [waiting.attempt.decode.blocks.ids[2:]]


def test_a_controller_limits_how_many_of_a_rank_run_together():
    planner, owner = make_planner(2, 4)
    requests = [decoding(planner, owner, 3, 50, at=float(-index)) for index in range(8)]
    assert len(call(planner).places) == 8
    planner.controller = SloController(10.0, [1, 2, 4])
    assert planner.limit == planner.stats().seqs_per_rank == 1
    plan = call(planner)
    # The last two came first, one on each rank.
    assert set(plan.attempt_ids.tolist()) == {requests[-1].attempt.id, requests[-2].attempt.id}
    assert plan.variant.num_slots == 1
    planner.controller.limit = 2
    assert len(call(planner).places) == 4
    assert reserve(planner, 3, 5) is None  # each rank has more than run together
    for _ in range(60):
        if planner.limit == 4:
            break
        call(planner)
    assert planner.limit == 4  # calls are fast: the controller has been told


def test_a_call_is_as_large_as_its_fullest_rank_and_does_what_its_rows_need():
    planner, owner = make_planner(2, 4)
    greedy = [decoding(planner, owner, 3, 50)]
    assert call(planner).variant == DecodeVariant(1, 4, SERVING_SHAPES[0])
    greedy.append(decoding(planner, owner, 3, 50))
    assert call(planner).variant == DecodeVariant(1, 4, SERVING_SHAPES[0])
    sampled = decoding(planner, owner, 3, 50, temperature=1.0)
    assert call(planner).variant == DecodeVariant(4, 4, SERVING_SHAPES[1])
    [beside] = [one for one in greedy if one.attempt.decode.rank == sampled.attempt.decode.rank]
    owner.end(beside.attempt)
    assert call(planner).variant == DecodeVariant(1, 4, SERVING_SHAPES[1])
    owner.end(sampled.attempt)
    assert call(planner).variant == DecodeVariant(1, 4, SERVING_SHAPES[0])


def test_what_no_call_can_do_is_not_reserved():
    planner, _ = make_planner(2, 2, shapes=SERVING_SHAPES[:1])
    with pytest.raises(ValueError, match="decode0: no call is compiled for SamplingShape"):
        reserve(planner, 3, 5, temperature=1.0)
    check_planner(planner)
    assert planner.is_idle


def test_calls_compiled_anew_are_used_by_those_that_run():
    planner, owner = make_planner(1, 2)
    request = decoding(planner, owner, 3, 50, stop_token_ids=(9,))
    call(planner)
    shape = SamplingShape(is_sampled=True, num_stop=8)
    change = planner.change(CompilePlan((DecodeVariant(2, 1, shape),)))
    planner.commit(planner.plan(0.0), None, 1.0)
    assert change.is_over
    assert change.error is None
    assert call(planner).variant == DecodeVariant(2, 1, shape)
    assert planner.call_tokens == 1
    assert len(request.token_ids) == 1 + 4 + 1


def test_tokens_end_at_a_stop_at_the_limit_and_where_there_are_none():
    planner, owner = make_planner(4, 1, num_steps=3)
    stops, full, goes_on, bad = (
        decoding(planner, owner, 3, max_tokens, stop_token_ids=stop)
        for max_tokens, stop in ((9, (8,)), (3, ()), (9, ()), (9, ()))
    )
    plan = planner.plan(0.0)
    columns = {stops: [7, 8, 9], full: [7, 8, -1], goes_on: [7, 8, 9], bad: [7, NOT_FINITE, 9]}
    order = [planner.attempts[attempt_id].request for attempt_id in plan.attempt_ids.tolist()]
    token_ids = np.array([columns[request] for request in order], np.int32).T
    planner.commit(plan, DecodeResult(token_ids, ROWS, 0.1), 1.0)
    check_planner(planner)
    assert (stops.token_ids, stops.finish_reason) == ([5, 7, 8], "stop")
    assert (full.token_ids, full.finish_reason) == ([5, 7, 8], "length")
    assert (goes_on.token_ids, goes_on.finish_reason) == ([5, 7, 8, 9], None)
    assert bad.token_ids == [5]
    assert {(what, request) for what, request in owner.told} == {("finish", stops), ("finish", full), ("refuse", bad)}
    assert "request 3: its logits are not finite" in owner.errors[0]
    assert planner.num_tokens == 2 + 2 + 3
    assert call(planner).attempt_ids.tolist() == [goes_on.attempt.id]


def test_a_row_whose_attempt_is_over_gives_its_tokens_to_nobody():
    """The place, and the request at another attempt, may be there again before the call has been committed."""
    planner, owner = make_planner(1, 2)
    gone, other = decoding(planner, owner, 3, 50), decoding(planner, owner, 3, 50)
    plan = planner.plan(0.0)
    owner.end(gone.attempt)
    assert not planner.reserve(attempt_at(gone))  # its place is behind the fence
    planner.commit(plan, result_of(plan), 1.0)
    assert gone.token_ids == [5]
    assert len(other.token_ids) == 5
    assert planner.num_tokens == 4
    assert planner.reserve(attempt_at(gone))
    arrive(planner, owner, gone)
    plan = call(planner)
    assert plan.joins.places.tolist() == [planner._places.place_of(gone.attempt)]
    assert plan.joins.positions.tolist() == [3]
    assert len(gone.token_ids) == 5


def test_drafts_that_are_kept_are_counted():
    planner, owner = make_planner(1, 2, num_steps=2, num_drafts=2)
    first, second = decoding(planner, owner, 3, 50), decoding(planner, owner, 3, 5)
    assert planner.call_tokens == 6
    plan = planner.plan(0.0)
    # Steps of the first keep two drafts and none, those of the second one, and nothing is left to do.
    token_ids = np.array([[1, 1], [2, 2], [3, -1], [4, 3], [-1, -1], [-1, -1]], np.int32)
    planner.commit(plan, DecodeResult(token_ids, ROWS, 0.1), 1.0)
    assert first.token_ids == [5, 1, 2, 3, 4]
    assert second.token_ids == [5, 1, 2, 3]
    assert planner.kept_drafts.tolist() == [2, 1, 1]
    assert call(planner).joins.places.tolist() == []


def test_log_probabilities_follow_their_tokens():
    planner, owner = make_planner(1, 3, num_steps=2, num_drafts=1)
    decoding(planner, owner, 3, 9)
    one = decoding(planner, owner, 3, 9, logprobs=1)
    other = decoding(planner, owner, 3, 3, logprobs=0)
    plan = planner.plan(0.0)
    assert plan.logprob_rows.tolist() == [1, 2]
    token_ids = np.array([[9, 1, 11], [9, -1, -1], [9, 2, 12], [9, 3, 13]], np.int32)
    chosen = -token_ids[:, 1:].reshape(-1).astype(np.float32)
    top_ids = np.tile(token_ids[:, 1:].reshape(-1, 1), (1, 2))
    arrays = LogprobArrays(chosen, np.ones(8, np.int32), top_ids, chosen[:, None].repeat(2, 1))
    one.logprobs.append(None)
    other.logprobs.append(None)  # of the first tokens
    planner.commit(plan, DecodeResult(token_ids, ROWS, 0.1, arrays), 1.0)
    assert [(found.token_id, found.logprob, found.top) for found in one.logprobs[1:]] == [
        (token, -token, ((token, -token),)) for token in (1, 2, 3)
    ]
    assert other.token_ids == [5, 11, 12]
    assert [(found.token_id, found.logprob, found.top) for found in other.logprobs[1:]] == [
        (11, -11, ()),
        (12, -12, ()),
    ]


def test_a_few_rounds_are_written_between_two_calls():
    """A long prompt must not hold up those that decode; without any, all rounds are written one after another."""
    planner, owner = make_planner(2, 2, round_tokens=4)
    decoding(planner, owner, 3, 100)
    arriving = reserve(planner, 40, 9)
    transfer = make_transfer([arriving.attempt], max_tokens=4)
    owner.transfers[transfer.id] = transfer
    kinds, arrivals = [], [(transfer.id, number) for number in range(10)]
    for now in range(12):
        plan = planner.plan(now, arrivals)
        arrivals = []
        kinds.append(type(plan))
        planner.commit(plan, result_of(plan) if isinstance(plan, DecodePlan) else None, now + 0.5)
        assert planner.stats().num_running == 1 + (kinds.count(ReceivePlan) == 10)
    some = [ReceivePlan] * MAX_ROUNDS_PER_CALL + [DecodePlan]
    assert kinds == [*some, *some, ReceivePlan, ReceivePlan]
    assert arriving.attempt.stage == "decode"
    assert call(planner, 20.0).joins.places.tolist() == [planner._places.place_of(arriving.attempt)]


def test_rounds_that_nobody_waits_for_are_thrown_away():
    planner, owner = make_planner(2, 2)
    one, other = reserve(planner, 5, 9), reserve(planner, 6, 9)
    transfer = make_transfer([one.attempt, other.attempt])
    owner.transfers[transfer.id] = transfer
    owner.end(one.attempt)
    plan = planner.plan(0.0, [(9999, 3), (transfer.id, 0)])
    assert (plan.transfer_id, plan.round, len(plan.attempt_ids), len(plan.segments.ranks)) == (9999, 3, 0, 0)
    planner.commit(plan, None, 1.0)
    plan = planner.plan(1.0)
    assert plan.attempt_ids.tolist() == [other.attempt.id]
    owner.end(other.attempt)  # while it is written
    planner.commit(plan, None, 2.0)
    assert planner.plan(2.0) is None
    check_planner(planner)
    assert planner.is_idle


def test_what_had_arrived_before_a_restart_is_not_written_after_it():
    """A restart takes along what has arrived: a round that was told of between a failure and the restart was to be
    written afterwards, when it was not there any more."""
    planner, _ = make_planner(2, 2)
    reserve(planner, 5, 9)
    plan = planner.plan(0.0, [(77, 0)])
    planner.fail(plan, RuntimeError("broken"), 1.0)
    restart = planner.plan(1.0, [(78, 0)])
    planner.commit(restart, None, 2.0)
    assert planner.plan(2.0) is None


def test_a_patient_instance_waits_until_all_have_arrived():
    planner, owner = make_planner(2, 2, is_patient=True)
    first, second = reserve(planner, 5, 9), reserve(planner, 5, 9)
    arrive(planner, owner, first)
    assert planner.plan(0.0) is None
    arrive(planner, owner, second)
    assert len(call(planner).places) == 2


def test_what_it_says_of_itself():
    planner, owner = make_planner(2, 2, 8, max_blocks=8)
    decoding(planner, owner, 5, 9)
    reserve(planner, 5, 9)
    stats = planner.stats()
    assert (stats.name, stats.role, stats.status, stats.ep_size) == ("decode0", "decode", "ready", 2)
    assert (stats.num_running, stats.num_waiting, stats.num_places, stats.seqs_per_rank) == (1, 1, 4, 2)
    assert (stats.num_blocks, stats.num_used_blocks) == (16, 2 * 3)
    call(planner, now=3.0)
    stats = planner.stats()
    assert (stats.num_calls, stats.num_tokens, stats.expert_imbalance) == (1, 4, 1.0)
    assert stats.busy_s == pytest.approx(0.1)
    [one] = planner.calls
    assert (one.begin, one.end, one.num_seqs) == (3.0, 3.1, 1)
