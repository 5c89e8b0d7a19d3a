"""Canonical forms: how each collective's argument becomes rank-major rows, and how its result is put back.

The exchanges know one layout per collective (`[ranks, ...]` in or out); axes of the caller are moved here.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

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


def checked_perm(perm: Sequence[tuple[int, int]], num_ranks: int) -> tuple[tuple[int, int], ...]:
    """`perm` as a tuple of (source, destination), once it is one that `ppermute` can follow."""
    pairs = tuple((int(source), int(target)) for source, target in perm)
    for what, ranks in (("source", [s for s, _ in pairs]), ("destination", [d for _, d in pairs])):
        if len(set(ranks)) != len(ranks) or not all(0 <= rank < num_ranks for rank in ranks):
            raise ValueError(f"fabric.ppermute: {what} ranks must be distinct and in [0, {num_ranks}), got {ranks}")
    return pairs


def checked_ragged_index(
    operand: Array, output_dtype: np.dtype, output_shape: tuple[int, ...], arrays: Sequence[ArrayLike], num_ranks: int
) -> tuple[Array, ...]:
    """The four index arrays of a ragged exchange in one integer type, once everything about them fits together."""
    index = tuple(map(jnp.asarray, arrays))
    if operand.dtype != output_dtype or operand.ndim < 1 or operand.shape[1:] != output_shape[1:]:
        raise ValueError(
            f"fabric.ragged_all_to_all: operand {operand.dtype}{operand.shape} and output {output_dtype}{output_shape} "
            "may differ in rows only"
        )
    shape = index[0].shape
    if any(array.shape != shape for array in index) or len(shape) != 1 or not shape[0] or shape[0] % num_ranks:
        raise ValueError(
            "fabric.ragged_all_to_all: offsets and sizes must be four vectors of one length, a multiple of the "
            f"{num_ranks} ranks, got shapes {[array.shape for array in index]}"
        )
    if not all(jnp.issubdtype(array.dtype, jnp.integer) for array in index):
        raise TypeError(
            f"fabric.ragged_all_to_all: offsets and sizes must be integers, got {[array.dtype.name for array in index]}"
        )
    wide = any(array.dtype.itemsize == 8 for array in index)
    return tuple(array.astype(jnp.int64 if wide else jnp.int32) for array in index)


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


# What an exchange over an axis of size 1 comes to, where nothing moves (psum, which changes its type, apart).
ALONE: dict[str, Callable[..., Array]] = {
    "all_to_all": lambda x, **_: x,
    "all_gather": lambda x, **_: x[None],
    "psum_scatter": lambda x, **_: x[0],
    "ppermute": lambda x, *, perm, **_: x if perm else jnp.zeros_like(x),
    "ragged_all_to_all": lambda x, output, start, sizes, target, _recv_sizes, **_: place_ragged_rows(
        x, output, start, target, sizes
    ),
}


def _canonical(name: str, argument: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"fabric.{name}: {argument} {axis} is out of range for {ndim} dimensions")
    return axis % ndim
