"""What a prefill instance shares, asks of the memory pool and stores: its planner alone, without steps or a pool."""

import numpy as np
import pytest

from cmjax.schedule import (
    NOT_FINITE,
    CacheSizes,
    Fetched,
    FetchPlan,
    Found,
    LoadPlan,
    LogprobArrays,
    LookupPlan,
    PoolBlock,
    PoolRate,
    PrefillPlan,
    PrefillPlanner,
    PrefillResult,
    RestartPlan,
    Stored,
    StorePlan,
)
from cmjax.schedule.prefill_cache import LEAST_PATIENCE_S, MOST_PATIENCE_S
from tests.schedule.clusters import BLOCK, Recorder, attempt_at, make_chain, make_request, prefill_sizes
from tests.schedule.invariants import check_planner

ROWS = np.ones((2, 4), np.int64)
NAMES = make_chain()
NAMES.extend(range(100))  # of the blocks of a prompt `range(...)`
DRAM = PoolBlock("dram", 10)


class Driver:
    """A planner that stands alone, and what it has planned; what is asked of the pool is answered by hand."""

    def __init__(self, num_blocks=64, *, step_tokens=64, **cache):
        self.owner = Recorder()
        sizes = prefill_sizes(num_blocks, step_tokens=step_tokens, cache=CacheSizes(BLOCK, **cache))
        self.planner = self.owner.planner = PrefillPlanner("prefill0", "", 2, sizes, self.owner)
        self.planner.is_compiled = True
        self.cache, self.counts = self.planner.cache, self.owner.cache_counts
        self.now, self.seconds = 0.0, 64.0  # the time, and what a step takes
        self.stored = []

    def add(self, prompt, max_tokens=1, *, namespace="", is_named=True, **fields):
        """A request, and its attempt."""
        chain = make_chain(namespace=namespace) if is_named else None
        request = make_request(0, prompt, max_tokens, chain=chain, **fields)
        attempt = attempt_at(request, target=None if max_tokens == 1 else "decode0")
        self.planner.add(attempt)
        return request, attempt

    def plan(self, *arrivals):
        return self.planner.plan(self.now, arrivals)

    def commit(self, plan, token=7):
        result = None
        if isinstance(plan, PrefillPlan):
            num_asked = sum((plan.stops - plan.starts)[plan.prompt_logprob_rows])
            column = np.zeros((num_asked, 1))
            logprobs = LogprobArrays(column[:, 0], column[:, 0], column, column)
            token_ids = np.full(len(plan.attempt_ids), token, np.int32)
            result = PrefillResult(token_ids, ROWS, self.seconds, prompt_logprobs=logprobs)
        elif isinstance(plan, StorePlan):
            self.stored += plan.names
        self.planner.commit(plan, result, self.now)
        check_planner(self.planner)
        return plan

    def next(self, kind, *arrivals):
        """The next plan, which must be of a kind, and has been carried out."""
        plan = self.plan(*arrivals)
        assert isinstance(plan, kind), plan
        return self.commit(plan)

    def nothing(self, *arrivals):
        assert self.plan(*arrivals) is None

    def run(self, prompt, **fields):
        """A request of which nothing is found in the pool, with all that comes of it; returns its steps."""
        (request, _), steps, arrivals = self.add(prompt, **fields), [], ()
        while (plan := self.plan(*arrivals)) is not None:
            self.commit(plan)
            is_lookup = isinstance(plan, LookupPlan)
            arrivals = [Found(one, (), {}) for one in plan.attempt_ids.tolist()] if is_lookup else ()
            steps += [plan] if isinstance(plan, PrefillPlan) else []
        assert request.finish_reason == "length"
        return request, steps

    def cached(self, prompt, **fields):
        """Tokens that such a request need not compute."""
        request, steps = self.run(prompt, **fields)
        assert steps[0].starts[0] == request.num_cached_tokens
        return request.num_cached_tokens

    def learn(self, token_s):
        """Steps take so long for a token."""
        self.seconds = 64 * token_s
        self.run(range(1000, 1064), is_named=False)
        self.counts.__init__()

    def share_nothing(self):
        """The blocks that are kept are needed for others."""
        self.cache._prefixes.clear()


