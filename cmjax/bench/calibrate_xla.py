"""XLA's own operators, in rows of one kind each: what `cmjax.bench.calibrate` fits their costs to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.model.cache import read_blocks, write_rows

_SMALL = (8, 64)
_REPEATS = 4
_MANY = 8  # times over, so that no core keeps the code of all that it runs close by
_BLOCK = 16
_apart = lax.optimization_barrier  # what XLA would fuse otherwise


@dataclasses.dataclass(frozen=True)
class Chain:
    """Operators that each take what the one before gives.

    Attributes:
        body: `(x, *others) -> x`, on one device.
        make: the arrays of one device.
    """

    body: Callable[..., jax.Array]
    make: Callable[[np.random.Generator], tuple[np.ndarray, ...]]


def chains() -> list[tuple[tuple[str, ...], list[Chain]]]:
    """`(costs, what they are fitted to)` in turn, each beside the costs before it."""
    scores, halves = (4, 128, 128), (128, 512)
    return [
        (("operator_s",), [Chain(_small, _arrays(_SMALL, *[_SMALL] * _MANY))]),
        (("worked_s", "touched_s", "spilled_s", "parted_s"), [
            Chain(body, _arrays(*[shape] * 6)) for body in (_masked, _copied) for shape in (scores, scores[1:])
        ]),
        (("bent_s",), [Chain(_exponentials, _arrays(scores))]),
        (("rounded_s", "padded_s"), [
            Chain(_gated, _arrays(halves, dtype=jnp.bfloat16)),
            Chain(_added, _arrays(halves, halves, dtype=jnp.bfloat16)),
            Chain(_padded, _arrays((512, 4, 24), dtype=jnp.bfloat16)),
        ]),
        (("reduced_s", "library_s"), [
            Chain(_reduced, _arrays(scores)),
            Chain(_reduced, _arrays((1, 128, 128))),
        ]),
        (("folded_s", "mapped_s"), [Chain(_combined, _choices(tokens)) for tokens in (256, 2048)]),
        (("dot_s", "dot_value_s"), [
            Chain(lambda x, w: jnp.einsum("hqd,hdk->hqk", x, w), _arrays((4, 128, 128), (4, 128, 128))),
            Chain(_scored, _arrays(*[(4, 128, 24)] * 3)),
            Chain(_scored, _arrays(*[(1, 128, 24)] * 3)),
        ]),
        (("gathered_s", "searched_s"), [
            Chain(_read, _with_zero(_cached(4096, 16))),
            Chain(_taken, _arrays((260, 64))),
        ]),
        (("scattered_s",), [Chain(_written, _cached(256, 16))]),
        # Values that differ each time, so that no turn finds them in order.
        (("top_k_s",), [Chain(lambda x: jnp.sin(x * 97) + lax.top_k(x, 8)[0][:, :1], _arrays((64, 256)))]),
        (("compared_s",), [Chain(lambda x: jnp.sort(jnp.sin(x * 97)), _arrays((4096,)))]),
    ]  # fmt: skip


def _arrays(*shapes: tuple[int, ...], dtype: Any = np.float32) -> Callable[[np.random.Generator], tuple]:
    return lambda rng: tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def _cached(rows: int, blocks: int) -> Callable[[np.random.Generator], tuple[np.ndarray, ...]]:
    """A cache, and a table of some of its blocks."""
    return lambda rng: (
        rng.standard_normal((2, rows, 32)).astype(jnp.bfloat16),
        rng.permutation(rows // _BLOCK)[:blocks].astype(np.int32).reshape(1, -1),
    )


def _with_zero(make: Callable[[np.random.Generator], tuple]) -> Callable[[np.random.Generator], tuple]:
    return lambda rng: (np.zeros(1, np.float32), *make(rng))


def _small(x: jax.Array, *others: jax.Array) -> jax.Array:
    """What stands between the kernels of a layer, no two operators alike, each with an array of its own."""
    for number, other in enumerate(others):
        width = x.shape[-1] // 2
        left, right = jnp.split(_apart(x + other), 2, axis=-1)
        x = _apart(jnp.concatenate([right, -left], axis=-1) * (1 + number))
        x = _apart(x.astype(jnp.bfloat16)).astype(jnp.float32) * 0.5
        index = _apart(jnp.clip(x[:, 0].astype(jnp.int32) + number, 0, x.shape[0] - 1))
        x = _apart(jnp.take(other, index, axis=0, mode="clip")) + x
        x = _apart(x.at[:, number].set(0.25))
        row = _apart(lax.dynamic_index_in_dim(other, index[0], keepdims=False))
        most = _apart(x.max(-1) + number)
        x = _apart(jnp.where(index[:, None] < number, row, x * most[:, None]))
        x = x.at[:, :width].add(_apart(x[:, width:] * number))
    return x


def _masked(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Elementwise alone, over arrays that come by seldom."""
    for number, other in enumerate(others):
        ordered = (
            jnp.arange(x.shape[-1]) <= (jnp.arange(x.shape[-2]) + x.reshape(-1)[number].astype(jnp.int32))[:, None]
        )
        ordered &= jnp.arange(x.shape[-1]) < 120 + number
        x = _apart(jnp.where(ordered, (x + other) * 0.999, -1.0))
    return x


