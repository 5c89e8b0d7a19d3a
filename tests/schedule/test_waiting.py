"""The order in which waiting requests are admitted."""

import collections

from hypothesis import given
from hypothesis import strategies as st

from cmjax.schedule.waiting import WaitingQueue
from tests.schedule.clusters import make_request


def numbered(*specs):
    """A queue of requests given as (tenant, priority), and the requests."""
    queue = WaitingQueue()
    requests = [
        make_request(index, [1], at=float(index), tenant=tenant, priority=priority)
        for index, (tenant, priority) in enumerate(specs)
    ]
    for request in requests:
        queue.submit(request)
    return queue, requests


def drain(queue, tokens=10):
    """All, in the order they leave, each served so many tokens."""
    order = []
    while (request := queue.first()) is not None:
        queue.remove(request)
        queue.served(request.tenant, tokens)
        order.append(int(request.request_id.split()[1]))
    return order


def test_one_tenant_s_requests_leave_as_they_came():
    queue, _ = numbered(("a", 0), ("a", 0), ("a", 0))
    assert len(queue) == 3
    assert drain(queue) == [0, 1, 2]
    assert len(queue) == 0
    assert queue.first() is None


def test_lower_priorities_go_first():
    queue, _ = numbered(("a", 1), ("a", 0), ("b", -1), ("a", 0))
    assert drain(queue) == [2, 1, 3, 0]


def test_tenants_take_turns_by_what_they_have_been_served():
    queue, _ = numbered(("many", 0), ("many", 0), ("many", 0), ("few", 0), ("few", 0))
    assert drain(queue) == [0, 3, 1, 4, 2]
    queue, _ = numbered(("a", 0), ("a", 0), ("a", 0), ("b", 0), ("b", 0), ("b", 0))
    queue.served("a", 25)
    assert drain(queue) == [3, 4, 5, 0, 1, 2]


def test_one_that_comes_late_has_saved_up_nothing():
    queue, _ = numbered(("old", 0), ("old", 0))
    queue.served("old", 1000)
    for index in (2, 3, 4):
        queue.submit(make_request(index, [1], at=float(index), tenant="new"))
    assert drain(queue) == [0, 2, 1, 3, 4]


def test_what_starts_over_goes_before_its_tenant_s_others():
    queue, requests = numbered(("a", 0), ("a", 0), ("b", 0))
    queue.remove(requests[0])
    queue.served("a", 5)
    queue.add(requests[0], first=True)
    assert [request.request_id for request in queue if request.tenant == "a"] == ["request 0", "request 1"]
    assert drain(queue) == [2, 0, 1]


@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["submit", "restart", "remove", "serve"]), st.sampled_from("abc"), st.integers(0, 2)),
        max_size=60,
    )
)
def test_the_queue_holds_what_was_put_in_and_not_taken_out(actions):
    queue, outside = WaitingQueue(), []
    groups = collections.defaultdict(list)  # priority, tenant -> requests in their order
    for index, (what, tenant, priority) in enumerate(actions):
        if what == "submit":
            request = make_request(index, [1], at=float(index), tenant=tenant, priority=priority)
            queue.submit(request)
            groups[priority, tenant].append(request)
        elif what == "remove" and (request := queue.first()) is not None:
            assert request.priority == min(priority for priority, _ in groups)
            group = groups[request.priority, request.tenant]
            assert request is group.pop(0)
            if not group:
                del groups[request.priority, request.tenant]
            queue.remove(request)
            outside.append(request)
        elif what == "restart" and outside:
            request = outside.pop()
            queue.add(request, first=True)
            groups[request.priority, request.tenant].insert(0, request)
        elif what == "serve":
            queue.served(tenant, 7)
        inside = {request for group in groups.values() for request in group}
        assert set(queue) == inside
        assert len(queue) == len(inside)
        assert (queue.first() is None) == (not inside)
