"""Every collective against its lax namesake and numpy: values, types, meshes, halves."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from cmjax.mesh import fabric

MOVED = (np.int8, np.uint8, ml_dtypes.bfloat16, np.float32, np.int32)
OTHER = (np.bool_, np.int16, np.float16, ml_dtypes.float8_e4m3fn, np.uint32)


def values(rng, shape, dtype):
    """Random bytes, but for bool and for NaNs, whose payload a float operation may change."""
    if np.dtype(dtype) == np.bool_:
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.integers(-100, 100, shape).astype(dtype)


def equal(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(actual).view(np.uint8), np.asarray(expected).view(np.uint8))


def movements(module, x, axis, size):
    """Every data movement, in every form the arguments allow; x is [2, 2 * size, size, 3].

    Gathers multiply by the number of ranks, so they take a corner of it.
    """
    corner = x[:, :4, 0]
    return [
        module.all_to_all(x, axis, 2, 0),
        module.all_to_all(x, axis, 2, 3),
        module.all_to_all(x, axis, 1, 3, tiled=True),
        module.all_to_all(x, axis, 1, 1, tiled=True),
        module.all_to_all(x, axis, 2, 0, tiled=True),
        module.all_gather(corner, axis),
        module.all_gather(corner, axis, axis=2),
        module.all_gather(corner, axis, axis=-1, tiled=True),
        module.ppermute(corner, axis, [(i, (i + 3) % size) for i in range(size - 2)]),
    ]


def sums(module, x, axis):
    return [
        module.psum(x[:, 0], axis),
        module.psum({"a": x[0, 1], "b": (x[1, :, 0], x[1, 0, 0, 0])}, axis),
        module.psum_scatter(x, axis, scatter_dimension=2),
        module.psum_scatter(x, axis, scatter_dimension=1, tiled=True),
    ]


def halves(x, axis, size):
    """The same as `movements` and `sums`, started first and finished in the opposite order."""
    perm = [(i, (i + 3) % size) for i in range(size - 2)]
    tokens = [
        (fabric.all_to_all_done, fabric.all_to_all_start(x, axis, 2, 3)),
        (fabric.all_gather_done, fabric.all_gather_start(x, axis, axis=2)),
        (fabric.ppermute_done, fabric.ppermute_start(x, axis, perm)),
        (fabric.psum_scatter_done, fabric.psum_scatter_start(x, axis, scatter_dimension=2)),
        (fabric.psum_done, fabric.psum_start(x, axis)),
    ]
    work = jnp.cumsum(x.astype(jnp.float32))
    return [done(x, token, hide_behind=work) for done, token in tokens[::-1]][::-1]


def on_mesh(mesh, fn, *args, check_vma=False):
    specs = P(mesh.axis_names)
    mapped = jax.shard_map(
        lambda *a: jax.tree.map(lambda y: y[None], fn(*(v[0] for v in a))),
        mesh=mesh,
        in_specs=specs,
        out_specs=specs,
        check_vma=check_vma,
    )
    return jax.jit(mapped)(*args)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("shape", "axes", "axis"),
    [
        ((8,), ("ep",), "ep"),
        ((20,), ("ep",), "ep"),
        ((3, 8), ("dp", "ep"), "ep"),
        ((8, 3), ("ep", "tp"), "ep"),
        ((2, 3, 4), ("a", "b", "c"), ("a", "c")),
    ],
)
def test_equals_lax(rng, make_mesh, shape, axes, axis):
    mesh = make_mesh(*shape, axes=axes)
    names = (axis,) if isinstance(axis, str) else axis
    size = int(np.prod([mesh.shape[name] for name in names]))
    total = int(np.prod(shape))
    # Every dtype where the programs are smallest.
    dtypes = MOVED if size == 8 and len(shape) == 1 else MOVED[-2:]
    xs = [values(rng, (total, 2, 2 * size, size, 3), dtype) for dtype in dtypes]

    def run(module):
        def step(*xs):
            moved = [movements(module, x, axis, size) for x in xs]
            return moved, [sums(module, x, axis) for x in xs if x.dtype in (jnp.int32, jnp.uint8, jnp.int8)]

        return on_mesh(mesh, step, *xs)

    jax.tree.map(equal, run(fabric), run(lax))


@pytest.mark.parametrize(
    ("shape", "axes", "axis", "group_size"),
    [((12,), ("ep",), "ep", 4), ((12,), ("ep",), "ep", 1), ((2, 6), ("dp", "ep"), "ep", 3), ((6,), ("ep",), "ep", 6)],
)
def test_groups_of_an_axis_equal_lax(rng, make_mesh, shape, axes, axis, group_size):
    """Whole, in halves, and in lax's form, which other platforms use."""
    mesh = make_mesh(*shape, axes=axes)
    x = values(rng, (int(np.prod(shape)), 2, 2 * group_size, group_size, 3), np.int32)
    groups = np.arange(mesh.shape[axis]).reshape(-1, group_size).tolist()

    def whole(module, **how):
        return lambda x: [
            module.all_to_all(x, axis, 2, 0, **how),
            module.all_to_all(x, axis, 1, 3, tiled=True, **how),
            module.all_gather(x, axis, axis=1, **how),
            module.all_gather(x, axis, tiled=True, **how),
        ]

    def in_halves(x):
        how = {"group_size": group_size}
        tokens = [
            fabric.all_to_all_start(x, axis, 2, 0, **how),
            fabric.all_to_all_start(x, axis, 1, 3, tiled=True, **how),
            fabric.all_gather_start(x, axis, axis=1, **how),
            fabric.all_gather_start(x, axis, tiled=True, **how),
        ]
        return [fabric.done(x, token) for token in tokens]

    expected = on_mesh(mesh, whole(lax, axis_index_groups=groups), x)
    jax.tree.map(equal, on_mesh(mesh, whole(fabric, group_size=group_size), x), expected)
    jax.tree.map(equal, on_mesh(mesh, in_halves, x), expected)
    fabric.configure(collectives="lax")
    try:
        jax.tree.map(equal, on_mesh(mesh, whole(fabric, group_size=group_size), x), expected)
    finally:
        fabric.configure(collectives="auto")
    with pytest.raises(ValueError, match=r"fabric.all_gather: group_size 5 does not divide the \d+ ranks"):
        on_mesh(mesh, lambda x: fabric.all_gather(x, axis, group_size=5), x)


