"""Expanded attention as a kernel: against its XLA form, and bit for bit against itself, cut in whatever way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax import kernels
from cmjax.model.cache import PagedKeys
from cmjax.model.mla import CoreAttention, LocalSequences, Softmax, expanded_part
from cmjax.model.params import AttentionParams
from cmjax.quant import LayerMatrix
from tests.forms import skip_without_kernels
from tests.helpers import assert_close, tiny_config

skip_without_kernels()

DTYPES = [np.dtype(jnp.float32), np.dtype(jnp.bfloat16)]
EXAMPLES = 6  # of each program, which takes longer to compile


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a program is compiled for; blocks are those of a sequence at most."""

    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    tokens: int
    sequences: int
    blocks: int
    block_size: int

    @property
    def config(self):
        return tiny_config(
            num_attention_heads=self.heads,
            kv_lora_rank=self.latent,
            qk_nope_head_dim=self.nope,
            qk_rope_head_dim=self.rope,
            v_head_dim=self.value,
        )


# Odd widths and whole vectors of them, blocks of less than a chunk of keys and of more, several chunks of them.
SIZES = [
    Sizes(2, 5, 4, 7, 13, 40, 4, 30, 3),
    Sizes(3, 34, 6, 64, 32, 260, 3, 25, 16),
    Sizes(1, 32, 16, 30, 50, 150, 2, 3, 150),
]
LAYERS, LAYER, CACHE_LAYERS, CACHE_LAYER = 3, 2, 2, 1


@st.composite
def spans(draw, sizes):
    """Sequences side by side: `(start, count, first_position)`, some of them empty."""
    counts, rest = [], sizes.tokens
    for _ in range(sizes.sequences):
        counts.append(draw(st.integers(0, rest)))
        rest -= counts[-1]
    counts = np.array(counts, np.int32)
    firsts = [draw(st.integers(0, max(0, sizes.blocks * sizes.block_size - count))) for count in counts.tolist()]
    return np.cumsum(counts, dtype=np.int32) - counts, counts, np.array(firsts, np.int32)


