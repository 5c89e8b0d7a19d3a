"""`ragged_all_to_all` where lax collectives run: lax's own, or a padded `all_to_all` with the same meaning.

On accelerators lax's own is fairly new, and fails in places (by shape, by number of ranks, by interconnect), hence the
padded form; on XLA:CPU lax's own does not exist.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from cmjax.mesh.layout import place_ragged_rows
from cmjax.mesh.settings import Forms

Array = jax.Array


def lax_ragged(*operands: Array, axis_name: tuple[str, ...], forms: Forms, platform: str, **_: object) -> Array:
    """The lax form that `forms` asks for; by default lax's own where it exists and has not failed its trial."""
    is_native = forms.ragged == "native" or (forms.ragged == "auto" and native_ragged_failure(platform) is None)
    form = lax.ragged_all_to_all if is_native else _padded_ragged
    return form(*operands, axis_name=axis_name)


# platform -> what was wrong in the trial, or None
_TRIALS: dict[str, str | None] = {}


def try_native_ragged(devices: Sequence[jax.Device]) -> None:
    """Try `lax.ragged_all_to_all` on some of an instance's devices (up to 8), once a platform: what is lowered after it
    takes the padded form where that failed. Nothing is tried while lowering, which may be for a machine that is not
    there."""
    platform = devices[0].platform
    if platform != "cpu" and platform not in _TRIALS:
        _TRIALS[platform] = trial_failure(list(devices[:8]))


def native_ragged_failure(platform: str) -> str | None:
    """Why `lax.ragged_all_to_all` does not serve on `platform`, as far as is known; or None."""
    if platform == "cpu":
        return "is not implemented on XLA:CPU"
    return _TRIALS.get(platform)


def trial_failure(devices: list[jax.Device]) -> str | None:
    """What is wrong with `lax.ragged_all_to_all` on these devices, or None."""
    try:
        found = _exchange_on(devices)
    except Exception as error:  # whatever it is: the padded form serves, and status() says why
        return f"failed its trial: {(str(error).splitlines() or [type(error).__name__])[0]}"
    expected = np.tile(np.arange(len(devices)), len(devices))
    return None if np.array_equal(found, expected) else "gave wrong rows in its trial"


def _exchange_on(devices: list[jax.Device]) -> np.ndarray:
    """Rank r sends a row of r to every rank: each rank's rows as received, `[ranks * ranks]`."""
    num_ranks = len(devices)

    def exchange() -> Array:
        rank = lax.axis_index("rank").astype(jnp.int32)
        rows, ones = jnp.full((num_ranks, 1), rank), jnp.ones(num_ranks, jnp.int32)
        offsets = jnp.arange(num_ranks, dtype=jnp.int32)
        there = jnp.full(num_ranks, rank)
        received = lax.ragged_all_to_all(rows, -rows, offsets, ones, there, ones, axis_name="rank")
        return received[:, 0]

    mesh = Mesh(np.array(devices), ("rank",))
    run = jax.shard_map(exchange, mesh=mesh, in_specs=(), out_specs=PartitionSpec("rank"), check_vma=False)
    return np.asarray(jax.jit(run)())


def _padded_ragged(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: tuple[str, ...],
) -> Array:
    """Every update in a slot of the worst-case size, one `all_to_all`, and the rows that exist put in place."""
    num_ranks, num_rows = lax.axis_size(axis_name), min(operand.shape[0], output.shape[0])
    rows = jnp.clip(input_offsets[:, None] + jnp.arange(num_rows), 0, max(operand.shape[0] - 1, 0))
    slots = operand[rows].reshape(num_ranks, -1, *operand.shape[1:])  # [ranks, updates * rows, ...]
    received = lax.all_to_all(slots, axis_name, 0, 0).reshape(-1, *operand.shape[1:])
    offsets = lax.all_to_all(output_offsets.reshape(num_ranks, -1), axis_name, 0, 0).reshape(-1)
    starts = jnp.arange(offsets.shape[0], dtype=offsets.dtype) * num_rows
    return place_ragged_rows(received, output, starts, offsets, recv_sizes)
