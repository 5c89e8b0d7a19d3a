"""Faults that were found, each in virtual time, and placed at every instant where it may matter."""

import numpy as np
import pytest

from cmjax.schedule import (
    CompilePlan,
    DecodePlan,
    PrefillPlan,
    ReceivePlan,
    RestartPlan,
    SendPlan,
)
from cmjax.schedule.planner import MAX_FAILURES_IN_A_ROW
from cmjax.schedule.virtual import VirtualError
from tests.schedule.clusters import Cluster, decode_sizes, prefill_sizes, run_s, small_cluster
from tests.schedule.invariants import check_scheduler

LONG = list(range(100, 150))


def instants(until, step=0.02):
    return np.arange(0.0, until, step).tolist()


def check_often(cluster, until, step=0.05):
    """Look at the books now and then."""
    for when in instants(until, step):
        cluster.at(when, lambda: check_scheduler(cluster.scheduler))


def target_of(request):
    return request.attempt.target if request.attempt else None


def strike(cluster, how, name):
    """A decode instance fails in one of the ways there are."""
    if how == "lost":
        cluster.scheduler.lose(name, RuntimeError("gone"))
    elif how == "removed":
        cluster.remove(name)
    else:
        cluster.failing.add(name)


def failing_cluster(**fields) -> Cluster:
    """One whose instances in `failing` fail once, with their next run."""
    failing = set()

    def failure(name, plan):
        if name in failing:
            failing.discard(name)
            return RuntimeError("a bad run")
        return None

    cluster = small_cluster(failure=failure, **fields)
    cluster.failing = failing
    return cluster


@pytest.mark.parametrize("how", ["lost", "removed", "failed"])
def test_a_decode_instance_fails_while_its_prompt_is_being_computed(how):
    """The request was given to the same prefill instance again while one of its chunks was under way. The result of
    that chunk was taken for the new attempt's, which then began behind its first tokens: they were never computed
    again, and missing in the cache."""
    seen = set()
    for when in instants(1.2):
        cluster = failing_cluster(num_prefill=1, num_decode=2, step_tokens=12)
        long = cluster.submit(LONG, 12)
        others = [cluster.submit([index] * 5, 8, at=0.05 * index) for index in range(1, 5)]

        def act(cluster=cluster, long=long):
            if name := target_of(long):
                attempt = long.attempt
                seen.add((attempt.stage, attempt.num_computed, cluster.scheduler.prefill["prefill0"].under_way is None))
                strike(cluster, how, name)

        cluster.at(when, act)
        check_often(cluster, 2.0)
        cluster.run()
        cluster.assert_all_right([long, *others])
        assert long.num_failures <= 1
        assert long.num_failures == 0 or how != "removed"
    under_way = {computed for stage, computed, is_idle in seen if stage == "prefill" and not is_idle}
    assert {12, 24, 36} <= under_way  # between its first and its last chunk, too
    assert {stage for stage, *_ in seen} == {"prefill", "handoff", "decode"}


@pytest.mark.parametrize("num_prefill", [1, 2])
@pytest.mark.parametrize("how", ["timeout", "send", "lost"])
def test_a_hand_off_fails_before_its_source_has_let_go(num_prefill, how):
    """The request was admitted again, and given a place at another instance, while the instance that it came from still
    had it: it let go of what was the new attempt's by then. The request was lost, or its place was taken for ever, or
    somebody else's blocks were freed."""
    num_failed = 0
    for when in instants(1.3):
        slow = (
            [] if how != "timeout" else [2.0]
        )  # the first hand-off is sent so slowly that it counts as lost meanwhile

        def run_for(plan, slow=slow):
            return slow.pop() if slow and isinstance(plan, SendPlan) else run_s(plan)

        failures = [RuntimeError("a bad link")] if how == "send" else []

        def failure(name, plan, failures=failures):
            return failures.pop() if failures and isinstance(plan, SendPlan) and plan.round == 1 else None

        cluster = small_cluster(
            num_prefill, 2, step_tokens=24, run_s=run_for, failure=failure, timeout_s=1.0, commit_s=lambda plan: 0.03
        )
        first = cluster.submit(LONG, 12)
        others = [cluster.submit([index] * 30, 8, at=when) for index in range(1, 7)]
        if how == "lost":
            cluster.at(when, lambda c=cluster, r=first: target_of(r) and c.scheduler.lose(target_of(r), RuntimeError()))
        cluster.at(1.0 + when, lambda: None)  # deadlines are looked at
        check_often(cluster, 4.0)
        cluster.run()
        cluster.assert_all_right([first, *others])
        num_failed += first.num_failures
    assert num_failed > 10


