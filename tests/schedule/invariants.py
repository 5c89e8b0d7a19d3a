"""What must add up between plans: leases and pools, rows and attempts, hand-offs."""

import collections

from cmjax.schedule import DecodePlanner, PrefillPlanner


def check_pool(pool, leases):
    """These leases, all there are, and the free blocks are the pool."""
    expected = [0] * pool.num_blocks
    for lease in leases:
        for block in lease.ids:
            expected[block] += 1
    free = sorted(pool._free)
    if expected != pool._num_holders or free != [block for block, count in enumerate(expected) if not count]:
        raise AssertionError(f"held {expected}, counted {pool._num_holders}, free {free}")


def check_planner(planner):
    leases = [lease for attempt in planner.attempts.values() for lease in attempt.leases()]
    if isinstance(planner, PrefillPlanner):
        leases += cached_leases(planner.cache)
        for pool in (planner._pool, planner._places):
            check_pool(pool, [lease for lease in leases if lease.pool is pool])
        assert planner.cache._pulls.keys() <= planner._queue.keys()
        left = sum(one.num_prefill - one.num_computed for one in planner._queue.values())
        assert left == planner._num_tokens_left, (left, planner._num_tokens_left)
    else:
        assert isinstance(planner, DecodePlanner)
        check_places(planner._places, leases)


def cached_leases(cache):
    """What a prefix cache holds: blocks to be shared, and blocks to be stored."""
    return [known.lease for known in cache._prefixes._known.values()] + [one.lease for one in cache.stores._waiting]


def check_places(places, leases):
    """These leases, all there are, the arrays and the pools agree."""
    by_pool = collections.defaultdict(list)
    for lease in leases:
        by_pool[id(lease.pool)].append(lease)
    for pool in (*places._pools, *places._rank_places):
        check_pool(pool, by_pool[id(pool)])
    ids = sorted(places.ids[places.ids >= 0].tolist())
    assert ids == sorted(places.attempts), (ids, sorted(places.attempts))
    for attempt in places.attempts.values():
        place = places.place_of(attempt)
        assert attempt.decode is not None
        assert places.ids[place] == attempt.id
        assert places.num_blocks[place] == len(attempt.decode.blocks.ids)
        assert places.num_cached[place] == attempt.request.num_cached
        assert places.is_running[place] == (attempt.stage == "decode")


def check_scheduler(scheduler):
    """No attempt, lease or hand-off belongs nowhere."""
    held = {attempt.id: attempt for planner in scheduler.planners for attempt in planner.attempts.values()}
    assert not any(attempt.is_over or attempt.request.attempt is not attempt for attempt in held.values())
    assert scheduler.num_running == len(held), (scheduler.num_running, sorted(held))
    travelling = {attempt_id for transfer in scheduler._transfers.values() for attempt_id in transfer.missing}
    assert travelling == set(scheduler._transfer_of) == {one.id for one in held.values() if one.stage == "handoff"}
    for planner in scheduler.planners:
        if planner.under_way is None:
            check_planner(planner)
