"""The scheduler on a virtual clock: every request ends, rightly, whatever fails meanwhile."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.schedule import PrefillPlan, RestartPlan, Scheduler, SendPlan
from tests.schedule.clusters import Cluster, decode_sizes, expected_tokens, prefill_sizes, run_s, small_cluster
from tests.schedule.invariants import check_scheduler


def cluster_of(prefill, decode, **fields) -> Cluster:
    """One instance of each role, of these sizes."""
    cluster = Cluster(**{"run_s": run_s} | fields)
    cluster.add_prefill("prefill0", prefill)
    cluster.add_decode("decode0", decode)
    return cluster


@given(
    shapes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40), st.floats(0, 20)), min_size=1, max_size=30),
    decode_blocks=st.integers(48, 120),
)
def test_every_request_gets_its_tokens_even_where_blocks_are_scarce(shapes, decode_blocks):
    cluster = cluster_of(prefill_sizes(), decode_sizes(2, 4, decode_blocks))
    for index, (length, max_tokens, at) in enumerate(shapes):
        cluster.submit([index % 7 + 1] * length, max_tokens, at)
    cluster.run()
    cluster.assert_all_right()


def test_preempted_requests_lose_nothing():
    cluster = cluster_of(prefill_sizes(), decode_sizes(1, 4, 16))
    for index in range(4):
        cluster.submit([index + 1] * 4, 40)
    cluster.run()
    assert cluster.scheduler.num_preemptions > 0
    assert sum(request.num_preemptions for request in cluster.requests) == cluster.scheduler.num_preemptions
    cluster.assert_all_right()


def test_handoffs_that_get_lost_are_sent_again():
    cluster = small_cluster(handoff_s=lambda index: None if index % 3 == 0 else 0.05)
    for index in range(12):
        cluster.submit([index + 1] * 5, 8)
    cluster.run()
    assert cluster.scheduler.num_failed_handoffs > 0
    cluster.assert_all_right()


def test_what_has_arrived_of_a_hand_off_goes_on_when_the_rest_is_lost():
    cluster = small_cluster(1, 1, handoff_s=lambda index: None if index == 1 else 0.05, timeout_s=1.0)
    cluster.submit([3] * 10, 1)  # while it is computed, the others come
    short, long = cluster.submit([1] * 10, 60, at=0.01), cluster.submit([2] * 20, 8, at=0.01)
    cluster.run()
    cluster.assert_all_right()
    assert [len(plan.segments.ranks) for _, plan in cluster.ended if isinstance(plan, SendPlan)] == [2, 1, 1, 1]
    assert (short.num_failures, long.num_failures) == (0, 1)
    assert cluster.scheduler.num_failed_handoffs == 1


def test_a_request_whose_handoffs_never_arrive_ends_with_an_error():
    cluster = small_cluster(handoff_s=lambda index: None)
    request = cluster.submit([1, 2, 3], 8)
    cluster.run()
    assert request.finish_reason == "error"
    assert "request 0: its KV did not arrive at decode0 within 5 s" in request.error
    assert len(request.token_ids) == 1  # prefill's own, none from a cache that is not there
    assert request.num_failures == 3
    cluster.check_nothing_is_held()


def test_a_round_that_cannot_be_sent_starts_its_requests_over_at_once():
    """They do not wait for their hand-off's deadline; and what hit them three times ends with an error."""
    failures = []

    def failure(name, plan):
        return RuntimeError("a broken link") if isinstance(plan, SendPlan) and len(failures) < limit else None

    def failing(name, plan):
        error = failure(name, plan)
        if error is not None:
            failures.append(name)
        return error

    for limit in (2, 3):
        failures.clear()
        cluster = small_cluster(failure=failing)
        request = cluster.submit([1, 2, 3], 8)
        cluster.run()
        assert cluster.now < 5.0
        assert set(failures) == {"prefill0", "prefill1"}
        assert cluster.count(RestartPlan) == 0
        if limit == 2:
            cluster.assert_all_right()
        else:
            assert request.error == "request 0: its KV could not be sent to decode0: a broken link"
            cluster.check_nothing_is_held()


