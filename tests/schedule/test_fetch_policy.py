"""Whether blocks are fetched or computed again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.schedule.fetch_policy import FetchPolicy, PoolBlock, PoolRate

TIERS = ("dram", "disk", "redis")
# Whole seconds and bytes, so that equal times are equal.
RATES = st.fixed_dictionaries({}, optional={tier: st.builds(PoolRate, st.integers(0, 9), st.just(1)) for tier in TIERS})
BLOCKS = st.lists(st.builds(PoolBlock, st.sampled_from(TIERS), st.integers(0, 9)), max_size=8)


def seconds_of(blocks, rates):
    """Of a fetch of each tier's blocks; nothing is known of those of others, which may be as fast as they like."""
    by_tier = {tier: [one.num_bytes for one in blocks if one.tier == tier] for tier in rates}
    return sum(rates[tier].latency_s + sum(sizes) for tier, sizes in by_tier.items() if sizes)


@settings(max_examples=500)
@given(found=BLOCKS, rates=RATES, compute_s=st.integers(0, 12))
def test_it_fetches_what_saves_most_and_never_what_loses(found, rates, compute_s):
    saved = [count * compute_s - seconds_of(found[:count], rates) for count in range(len(found) + 1)]
    count = FetchPolicy().choose(found, rates, compute_s)
    assert saved[count] == max(saved) >= 0
    assert count == saved.index(max(saved))  # no more than needed for it


def test_what_is_not_known_is_tried():
    found = [PoolBlock("dram", 5)] * 3
    assert FetchPolicy().choose(found, {}, 0.001) == 3  # a tier that has not been measured
    assert FetchPolicy().choose(found, {"dram": PoolRate(100, 0.001)}, None) == 3  # steps that have not been
    assert FetchPolicy().choose([], {}, None) == 0


FAST, SLOW = PoolBlock("dram", 1), PoolBlock("disk", 100)
MEASURED = {"dram": PoolRate(0, 1), "disk": PoolRate(0, 1)}


@pytest.mark.parametrize("before", [[], [FAST, FAST]], ids=["alone", "behind a fast one"])
def test_a_tier_that_has_always_lost_is_tried_again_with_one_block(before):
    policy = FetchPolicy()
    chosen = [policy.choose([*before, SLOW, SLOW, SLOW], MEASURED, 2) for _ in range(3 * policy.RETRY_AFTER)]
    num_fast = len(before)
    assert [index for index, count in enumerate(chosen, 1) if count != num_fast] == [
        policy.RETRY_AFTER * turn for turn in (1, 2, 3)
    ]
    assert set(chosen) == {num_fast, num_fast + 1}


def test_a_tier_that_has_won_meanwhile_begins_anew():
    policy = FetchPolicy()
    for _ in range(policy.RETRY_AFTER - 1):
        assert policy.choose([SLOW], MEASURED, 2) == 0
    assert policy.choose([SLOW], MEASURED, 200) == 1
    assert policy.choose([SLOW], MEASURED, 2) == 0


def test_each_tier_is_counted_for_itself():
    policy, rates = FetchPolicy(), MEASURED | {"redis": PoolRate(0, 1)}
    for _ in range(policy.RETRY_AFTER - 1):
        assert policy.choose([SLOW], rates, 2) == 0
    assert policy.choose([PoolBlock("redis", 100)], rates, 2) == 0
    assert policy.choose([SLOW], rates, 2) == 1


def test_latency_is_paid_once_a_fetch():
    """One block alone is not worth it, all of them are."""
    rates = {"dram": PoolRate(latency_s=5, bytes_per_s=1)}
    found = [PoolBlock("dram", 1)] * 8
    assert FetchPolicy().choose(found[:2], rates, 3) == 0  # 5 + 2 seconds for 6
    assert FetchPolicy().choose(found, rates, 3) == 8
    assert rates["dram"].seconds(8) == 13


def test_a_tier_that_was_too_late_is_left_alone_until_one_block_comes_in_time():
    policy, found = FetchPolicy(), [FAST, FAST, SLOW]
    policy.note([SLOW], is_late=True)
    counts = [policy.choose(found, {}, 1000.0) for _ in range(FetchPolicy.RETRY_AFTER)]
    assert counts == [2] * (FetchPolicy.RETRY_AFTER - 1) + [3]
    policy.note(found, is_late=False)
    assert policy.choose(found, {}, 1000.0) == 3
