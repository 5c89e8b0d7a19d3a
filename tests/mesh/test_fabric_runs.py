"""The fabric over time: loops, concurrent programs, mistakes, missing ranks, traffic, delays."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as P

from cmjax.mesh import fabric
from cmjax.mesh.native import build
from cmjax.native import BuildError

ROOT = pathlib.Path(__file__).parents[2]


def num_live():
    return build.load().library.cmjax_fabric_num_live()


def compile_step(mesh, fn, check_vma=False):
    specs = P(mesh.axis_names)
    step = lambda *args: fn(*(a[0] for a in args))[None]  # noqa: E731
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma))


def turn(x, times, axis="ep"):
    """`times` chained exchanges of x[ranks]; after an even number every rank has its own row again, plus `times`."""
    return lax.fori_loop(0, times, lambda i, x: fabric.all_to_all(x, axis, 0, 0) + 1, x)


def test_ten_thousand_exchanges_leave_nothing_behind(make_mesh):
    x = np.arange(64, dtype=np.int32).reshape(8, 8)
    step = compile_step(make_mesh(8), lambda x: turn(x, 12_000))
    before = fabric.traffic.snapshot().calls("ub", "all_to_all")
    np.testing.assert_array_equal(step(x), x + 12_000)
    assert fabric.traffic.snapshot().calls("ub", "all_to_all") - before == 12_000
    assert num_live() == 0


def test_several_meshes_interleaved(make_mesh):
    """Dispatched without waiting: runs of one program, of different programs and of overlapping devices."""
    meshes = [make_mesh(8), make_mesh(8, first=4), make_mesh(2, 4, axes=("dp", "ep"), first=8), make_mesh(64)]
    steps = [(mesh, compile_step(mesh, lambda x: turn(x, 10))) for mesh in meshes]
    results = []
    for i in range(12):
        for mesh, step in steps:
            x = np.full((mesh.size, mesh.shape["ep"]), i, np.int32)
            results.append((step(x), x + 10))
    for actual, expected in results:
        np.testing.assert_array_equal(actual, expected)


def test_three_programs_at_the_same_time(make_mesh):
    """As two prefill instances and a decode instance do, each driven by its own thread."""
    meshes = [make_mesh(320), make_mesh(32, first=320), make_mesh(32, first=352)]
    steps = [compile_step(mesh, lambda x: turn(x, 20)) for mesh in meshes]
    outcome = [None] * 3

    def drive(i):
        x = np.zeros((meshes[i].size, meshes[i].size), np.int32)
        for _ in range(3):
            x = step_result = np.asarray(steps[i](x))
        outcome[i] = step_result

    threads = [threading.Thread(target=drive, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in outcome:
        np.testing.assert_array_equal(result, np.full_like(result, 60))


@pytest.mark.parametrize("num_ranks", [8, 320])
def test_halves_in_a_scan_around_a_loop(make_mesh, num_ranks):
    def layer(x, _):
        token = fabric.all_to_all_start(x, "ep", 0, 0)
        work = lax.fori_loop(0, x[0] % 2 + 3, lambda i, w: jnp.sin(w) @ w, jnp.eye(4) * 0.1)
        return fabric.all_to_all_done(x, token, hide_behind=work) + 1, work.sum()

    x = np.arange(num_ranks**2, dtype=np.int32).reshape(num_ranks, num_ranks)
    for check_vma in (False, True):
        step = compile_step(make_mesh(num_ranks), lambda x: lax.scan(layer, x, None, length=6)[0], check_vma)
        np.testing.assert_array_equal(step(x), x + 6)
    assert num_live() == 0


def test_a_token_can_be_carried_into_the_next_iteration(make_mesh):
    """A start in one iteration and its done in the next: two exchanges of one channel are alive at once."""

    def body(carry, _):
        x, token = carry
        y = x * 10
        ahead = fabric.all_gather_start(y, "ep")
        gathered = fabric.all_gather_done(x, token, hide_behind=ahead.stamp)
        return (y, ahead), gathered

    def step(x):
        (x, token), rows = lax.scan(body, (x, fabric.all_gather_start(x, "ep")), None, length=4)
        return jnp.concatenate([rows, fabric.all_gather_done(x, token)[None]])

    x = np.arange(1, 9, dtype=np.int32)
    expected = np.array([x * 10**i for i in range(5)])
    np.testing.assert_array_equal(compile_step(make_mesh(8), step)(x), np.broadcast_to(expected, (8, 5, 8)))


def test_after_orders_in_place(make_mesh):
    def step(x, w):
        tokens = {"a": fabric.all_gather_start(x, "ep"), "b": fabric.psum_start(x, "ep")}
        w = fabric.after(tokens, {"w": w + 1})["w"]
        work = jnp.sin(w)
        gathered = fabric.all_gather_done(x, tokens["a"], hide_behind=work)
        return gathered.sum(0) - fabric.psum_done(x, tokens["b"], hide_behind=work) + work

    x, w = np.arange(8, dtype=np.float32), np.ones((8, 999), np.float32)
    for form in ("auto", "lax"):
        fabric.configure(collectives=form)
        try:
            compiled = compile_step(make_mesh(8), step).lower(x, w).compile()
        finally:
            fabric.configure(collectives="auto")
        np.testing.assert_allclose(compiled(x, w), np.sin(w + 1), rtol=1e-6)
        if form == "auto":
            (ordered,) = [line for line in compiled.as_text().splitlines() if "cmjax_fabric_yield" in line]
            assert "output_to_operand_aliasing={{}: (0, {})}" in ordered
            assert ordered.split("custom_call_target")[0].count("_start") == 2  # it takes both stamps


# --- Mistakes ---


def every_rank_fails(result, message):
    for shard in result.addressable_shards:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            np.asarray(shard.data)
    assert num_live() == 0


def test_ranks_that_count_differently_time_out(make_mesh):
    """Rank 0 starts one exchange more on the channel, so it waits for a second one that rank 1 never enters."""

    def step(x):
        extra = lax.cond(
            lax.axis_index("ep") == 0,
            lambda x: fabric.psum_start(x, "ep", channel="shared").stamp,
            lambda x: jnp.zeros(4, jnp.int32),
            x,
        )
        x += jnp.minimum(extra[3], 0)  # never less than 0, which XLA cannot know: the order is fixed
        return fabric.psum_done(x, fabric.psum_start(x, "ep", channel="shared"))

    message = "psum on channel 'shared' .group 0, 2 ranks. gave up after 0.3 s .*1 ranks arrived, missing ranks: [01]$"
    fabric.configure(timeout_s=0.3)
    try:
        every_rank_fails(compile_step(make_mesh(2), step)(np.zeros((2, 4), np.int32)), message)
    finally:
        fabric.configure(timeout_s=120)


def test_a_start_that_is_never_finished_is_forgotten(make_mesh):
    fabric.configure(timeout_s=0.1)
    try:
        step = compile_step(make_mesh(2), lambda x: x + fabric.psum_start(x, "ep").stamp[:1] * 0)
        np.testing.assert_array_equal(step(np.ones((2, 4), np.int32)), np.ones((2, 4), np.int32))
        deadline = time.monotonic() + 60
        while num_live() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert num_live() == 0
    finally:
        fabric.configure(timeout_s=120)


def test_disagreement_names_both_ranks(make_mesh):
    def step(x):
        odd = lax.axis_index("ep") == 3
        return lax.cond(
            odd,
            lambda x: fabric.all_gather(x[:2], "ep", channel="mixed")[0, :1],
            lambda x: fabric.all_gather(x, "ep", channel="mixed")[0, :1],
            x,
        )

    result = compile_step(make_mesh(8), step)(np.zeros((8, 4), np.float32))
    message = r"all_gather on channel 'mixed' .group 0, 8 ranks.: ranks disagree: rank \d brought \[\d\] .* rank \d "
    every_rank_fails(result, message)


def test_groups_of_another_size_on_one_channel_are_told_apart(make_mesh):
    def step(x):
        with_all = lambda x: fabric.all_gather(x, "ep", channel="mixed").sum(0)  # noqa: E731
        with_half = lambda x: fabric.all_gather(x, "ep", channel="mixed", group_size=4).sum(0)  # noqa: E731
        return lax.cond(lax.axis_index("ep") == 3, with_half, with_all, x)

    result = compile_step(make_mesh(8), step)(np.zeros((8, 4), np.float32))
    message = r"ranks disagree: rank \d brought .* among [48] ranks, rank \d brought .* among [48] ranks"
    every_rank_fails(result, message)


@pytest.mark.parametrize("num_ranks", [8, 64])
def test_a_rank_that_fails_does_not_hang_the_others(make_mesh, num_ranks):
    absent = {3, 5, 6, 7}

    def break_some(rank):
        if int(rank) in absent:
            raise RuntimeError("this rank is broken")
        return np.int32(0)

    def step(x):
        rank = lax.axis_index("ep")
        broken = io_callback(break_some, jax.ShapeDtypeStruct((), np.int32), rank) if num_ranks == 8 else None
        if broken is None:
            return lax.cond(rank % 9 < 7, lambda x: fabric.psum(x, "ep", channel="c"), lambda x: x, x)
        return fabric.psum(x + broken, "ep", channel="c")

    fabric.configure(timeout_s=0.4)
    try:
        result = compile_step(make_mesh(num_ranks), step)(np.zeros((num_ranks, 2), np.int32))
        missing = "3, 5-7" if num_ranks == 8 else "7, 8, 16, 17, 25, 26, 34, 35, 43, 44, 52, 53, 61, 62"
        arrived = num_ranks - len(missing.split(",")) - 2 * (num_ranks == 8)
        message = (
            f"psum on channel 'c' .group 0, {num_ranks} ranks. gave up after 0.4 s without progress: "
            f"{arrived} ranks arrived, missing ranks: {missing}"
        )
        for rank, shard in enumerate(result.addressable_shards):
            if num_ranks == 8:
                # jax 0.10 reports the first failure of a program on each of its devices.
                with pytest.raises(
                    jax.errors.JaxRuntimeError, match="broken" if rank in absent else f"{message}|broken"
                ):
                    np.asarray(shard.data)
            elif rank % 9 < 7:
                with pytest.raises(jax.errors.JaxRuntimeError, match=message):
                    np.asarray(shard.data)
        assert num_live() == 0
    finally:
        fabric.configure(timeout_s=120)
    # The fabric works as before.
    x = np.ones((num_ranks, 2), np.int32)
    np.testing.assert_array_equal(compile_step(make_mesh(num_ranks), lambda x: fabric.psum(x, "ep"))(x), x * num_ranks)


def test_a_token_is_used_once(make_mesh):
    def step(x):
        token = fabric.psum_start(x, "ep", channel="once")
        first = fabric.psum_done(x, token)
        return fabric.psum_done(x, token, hide_behind=first)

    result = compile_step(make_mesh(2), step)(np.zeros((2, 4), np.int32))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"no exchange was started under this token.*use each token once"
    ):
        result.block_until_ready()


def test_a_token_of_another_group_is_refused(make_mesh):
    """Two groups of two ranks exchange their tokens, and with them the exchanges that they finish."""

    def step(x):
        token = fabric.all_gather_start(x, "ep", channel="c")
        other = fabric.ppermute(token.stamp, "dp", [(0, 1), (1, 0)])
        return fabric.all_gather_done(x, token.replace(stamp=other))

    result = compile_step(make_mesh(2, 2, axes=("dp", "ep")), step)(np.zeros((4, 4), np.int32))
    message = (
        r"all_gather on channel 'c' .group [01], 2 ranks.: rank [01] finished what it had not started: "
        "it is one of 2 ranks of group [01]"
    )
    every_rank_fails(result, message)


def test_a_token_of_another_number_of_ranks_is_refused(make_mesh):
    def step(x):
        pair = fabric.psum_start(x, "ep", channel="pair")
        everyone = fabric.psum_start(x, ("dp", "ep"), channel="everyone")
        return fabric.psum_done(x, everyone.replace(stamp=pair.stamp))

    result = compile_step(make_mesh(4, 2, axes=("dp", "ep")), step)(np.zeros((8, 4), np.int32))
    message = r"psum on channel 'pair' .group \d, 2 ranks.: rank \d finished what .* one of 8 ranks of group 0"
    every_rank_fails(result, message)


@pytest.mark.parametrize(
    ("error", "message", "step"),
    [
        (
            NotImplementedError,
            "psum does not have a derivative",
            lambda x: jax.grad(lambda x: fabric.psum(x, "ep")[0])(x),
        ),
        (
            NotImplementedError,
            "all_to_all does not have a batching rule",
            lambda x: jax.vmap(lambda x: fabric.all_to_all(x, "ep", 0, 0))(jnp.ones((3, 8))),
        ),
        (
            ValueError,
            "axis 0 of shape .4,. must have the size of the mesh axis, 8",
            lambda x: fabric.all_to_all(x, "ep", 0, 0),
        ),
        (ValueError, "must divide by the size", lambda x: fabric.psum_scatter(x, "ep", tiled=True)),
        (ValueError, "split_axis 1 is out of range", lambda x: fabric.all_to_all(x, "ep", 1, 0)),
        (ValueError, "destination ranks must be distinct", lambda x: fabric.ppermute(x, "ep", [(0, 1), (2, 1)])),
        (ValueError, "in .0, 8., got .8.", lambda x: fabric.ppermute(x, "ep", [(8, 1)])),
        (TypeError, "dtype float8_e4m3fn cannot be summed", lambda x: fabric.psum(x.astype(jnp.float8_e4m3fn), "ep")),
        (TypeError, "does not fill whole bytes", lambda x: fabric.all_gather(x.astype(jnp.int4), "ep")),
        (NameError, "nope", lambda x: fabric.psum(x, "nope")),
    ],
)
def test_misuse_is_one_clear_error(make_mesh, error, message, step):
    with pytest.raises(error, match=message):
        compile_step(make_mesh(8), step)(np.zeros((8, 4), np.float32))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"ragged": "fast"}, "ragged must be one of"),
        ({"collectives": "nccl"}, "collectives must be one of"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        fabric.configure(**setting)


def test_wrong_delay_models():
    with pytest.raises(ValueError, match="latency_s has planes"):
        fabric.DelayModel({"ub": 1.0}, {"rdma": 1.0})
    with pytest.raises(ValueError, match="bandwidth 0 bytes/s"):
        fabric.DelayModel({"ub": 1.0}, {"ub": 0})
    with pytest.raises(ValueError, match="multiplier"):
        fabric.DelayModel({}, {}, multiplier=-1)


# --- Traffic ---


def test_traffic_is_exact(make_mesh):
    """Each collective's bytes from device to device, on a mesh that starts at device 5, two groups of three."""
    sizes = np.array([[[1, 0], [2, 1], [0, 0]], [[0, 0], [3, 0], [1, 1]], [[2, 2], [0, 1], [0, 0]]])
    ends = sizes.reshape(3, -1).cumsum(1).reshape(sizes.shape)
    columns = np.stack([sizes[:, d].reshape(-1).cumsum().reshape(3, 2) for d in range(3)], axis=1)
    index = [
        a.reshape(3, -1).astype(np.int32) for a in (ends - sizes, sizes, columns - sizes, sizes.transpose(1, 0, 2))
    ]
    index = [np.concatenate([a, a]) for a in index]

    def step(x, *index):
        y = fabric.all_to_all(x, "ep", 0, 0)
        z = fabric.all_gather(y, "ep", plane="rdma")
        w = fabric.psum(x[0], "ep") + fabric.psum_scatter(x, "ep")
        v = fabric.ppermute(w, "ep", [(0, 2), (1, 1)])
        token = fabric.all_to_all_start(x, "ep", 0, 0, plane="vpc")
        u = fabric.ragged_all_to_all(jnp.zeros((8, 5), jnp.int8), jnp.zeros((8, 5), jnp.int8), *index, axis_name="ep")
        return y.sum() + z.sum() + v.sum() + fabric.all_to_all_done(x, token).sum() + u.sum()

    compiled = compile_step(make_mesh(2, 3, axes=("dp", "ep"), first=5), step)
    x = np.zeros((6, 3, 7), np.int32)
    fabric.traffic.reset()
    for _ in range(2):
        compiled(x, *index).block_until_ready()
    snapshot = fabric.traffic.snapshot()

    def matrix(pairs):
        expected = np.zeros((11, 11), np.int64)
        for group in (5, 8):
            expected[group : group + 3, group : group + 3] = pairs
        return expected * 2

    chunk = 7 * 4
    expected = {
        ("rdma", "all_gather"): matrix(np.full((3, 3), 3 * chunk)),
        ("ub", "all_to_all"): matrix(np.full((3, 3), chunk)),
        ("ub", "ppermute"): matrix(np.array([[0, 0, chunk], [0, chunk, 0], [0, 0, 0]])),
        ("ub", "psum"): matrix(np.full((3, 3), 2 * 10)),  # 28 bytes in thirds, rounded up, there and back
        ("ub", "psum_scatter"): matrix(np.full((3, 3), chunk)),
        ("ub", "ragged_all_to_all"): matrix(sizes.sum(2) * 5),
        ("vpc", "all_to_all"): matrix(np.full((3, 3), chunk)),
    }
    assert [(entry.plane, entry.collective) for entry in snapshot.entries] == sorted(expected)
    for entry in snapshot.entries:
        assert entry.calls == 4  # two groups, two runs
        np.testing.assert_array_equal(entry.num_bytes, expected[entry.plane, entry.collective])
    assert snapshot.wire_bytes("vpc") == 4 * 6 * chunk
    assert snapshot.local_bytes("vpc") == 4 * 3 * chunk
    assert snapshot.calls(collective="all_to_all") == 8
    np.testing.assert_array_equal(snapshot.matrix("ub"), sum(m for (plane, _), m in expected.items() if plane == "ub"))