@pytest.mark.parametrize(("name", "when"), [("prefill0", 0.15), ("decode1", 1.0)])
def test_the_requests_of_a_lost_instance_go_on_elsewhere(name, when):
    cluster = small_cluster(num_decode=2)
    for index in range(30):
        cluster.submit([index + 1] * 20, 30)
    cluster.at(when, lambda: cluster.scheduler.lose(name, RuntimeError("gone")))
    cluster.run()
    cluster.assert_all_right()
    assert any(request.num_failures for request in cluster.requests)
    assert cluster.scheduler.planner(name).status == "lost"
    assert str(cluster.scheduler.planner(name).last_error) == "gone"


def test_without_a_decode_instance_requests_end_with_an_error():
    cluster = small_cluster()
    for index in range(10):
        cluster.submit([index + 1] * 20, 30, at=index / 10)
    short = cluster.submit([1] * 5, 1, at=3.0)
    cluster.at(2.0, lambda: cluster.scheduler.lose("decode0", RuntimeError("gone")))
    cluster.run()
    *long, _ = cluster.requests
    assert all(request.finish_reason == "error" for request in long)
    assert any("no decode instance is left" in request.error for request in long)
    for request in long:
        assert request.token_ids == expected_tokens(request.prompt_ids, len(request.token_ids))
    assert short.finish_reason == "length"  # prefill's token is all that it needs


def test_without_a_prefill_instance_all_requests_end_with_an_error():
    cluster = small_cluster(num_prefill=1)
    decoding = cluster.submit([1] * 5, 30)
    waiting = [cluster.submit([2] * 5, max_tokens, at=2.0) for max_tokens in (1, 9)]
    cluster.at(1.0, lambda: cluster.scheduler.lose("prefill0", RuntimeError("gone")))
    cluster.run()
    assert decoding.finish_reason == "length"
    for request in waiting:
        assert request.finish_reason == "error"
        assert request.error == f"{request.request_id}: no prefill instance is left"


def test_instances_join_and_are_drained_while_requests_run():
    cluster = small_cluster(num_prefill=1)
    for index in range(40):
        cluster.submit([index + 1] * 30, 20, at=index / 20)

    def drain() -> None:
        cluster.scheduler.prefill["prefill0"].is_draining = True
        cluster.scheduler.decode["decode0"].is_draining = True

    cluster.at(
        0.5, lambda: (cluster.add_prefill("prefill1", prefill_sizes()), cluster.add_decode("decode1", decode_sizes()))
    )
    cluster.at(1.0, drain)
    cluster.run()
    cluster.assert_all_right()
    assert {cluster.places["prefill", request] for request in cluster.requests} == {"prefill0", "prefill1"}
    assert {cluster.places["decode", request] for request in cluster.requests} == {"decode0", "decode1"}
    tokens = {name: planner.num_tokens for name, planner in cluster.scheduler.decode.items()}
    assert set(tokens) == {"decode0", "decode1"}
    assert min(tokens.values()) > 0
    assert sum(tokens.values()) == 40 * 19
    assert cluster.scheduler.decode["decode0"].is_idle
    assert cluster.scheduler.decode["decode0"].status == "draining"
    assert not any(request.num_failures for request in cluster.requests)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_where_all_are_drained_what_waits_ends_with_an_error(role):
    """Nobody would ever take it; what has a place goes on."""
    cluster = small_cluster(1, 1)
    first = cluster.submit([1] * 20, 30)

    def drain() -> None:
        cluster.scheduler.planner(f"{role}0").is_draining = True

    cluster.at(1.0, drain)
    late = [cluster.submit([2] * 20, max_tokens, at=1.1) for max_tokens in (30, 1)]
    cluster.run()
    assert first.finish_reason == "length"
    assert late[0].error == f"{late[0].request_id}: no {role} instance is left"
    assert late[1].finish_reason == ("error" if role == "prefill" else "length")
    cluster.check_nothing_is_held()


def test_what_an_instance_that_is_taken_out_had_goes_on_elsewhere_through_no_fault():
    cluster = small_cluster(num_decode=2)
    for index in range(16):
        cluster.submit([index + 1] * 20, 30)
    cluster.at(0.25, lambda: cluster.remove("prefill0"))
    cluster.at(1.0, lambda: cluster.remove("decode0"))
    cluster.run()
    cluster.assert_all_right()
    assert not any(request.num_failures for request in cluster.requests)
    assert [planner.name for planner in cluster.scheduler.planners] == ["prefill1", "decode1"]