def test_halves_equal_whole_and_both_vma_modes(rng, make_mesh):
    mesh, size = make_mesh(2, 8, axes=("dp", "ep")), 8
    x = values(rng, (16, 2, 16, 8, 3), np.int32)

    def whole(x):
        perm = [(i, (i + 3) % size) for i in range(size - 2)]
        return [
            lax.all_to_all(x, "ep", 2, 3),
            lax.all_gather(x, "ep", axis=2),
            lax.ppermute(x, "ep", perm),
            lax.psum_scatter(x, "ep", scatter_dimension=2),
            lax.psum(x, "ep"),
        ]

    expected = on_mesh(mesh, whole, x)
    for check_vma in (False, True):
        actual = on_mesh(mesh, lambda x: halves(x, "ep", size), x, check_vma=check_vma)
        jax.tree.map(equal, actual, expected)


def test_types_over_the_mesh_are_those_of_lax(make_mesh):
    """check_vma=True: what differs between ranks after each collective, and what no longer does."""
    mesh = make_mesh(2, 8, axes=("dp", "ep"))
    seen = []

    def step(x, same):
        seen.clear()
        for module in (lax, fabric):
            for value in (x, same):
                outputs = [
                    module.psum(value, "ep"),
                    module.psum(value, ("dp", "ep")),
                    module.all_gather(value, "dp"),
                    module.all_to_all(value, "ep", 0, 0),
                    module.psum_scatter(value, "ep"),
                    module.ppermute(value, "ep", [(0, 1)]),
                ]
                seen.append([(y.shape, y.dtype, frozenset(jax.typeof(y).mat.varying)) for y in outputs])
        return x

    jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(("dp", "ep")), P()), out_specs=P(("dp", "ep"))))(
        np.zeros((128, 3), np.float32), np.zeros((8, 3), np.float32)
    )
    assert seen[:2] == seen[2:]


