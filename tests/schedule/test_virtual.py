"""The instances in virtual time, on which the other tests rely: they notice what goes wrong."""

import dataclasses

import numpy as np
import pytest

from cmjax.schedule import DecodePlan, ReceivePlan, SendPlan
from cmjax.schedule.virtual import VirtualError, token_after
from cmjax.schedule.virtual_executors import VirtualCache, VirtualEntries
from tests.schedule.clusters import Cluster, expected_tokens, logprob_of, small_cluster


def test_the_next_token_follows_from_all_before_it():
    tokens = [5, 6, 7]
    assert expected_tokens(tokens, 2) == [token_after(tokens), token_after([*tokens, token_after(tokens)])]
    others = ([5, 6, 8], [5, 7, 7], [5, 7], [5, 6, 7, 7], [6, 6, 7])
    assert token_after(tokens) not in [token_after(other) for other in others]


def test_nobody_reads_what_was_written_for_another():
    cache = VirtualCache(4, 4)
    cache.write(1, np.array([2, 0]), 0, np.arange(6))
    assert cache.read(1, np.array([2, 0]), 2, 6).tolist() == [2, 3, 4, 5]
    with pytest.raises(AssertionError, match="nothing was written"):
        cache.read(1, np.array([2, 0]), 2, 7)
    cache.write(2, np.array([0]), 1, np.array([9]))
    with pytest.raises(AssertionError, match="attempt 1 reads what"):
        cache.read(1, np.array([2, 0]), 0, 6)
    with pytest.raises(AssertionError, match="nothing was written"):
        cache.read(2, np.array([0]), 0, 2)  # what another one has left there


def test_a_shared_block_that_gets_a_new_owner_shows():
    cache = VirtualCache(4, 4)
    cache.write(1, np.array([2, 0]), 0, np.arange(8))
    with pytest.raises(AssertionError, match="attempt 2 reads what"):
        cache.read(2, np.array([2, 3]), 0, 4)
    cache.join(2, np.array([2, 3]), 4)
    cache.write(2, np.array([2, 3]), 4, np.array([9]))
    assert cache.read(1, np.array([2, 0]), 0, 8).tolist() == list(range(8))
    assert cache.read(2, np.array([2, 3]), 0, 5).tolist() == [0, 1, 2, 3, 9]
    cache.write(2, np.array([2, 3]), 3, np.array([3]))  # the same, but it is not its own to write
    with pytest.raises(AssertionError, match="attempt 1 reads what"):
        cache.read(1, np.array([2, 0]), 0, 8)
    with pytest.raises(AssertionError, match="nothing was written"):
        cache.read(2, np.array([2, 3]), 0, 5)


def test_entries_of_the_mtp_module_are_of_a_token_its_place_and_the_next_one():
    entries, tokens = VirtualEntries(8), np.array([5, 6, 7])
    slots = np.array([4, 5, 2])
    entries.write(slots, 0, tokens, np.array([6, 7, 9]))
    entries.check(slots, tokens, 9)
    for others in ((slots, tokens, 8), (slots, np.array([5, 6, 8]), 9), (np.array([4, 5, 3]), tokens, 9)):
        with pytest.raises(AssertionError, match="MTP entries"):
            entries.check(*others)
    entries.write(slots[2:], 1, tokens[2:], np.array([9]))
    with pytest.raises(AssertionError, match="MTP entries"):
        entries.check(slots, tokens, 9)


class Altered:
    """An executor that runs other plans than it is told to."""

    def __init__(self, inner, alter):
        self.inner, self.alter = inner, alter

    def run(self, plan):
        return self.inner.run(self.alter(plan))

    def poll(self):
        return self.inner.poll()

    @property
    def expects_arrivals(self):
        return self.inner.expects_arrivals


def other_blocks(plan):
    """The blocks of a round in another order."""
    if not isinstance(plan, SendPlan | ReceivePlan):
        return plan
    blocks = dataclasses.replace(plan.segments.blocks, values=plan.segments.blocks.values[::-1])
    return dataclasses.replace(plan, segments=dataclasses.replace(plan.segments, blocks=blocks))


def no_joins(plan):
    """A call whose rows have all been there before."""
    if not isinstance(plan, DecodePlan):
        return plan
    joins = dataclasses.replace(plan.joins, places=plan.joins.places + 1)
    return dataclasses.replace(plan, joins=joins)


@pytest.mark.parametrize(
    ("name", "alter"), [("prefill0", other_blocks), ("decode0", other_blocks), ("decode0", no_joins)]
)
def test_plans_that_are_wrong_are_noticed(name, alter):
    cluster = small_cluster(1, 1, wrap=lambda one, inner: Altered(inner, alter) if one == name else inner)
    cluster.submit(range(100, 130), 9)
    with pytest.raises((AssertionError, KeyError)):
        cluster.run()


def test_a_virtual_error_is_a_failing_run():
    errors = [VirtualError("broken")]

    def fail_once(plan):
        if errors:
            raise errors.pop()
        return plan

    cluster = small_cluster(1, 1, wrap=lambda name, inner: Altered(inner, fail_once))
    request = cluster.submit([1, 2, 3], 5)
    cluster.run()
    cluster.assert_all_right()
    assert request.num_failures == 1
    assert str(cluster.scheduler.prefill["prefill0"].last_error) == "broken"


def test_time_passes_until_nothing_happens_any_more_or_as_long_as_asked_for():
    cluster = small_cluster()
    cluster.run(3.0)
    assert cluster.now == 3.0
    request = cluster.submit([1, 2, 3], 5, at=4.0)
    cluster.run(3.5)
    assert (cluster.now, request.times.scheduled) == (3.5, None)
    cluster.run()
    assert 4.0 < cluster.now < 10.0
    assert request.times.scheduled == 4.0
    # What nobody can run waits without end, and the cluster does not wait with it.
    stuck = cluster.submit([1] * 1000, 5)
    cluster.run()
    assert stuck.finish_reason is None


def test_rounds_on_their_way_are_expected():
    cluster = Cluster(handoff_s=lambda index: 0.5)
    executors = {}
    cluster.wrap = lambda name, inner: executors.setdefault(name, inner)
    source = small_cluster(1, 1)
    cluster.add_prefill("prefill0", source.scheduler.prefill["prefill0"].sizes)
    cluster.add_decode("decode0", source.scheduler.decode["decode0"].sizes)
    expected = {}
    for when in (0.15, 0.25, 0.65, 0.75):
        cluster.at(when, lambda when=when: expected.update({when: executors["decode0"].expects_arrivals}))
    request = cluster.submit([1, 2, 3], 5)
    cluster.run()
    cluster.assert_all_right([request])
    # A step of 0.1 s, a round sent for as long, and on its way for half a second.
    assert expected == {0.15: False, 0.25: True, 0.65: True, 0.75: False}
    assert not executors["prefill0"].expects_arrivals


def test_log_probabilities_say_whose_they_are():
    cluster = small_cluster()
    request = cluster.submit(range(40, 70), 9, logprobs=1, prompt_logprobs=0)
    cluster.run()
    cluster.assert_all_right()
    assert [one.token_id for one in request.logprobs] == request.token_ids
    assert [one.logprob for one in request.logprobs] == [logprob_of(token) for token in request.token_ids]
    first, *others = request.prompt_logprobs
    assert first is None
    assert [one.token_id for one in others] == list(range(41, 70))
    assert [one.logprob for one in others] == [logprob_of(token) for token in range(41, 70)]
