"""Canonical forms: how each collective's argument becomes rank-major rows, and how its result is put back.

The exchanges know one layout per collective (`[ranks, ...]` in or out); axes of the caller are moved here.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static: where the ranks' axis sits in one call. `split` is -1 where the collective splits nothing."""

    name: str
    num_ranks: int
    split: int = -1
    concat: int = -1
    tiled: bool = False

    def pack(self, x: Array) -> Array:
        """`x` with the axis that is split among the ranks in front: [ranks, ...]. Unchanged where nothing is split."""
        if self.split < 0:
            return x
        if not self.tiled:
            if x.shape[self.split] != self.num_ranks:
                raise ValueError(
                    f"fabric.{self.name}: axis {self.split} of shape {x.shape} must have the size of the mesh axis, "
                    f"{self.num_ranks}"
                )
            return jnp.moveaxis(x, self.split, 0)
        if x.shape[self.split] % self.num_ranks:
            raise ValueError(
                f"fabric.{self.name}: axis {self.split} of shape {x.shape} must divide by the size of the mesh axis, "
                f"{self.num_ranks}"
            )
        shape = list(x.shape)
        shape[self.split : self.split + 1] = [self.num_ranks, shape[self.split] // self.num_ranks]
        return jnp.moveaxis(x.reshape(shape), self.split, 0)

    def unpack(self, y: Array) -> Array:
        """The caller's result from [ranks, ...] (ranks = where each part came from)."""
        if self.concat < 0:
            return y
        y = jnp.moveaxis(y, 0, self.concat)
        if not self.tiled:
            return y
        shape = list(y.shape)
        shape[self.concat : self.concat + 2] = [shape[self.concat] * shape[self.concat + 1]]
        return y.reshape(shape)


def all_to_all_layout(x: Array, num_ranks: int, split_axis: int, concat_axis: int, tiled: bool) -> Layout:
    """Both axes count positions as `lax.all_to_all` does: of `x`, and of the result."""
    split = _canonical("all_to_all", "split_axis", split_axis, x.ndim)
    return Layout("all_to_all", num_ranks, split, _canonical("all_to_all", "concat_axis", concat_axis, x.ndim), tiled)


def all_gather_layout(x: Array, num_ranks: int, axis: int, tiled: bool) -> Layout:
    """`axis` is a position in the result."""
    ndim = x.ndim if tiled else x.ndim + 1
    return Layout("all_gather", num_ranks, concat=_canonical("all_gather", "axis", axis, ndim), tiled=tiled)


def psum_scatter_layout(x: Array, num_ranks: int, scatter_dimension: int, tiled: bool) -> Layout:
    """`scatter_dimension` is a position in `x`."""
    split = _canonical("psum_scatter", "scatter_dimension", scatter_dimension, x.ndim)
    return Layout("psum_scatter", num_ranks, split, tiled=tiled)


def place_ragged_rows(
    operand: Array, output: Array, input_offsets: Array, output_offsets: Array, sizes: Array
) -> Array:
    """`output` with `sizes[u]` rows of `operand` from `input_offsets[u]` on, put at `output_offsets[u]`, for each u.

    A gather over the rows of `output`; a later update wins where two overlap.
    """
    rows = jnp.arange(output.shape[0], dtype=output_offsets.dtype)[:, None]  # [rows, 1]
    inside = (rows >= output_offsets) & (rows < output_offsets + sizes)  # [rows, updates]
    num_updates = sizes.shape[0]
    update = jnp.max(jnp.where(inside, jnp.arange(num_updates), -1), axis=1)  # [rows], -1 = keep
    chosen = jnp.maximum(update, 0)
    source = input_offsets[chosen] + rows[:, 0] - output_offsets[chosen]
    moved = operand.at[jnp.clip(source, 0, max(operand.shape[0] - 1, 0))].get(mode="clip")
    keep = (update < 0).reshape((-1,) + (1,) * (output.ndim - 1))
    return jnp.where(keep, output, moved)


def _canonical(name: str, argument: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"fabric.{name}: {argument} {axis} is out of range for {ndim} dimensions")
    return axis % ndim