def test_recorded_copies_stand_beside_exchanges(devices):
    fabric.traffic.reset()
    fabric.record("rdma", "kv_handoff", devices[3], devices[7], 100)
    fabric.record("rdma", "kv_handoff", 3, 7, 20, calls=2)
    fabric.record("rdma", "kv_handoff", 4, 4, 5)
    (entry,) = fabric.traffic.snapshot().entries
    assert (entry.calls, entry.wire_bytes, entry.local_bytes, entry.num_bytes[3, 7]) == (4, 120, 5, 120)
    with pytest.raises(ValueError, match="must not be negative"):
        fabric.record("rdma", "kv_handoff", 3, 7, -1)
    fabric.traffic.reset()
    assert fabric.traffic.snapshot().entries == ()
    assert fabric.traffic.snapshot().matrix().shape == (0, 0)


def test_traffic_can_be_read_while_it_is_counted(make_mesh):
    step = compile_step(make_mesh(8), lambda x: turn(x, 2000))
    fabric.traffic.reset()
    running = step(np.zeros((8, 8), np.int32))
    seen = [fabric.traffic.snapshot().calls("ub", "all_to_all") for _ in range(50)]
    assert seen == sorted(seen)
    running.block_until_ready()
    entry = fabric.traffic.snapshot().select("ub", "all_to_all")[0]
    assert (entry.calls, entry.wire_bytes) == (2000, 2000 * 56 * 4)


