"""The global scheduler on a virtual clock: every request ends, rightly, whatever fails meanwhile."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.simulated import Cluster, expected_tokens


def small_cluster(**fields) -> Cluster:
    cluster = Cluster(**fields)
    cluster.add_prefill("prefill0")
    cluster.add_prefill("prefill1")
    cluster.add_decode("decode0")
    return cluster


def assert_all_right(cluster: Cluster) -> None:
    for request in cluster.requests:
        assert request.finish_reason == "length", request.error
        assert request.token_ids == expected_tokens(request.prompt_ids, request.sampling.max_tokens)
    cluster.check_nothing_is_held()


@given(
    shapes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40), st.floats(0, 20)), min_size=1, max_size=30),
    decode_blocks=st.integers(48, 120),
)
def test_every_request_gets_its_tokens_even_where_blocks_are_scarce(shapes, decode_blocks):
    cluster = Cluster()
    cluster.add_prefill("prefill0")
    cluster.add_decode("decode0", ranks=2, places=4, num_blocks=decode_blocks)
    for index, (length, max_tokens, at) in enumerate(shapes):
        cluster.submit([index % 7 + 1] * length, max_tokens, at)
    cluster.run()
    assert_all_right(cluster)


def test_preempted_requests_lose_nothing():
    cluster = Cluster()
    cluster.add_prefill("prefill0")
    cluster.add_decode("decode0", ranks=1, places=4, num_blocks=16)
    for index in range(4):
        cluster.submit([index + 1] * 4, 40)
    cluster.run()
    assert cluster.scheduler.num_preemptions > 0
    assert_all_right(cluster)


def test_handoffs_that_get_lost_are_sent_again():
    cluster = small_cluster(handoff_s=lambda index: None if index % 3 == 0 else 0.05)
    for index in range(12):
        cluster.submit([index + 1] * 5, 8)
    cluster.run()
    assert cluster.scheduler.num_failed_handoffs > 0
    assert_all_right(cluster)


def test_a_request_whose_handoffs_never_arrive_ends_with_an_error():
    cluster = small_cluster(handoff_s=lambda index: None)
    request = cluster.submit([1, 2, 3], 8)
    cluster.run()
    assert request.finish_reason == "error"
    assert "request 0: its KV did not arrive at decode0 within 5 s" in request.error
    assert len(request.token_ids) == 1  # prefill's own, none from a cache that is not there
    cluster.check_nothing_is_held()


@pytest.mark.parametrize(("name", "when"), [("prefill0", 0.15), ("decode1", 1.0)])
def test_the_requests_of_a_lost_instance_go_on_elsewhere(name, when):
    cluster = small_cluster()
    cluster.add_decode("decode1")
    for index in range(30):
        cluster.submit([index + 1] * 20, 30)
    cluster.at(when, lambda: cluster.scheduler.lose(name, f"{name} failed"))
    cluster.run()
    assert_all_right(cluster)
    assert any(request.num_failures for request in cluster.requests)


def test_without_a_decode_instance_requests_end_with_an_error():
    cluster = small_cluster()
    for index in range(10):
        cluster.submit([index + 1] * 20, 30, at=index / 10)
    cluster.at(2.0, lambda: cluster.scheduler.lose("decode0", "decode0 failed"))
    cluster.run()
    assert all(request.finish_reason == "error" for request in cluster.requests)
    assert any("no decode instance is left" in error for error in (request.error for request in cluster.requests))
    for request in cluster.requests:
        assert request.token_ids == expected_tokens(request.prompt_ids, len(request.token_ids))


def test_instances_join_and_are_drained_while_requests_run():
    cluster = Cluster()
    cluster.add_prefill("prefill0")
    cluster.add_decode("decode0")
    for index in range(40):
        cluster.submit([index + 1] * 30, 20, at=index / 20)

    def drain() -> None:
        cluster.scheduler.prefill["prefill0"].status = "draining"
        cluster.scheduler.decode["decode0"].status = "draining"

    cluster.at(0.5, lambda: (cluster.add_prefill("prefill1"), cluster.add_decode("decode1")))
    cluster.at(1.0, drain)
    cluster.run()
    assert_all_right(cluster)
    assert {request.prefill_name for request in cluster.requests} == {"prefill0", "prefill1"}
    assert {request.decode_name for request in cluster.requests} == {"decode0", "decode1"}
    assert cluster.scheduler.is_idle("decode0")


def test_work_is_spread_by_load():
    cluster = Cluster(step_tokens=1000)
    for index in range(4):
        cluster.add_prefill(f"prefill{index}", num_blocks=1000)
    cluster.add_decode("decode0", ranks=8, places=8, num_blocks=1000)
    rng = np.random.default_rng(0)
    for length in rng.integers(1, 100, 64):
        cluster.submit([1] * int(length), 30)
    loads = {}
    router = cluster.scheduler.decode["decode0"].router
    cluster.at(0.001, lambda: loads.update({n: p.router.load for n, p in cluster.scheduler.prefill.items()}))
    cluster.at(0.001, lambda: loads.update(ranks=[sum(r is not None for r in places) for places in router.requests]))
    cluster.run()
    assert set(loads.pop("ranks")) == {8}
    assert max(loads.values()) - min(loads.values()) <= 100
    assert_all_right(cluster)


def test_priorities_go_first():
    cluster = Cluster()
    cluster.add_prefill("prefill0")
    cluster.add_decode("decode0", ranks=1, places=1)
    low = [cluster.submit([1] * 5, 10, priority=1) for _ in range(3)]
    high = cluster.submit([2] * 5, 10, at=0.01)
    ended = []
    cluster.scheduler.finish, finish = lambda r: (ended.append(r), finish(r)), cluster.scheduler.finish
    cluster.run()
    assert ended == [low[0], high, *low[1:]]


def test_a_tenant_with_many_requests_does_not_hold_up_another():
    cluster = Cluster()
    cluster.add_prefill("prefill0")
    cluster.add_decode("decode0", ranks=1, places=1)
    for _ in range(20):
        cluster.submit([1] * 5, 10, tenant="many")
    few = [cluster.submit([2] * 5, 10, at=0.01, tenant="few") for _ in range(3)]
    ended = []
    cluster.scheduler.finish, finish = lambda r: (ended.append(r), finish(r)), cluster.scheduler.finish
    cluster.run()
    assert [ended.index(request) for request in few] == [1, 3, 5]
    # One that comes late has saved up nothing: from now on it takes turns.
    assert_all_right(cluster)


def test_cancelling_frees_everything_at_every_stage():
    for when in np.arange(0.0, 3.0, 0.05):
        cluster = small_cluster()
        requests = [cluster.submit([index + 1] * 40, 30) for index in range(12)]
        cluster.at(float(when), lambda c=cluster, r=requests: [c.scheduler.cancel(one) for one in r[::2]])
        cluster.run()
        for request in requests[1::2]:
            assert request.token_ids == expected_tokens(request.prompt_ids, 30)
        cluster.check_nothing_is_held()
