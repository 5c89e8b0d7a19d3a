"""Names of blocks, and the blocks of an instance that are kept for what they hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.schedule.blocks import BlockPool, Fence
from cmjax.schedule.prefix import PrefixBlocks
from tests.schedule.clusters import make_chain
from tests.schedule.invariants import check_pool

PER_BLOCK, NUM_BLOCKS = 2, 16


def tokens_of(name):
    return np.full(4, name[0], np.int32)


def test_names_are_of_all_tokens_up_to_a_blocks_end():
    whole, grown, other = make_chain(), make_chain(), make_chain()
    whole.extend(range(15))
    for length in (3, 4, 11, 15):
        grown.extend(range(length))
    assert whole.names == grown.names
    assert len(set(whole.names)) == 3  # the last three tokens fill no block
    assert [one.tolist() for one in grown.token_ids] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    other.extend([9, *range(1, 15)])
    assert not set(other.names) & set(whole.names)


class Model:
    """What `PrefixBlocks` must do: keys in the order they were used, the least recently used first."""

    def __init__(self, needs_next):
        self.needs_next, self.blocks, self.order = needs_next, {}, []

    def key(self, name, next_token):
        return (name, next_token) if self.needs_next else name

    def add(self, name, next_token, blocks):
        key = self.key(name, next_token)
        if key not in self.blocks and not (self.needs_next and next_token is None):
            self.blocks[key] = list(blocks)
            self.order.append(key)

    def touch(self, chain):
        for name, next_token in chain[::-1]:
            key = self.key(name, next_token)
            if key in self.blocks:
                self.order.remove(key)
                self.order.append(key)

    def make_room(self, count, num_free, in_use):
        """Whether there is room, having let go of what is needed for it."""
        going = []
        for key in self.order:
            if num_free + PER_BLOCK * len(going) >= count:
                break
            if not in_use & set(self.blocks[key]):
                going.append(key)
        if num_free + PER_BLOCK * len(going) < count:
            return False
        for key in going:
            del self.blocks[key]
            self.order.remove(key)
        return True


NAMES = st.sampled_from([b"a", b"b", b"c", b"d"])
NEXT = st.sampled_from([None, 1, 2])
CHAINS = st.lists(st.tuples(NAMES, NEXT), min_size=1, max_size=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), CHAINS),
        st.tuples(st.just("share"), st.tuples(NAMES, NEXT)),
        st.tuples(st.just("give back"), st.integers(0, 9)),
        st.tuples(st.just("make room"), st.integers(0, NUM_BLOCKS + 1)),
        st.tuples(st.just("touch"), CHAINS),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(steps=STEPS, needs_next=st.booleans())
def test_it_does_what_a_plain_model_does(steps, needs_next):
    pool, model, leases = BlockPool(NUM_BLOCKS), Model(needs_next), []
    prefixes = PrefixBlocks(pool, needs_next=needs_next)
    for what, arg in steps:
        in_use = {block for lease in leases for block in lease.ids}
        if what == "compute" and pool.num_free >= PER_BLOCK * len(arg):
            lease = pool.take(PER_BLOCK * len(arg))
            leases.append(lease)
            for index, (name, next_token) in enumerate(arg):
                blocks = lease.ids[index * PER_BLOCK : (index + 1) * PER_BLOCK]
                prefixes.add(name, tokens_of(name), next_token, blocks)
                model.add(name, next_token, blocks)
        elif what == "share" and (blocks := prefixes.find(arg[0], tokens_of(arg[0]), arg[1])) is not None:
            leases.append(pool.share(blocks))
        elif what == "give back" and leases:
            leases.pop(arg % len(leases)).give_back()
        elif what == "make room":
            expected = model.make_room(arg, pool.num_free, in_use)
            assert prefixes.make_room(arg) == expected
            assert pool.num_free >= arg or not expected
        elif what == "touch":
            prefixes.touch(arg)
            model.touch(arg)
        elif what == "clear":
            prefixes.clear()
            model = Model(needs_next)
        in_use = {block for lease in leases for block in lease.ids}
        for name in (b"a", b"b", b"c", b"d"):
            for next_token in (None, 1, 2):
                found = prefixes.find(name, tokens_of(name), next_token)
                assert found == model.blocks.get(model.key(name, next_token))
                assert prefixes.find(name, tokens_of(name) + 1, next_token) is None  # others by the same name
        assert len(prefixes) == len(model.blocks)
        assert prefixes.num_idle == PER_BLOCK * sum(not in_use & set(blocks) for blocks in model.blocks.values())
        check_pool(pool, [*leases, *(known.lease for known in prefixes._known.values())])


@pytest.fixture
def kept():
    """Three blocks of a chain that nobody uses."""
    fence = Fence()
    pool = BlockPool(4, fence)
    prefixes, lease = PrefixBlocks(pool, needs_next=True), pool.take(3)
    for name, next_token, block in zip((b"a", b"b", b"c"), (1, 2, 3), lease.ids, strict=True):
        prefixes.add(name, tokens_of(name), next_token, [block])
    prefixes.touch([(b"a", 1), (b"b", 2), (b"c", 3)])
    lease.give_back()
    return pool, prefixes


def names_of(prefixes):
    return {name for name, _ in prefixes._known}


def test_the_end_of_a_chain_goes_first(kept):
    pool, prefixes = kept
    assert prefixes.make_room(2)
    assert names_of(prefixes) == {b"a", b"b"}
    assert prefixes.make_room(3)
    assert names_of(prefixes) == {b"a"}
    assert pool.num_free == 3


def test_nothing_is_lost_where_there_would_not_be_enough(kept):
    pool, prefixes = kept
    reader = pool.share(prefixes.find(b"a", tokens_of(b"a"), 1))
    assert not prefixes.make_room(4)
    assert len(prefixes) == 3
    assert prefixes.make_room(3)
    assert names_of(prefixes) == {b"a"}
    reader.give_back()
    assert prefixes.make_room(4)


def test_what_a_plan_under_way_reads_is_free_after_it(kept):
    pool, prefixes = kept
    pool.fence.close()
    prefixes.clear()
    assert (len(prefixes), pool.num_free) == (0, 1)
    pool.fence.open()
    assert pool.num_free == 4
