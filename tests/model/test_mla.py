"""Latent attention, expanded and absorbed, over a scattered cache full of NaN, against the slow form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.model import init_params, reference
from cmjax.model.cache import PagedKeys, read_blocks, slots_of, write_rows
from cmjax.model.mla import (
    LocalSequences,
    absorbed_end,
    absorbed_part,
    absorbed_start,
    expanded_end,
    expanded_part,
    expanded_start,
    mla_prolog,
)
from tests.helpers import assert_close, tiny_config

LAYERS, LAYER = 2, 1
CONFIG = tiny_config(first_k_dense_replace=9)
ATTN = jax.tree.map(lambda a: a[LAYER], init_params(CONFIG, seed=5).dense.attn)
STACK = jax.tree.map(lambda a: a[None], ATTN)


class Packed:
    """Sequences `[length, hidden]` side by side, their latents in blocks of a NaN cache that are shuffled."""

    def __init__(self, rng, lengths, block_size, fill=np.nan):
        self.lengths, self.block_size = lengths, block_size
        self.ends = np.cumsum(lengths)
        self.x = rng.normal(size=(self.ends[-1], CONFIG.hidden_size)).astype(np.float32)
        self.positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
        needed = [-(-n // block_size) for n in lengths]
        width = max(needed) + 1
        # Block 0 is what an unused entry of a table would read: it belongs to nobody, and holds NaN.
        blocks = 1 + rng.permutation(sum(needed) + 3)
        self.table = np.full((len(lengths), width), -1, np.int32)
        for row, count in enumerate(needed):
            self.table[row, :count] = blocks[sum(needed[:row]) :][:count]
        seq = np.repeat(np.arange(len(lengths)), lengths)
        self.slots = self.table[seq, self.positions // block_size] * block_size + self.positions % block_size
        self.q_nope, self.q_pe, latent = jax.jit(mla_prolog, static_argnums=1)(ATTN, CONFIG, self.x, self.positions)
        empty = np.full((LAYERS, (len(blocks) + 1) * block_size, CONFIG.latent_width), fill, np.float32)
        self.cache = jax.jit(write_rows)(empty, LAYER, self.slots, latent)

    def expected(self):
        """Attention output before `o`, `[tokens, heads * v]`, in float64: `o` is undone by making it the identity."""
        width = CONFIG.num_attention_heads * CONFIG.v_head_dim
        plain = STACK.replace(o=np.eye(width)[None])
        starts = self.ends - self.lengths
        parts = [
            reference.attention(CONFIG, plain, 0, self.x[None, a:b].astype(np.float64))[0]
            for a, b in zip(starts, self.ends, strict=True)
        ]
        return np.concatenate(parts)


def attend_expanded(attn, q_nope, q_pe, keys, sequences):
    core = expanded_start(CONFIG, q_nope, q_pe)
    return expanded_end(expanded_part(attn, CONFIG, core, keys, sequences))


@functools.partial(jax.jit, static_argnames="block_size")
def run_expanded(q_nope, q_pe, cache, sequences, table, *, block_size):
    return attend_expanded(
        ATTN, q_nope, q_pe, PagedKeys(cache, LAYER, table, block_size, CONFIG.latent_width), sequences
    )


@functools.partial(jax.jit, static_argnames="block_size")
def run_absorbed(q_nope, q_pe, cache, lengths, table, *, block_size):
    core = absorbed_start(ATTN, CONFIG, q_nope, q_pe, len(table))
    core = absorbed_part(CONFIG, core, PagedKeys(cache, LAYER, table, block_size, CONFIG.latent_width), lengths)
    return absorbed_end(ATTN, CONFIG, core)


def whole(lengths):
    return LocalSequences(*(np.asarray(a, np.int32) for a in (np.cumsum(lengths) - lengths, lengths, 0 * lengths)))


# Short ones beside ones longer than a query tile and several key chunks, and of just their size.
LENGTHS = {7: [3, 1, 12, 7], 16: [128, 5, 700, 16, 129, 384], 1: [2, 9]}


@pytest.mark.parametrize("block_size", LENGTHS)
def test_expanded(rng, block_size):
    lengths = np.array(LENGTHS[block_size])
    packed = Packed(rng, lengths, block_size)
    out = run_expanded(packed.q_nope, packed.q_pe, packed.cache, whole(lengths), packed.table, block_size=block_size)
    assert_close(out, packed.expected(), scale=5)


@pytest.mark.parametrize("block_size", LENGTHS)
def test_absorbed(rng, block_size):
    """The last token of each sequence, one of them longer than a key chunk; an empty place yields zeros."""
    lengths = np.array(LENGTHS[block_size])
    packed = Packed(rng, lengths, block_size)
    last = packed.ends - 1
    table = np.concatenate([packed.table, np.full_like(packed.table[:1], -1)])
    q_nope, q_pe = (np.concatenate([q[last], q[:1]]) for q in (packed.q_nope, packed.q_pe))
    out = run_absorbed(q_nope, q_pe, packed.cache, np.append(lengths, 0).astype(np.int32), table, block_size=block_size)
    assert_close(out[:-1], packed.expected()[last], scale=5)
    np.testing.assert_array_equal(out[-1], 0)


def test_expanded_on_a_segment_of_the_tokens(rng):
    """A rank holds tokens 100 to 179 of the pack: the end of one sequence, all of another, the start of a third."""
    lengths = np.array([130, 20, 60])
    packed = Packed(rng, lengths, 16)
    sequences = LocalSequences(*(np.array(a, np.int32) for a in ([0, 30, 50], [30, 20, 30], [100, 0, 0])))
    segment = slice(100, 180)
    out = run_expanded(
        packed.q_nope[segment], packed.q_pe[segment], packed.cache, sequences, packed.table, block_size=16
    )
    assert_close(out, packed.expected()[segment], scale=5)


@pytest.mark.parametrize("block_size", LENGTHS)
@pytest.mark.parametrize("count", [2, 3])
def test_parts_in_a_row_are_the_whole(rng, block_size, count):
    """Bit for bit, also where there are fewer chunks of keys than parts."""
    lengths = np.array(LENGTHS[block_size])
    packed = Packed(rng, lengths, block_size)
    sequences, last, seen = whole(lengths), packed.ends - 1, lengths.astype(np.int32)
    q_nope, q_pe, cache, table = packed.q_nope, packed.q_pe, packed.cache, packed.table

    @jax.jit
    def in_parts(q_nope, q_pe, cache, sequences, seen, table):
        core = expanded_start(CONFIG, q_nope, q_pe)
        one = absorbed_start(ATTN, CONFIG, q_nope[last], q_pe[last], len(lengths))
        for index in range(count):
            keys, part = PagedKeys(cache, LAYER, table, block_size, CONFIG.latent_width), (index, count)
            core = expanded_part(ATTN, CONFIG, core, keys, sequences, part)
            one = absorbed_part(CONFIG, one, keys, seen, part)
        return expanded_end(core), absorbed_end(ATTN, CONFIG, one)

    expanded, absorbed = in_parts(q_nope, q_pe, cache, sequences, seen, table)
    wanted = run_expanded(q_nope, q_pe, cache, sequences, table, block_size=block_size)
    np.testing.assert_array_equal(expanded, wanted)
    wanted = run_absorbed(q_nope[last], q_pe[last], cache, seen, table, block_size=block_size)
    np.testing.assert_array_equal(absorbed, wanted)


def test_expanded_without_any_query(rng):
    packed = Packed(rng, np.array([5, 3]), 16)
    nobody = LocalSequences(*(np.zeros(2, np.int32) for _ in range(3)))
    out = run_expanded(packed.q_nope, packed.q_pe, packed.cache, nobody, packed.table, block_size=16)
    np.testing.assert_array_equal(out, 0)


def test_a_sequence_does_not_see_its_neighbors(rng):
    """Bit for bit the same output alone as beside others, in any place of the batch."""
    lengths = np.array([500, 33, 7])
    packed = Packed(rng, lengths, 16)
    together = run_expanded(packed.q_nope, packed.q_pe, packed.cache, whole(lengths), packed.table, block_size=16)
    alone = LocalSequences(*(np.array(a, np.int32) for a in ([0, 500, 0], [0, 33, 0], [0, 0, 0])))
    out = run_expanded(packed.q_nope, packed.q_pe, packed.cache, alone, packed.table, block_size=16)
    np.testing.assert_array_equal(out[500:533], together[500:533])

    last, swap = packed.ends - 1, np.array([2, 0, 1])
    one = run_absorbed(
        packed.q_nope[last], packed.q_pe[last], packed.cache, lengths.astype(np.int32), packed.table, block_size=16
    )
    other = run_absorbed(
        packed.q_nope[last[swap]],
        packed.q_pe[last[swap]],
        packed.cache,
        np.where(swap == 1, 33, 0).astype(np.int32),
        packed.table[swap],
        block_size=16,
    )
    np.testing.assert_array_equal(other[2], one[1])


def test_cache_rows(rng):
    """Writes touch the named slots of one layer, -1 touches none, and blocks read back in table order."""
    cache = np.zeros((3, 12, 2), np.float32)
    rows = rng.normal(size=(4, 2)).astype(np.float32)
    slots = np.array([5, -1, 11, 0], np.int32)
    written = jax.jit(write_rows)(cache, 1, slots, rows)
    cache[1, [5, 11, 0]] = rows[[0, 2, 3]]
    np.testing.assert_array_equal(written, cache)
    table = np.array([[2, 0, -1], [1, 2, 0]], np.int32)
    read = read_blocks(written, 1, table, 0, 2, 4)
    np.testing.assert_array_equal(read[0], np.concatenate([cache[1, 8:12], cache[1, 0:4]]))
    np.testing.assert_array_equal(read[1], np.concatenate([cache[1, 4:8], cache[1, 8:12]]))
    np.testing.assert_array_equal(read_blocks(written, 1, table, 1, 1, 4)[1], cache[1, 8:12])


def test_slots_of():
    table = np.array([[7, 2, -1], [3, -1, -1], [1, 0, 4]], np.int32)
    np.testing.assert_array_equal(slots_of(table, np.array([5, 4, 11]), 4), [9, -1, 19])
    np.testing.assert_array_equal(slots_of(table, np.array([12, 0, 3]), 4), [-1, 12, 7])


def test_bfloat16(rng):
    """Products are exact and sums in float32: close to the float32 result from the same rounded values."""
    lengths = np.array([40, 33])
    packed = Packed(rng, lengths, 16)
    q_nope, q_pe, cache = [jnp.asarray(a, jnp.bfloat16) for a in (packed.q_nope, packed.q_pe, packed.cache)]
    attn = ATTN.replace(kv_b=jnp.asarray(ATTN.kv_b, jnp.bfloat16))
    keys = PagedKeys(cache, LAYER, packed.table, 16, CONFIG.latent_width)
    out = jax.jit(functools.partial(attend_expanded, attn))(q_nope, q_pe, keys, whole(lengths))
    assert out.dtype == jnp.bfloat16
    assert_close(out, packed.expected(), scale=3)