def restarts(cluster):
    return cluster.count(RestartPlan), [planner.last_error for planner in cluster.scheduler.planners]


def test_a_cancellation_between_a_round_s_two_halves():
    """A round that had been sent for a request that was cancelled meanwhile made the receiving instance fail, and with
    it all of its requests start over."""
    stages = set()
    for when in instants(1.2):
        cluster = small_cluster(1, 1, step_tokens=48, handoff_s=lambda index: 0.1, commit_s=lambda plan: 0.02)
        gone = cluster.submit(LONG, 12)
        beside = [cluster.submit([index] * 11, 12) for index in range(1, 4)]

        def cancel(cluster=cluster, gone=gone):
            stages.add(gone.attempt.stage if gone.attempt else "over")
            cluster.scheduler.cancel(gone)

        cluster.at(when, cancel)
        check_often(cluster, 2.0)
        cluster.run()
        cluster.assert_all_right(beside)
        assert gone.finish_reason in ("abort", "length")
        assert restarts(cluster) == (0, [None, None])
        assert not any(request.num_failures for request in beside)
    assert {"prefill", "handoff", "decode"} <= stages


def test_all_of_a_hand_off_cancelled_on_its_way():
    """Rounds of a hand-off that nobody waits for any more arrive, and are thrown away."""
    thrown = 0
    for when in instants(0.8):
        cluster = small_cluster(1, 1, step_tokens=64, handoff_s=lambda index: 0.3)
        requests = [cluster.submit([index] * 30, 12) for index in range(1, 3)]
        later = cluster.submit([9] * 5, 9, at=2.0)
        cluster.at(when, lambda c=cluster, some=requests: [c.scheduler.cancel(one) for one in some])
        cluster.run()
        cluster.assert_all_right([later])
        assert restarts(cluster) == (0, [None, None])
        thrown += sum(isinstance(plan, ReceivePlan) and not len(plan.attempt_ids) for _, plan in cluster.ended)
        assert not cluster.wire.arrived("decode0", float("inf"), set())
    assert thrown > 20


def test_a_decode_instance_is_taken_out_while_a_hand_off_to_it_travels():
    """Sending to an instance that was not there any more ended the prefill instance, too."""
    stages = set()
    for when in instants(1.2):
        cluster = small_cluster(1, 2, step_tokens=24, handoff_s=lambda index: 0.1, commit_s=lambda plan: 0.02)
        first = cluster.submit(LONG, 12)
        others = [cluster.submit([index] * 20, 12, at=0.1 * index) for index in range(1, 6)]

        def remove(cluster=cluster, first=first):
            if name := target_of(first):
                stages.add(first.attempt.stage)
                cluster.remove(name)

        cluster.at(when, remove)
        check_often(cluster, 2.0)
        cluster.run()
        cluster.assert_all_right([first, *others])
        assert restarts(cluster)[0] == 0
        assert cluster.scheduler.prefill["prefill0"].last_error is None
        assert not any(request.num_failures for request in cluster.requests)
    assert stages == {"prefill", "handoff", "decode"}


