"""Block bookkeeping: pools, leases, fences, and ragged rows."""

import collections
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cmjax.errors import UserError
from cmjax.schedule import BlockPool, Fence, Ragged, blocks_for, slot_mapping
from tests.schedule.invariants import check_pool

SIZE = 13


class PoolMachine(RuleBasedStateMachine):
    """Takes, extends, shares and gives back at random; every block is in the hands that it should be in."""

    def __init__(self):
        super().__init__()
        self.fence = Fence()
        self.pool = BlockPool(SIZE, self.fence)
        self.leases = []
        self.behind_fence = []  # given back since it closed
        self.free = collections.deque(range(SIZE))  # what is taken next
        self.is_closed = False

    def taken(self, count):
        return [self.free.popleft() for _ in range(count)]

    def freed(self, lease):
        """A lease less holds its blocks: those that no other holds are free."""
        held = {block for other in self.leases + self.behind_fence for block in other.ids}
        self.free += [block for block in lease.ids if block not in held]

    @rule(count=st.integers(0, SIZE))
    def take(self, count):
        if count > len(self.free):
            message = f"{count} blocks asked for, {len(self.free)} of {SIZE} are free"
            with pytest.raises(ValueError, match=message):
                self.pool.take(count)
        else:
            lease = self.pool.take(count)
            assert lease.ids == self.taken(count)
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), count=st.integers(0, SIZE))
    def extend(self, data, count):
        lease = data.draw(st.sampled_from(self.leases))
        before = list(lease.ids)
        if count > len(self.free):
            with pytest.raises(ValueError, match="blocks asked for"):
                lease.extend(count)
            assert lease.ids == before
        else:
            more = self.taken(count)
            assert lease.extend(count) == more
            assert lease.ids == before + more

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def share(self, data):
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.append(lease.share())
        assert self.leases[-1].ids == lease.ids

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data):
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.give_back()
        if self.is_closed:
            self.behind_fence.append(lease)
        else:
            self.freed(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back_twice(self, data):
        index = data.draw(st.integers(0, len(self.leases) - 1))
        lease = self.leases[index]
        lease.give_back()
        with pytest.raises(ValueError, match="have been given back already"):
            lease.give_back()
        self.leases.pop(index)
        if self.is_closed:
            self.behind_fence.append(lease)
        else:
            self.freed(lease)

    @rule()
    def close(self):
        self.fence.close()
        self.is_closed = True

    @rule()
    def open(self):
        self.fence.open()
        self.is_closed = False
        while self.behind_fence:
            self.freed(self.behind_fence.pop(0))

    @invariant()
    def every_block_is_somewhere(self):
        leases = self.leases + self.behind_fence
        held = {block for lease in leases for block in lease.ids}
        assert held <= set(range(SIZE))
        assert self.pool.num_free == len(self.free) == SIZE - len(held)
        check_pool(self.pool, leases)


TestPool = PoolMachine.TestCase


def test_what_is_given_back_twice_frees_nothing():
    pool = BlockPool(4)
    first, second = pool.take(2), pool.take(1)
    first.give_back()
    with pytest.raises(ValueError, match=r"blocks \[0, 1\] have been given back already"):
        first.give_back()
    assert pool.num_free == 3
    taken = pool.take(3)
    assert taken.ids == [3, 0, 1]
    with pytest.raises(ValueError, match="have been given back already"):
        first.give_back()  # nor what somebody else has by now
    check_pool(pool, [second, taken])


@pytest.mark.parametrize("case", ["one too few", "one too many", "nobody's", "another's"])
def test_the_check_finds_books_that_do_not_add_up(case):
    pool, other = BlockPool(6), BlockPool(6)
    leases = [pool.take(2), pool.take(3)]
    check_pool(pool, leases)
    if case == "one too few":
        leases.pop()
    elif case == "one too many":
        leases.append(leases[0])
    elif case == "nobody's":
        leases[0].ids.pop()
    else:
        other.take(3)
        leases[1] = other.take(3)
    with pytest.raises(AssertionError, match="held"):
        check_pool(pool, leases)


def test_a_pool_has_blocks():
    with pytest.raises(UserError, match="num_blocks 0 is not positive"):
        BlockPool(0)


def test_blocks_that_are_shared_are_free_when_all_have_given_them_back():
    pool = BlockPool(5)
    first = pool.take(3)
    second = first.share()
    first.extend(1)
    first.give_back()
    assert pool.num_free == 2  # the one that only the first had
    third = second.share()
    second.give_back()
    assert pool.num_free == 2
    third.give_back()
    assert pool.num_free == 5


def test_behind_a_closed_fence_nothing_gets_another_owner():
    fence = Fence()
    blocks, places = BlockPool(4, fence), BlockPool(2, fence)
    held = [blocks.take(3), places.take(1)]
    fence.close()
    for lease in held:
        lease.give_back()
    assert (blocks.num_free, places.num_free) == (1, 1)
    assert blocks.take(1).ids == [3]  # what was free stays free
    with pytest.raises(ValueError, match="1 blocks asked for, 0 of 4 are free"):
        blocks.take(1)
    fence.open()
    assert (blocks.num_free, places.num_free) == (3, 2)
    blocks.take(2).give_back()
    assert blocks.num_free == 3


class Watched(list):
    """A list whose items are looked up one by one, and counted."""

    num_lookups = 0

    def __getitem__(self, index):
        self.num_lookups += 1
        return super().__getitem__(index)

    def __iter__(self):
        raise AssertionError("somebody goes through all of the pool")

    __contains__ = __reversed__ = index = count = sort = copy = __iter__


class WatchedDeque(collections.deque):
    """A deque that is used at its ends alone."""

    def __iter__(self):
        raise AssertionError("somebody goes through all that is free")

    __contains__ = __getitem__ = __reversed__ = index = count = remove = copy = __iter__


@pytest.mark.parametrize("num_blocks", [100, 10_000])
def test_freeing_does_not_go_through_the_pool(num_blocks):
    """What is looked at follows what is freed: a pool of a hundred times the blocks makes no difference."""
    pool = BlockPool(num_blocks)
    watched, pool._free = Watched(pool._num_holders), WatchedDeque(pool._free)
    pool._num_holders = watched
    lease = pool.take(7)
    lease.extend(3)
    shared = lease.share()
    lease.give_back()
    shared.give_back()
    assert pool.num_free == num_blocks
    assert watched.num_lookups <= 10 * 5


@given(length=st.integers(1, 200), block_size=st.sampled_from([1, 7, 16]), seed=st.integers(0, 2**32 - 1))
def test_slot_mapping(length, block_size, seed):
    """Slots follow the blocks in order, no two positions share one, and all lie in the blocks."""
    blocks = np.random.default_rng(seed).permutation(300)[: blocks_for(length, block_size)].tolist()
    slots = slot_mapping(blocks, np.arange(length), block_size)
    assert slots.dtype == np.int32
    assert len(blocks) * block_size - block_size < length <= len(blocks) * block_size
    expected = [block * block_size + offset for block in blocks for offset in range(block_size)][:length]
    np.testing.assert_array_equal(slots, expected)
    some = np.random.default_rng(seed).integers(0, length, 5)
    np.testing.assert_array_equal(slot_mapping(blocks, some, block_size), slots[some])


def test_the_example_of_slot_mapping():
    assert slot_mapping([7, 2], np.array([5]), 4).tolist() == [9]


@given(rows=st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6), data=st.data())
def test_ragged_rows(rows, data):
    """Rows come back as they went in, whatever their lengths, and are written each into its own row of a table."""
    ragged = Ragged.of(rows)
    assert ragged.values.dtype == ragged.lengths.dtype == np.int32
    assert [row.tolist() for row in ragged] == rows
    assert [row.tolist() for row in pickle.loads(pickle.dumps(ragged))] == rows
    first = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    where = data.draw(st.permutations(range(8)))[: len(rows)]
    for begins in (first, [2] * len(rows)):
        table, expected = np.full((8, 9), -1), np.full((8, 9), -1)
        ragged.write_into(table, np.array(where, np.int32), np.array(begins, np.int32) if begins is first else 2)
        for row, target, begin in zip(rows, where, begins, strict=True):
            expected[target, begin : begin + len(row)] = row
        np.testing.assert_array_equal(table, expected)


def test_ragged_rows_of_floats():
    assert [row.tolist() for row in Ragged.of([[0.5], [], [1.5, 2.5]], np.float32)] == [[0.5], [], [1.5, 2.5]]