def test_work_is_spread_by_load():
    cluster = Cluster(run_s=run_s)
    for index in range(4):
        cluster.add_prefill(f"prefill{index}", prefill_sizes(1000, step_tokens=1000))
    decode = cluster.add_decode("decode0", decode_sizes(8, 8, 1000))
    rng = np.random.default_rng(0)
    for length in rng.integers(1, 100, 64):
        cluster.submit([1] * int(length), 30)
    loads = {}
    cluster.at(0.001, lambda: loads.update({name: one.load for name, one in cluster.scheduler.prefill.items()}))
    cluster.at(0.001, lambda: loads.update(ranks=decode.num_per_rank.tolist()))
    cluster.run()
    assert set(loads.pop("ranks")) == {8}
    assert max(loads.values()) - min(loads.values()) <= 100
    cluster.assert_all_right()


def test_decode_instances_share_the_load():
    cluster = small_cluster(num_decode=2)
    for _ in range(6):
        cluster.submit([1] * 5, 20)
    loads = []
    cluster.at(0.001, lambda: loads.extend(one.num_attempts for one in cluster.scheduler.decode.values()))
    cluster.run()
    assert loads == [3, 3]


def ends_of(cluster):
    """Requests in the order they end."""
    ended = []
    cluster.scheduler.finish, finish = lambda r: (ended.append(r), finish(r)), cluster.scheduler.finish
    return ended


def test_priorities_go_first():
    cluster = cluster_of(prefill_sizes(), decode_sizes(1, 1))
    low = [cluster.submit([1] * 5, 10, priority=1) for _ in range(3)]
    high = cluster.submit([2] * 5, 10, at=0.01)
    ended = ends_of(cluster)
    cluster.run()
    assert ended == [low[0], high, *low[1:]]


def test_a_tenant_with_many_requests_does_not_hold_up_another():
    cluster = cluster_of(prefill_sizes(), decode_sizes(1, 1))
    for _ in range(20):
        cluster.submit([1] * 5, 10, tenant="many")
    few = [cluster.submit([2] * 5, 10, at=0.01, tenant="few") for _ in range(3)]
    ended = ends_of(cluster)
    cluster.run()
    assert [ended.index(request) for request in few] == [1, 3, 5]
    # One that comes late has saved up nothing: from now on it takes turns.
    cluster.assert_all_right()


def test_a_long_prompt_is_not_overtaken_for_ever_by_short_ones():
    cluster = cluster_of(prefill_sizes(), decode_sizes(1, 4, 20, max_blocks=20))
    short = [cluster.submit([1] * 8, 12, at=index / 10) for index in range(40)]
    long = cluster.submit([2] * 60, 8, at=0.55)
    ended = ends_of(cluster)
    cluster.run()
    assert ended.index(long) < 20
    cluster.assert_all_right([*short, long])


def test_cancelling_frees_everything_at_every_stage():
    stages = set()
    for when in np.arange(0.0, 3.0, 0.05):
        cluster = small_cluster()
        requests = [cluster.submit([index + 1] * 40, 30) for index in range(12)]

        def cancel(cluster=cluster, requests=requests):
            for request in requests[::2]:
                stages.add(request.attempt.stage if request.attempt else request.finish_reason or "waiting")
                cluster.scheduler.cancel(request)
                check_scheduler(cluster.scheduler)

        cluster.at(float(when), cancel)
        cluster.run()
        for request in requests[1::2]:
            assert request.token_ids == expected_tokens(request.prompt_ids, 30)
        for request in requests[::2]:
            assert request.finish_reason in ("abort", "length")
            assert request.token_ids == expected_tokens(request.prompt_ids, len(request.token_ids))
        cluster.check_nothing_is_held()
    assert stages == {"waiting", "prefill", "handoff", "decode", "length"}


def test_cancelling_what_has_ended_changes_nothing():
    cluster = small_cluster()
    request = cluster.submit([1] * 5, 3)
    cluster.run()
    cluster.scheduler.take_updates()
    cluster.scheduler.cancel(request)
    assert request.finish_reason == "length"
    assert not cluster.scheduler.has_updates