@pytest.mark.parametrize("kind", [PrefillPlan, DecodePlan])
def test_an_instance_that_restarts_while_it_is_drained_stays_drained(kind):
    """After its restart it was ready again, and took new requests."""
    for when in instants(0.6):
        cluster = failing_cluster(num_prefill=2, num_decode=2)
        requests = [cluster.submit([index + 1] * 20, 20) for index in range(8)]
        name = "prefill0" if kind is PrefillPlan else "decode0"
        planner = cluster.scheduler.planner(name)
        statuses = set()

        def drain(cluster=cluster, planner=planner, requests=requests):
            planner.is_draining = True
            cluster.failing.add(planner.name)
            requests.extend(cluster.submit([50 + index] * 20, 20, at=2 + 0.1 * index) for index in range(4))

        cluster.at(when, drain)
        for later in instants(3.0):
            cluster.at(when + later, lambda planner=planner, statuses=statuses: statuses.add(planner.status))
        cluster.run()
        cluster.assert_all_right(requests)
        assert statuses == {"draining"}
        last_calls = [whose for whose, plan in cluster.ended[-20:] if isinstance(plan, kind)]
        assert name not in last_calls


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("has_other", [False, True])
def test_an_instance_whose_restarts_fail_is_given_up(role, has_other):
    """Its requests go on elsewhere, or end where there is no elsewhere; those who wait for a change of it are told."""
    broken = f"{role}0"

    def failure(name, plan):
        is_step = isinstance(plan, PrefillPlan | DecodePlan | RestartPlan)
        return RuntimeError("a broken device") if name == broken and is_step else None

    count = 2 if has_other else 1
    cluster = small_cluster(count if role == "prefill" else 1, count if role == "decode" else 1, failure=failure)
    requests = [cluster.submit([index + 1] * 20, 12) for index in range(6)]
    changes = []
    planner = cluster.scheduler.planner(broken)
    # Asked for while it fails, and when it has been given up.
    cluster.at(0.3, lambda: changes.append(planner.change(CompilePlan(planner.variants))))
    cluster.at(9.0, lambda: changes.append(planner.change(CompilePlan(planner.variants))))
    late = cluster.submit([99] * 5, 9, at=9.5)
    cluster.run()
    assert planner.status == "lost"
    assert cluster.count(RestartPlan, broken) == MAX_FAILURES_IN_A_ROW - 1
    if has_other:
        cluster.assert_all_right()
    else:
        assert late.finish_reason == "error"
        assert late.error == f"{late.request_id}: no {role} instance is left"
        assert {request.finish_reason for request in requests} == {"error"}
        cluster.check_nothing_is_held()
    assert [change.is_over for change in changes] == [True, True]
    assert all(str(change.error) == "a broken device" for change in changes)


def test_when_the_last_two_instances_are_given_up_nobody_waits_for_ever():
    """An instance that was given up did not look at what waited: with the last ones of both roles gone, nobody did, and
    requests that could not go anywhere never ended."""
    cluster = small_cluster(1, 1, failure=lambda name, plan: RuntimeError("a broken device"))
    requests = [cluster.submit([index + 1] * 20, 12) for index in range(20)]
    cluster.scheduler.lose("decode0", RuntimeError("gone"))
    short = [cluster.submit([7] * 200, 1) for _ in range(3)]
    cluster.run()
    assert all(request.finish_reason == "error" for request in requests + short)
    assert short[-1].error == f"{short[-1].request_id}: no prefill instance is left"
    cluster.check_nothing_is_held()


