"""Pages of what devices hold."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cmjax.mesh import use_huge_pages

HUGE = 2 << 20


def test_large_arrays_are_in_huge_pages_and_what_they_were():
    mesh = Mesh(np.array(jax.devices()[:2], dtype=object), ("x",))
    values = np.arange(4 * HUGE, dtype=np.float32).reshape(4, HUGE)
    by_row, everywhere = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    tree = {
        "cut": jax.device_put(values, by_row),
        "all": jax.device_put(values, everywhere),
        "small": jax.numpy.ones(3),
    }
    places = [shard.data.unsafe_buffer_pointer() for shard in tree["cut"].addressable_shards]
    moved = use_huge_pages(tree)
    assert [shard.data.unsafe_buffer_pointer() for shard in tree["cut"].addressable_shards] == places
    np.testing.assert_array_equal(np.asarray(tree["cut"]), values)
    np.testing.assert_array_equal(np.asarray(tree["all"]), values)
    assert use_huge_pages({"small": tree["small"]}) == 0
    if not moved:  # before Linux 6.1, where none are free, and where an administrator wants none
        pytest.skip("the system gives no huge pages")
    # Whole huge pages of each shard, all but the ends; a replicated buffer once, or once a device.
    assert moved % HUGE == 0
    assert moved <= 3 * values.nbytes
    assert _huge_bytes(places[0] + HUGE) > 0


def _huge_bytes(address: int) -> int:
    """What the system keeps in huge pages of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            return int(line.split()[1]) << 10
    return 0
