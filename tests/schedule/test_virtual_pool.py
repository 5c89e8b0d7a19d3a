"""The memory pool in virtual time, and that it makes up for a request that goes where its prefix does not lie."""

import random

import numpy as np
import pytest

from cmjax.schedule import (
    CacheSizes,
    Fetched,
    FetchPlan,
    Found,
    LookupPlan,
    Plan,
    PoolBlock,
    PoolPlan,
    PoolRate,
    PrefillPlan,
    Stored,
    StorePlan,
)
from cmjax.schedule.virtual import VirtualBlock, VirtualPool
from tests.schedule.clusters import BLOCK, Cluster, decode_sizes, make_chain, prefill_sizes, run_s

CHAIN = make_chain()
CHAIN.extend(range(16))
TOKENS = np.arange(16, dtype=np.int32).reshape(4, 4)


class Time:
    """What happens later happens when it is told to."""

    def __init__(self):
        self.waiting = []

    def later(self, seconds, action):
        self.waiting.append((seconds, action))

    def pass_by(self):
        """Everything happens; returns when."""
        waiting, self.waiting = sorted(self.waiting, key=lambda one: one[0]), []
        for _, action in waiting:
            action()
        return [seconds for seconds, _ in waiting]


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def pool(time):
    pool = VirtualPool(time.later, block_bytes=10, rates={"dram": PoolRate(1.0, 10.0), "disk": PoolRate(5.0, 1.0)})
    pool.blocks = {
        ("", name): VirtualBlock(tokens, "dram") for name, tokens in zip(CHAIN.names, CHAIN.token_ids, strict=True)
    }
    return pool


def lookup_of(*names, namespace=""):
    return LookupPlan(np.arange(len(names)), (namespace,) * len(names), names)


def fetch_of(stop):
    return FetchPlan(3, "", tuple(CHAIN.names[:stop]), TOKENS[:stop], np.zeros(stop, np.int32))


def store_of(stop):
    nothing, names = np.zeros(stop, np.int32), tuple(CHAIN.names[:stop])
    return StorePlan(names, ("",) * stop, TOKENS[:stop], nothing, nothing[:, None], 1, nothing, nothing - 1)


def test_what_is_found_ends_with_a_hole(pool, time):
    news = []
    del pool.blocks["", CHAIN.names[2]]
    names = tuple(CHAIN.names)
    assert pool.lookup(lookup_of(names, names[2:], names[3:]), news.append) == 3
    assert not news
    time.pass_by()
    block = PoolBlock("dram", 10)
    assert news == [Found(0, (block, block), {}), Found(1, (), {}), Found(2, (block,), {})]
    assert pool.lookup(lookup_of(names, namespace="other"), news.append) == 1
    time.pass_by()
    assert news[-1].blocks == ()


@pytest.mark.parametrize("what", ["gone", "others"])
def test_what_is_fetched_is_there_and_of_the_right_tokens_when_it_comes(pool, time, what):
    found = []
    assert pool.fetch(fetch_of(4), lambda news, blocks: found.append((news, blocks))) == 1
    if what == "gone":
        del pool.blocks["", CHAIN.names[2]]
    else:
        pool.blocks["", CHAIN.names[2]] = VirtualBlock(TOKENS[1], "dram")
    assert time.pass_by() == [1.0 + 40 / 10]
    [(news, blocks)] = found
    assert news == Fetched(3, 2)
    assert np.array_equal(blocks, TOKENS[:2])


def test_fetches_are_measured(pool, time):
    pool.blocks["", CHAIN.names[1]] = VirtualBlock(TOKENS[1], "disk")
    pool.fetch(fetch_of(1), lambda news, blocks: None)
    time.pass_by()
    assert pool.measured == {"dram": PoolRate(1.0, 10.0)}
    pool.fetch(fetch_of(3), lambda news, blocks: None)
    assert time.pass_by() == [(1 + 2) + (5 + 10)]
    assert pool.measured == pool.rates