def names(first, stop):
    return tuple(NAMES.names[first:stop])


# -- shared in place --------------------------------------------------------------------------------------------------


def test_the_second_prompt_shares_the_blocks_of_the_first():
    driver = Driver(has_pool=False)
    driver.run(range(18))
    held = [driver.cache._prefixes._known[name, -1].lease.ids[0] for name in names(0, 3)]
    request, [step] = driver.run([*range(13), 99, 99])
    assert (step.starts.tolist(), request.num_cached_tokens) == ([12], 12)
    assert next(iter(step.blocks)).tolist()[:3] == held
    assert step.token_ids.tolist() == [12, 99, 99]
    assert (driver.counts.num_queried, driver.counts.num_hits) == (18 + 15, 12)
    assert driver.planner.stats().num_used_blocks == 0


def test_a_prompt_that_is_there_as_a_whole_computes_its_last_tokens():
    driver = Driver(has_pool=False)
    driver.run(range(8))
    assert [driver.cached(range(length)) for length in (7, 8, 9)] == [4, 4, 8]


def test_with_an_mtp_module_a_block_is_shared_by_those_that_go_on_alike():
    driver = Driver(has_pool=False, needs_next=True)
    driver.run(range(8))  # its second block has nothing after it
    assert driver.cached([*range(8), 99]) == 4
    assert driver.cached([*range(8), 99, 1]) == 8
    assert driver.cached([*range(8), 98, 1]) == 4
    assert driver.cached([*range(8), 98, 2]) == 8


def test_a_hole_ends_what_is_shared():
    driver = Driver(has_pool=False)
    driver.run(range(18))
    driver.cache._prefixes._known.pop((NAMES.names[1], -1)).lease.give_back()
    assert driver.cached(range(18)) == 4
    assert driver.cached(range(18)) == 16  # the hole has been filled by the way


def test_other_tokens_by_the_same_name_are_not_shared():
    driver = Driver(has_pool=False)
    driver.run(range(18))
    driver.cache._prefixes._known[NAMES.names[1], -1].token_ids[0] += 1
    assert driver.cached(range(18)) == 4


def test_nothing_is_shared_between_namespaces():
    driver = Driver()
    assert [driver.cached(range(18), namespace=one) for one in ("", "a", "a", "")] == [0, 0, 16, 16]
    assert len(driver.stored) == len(set(driver.stored)) == 8


def test_where_there_is_no_room_the_end_of_a_prompt_goes_first():
    driver = Driver(8, has_pool=False)
    driver.run(range(18))  # four blocks are kept
    driver.run(range(50, 70), is_named=False)
    assert driver.cached(range(18)) == 12


def test_blocks_in_use_are_no_room():
    driver = Driver(8, has_pool=False)
    _, reader = driver.add(range(18), max_tokens=2)
    driver.next(PrefillPlan)  # its blocks are still to be sent
    _, other = driver.add(range(50, 70))
    driver.nothing()
    driver.add(range(6))
    driver.nothing()  # nor does one begin that finds room, before one that does not
    driver.owner.end(reader)
    assert driver.next(PrefillPlan).attempt_ids[0] == other.id


def test_what_is_not_finite_is_neither_shared_nor_stored():
    driver = Driver()
    _, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    driver.commit(driver.plan(Found(attempt.id, (), {})), token=NOT_FINITE)
    assert "not finite" in driver.owner.errors[0]
    driver.nothing()
    assert driver.cached(range(9)) == 0
    assert tuple(driver.stored) == names(0, 2)


def test_a_prompt_whose_log_probabilities_are_asked_for_is_computed_and_stored():
    driver = Driver()
    driver.run(range(6))
    driver.add(range(9), prompt_logprobs=0)
    assert driver.next(PrefillPlan).starts.tolist() == [0]
    driver.next(StorePlan)
    assert tuple(driver.stored) == names(0, 2)
    assert driver.cached(range(9)) == 8
    assert driver.counts.num_queried == 6 + 9