def arrays(sizes, dtype, seed):
    """A step's arrays: the query, kv_b, the cache and the block table, in which some entries are none."""
    rng = np.random.default_rng(seed)
    rows, slots = sizes.tokens + min(128, sizes.tokens), (sizes.sequences * sizes.blocks + 1) * sizes.block_size

    def floats(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    query = floats(sizes.heads, rows, sizes.nope + sizes.rope)
    kv_b = floats(LAYERS, sizes.heads, sizes.nope + sizes.value, sizes.latent) * dtype.type(sizes.latent**-0.5)
    table = 1 + rng.permutation(sizes.sequences * sizes.blocks).astype(np.int32).reshape(sizes.sequences, -1)
    table[rng.random(table.shape) < 0.1] = -1
    return query, kv_b, floats(CACHE_LAYERS, slots, sizes.latent + sizes.rope), table


def attend(sizes, parts, query, kv_b, cache, table, start, count, first_position):
    """`(peak, total, mixed)` after all parts in a row."""
    params = AttentionParams(
        **{field.name: None for field in dataclasses.fields(AttentionParams)}
        | {"kv_b": LayerMatrix(kv_b, jnp.int32(LAYER))}
    )
    core = CoreAttention(query, Softmax.start(query.shape[:2], sizes.value), sizes.tokens)
    keys = PagedKeys(cache, CACHE_LAYER, table, sizes.block_size, sizes.latent + sizes.rope)
    for index in range(parts):
        sequences = LocalSequences(start, count, first_position)
        core = expanded_part(params, sizes.config, core, keys, sequences, (index, parts))
    return core.state.peak, core.state.total, core.state.mixed


def compiled(sizes, dtype, parts, mode):
    before = kernels.mode()
    kernels.configure(mode)
    try:
        nobody = [np.zeros(sizes.sequences, np.int32)] * 3
        lowered = jax.jit(functools.partial(attend, sizes, parts)).lower(*arrays(sizes, dtype, 0), *nobody)
        assert ("cmjax_kernels_attend_expanded" in lowered.as_text()) == (mode == "native")
        return lowered.compile()
    finally:
        kernels.configure(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_expanded_attention_is_that_of_xla(form, once, sizes, dtype):
    """Where a row has seen anything; rows of no sequence stay as they were. In float32 only the order of sums differs;
    in bfloat16 now and then the rounding of a key or a value, too."""
    by_kernel, by_xla = once(lambda: [compiled(sizes, dtype, 1, mode) for mode in ("native", "xla")])

    @settings(max_examples=EXAMPLES)
    @given(spans(sizes), st.integers(0, 99))
    def check(own, seed):
        operands = arrays(sizes, dtype, seed)
        peak, total, mixed = (np.asarray(one) for one in by_kernel(*operands, *own))
        wanted_peak, wanted_total, wanted_mixed = (np.asarray(one) for one in by_xla(*operands, *own))
        stop = own[1].sum()
        assert (total[:, :stop] > 0).all()
        assert not total[:, stop:].any()
        assert not mixed[:, stop:].any()
        assert np.isneginf(peak[:, stop:]).all()
        means, wanted = mixed[:, :stop] / total[:, :stop, None], wanted_mixed[:, :stop] / wanted_total[:, :stop, None]
        assert_close(means.astype(dtype), wanted, scale=3)
        assert_close(peak[:, :stop].astype(dtype), wanted_peak[:, :stop], scale=3)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_row_is_the_same_however_the_work_is_cut(form, once, sizes, dtype):
    """Bit for bit: in shares of the keys, its sequence alone, and its sequence's rows in two calls."""
    whole, shares = once(lambda: [compiled(sizes, dtype, parts, "native") for parts in (1, 3)])

    @settings(max_examples=EXAMPLES)
    @given(spans(sizes), st.integers(0, 99), st.data())
    def check(own, seed, data):
        query, *others = arrays(sizes, dtype, seed)
        wanted = [np.asarray(one) for one in whole(query, *others, *own)]
        for one, other in zip(shares(query, *others, *own), wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        start, count, first_position = own
        chosen = data.draw(st.integers(0, sizes.sequences - 1))
        begin, length = int(start[chosen]), int(count[chosen])
        cut = data.draw(st.integers(0, length))
        place = data.draw(st.integers(0, sizes.tokens - length))  # elsewhere among the rows
        moved = np.roll(query, place - begin, axis=1)
        only = np.arange(sizes.sequences) == chosen
        for first, stop in ((0, cut), (cut, length)):
            alone = [
                np.where(only, value, 0).astype(np.int32)
                for value in (place + first, stop - first, first_position + first)
            ]
            for one, other in zip(whole(moved, *others, *alone), wanted, strict=True):
                np.testing.assert_array_equal(
                    np.asarray(one)[:, place + first : place + stop], other[:, begin + first : begin + stop]
                )

    check()


ZERO = np.zeros((), np.int32)
GOOD = {
    "query": (2, 6, 5),
    "peak": (2, 6),
    "total": (2, 6),
    "mixed": (2, 6, 4),
    "kv_b": (1, 2, 7, 8),
    "layer": ZERO,
    "cache": (3, 12, 10),
    "cache_layer": ZERO,
    "table": np.zeros((1, 4), np.int32),
    "starts": np.zeros(1, np.int32),
    "counts": np.full(1, 6, np.int32),
    "first_positions": np.zeros(1, np.int32),
    "nope": 3,
    "block_size": 4,
    "part": 0,
    "num_parts": 1,
}


def call(**changes):
    """The handler itself, of zeros, given whatever a test makes up."""
    assert kernels.is_native()  # its library is loaded
    values = [np.zeros(one, np.float32) if isinstance(one, tuple) else one for one in (GOOD | changes).values()]
    operands = [one for one in values if not isinstance(one, int)]
    attributes = zip(("nope", "block_size", "part", "num_parts"), values[len(operands) :], strict=True)
    results = [jax.ShapeDtypeStruct(GOOD[name], np.float32) for name in ("peak", "total", "mixed")]
    aliases = {1: 0, 2: 1, 3: 2}
    handler = jax.ffi.ffi_call("cmjax_kernels_attend_expanded", results, input_output_aliases=aliases)
    typed = {name: np.int32(value) for name, value in attributes} | {"scale": np.float32(1), "is_parallel": False}
    return jax.block_until_ready(jax.jit(lambda *arrays: handler(*arrays, **typed))(*operands))


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_b": (1, 3, 7, 8)},  # other heads
        {"kv_b": (1, 2, 8, 8)},  # another width of values
        {"cache": (3, 12, 11)},
        {"cache": (3, 3, 10)},  # less than a block
        {"layer": ZERO + 1},
        {"cache_layer": ZERO - 1},
        {"cache_layer": ZERO + 3},
        {"nope": 6},
        {"block_size": 0},
        {"part": 1},
        {"starts": np.ones(1, np.int32)},  # beyond the rows
        {"starts": np.full(1, -1, np.int32)},
        {"counts": np.full(1, 7, np.int32)},
        {"first_positions": np.full(1, -1, np.int32)},
        {"starts": np.zeros(2, np.int32)},
    ],
    ids=str,
)
def test_the_handler_refuses_what_does_not_fit(changes):
    with pytest.raises(jax.errors.JaxRuntimeError, match="cmjax_kernels: "):
        call(**changes)


@pytest.mark.parametrize("block", [-1, 3, 2**31 - 1])
def test_blocks_that_are_none_are_read_within_the_cache(block):
    """Zeros everywhere: each of the keys a row sees weighs the same, wherever the table says that they are."""
    _, total, mixed = call(table=np.full((1, 1), block, np.int32))  # and fewer entries than the keys have blocks
    np.testing.assert_array_equal(total, np.tile(np.arange(6) + 1, (2, 1)))
    np.testing.assert_array_equal(mixed, 0)
