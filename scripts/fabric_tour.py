"""The fabric's collectives on their own, at a width where XLA:CPU's abort: every result is checked against numpy.

    python scripts/fabric_tour.py [ranks]        (320 by default; brings the virtual devices up itself)

This is all it takes to try an exchange pattern without hardware: a mesh, `jax.shard_map`, and a collective.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cmjax.mesh import fabric, virtual_devices


def main(num_ranks: int = 320) -> None:
    devices = virtual_devices(num_ranks)
    mesh = Mesh(np.array(devices, dtype=object), ("ep",))
    rng = np.random.default_rng(0)
    # Row s * num_ranks + d is what rank s holds for rank d.
    x = rng.integers(-100, 100, (num_ranks, num_ranks, 4)).astype(np.int8)
    right = [(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)]

    # Each rank sends rank d the first `sizes[d]` of its rows, packed one after another, and says where they go.
    sizes = rng.integers(0, 3, (num_ranks, num_ranks)).astype(np.int32)
    rows_in, rows_out = int(sizes.sum(1).max()), int(sizes.sum(0).max())
    rows = rng.integers(-100, 100, (num_ranks, rows_in, 4)).astype(np.int8)
    input_offsets = (sizes.cumsum(1) - sizes).astype(np.int32)
    output_offsets = (sizes.cumsum(0) - sizes).astype(np.int32)

    def step(x: jax.Array, rows: jax.Array, *index: jax.Array) -> dict[str, jax.Array]:
        """What one rank does; arrays are this rank's own."""
        wide = x.astype(jnp.int32)
        received = fabric.ragged_all_to_all(rows, jnp.zeros((rows_out, 4), jnp.int8), *index, axis_name="ep")
        # In two halves: the sum of squares runs while the exchange is under way.
        token = fabric.all_to_all_start(x, "ep", 0, 0)
        squares = jnp.sum(fabric.after(token, wide) ** 2)
        swapped = fabric.all_to_all_done(x, token, hide_behind=squares)
        return {
            "all_to_all": fabric.all_to_all(x, "ep", 0, 0),
            "all_to_all, in halves": swapped,
            "all_gather": fabric.all_gather(x[0], "ep"),
            "psum": fabric.psum(wide, "ep"),
            "psum_scatter": fabric.psum_scatter(wide, "ep"),
            "ppermute": fabric.ppermute(x, "ep", right),
            "ragged_all_to_all": received,
        }

    def on_each(*arrays: jax.Array) -> dict[str, jax.Array]:
        return jax.tree.map(lambda y: y[None], step(*(array[0] for array in arrays)))

    exchange = jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False))
    results = exchange(x, rows, input_offsets, sizes, output_offsets, np.ascontiguousarray(sizes.T))

    arrived = np.zeros((num_ranks, rows_out, 4), np.int8)
    for s, d in np.ndindex(num_ranks, num_ranks):
        size = sizes[s, d]
        arrived[d, output_offsets[s, d] :][:size] = rows[s, input_offsets[s, d] :][:size]
    totals = x.sum(0, dtype=np.int32)
    expected = {
        "all_to_all": x.transpose(1, 0, 2),
        "all_to_all, in halves": x.transpose(1, 0, 2),
        "all_gather": np.broadcast_to(x[:, 0], (num_ranks, num_ranks, 4)),
        "psum": np.broadcast_to(totals, (num_ranks, num_ranks, 4)),
        "psum_scatter": totals,
        "ppermute": np.roll(x, 1, axis=0),
        "ragged_all_to_all": arrived,
    }
    for name, result in results.items():
        np.testing.assert_array_equal(result, expected[name], err_msg=name)
        print(f"{name:24} {num_ranks} ranks: equal to numpy")

    print(f"\n{'plane':6} {'collective':20} {'calls':>5} {'bytes on the wire':>18}")
    for entry in fabric.traffic.snapshot().entries:
        print(f"{entry.plane:6} {entry.collective:20} {entry.calls:5} {entry.wire_bytes:18,}")
    used = {status.form for status in fabric.status().values()}
    print(f"\nform in use: {', '.join(sorted(used))}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