def test_what_is_stored_is_there_in_the_end_but_for_what_is_refused(pool, time):
    news = []
    pool.blocks.clear()
    pool.is_refused, pool.tier_of = lambda name: name == CHAIN.names[1], lambda name: "disk"
    assert pool.store(store_of(3), TOKENS[:3], news.append) == 1
    assert not pool.blocks
    time.pass_by()
    assert news == [Stored(2, (CHAIN.names[1],))]
    assert pool.blocks.keys() == {("", CHAIN.names[0]), ("", CHAIN.names[2])}
    assert {block.tier for block in pool.blocks.values()} == {"disk"}


def test_what_is_lost_never_comes(pool, time):
    pool.delay_s = lambda plan: None if isinstance(plan, LookupPlan) else 7.0
    assert pool.lookup(lookup_of((), ()), pytest.fail) == 0
    assert pool.store(store_of(1), TOKENS[:1], lambda news: None) == 1
    assert time.pass_by() == [7.0]


# -- where a request goes ---------------------------------------------------------------------------------------------

CACHE_BLOCK, PREFIX, TAIL = 4 * BLOCK, 12 * 4 * BLOCK, 24
STEP_S, TOKEN_S = 0.002, 0.0002


def work_s(plan: Plan) -> float:
    """A step takes time by its tokens, and asking for something next to none."""
    if isinstance(plan, PrefillPlan):
        return STEP_S + TOKEN_S * len(plan.token_ids)
    return 0.0001 if isinstance(plan, PoolPlan) else run_s(plan)


def serve(order, num_instances=2, *, room=10, has_pool=True):
    """Requests that begin with prefixes by number, in this order, on instances with room for so many of them, after
    one with each prefix; returns the cluster when all have ended."""
    cluster = Cluster(run_s=work_s)
    # A block comes in an eighth of the time that computing it takes.
    cluster.pool.rates = {"dram": PoolRate(0.001, 1 / (CACHE_BLOCK * TOKEN_S / 8))}
    cache = CacheSizes(CACHE_BLOCK, has_pool=has_pool, needs_next=True)
    for index in range(num_instances):
        cluster.add_prefill(
            f"prefill{index}", prefill_sizes(room * (PREFIX + TAIL) // BLOCK, step_tokens=512, cache=cache)
        )
    cluster.add_decode("decode0", decode_sizes())
    for wave in (sorted(set(order)), order):  # the first one finds nothing anywhere
        cluster.began = cluster.now
        for which in wave:
            prefix, tail = random.Random(which), random.Random(-1 - len(cluster.requests))
            prompt = [prefix.randrange(5000) for _ in range(PREFIX)] + [tail.randrange(5000) for _ in range(TAIL)]
            cluster.submit(prompt, 1, cluster.began, chain=make_chain(CACHE_BLOCK))
        cluster.run()
    cluster.assert_all_right()
    return cluster


def seconds_of(cluster):
    """Until all had their tokens."""
    return max(request.times.prefilled for request in cluster.requests) - cluster.began


def shuffled(counts):
    order = [which for which, count in enumerate(counts) for _ in range(count)]
    random.Random(2).shuffle(order)
    return order


@pytest.mark.parametrize("room", [10, 60], ids=["most go", "all stay"])
@pytest.mark.parametrize("counts", [[6] * 24, [60, *[4] * 23]], ids=["even", "skewed"])
def test_a_request_is_served_as_soon_wherever_its_prefix_lies(counts, room):
    """Two instances to which the load alone sends requests beside two that each have all requests with half of the
    prefixes, and beside two without a pool."""
    order = shuffled(counts)
    anywhere, without_pool = serve(order, room=room), serve(order, room=room, has_pool=False)
    at_home = [serve([which for which in order if which % 2 == home], 1, room=room) for home in range(2)]
    shares = [planner.num_tokens for planner in anywhere.scheduler.prefill.values()]
    assert max(shares) < 1.2 * min(shares)
    assert seconds_of(anywhere) <= 1.05 * max(map(seconds_of, at_home))
    assert seconds_of(anywhere) < 0.6 * seconds_of(without_pool)