# -- lookup, fetch, load ----------------------------------------------------------------------------------------------


def test_a_prefix_is_looked_up_fetched_and_loaded_and_the_rest_computed():
    driver = Driver(plan_blocks=2)
    request, attempt = driver.add(range(19))
    lookup = driver.next(LookupPlan)
    assert (lookup.attempt_ids.tolist(), lookup.namespaces, lookup.names) == ([attempt.id], ("",), (names(0, 4),))
    driver.nothing()
    assert driver.planner.stats().num_used_blocks == 0  # before it is known what there is
    fetch = driver.next(FetchPlan, Found(attempt.id, (DRAM,) * 3, {}))
    assert (fetch.attempt_id, fetch.namespace, fetch.names) == (attempt.id, "", names(0, 3))
    assert fetch.token_ids.tolist() == np.arange(12).reshape(3, 4).tolist()
    driver.nothing()
    first, second, third, *_ = attempt.prefill.blocks.ids
    load = driver.next(LoadPlan, Fetched(attempt.id, 3))
    assert (load.attempt_id, load.first, load.is_last) == (attempt.id, 0, False)
    assert (load.blocks.tolist(), load.last_positions.tolist()) == ([[first], [second]], [3, 7])
    assert load.next_token_ids.tolist() == [4, 8]
    load = driver.next(LoadPlan)
    assert (load.first, load.is_last, load.blocks.tolist()) == (2, True, [[third]])
    assert (load.last_positions.tolist(), load.next_token_ids.tolist()) == ([11], [12])
    assert driver.planner.load == 7
    step = driver.next(PrefillPlan)
    assert (step.starts.tolist(), step.token_ids.tolist()) == ([12], list(range(12, 19)))
    assert request.num_cached_tokens == 12
    counts = driver.counts
    assert (counts.num_queried, counts.num_hits, counts.num_pool_queried, counts.num_pool_hits) == (19, 0, 19, 12)
    assert (counts.num_fetches, counts.num_declined, counts.num_failed_loads) == (1, 0, 0)
    assert driver.next(StorePlan).names == names(3, 4)  # the others are there
    assert driver.cached(range(19)) == 16  # what was loaded is shared as well


def test_what_the_instance_has_is_not_asked_for():
    driver = Driver()
    driver.run(range(10))
    driver.add(range(19))
    assert driver.next(LookupPlan).names == (names(2, 4),)


def test_what_the_instance_has_by_now_is_not_fetched():
    driver = Driver()
    _, late = driver.add(range(19))
    _, early = driver.add(range(10))
    assert driver.next(LookupPlan).attempt_ids.tolist() == [late.id, early.id]
    driver.next(PrefillPlan, Found(early.id, (), {}))
    driver.next(StorePlan)
    assert driver.next(FetchPlan, Found(late.id, (DRAM,) * 3, {})).names == names(2, 3)
    assert late.num_computed == 8
    load = driver.next(LoadPlan, Fetched(late.id, 1))
    assert (load.blocks.tolist(), load.last_positions.tolist()) == ([[late.prefill.blocks.ids[2]]], [11])


def test_others_are_computed_while_a_prompt_is_looked_up_and_fetched():
    driver = Driver()
    request, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    driver.run(range(50, 59), is_named=False)
    driver.next(FetchPlan, Found(attempt.id, (DRAM,) * 2, {}))
    driver.run(range(50, 59), is_named=False)
    driver.next(LoadPlan, Fetched(attempt.id, 2))
    driver.next(PrefillPlan)
    assert request.num_cached_tokens == 8


