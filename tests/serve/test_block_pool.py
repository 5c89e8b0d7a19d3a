"""Block bookkeeping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cmjax.errors import UserError
from cmjax.serve import BlockPool
from cmjax.serve.block_pool import blocks_for, slot_mapping


class PoolMachine(RuleBasedStateMachine):
    """Takes and frees at random; every block is in exactly one place."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(13)
        self.held = []

    @rule(count=st.integers(0, 13))
    def take(self, count):
        if count > self.pool.num_free:
            with pytest.raises(ValueError, match=f"{count} blocks asked for, {self.pool.num_free} of 13 are free"):
                self.pool.take(count)
        elif taken := self.pool.take(count):
            assert len(taken) == count
            self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_twice(self, data):
        blocks = data.draw(st.sampled_from(self.held))
        self.held.remove(blocks)
        self.pool.free(blocks)
        with pytest.raises(ValueError, match="not all of them are allocated"):
            self.pool.free(blocks)

    @invariant()
    def every_block_is_somewhere(self):
        held = [block for blocks in self.held for block in blocks]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(13))
        assert self.pool.num_free == 13 - len(held)


TestPool = PoolMachine.TestCase


@pytest.mark.parametrize("blocks", [[13], [-1], [0, 0], [2]])
def test_what_is_not_allocated_cannot_be_freed(blocks):
    pool = BlockPool(13)
    pool.take(2)
    with pytest.raises(ValueError, match="cannot free"):
        pool.free(blocks)
    assert pool.num_free == 11


def test_a_failed_free_frees_nothing():
    pool = BlockPool(4)
    [first, second] = pool.take(2)
    with pytest.raises(ValueError, match="cannot free"):
        pool.free([first, 3])
    pool.free([second, first])
    assert pool.num_free == 4


def test_a_pool_has_blocks():
    with pytest.raises(UserError, match="num_blocks 0 is not positive"):
        BlockPool(0)


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