# --- Modelled delay ---


def test_delay_is_hidden_behind_work_and_only_then(make_mesh):
    """Work that surely outlasts the delay hides all of it; with none in between, all of it is seen."""
    delay = fabric.DelayModel({"ub": 0.01, "rdma": 5.0}, {"ub": 8 * 7 * 4.0 * 100, "rdma": 1.0}, multiplier=2.0)
    modelled_s = 2 * (0.01 + 0.01)
    barrier = threading.Barrier(8)

    def work(stamp):
        barrier.wait(60)  # every rank has started
        time.sleep(modelled_s * 1.05)
        return stamp

    def step(x, in_between):
        token = fabric.all_to_all_start(x, "ep", 0, 0)
        behind = None
        if in_between:
            behind = io_callback(work, jax.ShapeDtypeStruct((4,), np.int32), token.stamp)
        return fabric.all_to_all_done(x, token, hide_behind=behind)

    x = np.arange(8 * 8 * 8, dtype=np.int32).reshape(8, 8, 8)
    fabric.configure(delay=delay)
    try:
        for in_between in (False, True):
            compiled = compile_step(make_mesh(8), lambda x, i=in_between: step(x, i))
            fabric.traffic.reset()
            np.testing.assert_array_equal(compiled(x), x.transpose(1, 0, 2))
            (entry,) = fabric.traffic.snapshot().entries
            assert entry.modelled_s == pytest.approx(modelled_s, rel=1e-6)
            assert entry.exposed_s == 0 if in_between else entry.exposed_s > 0
        # The whole form waits for all of it; planes the model does not list take no time.
        for plane, expected in (("ub", modelled_s), ("vpc", 0)):
            compiled = compile_step(make_mesh(8), lambda x, plane=plane: fabric.all_to_all(x, "ep", 0, 0, plane=plane))
            fabric.traffic.reset()
            np.testing.assert_array_equal(compiled(x), x.transpose(1, 0, 2))
            (entry,) = fabric.traffic.snapshot().entries
            assert entry.modelled_s == pytest.approx(expected, rel=1e-6)
            # All of it, but for the moment between the last rank's start and its arrival.
            assert 0.5 * expected <= entry.exposed_s <= entry.modelled_s
    finally:
        fabric.configure(delay=None)
    assert num_live() == 0