def test_a_prompt_that_finds_no_room_holds_up_none_that_has_begun():
    driver = Driver(8, step_tokens=8)
    _, asking = driver.add(range(20))
    driver.next(LookupPlan)
    _, begun = driver.add(range(50, 70), is_named=False)
    driver.next(PrefillPlan)
    _, behind = driver.add(range(4), is_named=False)
    step = driver.next(PrefillPlan, Found(asking.id, (), {}))
    assert (step.attempt_ids.tolist(), step.starts.tolist()) == ([begun.id], [8])
    assert driver.next(PrefillPlan).attempt_ids.tolist() == [begun.id]
    assert driver.next(PrefillPlan).attempt_ids.tolist() == [asking.id]
    assert behind.prefill is None


def test_nothing_found_is_a_miss():
    driver = Driver()
    _, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    assert driver.next(PrefillPlan, Found(attempt.id, (), {})).starts.tolist() == [0]
    assert (driver.counts.num_pool_queried, driver.counts.num_fetches) == (9, 0)


def test_blocks_that_have_gone_meanwhile_are_computed_and_stored_again():
    driver = Driver()
    request, attempt = driver.add(range(19))
    driver.next(LookupPlan)
    driver.next(FetchPlan, Found(attempt.id, (DRAM,) * 4, {}))
    assert len(driver.next(LoadPlan, Fetched(attempt.id, 1)).blocks) == 1
    assert driver.next(PrefillPlan).starts.tolist() == [4]
    assert driver.next(StorePlan).names == names(1, 4)
    assert (request.num_cached_tokens, driver.counts.num_failed_loads, driver.counts.num_pool_hits) == (4, 3, 4)


def test_a_fetch_that_brings_nothing_is_a_miss():
    driver = Driver()
    _, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    driver.next(FetchPlan, Found(attempt.id, (DRAM,) * 2, {}))
    assert driver.next(PrefillPlan, Fetched(attempt.id, 0)).starts.tolist() == [0]
    assert driver.counts.num_failed_loads == 2


def test_what_is_expected_to_lose_is_not_fetched():
    driver = Driver()
    driver.learn(token_s=0.01)  # a block takes 0.04 s
    for latency_s, kind in ((0.07, FetchPlan), (0.09, PrefillPlan)):
        _, attempt = driver.add(range(9))
        driver.next(LookupPlan)
        driver.next(kind, Found(attempt.id, (DRAM,) * 2, {"dram": PoolRate(latency_s, 1e9)}))
        if kind is FetchPlan:
            driver.next(PrefillPlan, Fetched(attempt.id, 0))
        driver.next(StorePlan) if kind is FetchPlan else driver.nothing()
        driver.share_nothing()
    assert (driver.counts.num_fetches, driver.counts.num_declined) == (1, 2)


@pytest.mark.parametrize(
    ("token_s", "patience_s"), [(None, MOST_PATIENCE_S), (1e-6, LEAST_PATIENCE_S), (0.1, 1.6), (1.0, MOST_PATIENCE_S)]
)
def test_a_lookup_that_is_late_is_a_miss(token_s, patience_s):
    driver = Driver()
    if token_s is not None:
        driver.learn(token_s)
    _, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    driver.now = patience_s - 1e-3
    driver.nothing()
    driver.now = patience_s + 1e-3
    assert driver.next(PrefillPlan).starts.tolist() == [0]  # at once
    driver.next(StorePlan, Found(attempt.id, (DRAM,) * 2, {}))
    driver.nothing()
    assert driver.counts.num_fetches == 0


@pytest.mark.parametrize(
    ("token_s", "patience_s"), [(None, MOST_PATIENCE_S), (1e-6, LEAST_PATIENCE_S), (0.1, 0.8), (1.0, 8.0)]
)
def test_a_fetch_that_is_late_is_a_miss_and_thrown_away_when_it_comes(token_s, patience_s):
    driver = Driver()
    if token_s is not None:
        driver.learn(token_s)
    _, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    driver.next(FetchPlan, Found(attempt.id, (DRAM,), {}))
    driver.now = patience_s - 1e-3
    driver.nothing()
    driver.now = patience_s + 1e-3
    assert driver.next(PrefillPlan).starts.tolist() == [0]
    load = driver.next(LoadPlan, Fetched(attempt.id, 1))
    assert (load.attempt_id, load.blocks.shape, load.is_last) == (attempt.id, (0, 1), True)
    assert driver.counts.num_failed_loads == 1
    assert driver.counts.num_pool_hits == 0