def _copied(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Arrays that are hardly computed."""
    for other in others:
        x = _apart(x + other)
    return x * 1e-3


def _added(x: jax.Array, other: jax.Array) -> jax.Array:
    for _ in range(_REPEATS):
        x = _apart(x + other)
    return x


def _exponentials(x: jax.Array) -> jax.Array:
    for _ in range(_REPEATS):
        x = _apart(jnp.exp(x * 0.3 - 1.0))
    return x


def _gated(x: jax.Array) -> jax.Array:
    """An activation in bfloat16, whose every step is rounded."""
    for _ in range(_REPEATS):
        gate, up = jnp.split(x, 2, axis=-1)
        gate = _apart(jax.nn.silu(gate) * up)
        x = _apart(jnp.concatenate([gate, up], axis=-1))
    return x


def _reduced(x: jax.Array) -> jax.Array:
    """Maxima and sums of the last axis."""
    for _ in range(2):
        most = _apart(x.max(-1))
        x = _apart(x.at[..., 0].add(_apart(x.sum(-1)) * 1e-6 + most * 1e-6))
    return x


def _combined(x: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Rows of several choices, each with its weight, as one."""
    rows = _apart((rows, x))[0].astype(jnp.float32)  # what depends on `x` stays in the loop
    return (x + (rows * weights[..., None]).sum(1)).astype(x.dtype)


def _choices(tokens: int) -> Callable[[np.random.Generator], tuple[np.ndarray, ...]]:
    def make(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        x, rows = (rng.standard_normal(shape).astype(jnp.bfloat16) for shape in ((tokens, 64), (tokens, 8, 64)))
        return x, rows, rng.standard_normal((tokens, 8)).astype(np.float32)

    return make


def _scored(x: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Products of little depth, and of few outputs."""
    scores = _apart(jnp.einsum("hqd,hkd->hqk", x, keys))
    return jnp.einsum("hqk,hkd->hqd", scores, values) * 1e-2


def _read(x: jax.Array, cache: jax.Array, table: jax.Array) -> jax.Array:
    """The rows of a chunk of keys, through the table of their blocks."""
    for _ in range(_REPEATS):
        later = (x[0] > 1e9).astype(jnp.int32)
        rows = _apart(read_blocks(cache, later + 1, table[:, :8], later, 8, _BLOCK))
        x = x + rows[0, 0, :1].astype(jnp.float32) * 1e-9
    return x


def _taken(x: jax.Array) -> jax.Array:
    """Rows by indices that are there."""
    for _ in range(_REPEATS):
        index = _apart(jnp.clip(x[:8, 0].astype(jnp.int32) + 8, 0, x.shape[0] - 1))
        x = _apart(x.at[:8].set(_apart(jnp.take(x, index, axis=0, mode="clip"))))
    return x


def _written(cache: jax.Array, table: jax.Array) -> jax.Array:
    slots = (table[0, :, None] * _BLOCK + jnp.arange(_BLOCK)).reshape(-1)
    for number in range(_REPEATS):
        cache = _apart(write_rows(cache, number % 2, slots, cache[0, : slots.shape[0]] * 0.999))
    return cache


def _padded(x: jax.Array) -> jax.Array:
    """Heads before tokens, with room behind them, and back."""
    length = x.shape[0]
    for _ in range(2):
        wide = _apart(jnp.pad(x.transpose(1, 0, 2) * 0.5, ((0, 0), (0, 128), (0, 0))))
        x = _apart(wide[:, 1 : length + 1].transpose(1, 0, 2) * 1.5)
    return x