# --- Building ---

WITHOUT_COMPILER = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
import jax, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 320)
from cmjax.mesh import fabric

def run(n, fn, *args):
    mesh = Mesh(np.array(jax.devices()[:n]), ("ep",))
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False))(*args)

print(np.asarray(run(4, lambda x: fabric.psum(x, "ep"), np.arange(4.0))).tolist())
one = np.ones(4, np.int32)
offsets = np.tile(np.arange(2, dtype=np.int32), 2)
ragged = lambda x, i, o, s: fabric.ragged_all_to_all(x, fabric.empty((2,), x.dtype), i, s, o, s, axis_name="ep")
print(np.asarray(run(2, ragged, np.arange(4), offsets, np.repeat(np.arange(2, dtype=np.int32), 2), one)).tolist())
for name, status in fabric.status().items():
    print(name, "|", status.form, "|", status.reason)
try:
    run(320, lambda x: fabric.psum(x, "ep"), np.arange(320.0))
except fabric.FabricError as error:
    print(error)
print(fabric.traffic.snapshot().entries)
"""


def test_without_a_compiler(tmp_path):
    env = {**os.environ, "PATH": str(tmp_path), "CMJAX_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("CXX", None)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    reason = "no C++ compiler was found (g++ or clang++; install one or set CXX)"
    warning, total, ragged, *statuses, refusal, traffic = result.stdout.splitlines()
    assert warning == f"WARNING fabric: {reason}; running on lax collectives (ragged ones padded), at most 256 devices"
    assert total == "[6.0, 6.0, 6.0, 6.0]"
    assert ragged == "[0, 2, 1, 3]"
    assert f"psum | lax | {reason}" in statuses
    assert statuses[-1].startswith(f"ragged_all_to_all | lax padded | {reason}")
    assert refusal == f"fabric: 320 devices need the C++ fabric (lax collectives on CPU stop at 256), but {reason}"
    assert traffic == "()"


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fabric.cc:1: error: no such luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CMJAX_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match=r"broken failed: fabric.cc:1: error: no such luck"):
        build.build()
    assert not list((tmp_path / "cache").glob("*.so"))
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found .there-is-no-such-compiler"):
        build.build()


def test_done_with_another_array_than_was_started_is_refused(make_mesh):
    mesh = make_mesh(4)

    def mixed_up(x):
        token = fabric.all_gather_start(x, "ep")
        return fabric.all_gather_done(x[:1], token)

    call = jax.jit(jax.shard_map(mixed_up, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    with pytest.raises(ValueError, match="started with float32"):
        call(np.zeros((16, 2), np.float32))