@pytest.mark.parametrize("how", ["lost", "removed"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["prefill0", "decode0"])
def test_an_instance_goes_while_it_is_changed(how, fails, name):
    """The change had been ended with an error already when its run came to its end, and the result was taken for that
    of a step."""

    def failure(whose, plan):
        return RuntimeError("late") if fails and isinstance(plan, CompilePlan) else None

    cluster = small_cluster(2, 2, failure=failure)
    planner = cluster.scheduler.planner(name)
    change = planner.change(CompilePlan(planner.variants))
    after = planner.change(CompilePlan(planner.variants))
    request = cluster.submit([1] * 20, 9)
    cluster.run(0.005)
    assert planner.under_way is change.plan
    strike(cluster, how, name)
    assert change.is_over
    assert after.is_over
    assert "taken out" in str(change.error) or str(change.error) == "gone"
    error = change.error
    cluster.run()
    assert change.error is error
    assert planner.under_way is None
    assert planner.is_idle
    cluster.assert_all_right([request])


def test_a_run_that_fails_after_its_instance_was_lost_changes_nothing():
    for when in instants(1.0):
        cluster = failing_cluster(num_prefill=2, num_decode=2)
        requests = [cluster.submit([index + 1] * 20, 12) for index in range(6)]

        def act(cluster=cluster):
            for name in ("prefill0", "decode0"):
                if cluster.scheduler.planner(name).under_way is not None:
                    cluster.failing.add(name)
                cluster.scheduler.lose(name, RuntimeError("gone"))

        cluster.at(when, act)
        cluster.run()
        cluster.assert_all_right(requests)
        assert cluster.count(RestartPlan) == 0
        assert all(str(one.last_error) in ("gone", "a bad run", "None") for one in cluster.scheduler.planners)
        assert all(request.num_failures <= 1 for request in requests)


def test_a_round_that_arrives_just_before_a_restart():
    """A restart takes along what has arrived; it was to be written afterwards all the same."""
    num_restarts = 0
    for when in instants(0.8):
        cluster = failing_cluster(num_prefill=1, step_tokens=24, handoff_s=lambda index: 0.02 * (index % 4))
        requests = [cluster.submit([index] * 20, 12, at=0.08 * index) for index in range(1, 8)]
        cluster.at(when, lambda c=cluster: c.failing.add("decode0"))
        cluster.run()
        cluster.assert_all_right(requests)
        num_restarts += cluster.count(RestartPlan)
    assert num_restarts > 30


def test_a_slow_commit_is_as_good_as_a_fast_one():
    """A round may have arrived, and its request have got all its tokens, before the source has been told that the round
    was sent."""
    cluster = small_cluster(1, 1, commit_s=lambda plan: 3.0 if isinstance(plan, SendPlan) else 0.0)
    requests = [cluster.submit([index] * 10, 4, at=index) for index in range(1, 5)]
    check_often(cluster, 20.0)
    ended_at = {}
    finish = cluster.scheduler.finish
    cluster.scheduler.finish = lambda request: (ended_at.update({request: cluster.now}), finish(request))
    cluster.run()
    cluster.assert_all_right(requests)
    assert ended_at[requests[0]] < 3.0


def test_scarce_prefill_blocks_behind_failed_hand_offs():
    """Prompts whose hand-offs fail hold their blocks at their source no longer than the hand-off."""
    cluster = Cluster(run_s=run_s, handoff_s=lambda index: None if index < 6 else 0.05, timeout_s=1.0)
    cluster.add_prefill("prefill0", prefill_sizes(16, step_tokens=32, num_places=2))
    cluster.add_decode("decode0", decode_sizes(2, 4, round_tokens=16))
    requests = [cluster.submit([index] * 30, 6) for index in range(1, 7)]
    check_often(cluster, 10.0)
    cluster.run()
    cluster.assert_all_right(requests)
    assert cluster.scheduler.num_failed_handoffs >= 3


def test_a_round_arrives_whose_sending_has_failed():
    """The request decoded, and its source, where nobody waited for the hand-off any more, kept its place and blocks
    until the request ended; others waited for them, for ever where the calls waited for those others."""
    cluster = Cluster(run_s=run_s, commit_s=lambda plan: 0.5 if isinstance(plan, SendPlan) else 0.0, wrap=FailsAfter)
    cluster.add_prefill("prefill0", prefill_sizes(8, num_places=1))
    cluster.add_decode("decode0", decode_sizes(2, 2), is_patient=True)
    requests = [cluster.submit([index] * 10, 30) for index in range(1, 5)]
    held = []
    cluster.at(0.9, lambda: held.append((requests[0].attempt.stage, requests[0].attempt.prefill)))
    cluster.run()
    cluster.assert_all_right(requests)
    assert held == [("decode", None)]
    assert str(cluster.scheduler.prefill["prefill0"].last_error) == "told too late"
    assert not any(request.num_failures for request in requests)


class FailsAfter:
    """An executor whose first round travels, and then counts as not sent."""

    def __init__(self, name, inner):
        self.inner, self.has_failed = inner, name != "prefill0"

    def run(self, plan):
        result = self.inner.run(plan)
        if isinstance(plan, SendPlan) and not self.has_failed:
            self.has_failed = True
            raise VirtualError("told too late")
        return result

    def poll(self):
        return self.inner.poll()

    @property
    def expects_arrivals(self):
        return self.inner.expects_arrivals