@pytest.mark.parametrize("stage", ["lookup", "fetch", "arrived", "load"])
def test_a_prompt_that_ends_meanwhile_leaves_nothing(stage):
    driver = Driver(plan_blocks=1)
    _, attempt = driver.add(range(9))
    under_way = None
    driver.next(LookupPlan)
    if stage != "lookup":
        driver.next(FetchPlan, Found(attempt.id, (DRAM,) * 2, {}))
    if stage in ("arrived", "load"):
        under_way = driver.plan(Fetched(attempt.id, 2))
        if stage == "arrived":
            driver.commit(under_way)
    driver.owner.end(attempt)
    if stage == "load":
        assert driver.planner.stats().num_used_blocks == 3  # nobody else's while they are written
        driver.commit(under_way)
    if stage == "lookup":
        driver.nothing(Found(attempt.id, (DRAM,) * 2, {}))
    else:
        load = driver.next(LoadPlan, *[Fetched(attempt.id, 2)] * (stage == "fetch"))
        assert (len(load.blocks), load.is_last) == (0, True)
    driver.nothing()
    assert driver.planner.stats().num_used_blocks == 0
    assert driver.planner.load == 0


@pytest.mark.parametrize("kind", [LookupPlan, FetchPlan])
def test_what_cannot_be_asked_is_a_miss_and_no_failure_of_the_instance(kind):
    driver = Driver()
    _, attempt = driver.add(range(9))
    plan = driver.plan()
    if kind is FetchPlan:
        driver.commit(plan)
        plan = driver.plan(Found(attempt.id, (DRAM,) * 2, {}))
    assert isinstance(plan, kind)
    driver.planner.fail(plan, ConnectionError("no pool"), 0.0)
    check_planner(driver.planner)
    assert driver.planner.status == "ready"
    assert driver.next(PrefillPlan).attempt_ids.tolist() == [attempt.id]
    assert driver.counts.num_failed_loads == (2 if kind is FetchPlan else 0)
    assert driver.owner.told[0][0] == "finish"


def test_a_load_that_fails_takes_the_cache_along():
    driver = Driver()
    request, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    driver.next(FetchPlan, Found(attempt.id, (DRAM,) * 2, {}))
    plan = driver.plan(Fetched(attempt.id, 2))
    assert isinstance(plan, LoadPlan)
    driver.planner.fail(plan, RuntimeError("broken"), 0.0)
    assert driver.owner.told == [("hit", request)]
    driver.next(RestartPlan)
    assert driver.planner.stats().num_used_blocks == 0
    assert driver.planner.cache.num_idle == 0


# -- store ------------------------------------------------------------------------------------------------------------


def test_blocks_are_stored_once_when_all_their_slots_have_been_written():
    driver = Driver(step_tokens=6, plan_blocks=2)
    driver.seconds = 0.0
    _, attempt = driver.add(range(20))
    driver.next(LookupPlan)
    stores = []
    plan = driver.plan(Found(attempt.id, (), {}))
    while plan is not None:
        driver.commit(plan)
        stores += [(plan.names, plan.hidden_rows.tolist())] if isinstance(plan, StorePlan) else []
        plan = driver.plan()
    # Steps of 6, 6, 6 and 2 tokens; which token of its step ends each block.
    assert stores == [(names(0, 1), [3]), (names(1, 3), [1, 5]), (names(3, 4), [3]), (names(4, 5), [1])]
    driver.share_nothing()
    driver.run(range(20))
    # A lookup has said that the pool has let go of those that it was asked for.
    assert tuple(driver.stored) == names(0, 5) + names(0, 4)
    driver.run(range(20))
    assert len(driver.stored) == 9