@pytest.mark.parametrize("num_ranks", [320, 384])
def test_wide_meshes_against_numpy(rng, make_mesh, num_ranks):
    mesh = make_mesh(num_ranks)
    x = values(rng, (num_ranks, num_ranks, 3), np.int8)
    y = rng.normal(size=(num_ranks, num_ranks, 5)).astype(np.float32)
    perm = [(i, (7 * i + 3) % num_ranks) for i in range(num_ranks)] if num_ranks % 7 else [(0, 1)]

    def step(x, y):
        return (
            fabric.all_to_all(x, "ep", 0, 0),
            fabric.all_to_all(y, "ep", 0, 1),
            fabric.all_gather(x[0], "ep"),
            fabric.psum(y[0], "ep"),
            fabric.psum_scatter(x.astype(jnp.int32), "ep"),
            fabric.ppermute(x[0], "ep", perm),
        )

    swapped, moved, gathered, summed, scattered, permuted = map(np.asarray, on_mesh(mesh, step, x, y))
    equal(swapped, x.transpose(1, 0, 2))
    equal(moved, np.ascontiguousarray(y.transpose(1, 2, 0)))
    equal(gathered, np.broadcast_to(x[:, 0], gathered.shape).copy())
    total = np.zeros(5, np.float32)
    for row in y[:, 0]:  # in rank order, so that the rounding agrees as well
        total += row
    equal(summed, np.broadcast_to(total, summed.shape).copy())
    equal(scattered, x.astype(np.int32).sum(0, dtype=np.int32))
    expected = np.zeros_like(permuted)
    for source, target in perm:
        expected[target] = x[source, 0]
    equal(permuted, expected)


def test_large_chunks_and_payloads(rng, make_mesh):
    """Past the sizes at which bytes are written around the caches: whole lines, ends of lines, whole pages."""
    mesh = make_mesh(64)
    for width in (1700, 8000):
        x = rng.integers(0, 255, (64, 64, width)).astype(np.uint8)
        halves_too = on_mesh(
            mesh,
            lambda x: (
                fabric.all_to_all(x, "ep", 0, 0),
                fabric.all_to_all_done(x, fabric.all_to_all_start(x, "ep", 0, 0)),
            ),
            x,
        )
        for y in halves_too:
            equal(y, x.transpose(1, 0, 2).copy())


def test_every_summable_dtype(rng, make_mesh):
    mesh = make_mesh(8)
    with jax.enable_x64(True):
        dtypes = [np.dtype(f"{kind}{bytes_}") for kind in "iu" for bytes_ in (1, 2, 4, 8)] + [
            np.dtype("f4"),
            np.dtype("f8"),
        ]
        xs = [rng.integers(0, 200, (8, 1030)).astype(dtype) for dtype in dtypes]
        actual = on_mesh(mesh, lambda *xs: [fabric.psum(x, "ep") for x in xs], *xs)
        for x, y in zip(xs, actual, strict=True):
            equal(y, np.broadcast_to(x.sum(0, dtype=x.dtype), y.shape).copy())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_short_floats_are_added_in_float32_and_rounded_once(rng, make_mesh, dtype):
    bits = rng.integers(0, 2**16, (8, 4096)).astype(np.uint16)
    x = bits.view(dtype)
    x = np.where(np.isfinite(x.astype(np.float32)), x, dtype(1)).astype(dtype)
    total = np.zeros(x.shape[1:], np.float32)
    with np.errstate(over="ignore"):
        for row in x.astype(np.float32):
            total += row
        expected = total.astype(dtype)
    actual = on_mesh(make_mesh(8), lambda x: fabric.psum(x, "ep"), x)
    equal(actual, np.broadcast_to(expected, x.shape).copy())


def test_other_dtypes_move(rng, make_mesh):
    mesh = make_mesh(4)
    xs = [values(rng, (4, 4, 6), dtype) for dtype in OTHER]
    actual = on_mesh(mesh, lambda *xs: [fabric.all_to_all(x, "ep", -2, -2) for x in xs], *xs)
    for x, y in zip(xs, actual, strict=True):
        equal(y, x.transpose(1, 0, 2).copy())
    counts = on_mesh(mesh, lambda x: fabric.psum(x, "ep"), xs[0])
    equal(counts, np.broadcast_to(xs[0].sum(0, dtype=np.int32), counts.shape).copy())


