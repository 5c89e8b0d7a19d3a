"""The ragged exchange: any sizes against numpy, both fallback forms, memory, and wrong sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from cmjax.mesh import fabric

ROWS_IN, ROWS_OUT, WIDTH, UPDATES = 40, 48, 3, 2


def pack(sizes, slack_in=0, slack_out=0):
    """Offsets that lay `sizes[source, target, update]` out one after another, `slack` unused rows before each."""
    input_offsets, output_offsets = np.zeros_like(sizes), np.zeros_like(sizes)
    for s in range(len(sizes)):
        flat = sizes[s].reshape(-1) + slack_in
        input_offsets[s] = (np.cumsum(flat) - flat + slack_in).reshape(sizes[s].shape)
    for d in range(len(sizes)):
        flat = sizes[:, d].reshape(-1) + slack_out
        output_offsets[:, d] = (np.cumsum(flat) - flat + slack_out).reshape(sizes[:, d].shape)
    return input_offsets, sizes, output_offsets, sizes.transpose(1, 0, 2)


def reference(operand, output, input_offsets, sizes, output_offsets):
    expected = output.copy()
    for s, d, j in np.ndindex(sizes.shape):
        rows = operand[s, input_offsets[s, d, j] :][: sizes[s, d, j]]
        expected[d, output_offsets[s, d, j] :][: sizes[s, d, j]] = rows
    return expected


def whole(operand, output, *index):
    return fabric.ragged_all_to_all(operand, output, *index, axis_name="ep")


def in_halves(operand, output, *index):
    token = fabric.ragged_all_to_all_start(operand, *index, axis_name="ep")
    return fabric.ragged_all_to_all_done(operand, output, token, hide_behind={"work": output.sum(), "none": None})


def compile_ragged(mesh, fn=whole):
    specs = P(mesh.axis_names)
    step = lambda *args: fn(*(a[0] for a in args))[None]  # noqa: E731
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs))


def flat_index(index):
    return [np.ascontiguousarray(a.reshape(len(a), -1), np.int32) for a in index]


@pytest.fixture(scope="module")
def eight(make_mesh):
    return {fn: compile_ragged(make_mesh(8), fn) for fn in (whole, in_halves)}


sizes_of_eight = st.lists(st.integers(0, 3), min_size=8 * 8 * UPDATES, max_size=8 * 8 * UPDATES)


@given(sizes=sizes_of_eight, slack_in=st.integers(0, 1), slack_out=st.integers(0, 1))
def test_any_sizes(eight, sizes, slack_in, slack_out):
    sizes = np.array(sizes).reshape(8, 8, UPDATES)
    # Cut down to what fits: later updates of a full sender or receiver become empty.
    fits = (sizes + slack_in).reshape(8, -1).cumsum(1).reshape(sizes.shape) + slack_in <= ROWS_IN
    sizes = np.where(fits, sizes, 0)
    for d in range(8):
        column = sizes[:, d]
        column[(column + slack_out).reshape(-1).cumsum().reshape(column.shape) + slack_out > ROWS_OUT] = 0
    index = pack(sizes, slack_in, slack_out)
    # Offsets of empty updates may lie anywhere.
    operand = np.arange(8 * ROWS_IN * WIDTH, dtype=np.float32).reshape(8, ROWS_IN, WIDTH)
    output = -1 - np.arange(8 * ROWS_OUT * WIDTH, dtype=np.float32).reshape(8, ROWS_OUT, WIDTH)
    expected = reference(operand, output, *index[:3])
    for compiled in eight.values():
        np.testing.assert_array_equal(compiled(operand, output, *flat_index(index)), expected)


def skewed_case(rng, num_ranks, dtype=np.int8):
    """Most ranks send little; everybody sends a lot to rank 3; rank 5 takes part with nothing."""
    sizes = rng.integers(0, 2, (num_ranks, num_ranks, UPDATES)) * rng.integers(0, 3, (num_ranks, num_ranks, UPDATES))
    sizes[:, 3] += 2
    sizes[5], sizes[:, 5] = 0, 0
    index = pack(sizes)
    operand = rng.integers(-100, 100, (num_ranks, sizes.sum((1, 2)).max() + 1, WIDTH)).astype(dtype)
    output = rng.integers(-100, 100, (num_ranks, sizes.sum((0, 2)).max() + 2, WIDTH)).astype(dtype)
    return operand, output, index


@pytest.mark.smoke
@pytest.mark.parametrize("num_ranks", [64, 320, 384])
@pytest.mark.parametrize("fn", [whole, in_halves])
def test_wide_and_skewed(rng, make_mesh, num_ranks, fn):
    operand, output, index = skewed_case(rng, num_ranks)
    actual = compile_ragged(make_mesh(num_ranks), fn)(operand, output, *flat_index(index))
    np.testing.assert_array_equal(actual, reference(operand, output, *index[:3]))


def test_one_axis_of_two_and_other_dtypes(rng, make_mesh):
    mesh = make_mesh(3, 8, axes=("dp", "ep"))
    for dtype in (np.uint8, jnp.bfloat16, np.float32, np.int32):
        cases = [skewed_case(np.random.default_rng(3), 8, dtype) for _ in range(3)]
        joined = [np.concatenate([case[i] for case in cases]) for i in (0, 1)]
        joined[0] = (joined[0] + np.arange(24).reshape(-1, 1, 1)).astype(dtype)
        index = [np.concatenate([flat_index(case[2])[i] for case in cases]) for i in range(4)]
        expected = [
            reference(joined[0][8 * g : 8 * g + 8], joined[1][8 * g : 8 * g + 8], *cases[g][2][:3]) for g in range(3)
        ]
        actual = compile_ragged(mesh)(*joined, *index)
        np.testing.assert_array_equal(actual, np.concatenate(expected))


@pytest.mark.parametrize("num_ranks", [8, 64])
def test_padded_form_on_lax_collectives(rng, make_mesh, num_ranks):
    operand, output, index = skewed_case(rng, num_ranks)
    expected = reference(operand, output, *index[:3])
    fabric.configure(collectives="lax", ragged="padded")
    try:
        assert fabric.status()["ragged_all_to_all"].form == "lax padded"
        assert fabric.status()["all_to_all"].form == "lax"
        fabric.traffic.reset()
        for fn in (whole, in_halves):
            actual = compile_ragged(make_mesh(num_ranks), fn)(operand, output, *flat_index(index))
            np.testing.assert_array_equal(actual, expected)
        assert fabric.traffic.snapshot().calls() == 0  # lax collectives are not counted
        text = compile_ragged(make_mesh(num_ranks)).lower(operand, output, *flat_index(index)).as_text()
        assert "stablehlo.all_to_all" in text
        assert "cmjax_fabric" not in text
    finally:
        fabric.configure(collectives="auto", ragged="auto")
    assert fabric.status()["ragged_all_to_all"].form == "fabric"


def test_other_collectives_on_lax(rng, make_mesh):
    x = rng.integers(-100, 100, (8, 8, 4)).astype(np.int32)

    def step(module, halves=False):
        def fn(x):
            perm = [(i, (i + 3) % 8) for i in range(6)]
            calls = [
                ("all_to_all", (0, 1)),
                ("all_gather", ()),
                ("psum", ()),
                ("psum_scatter", ()),
                ("ppermute", (perm,)),
            ]
            if not halves:
                return [getattr(module, name)(x, "ep", *args) for name, args in calls]
            tokens = [getattr(module, f"{name}_start")(x, "ep", *args) for name, args in calls]
            return [
                getattr(module, f"{name}_done")(x, token, hide_behind=x.sum())
                for (name, _), token in zip(calls, tokens, strict=True)
            ]

        mapped = lambda x: [y[None] for y in fn(x[0])]  # noqa: E731
        return jax.jit(jax.shard_map(mapped, mesh=make_mesh(8), in_specs=P("ep"), out_specs=P("ep")))

    expected = step(lax)(x)
    fabric.configure(collectives="lax")
    try:
        for halves in (False, True):
            jax.tree.map(np.testing.assert_array_equal, step(fabric, halves)(x), expected)
        wide = jax.shard_map(lambda x: fabric.psum(x, "ep"), mesh=make_mesh(320), in_specs=P("ep"), out_specs=P())
        with pytest.raises(fabric.FabricError, match=r"320 devices need the C\+\+ fabric .*stop at 256"):
            jax.jit(wide)(np.zeros(320))
    finally:
        fabric.configure(collectives="auto")


def test_output_is_aliased_and_never_cleared(make_mesh):
    """A gigabyte of output in which three rows exist: nothing of that size is copied, filled or converted."""
    rows = 2**28

    def step(x, *index):
        output = fabric.empty((rows, 4), jnp.int8)
        received = fabric.ragged_all_to_all(x[0], output, *(i[0] for i in index), axis_name="ep")
        token = fabric.ragged_all_to_all_start(received[:8], *(i[0] for i in index), axis_name="ep")
        again = fabric.ragged_all_to_all_done(received[:8], fabric.empty((rows, 4), jnp.int8), token)
        return again[None, :8]

    mesh = make_mesh(4)
    sizes = np.full((4, 4, 1), 1)
    index = flat_index(pack(sizes))
    x = np.arange(4 * 8 * 4, dtype=np.int8).reshape(4, 8, 4)
    compiled = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))).lower(x, *index).compile()
    results = [line.split(" = ")[1] for line in compiled.as_text().splitlines() if " = " in line]
    opcodes = [result.split("} ")[1].split("(")[0] for result in results if result.startswith(f"s8[{rows},4]")]
    assert sorted(set(opcodes)) == ["custom-call", "parameter"]  # parameter: of the fused slice
    assert opcodes.count("custom-call") == 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2.1 * rows * 4
    twice = x.reshape(4, 8, 4)[:, :4].transpose(1, 0, 2)
    np.testing.assert_array_equal(np.asarray(compiled(x, *index))[:, :4], twice.transpose(1, 0, 2))


def test_a_modelled_delay_is_of_the_busiest_rank(rng, make_mesh):
    """What a rank keeps does not travel, and of what it sends and what it receives the greater counts."""
    operand, output, index = skewed_case(rng, 8)
    sizes = index[1] * (1 - np.eye(8, dtype=int))[:, :, None]
    busiest = max(*sizes.sum((1, 2)), *sizes.sum((0, 2)))
    compiled = compile_ragged(make_mesh(8))
    fabric.configure(delay=fabric.DelayModel({"ub": 0.0}, {"ub": 1e5}))
    try:
        fabric.traffic.reset()
        jax.block_until_ready(compiled(operand, output, *flat_index(index)))
        (entry,) = fabric.traffic.snapshot().entries
        assert entry.modelled_s == pytest.approx(busiest * WIDTH / 1e5, rel=1e-6)
    finally:
        fabric.configure(delay=None)


def mistake(array, value, sender=2, receiver=6, update=1):
    """One wrong number in a healthy exchange of eight ranks in which everybody sends one row."""
    index = [a.copy() for a in pack(np.ones((8, 8, UPDATES), int))]
    rank, peer = (receiver, sender) if array == 3 else (sender, receiver)
    index[array][rank, peer, update] = value
    return flat_index(index)


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        (0, ROWS_IN, "rows outside the sender's operand"),
        (0, -1, "rows outside the sender's operand"),
        (1, 2, "send_sizes and recv_sizes disagree"),
        (1, -1, "send_sizes and recv_sizes disagree"),
        (2, ROWS_OUT, "rows outside the receiver's output"),
        (2, -3, "rows outside the receiver's output"),
        (2, 2**31 - 1, "rows outside the receiver's output"),
        (3, 5, "send_sizes and recv_sizes disagree"),
    ],
)
def test_wrong_numbers_fail_every_rank(eight, array, value, message):
    operand, output = np.zeros((8, ROWS_IN, WIDTH), np.float32), np.zeros((8, ROWS_OUT, WIDTH), np.float32)
    for compiled in eight.values():
        result = compiled(operand, output, *mistake(array, value))
        for shard in result.addressable_shards:
            with pytest.raises(jax.errors.JaxRuntimeError, match=f"{message}: rank 2 sends rank 6 .update 1"):
                np.asarray(shard.data)


@pytest.mark.parametrize("fn", [whole, in_halves])
@pytest.mark.parametrize(("odd_updates", "odd_type"), [(1, "int32"), (UPDATES, "int64"), (1, "int64")])
def test_ranks_that_disagree_on_the_index_arrays(make_mesh, fn, odd_updates, odd_type):
    """Rank 3 has fewer updates for each peer than the others, wider offsets, or both: nobody reads its arrays."""

    def mixed(operand, output, *index):
        # The branches name one channel, so that they are one exchange.
        def some(num_updates, dtype):
            def exchange(operand, output, *index):
                index = [a.reshape(8, UPDATES)[:, :num_updates].reshape(-1).astype(dtype) for a in index]
                if fn is whole:
                    return fabric.ragged_all_to_all(operand, output, *index, axis_name="ep", channel="mixed")
                token = fabric.ragged_all_to_all_start(operand, *index, axis_name="ep", channel="mixed")
                return fabric.ragged_all_to_all_done(operand, output, token)

            return exchange

        odd = lax.axis_index("ep") == 3
        return lax.cond(odd, some(odd_updates, odd_type), some(UPDATES, "int32"), operand, output, *index)

    with jax.enable_x64(True):
        operand, output = np.zeros((8, ROWS_IN, WIDTH), np.float32), np.zeros((8, ROWS_OUT, WIDTH), np.float32)
        index = flat_index(pack(np.ones((8, 8, UPDATES), int)))
        result = compile_ragged(make_mesh(8), mixed)(operand, output, *index)
    usual = rf"rank [^3] brought .*, {UPDATES} updates a peer in int32, "
    odd = rf"rank 3 brought .*, {odd_updates} updates? a peer in {odd_type}, "
    for shard in result.addressable_shards:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"ranks disagree: ({usual}.*{odd}|{odd}.*{usual})"):
            np.asarray(shard.data)


def test_misuse_is_one_clear_error(make_mesh):
    mesh = make_mesh(8)
    good = np.zeros((8, 8), np.int32)

    def attempt(operand, output, *index):
        compile_ragged(mesh)(operand, output, *index)

    with pytest.raises(ValueError, match="may differ in rows only"):
        attempt(np.zeros((8, 4, 3), np.float32), np.zeros((8, 4, 3), np.int32), good, good, good, good)
    with pytest.raises(ValueError, match="a multiple of the 8 ranks"):
        attempt(np.zeros((8, 4)), np.zeros((8, 4)), *[np.zeros((8, 9), np.int32)] * 4)
    with pytest.raises(TypeError, match="must be integers"):
        attempt(np.zeros((8, 4)), np.zeros((8, 4)), good, good, good, good.astype(np.float32))