def test_a_store_holds_its_blocks_until_they_have_been_read():
    driver = Driver()
    _, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    driver.next(PrefillPlan, Found(attempt.id, (), {}))
    assert attempt.is_over
    driver.cache.clear()
    assert driver.planner.stats().num_used_blocks == 2
    store = driver.plan()
    assert isinstance(store, StorePlan)
    assert driver.planner.stats().num_used_blocks == 2
    driver.commit(store)
    assert driver.planner.stats().num_used_blocks == 0
    assert driver.planner.stats().num_blocks == driver.planner._pool.num_free


@pytest.mark.parametrize("how", ["refused", "not even asked"])
def test_what_could_not_be_stored_is_stored_when_it_is_computed_again(how):
    driver = Driver()
    _, attempt = driver.add(range(9))
    driver.next(LookupPlan)
    driver.next(PrefillPlan, Found(attempt.id, (), {}))
    plan = driver.plan()
    if how == "refused":
        driver.commit(plan)
        driver.nothing(Stored(1, names(1, 2)))
    else:
        driver.planner.fail(plan, ConnectionError("no pool"), 0.0)
        assert driver.planner.status == "ready"
    failed = names(1, 2) if how == "refused" else names(0, 2)
    assert (driver.counts.num_stored, driver.counts.num_failed_stores) == (2 - len(failed), len(failed))
    check_planner(driver.planner)
    driver.share_nothing()
    driver.add(range(9), prompt_logprobs=0)  # which is computed without a lookup
    driver.next(PrefillPlan)
    assert driver.next(StorePlan).names == failed


def test_after_a_reset_all_is_computed_and_stored_again():
    driver = Driver()
    driver.run(range(9))
    driver.cache.clear()
    assert driver.cached(range(9)) == 0
    assert tuple(driver.stored) == names(0, 2) * 2


@pytest.mark.parametrize("keeps_generated", [False, True])
def test_blocks_with_generated_tokens_are_stored_where_that_is_wanted(keeps_generated):
    driver = Driver(keeps_generated=keeps_generated)
    request = make_request(0, range(6), 20, chain=make_chain())
    request.append([*range(6, 13)])
    driver.planner.add(attempt := attempt_at(request))
    assert driver.next(LookupPlan).names == (names(0, 2),)
    driver.next(PrefillPlan, Found(attempt.id, (), {}))
    assert driver.next(StorePlan).names == names(0, 3 if keeps_generated else 1)
    assert driver.counts.num_queried == 0  # of prompts alone


def test_without_a_pool_nothing_is_asked_or_stored_and_without_names_nothing_is_shared():
    driver = Driver(has_pool=False)
    assert driver.cached(range(9)) == 0
    assert driver.cached(range(9)) == 8
    assert driver.cached(range(9), is_named=False) == 0
    assert not driver.stored


def test_what_the_instance_lets_go_of_before_a_prompt_begins_is_asked_of_the_pool():
    driver = Driver(num_blocks=8, step_tokens=32)
    driver.run(range(9))  # two blocks kept in place
    driver.add(range(500, 528))  # seven blocks: it takes the room of one of them
    _, attempt = driver.add(range(22))  # its first two lie here now, the pool has all five
    lookup = driver.next(LookupPlan)
    assert list(map(len, lookup.names)) == [6, 3]
    answers = [Found(lookup.attempt_ids[0].item(), (), {}), Found(attempt.id, (DRAM,) * 3, {})]
    plan, asked = driver.plan(*answers), []
    while plan is not None:
        driver.commit(plan)
        news = ()
        if isinstance(plan, LookupPlan):
            asked += plan.names
            news = [Found(attempt.id, (DRAM,) * len(plan.names[0]), {})]
        elif isinstance(plan, FetchPlan):
            news = [Fetched(attempt.id, len(plan.names))]
        plan = driver.plan(*news)
    assert asked == [tuple(NAMES.names[1:5])]
    assert driver.counts.num_pool_hits == 16
    assert attempt.num_computed == 22
