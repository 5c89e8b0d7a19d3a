import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.mesh import EP_AXIS, fabric, share_compiled_programs

HIT, MISS = (f"/jax/compilation_cache/cache_{what}" for what in ("hits", "misses"))


def program(mesh):
    """Of the mesh's form: what it returns depends on rank and on what others send."""

    def rank(x):
        rank_id = lax.axis_index(EP_AXIS).astype(x.dtype)
        return fabric.psum(x * (rank_id + 1), EP_AXIS, channel="share") + rank_id

    spec = PartitionSpec(EP_AXIS)
    return jax.jit(jax.shard_map(rank, mesh=mesh.abstract_mesh, in_specs=spec, out_specs=spec, check_vma=False))


def placed(mesh, values):
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(EP_AXIS)))


@pytest.mark.usefixtures("empty_compile_cache")
def test_a_program_is_compiled_once_for_all_meshes_of_a_form(make_mesh, jax_events):
    meshes = [make_mesh(4), make_mesh(4, first=4), make_mesh(4, first=2), make_mesh(4, first=370)]
    run = program(meshes[0])
    for index, mesh in enumerate(meshes):
        jax_events.clear()
        values = np.arange(8, dtype=np.float32) + index
        found = run(placed(mesh, values))
        assert (jax_events[HIT], jax_events[MISS]) == ((0, 1) if index == 0 else (1, 0))
        chex.assert_trees_all_equal(found.devices(), set(mesh.devices.flat))
        total = (values.reshape(4, 2) * np.arange(1, 5)[:, None]).sum(0)
        np.testing.assert_array_equal(found, (total + np.arange(4)[:, None]).ravel())


@pytest.mark.usefixtures("empty_compile_cache")
def test_they_run_side_by_side(make_mesh):
    """Instances that share a program do not share its exchanges."""
    meshes = [make_mesh(4), make_mesh(4, first=4)]
    run = program(meshes[0])
    values = [np.full(4, 10.0**index, np.float32) for index in range(2)]
    inputs = [placed(mesh, one) for mesh, one in zip(meshes, values, strict=True)]
    for _ in range(20):
        found = [run(one) for one in inputs]
    for one, all_ones in zip(found, values, strict=True):
        np.testing.assert_array_equal(one, all_ones * 10 + np.arange(4))


@pytest.mark.usefixtures("empty_compile_cache")
def test_what_is_compiled_otherwise_is_another_program(make_mesh, jax_events):
    jax_events.clear()
    mesh = make_mesh(4)
    for number, options in enumerate([None, {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}], 1):
        jax.jit(lambda x: jnp.sin(x) * 3, compiler_options=options)(placed(mesh, np.ones(4, np.float32)))
        assert (jax_events[HIT], jax_events[MISS]) == (0, number)
    fewer = placed(make_mesh(2), np.ones(4, np.float32))
    jax.jit(lambda x: jnp.sin(x) * 3)(fewer)
    assert (jax_events[HIT], jax_events[MISS]) == (0, 3)


def test_asking_twice_changes_nothing():
    from jax._src import cache_key

    before = cache_key.get
    share_compiled_programs()
    assert cache_key.get is before