def test_axis_of_size_one_emits_no_exchange(rng, make_mesh):
    x = values(rng, (1, 1, 4, 3), np.float32)
    index = [np.array([[v]], np.int32) for v in (1, 2, 0, 2)]

    def step(module):
        def fn(x, *index):
            token = fabric.all_to_all_start(x, "ep", 0, 1) if module is fabric else None
            whole = [
                module.all_to_all(x, "ep", 0, 1),
                module.all_gather(x, "ep", axis=1, tiled=True),
                module.psum(x, "ep"),
                module.psum_scatter(x, "ep"),
                module.ppermute(x, "ep", [(0, 0)]),
                module.ppermute(x, "ep", []),
            ]
            if module is lax:
                ragged = [jnp.zeros((5, 3)).at[0:2].set(x[0, 1:3])] * 2 + [lax.all_to_all(x, "ep", 0, 1)]
            else:
                zeros = jnp.zeros((5, 3))
                started = fabric.ragged_all_to_all_start(x[0], *index, axis_name="ep")
                ragged = [
                    fabric.ragged_all_to_all(x[0], zeros, *index, axis_name="ep"),
                    fabric.ragged_all_to_all_done(x[0], zeros, started),
                    fabric.all_to_all_done(x, token),
                ]
            return whole + ragged

        return fn

    mesh = make_mesh(1)
    jax.tree.map(equal, on_mesh(mesh, step(fabric), x, *index), on_mesh(mesh, step(lax), x, *index))
    alone = lambda x: step(fabric)(x[0], *(i[0] for i in index))  # noqa: E731
    mapped = jax.shard_map(alone, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
    assert "fabric_" not in str(jax.make_jaxpr(mapped)(x))


def test_outside_jit(rng, make_mesh):
    """Eagerly each primitive is a program of its own, so a start and its done meet across programs."""
    x = values(rng, (8, 8, 3), np.int32)

    def step(x):
        return fabric.all_to_all_done(x, fabric.all_to_all_start(x, "ep", 1, 1))

    y = jax.shard_map(step, mesh=make_mesh(8), in_specs=P("ep"), out_specs=P("ep"))(x)
    equal(y, x.transpose(1, 0, 2).copy())


def test_exchange_bytes(make_mesh):
    def step(x):
        token = fabric.all_to_all_start(x, "ep", 0, 0)
        return (
            fabric.all_to_all_done(x, token),
            fabric.all_gather(x, "ep", plane="rdma", channel="weights"),
            fabric.psum(x, "ep"),
            fabric.psum_scatter(x, "ep"),
            fabric.ppermute(x, "ep", [(0, 1)]),
        )

    mapped = jax.shard_map(step, mesh=make_mesh(8), in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
    (outer,) = jax.make_jaxpr(mapped)(jax.ShapeDtypeStruct((64, 3), np.float32)).eqns
    eqns = {e.primitive.name: e for e in outer.params["jaxpr"].eqns if e.primitive.name.startswith("fabric_")}
    local = 8 * 3 * 4
    assert {name: fabric.exchange_bytes(eqn) for name, eqn in eqns.items()} == {
        "fabric_all_to_all_start": 0,
        "fabric_all_to_all_done": local // 8 * 7,
        "fabric_all_gather": local * 7,
        "fabric_psum": 2 * local // 8 * 7,
        "fabric_psum_scatter": local // 8 * 7,
        "fabric_ppermute": local,
    }
    params = eqns["fabric_all_gather"].params
    named = [params[name] for name in ("plane", "channel", "axis_name", "num_ranks")]
    assert named == ["rdma", "weights", ("ep",), 8]


def test_channels_are_the_same_in_every_process_and_distinct_in_a_program(make_mesh):
    def lowered():
        def step(x):
            with jax.named_scope("layer"):
                return fabric.all_gather(x, "ep"), fabric.all_gather(x + 1, "ep"), fabric.psum(x, "ep", channel="mine")

        mapped = jax.shard_map(step, mesh=make_mesh(8), in_specs=P("ep"), out_specs=P(), check_vma=False)
        return jax.jit(mapped).lower(np.zeros((8, 3), np.float32)).as_text()

    text = lowered()
    assert text == lowered()  # so that the compilation cache finds it
    channels = [part.split('"')[1] for part in text.split("channel = ")[1:]]
    assert len(set(channels)) == 3
    assert "mine" in channels
    assert sum("layer" in channel and "all_gather" in channel for channel in channels) == 2