def test_a_failed_run_is_tried_again_elsewhere():
    """Prefill fails once: the instance starts afresh, and its requests go to the other one."""
    failures = [RuntimeError("a bad step")]

    def failure(name, plan):
        return failures.pop() if failures and name == "prefill0" and isinstance(plan, PrefillPlan) else None

    cluster = small_cluster(failure=failure)
    first = cluster.submit([1] * 20, 8)
    later = [cluster.submit([2] * 20, 8, at=5 + index) for index in range(3)]
    statuses = []
    cluster.at(0.125, lambda: statuses.append(cluster.scheduler.prefill["prefill0"].status))
    cluster.run()
    cluster.assert_all_right()
    assert statuses == ["starting"]
    assert (first.num_failures, first.failed_at, cluster.places["prefill", first]) == (1, "prefill0", "prefill1")
    assert {cluster.places["prefill", request] for request in later} == {"prefill0"}
    assert cluster.scheduler.prefill["prefill0"].status == "ready"
    assert str(cluster.scheduler.prefill["prefill0"].last_error) == "a bad step"


def test_what_starts_over_goes_first_in_its_old_order():
    failures = [RuntimeError("a bad step")]

    def failure(name, plan):
        return failures.pop() if failures and cluster.now > 0.3 else None

    cluster = small_cluster(1, 1, step_tokens=20, failure=failure)
    requests = [cluster.submit([index] * 15, 5) for index in range(8)]
    cluster.run()
    cluster.assert_all_right()
    assert cluster.count(RestartPlan) == 1
    assert sum(request.num_failures for request in requests) > 1
    order = sorted(requests, key=lambda request: request.times.prefilled)
    assert order == requests


def test_kept_drafts_are_counted_past_the_end_of_their_instance():
    cluster = Cluster(run_s=run_s)
    assert cluster.scheduler.kept_drafts.tolist() == [0]
    cluster.add_prefill("prefill0", prefill_sizes())
    for name in ("decode0", "decode1"):
        cluster.add_decode(name, decode_sizes(num_drafts=1))
    requests = [cluster.submit([index] * 10, 20) for index in range(4)]
    counts = []
    for name in ("decode0", "decode1"):
        cluster.run()
        counts.append(cluster.scheduler.kept_drafts)
        cluster.remove(name)
        counts.append(cluster.scheduler.kept_drafts)
    cluster.assert_all_right(requests)
    assert all(count.tolist() == counts[0].tolist() and count.dtype == np.int64 for count in counts)
    assert counts[0] @ [1, 2] == 4 * 19


def test_requests_go_to_instances_of_their_model():
    cluster = small_cluster(num_prefill=2, num_decode=2)
    for name in ("prefill1", "decode1"):
        cluster.scheduler.planner(name).model = "other"
    one, other = cluster.submit([1] * 9, 9), cluster.submit([2] * 9, 9, model="other")
    cluster.run()
    cluster.assert_all_right()
    assert [cluster.places[role, one] for role in ("prefill", "decode")] == ["prefill0", "decode0"]
    assert [cluster.places[role, other] for role in ("prefill", "decode")] == ["prefill1", "decode1"]


def test_updates_tell_every_token_once_and_the_end():
    cluster = small_cluster()
    request = cluster.submit([1] * 5, 12)
    told = []

    def look():
        told.extend(update for one, update in cluster.scheduler.take_updates() if one is request)

    for when in np.arange(0.0, 3.0, 0.01):
        cluster.at(float(when), look)
    cluster.run()
    assert [token for update in told for token in update.token_ids] == expected_tokens([1] * 5, 12)
    assert [update.finish_reason for update in told] == [None] * (len(told) - 1) + ["length"]
    assert [len(update.token_ids) for update in told] == [1, 4, 4, 3]


def test_counts_are_of_requests_not_of_what_was_computed_again():
    cluster = cluster_of(prefill_sizes(), decode_sizes(1, 4, 16))
    for index in range(4):
        cluster.submit([index + 1] * 4, 40)
    cluster.submit([7] * 9, 1)
    cluster.run()
    scheduler: Scheduler = cluster.scheduler
    assert scheduler.num_preemptions > 0
    assert scheduler.num_prompt_tokens == 4 * 4 + 9
    assert scheduler.num_generation_tokens == 4 * 40 + 1
    assert scheduler.num_handoffs == 4 + scheduler.num_preemptions
    assert scheduler.prefill["prefill0"].num_tokens > 4 * 4 + 9
