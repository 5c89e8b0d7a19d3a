"""`quant="auto"`: which matrices int8 makes faster on this machine, at the rows that a step has."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import DTypeLike

from cmjax.model import ModelConfig, abstract_params, expert_kind, is_quantized, named_leaves
from cmjax.quant import QUANT_MODES, Matrix, linear, matrix_at, quantize

# ((out, in), rows, dtype) -> seconds of a product with float weights, and with int8 weights.
Seconds = Callable[[tuple[int, int], int, np.dtype], tuple[float, float]]

_LAYERS, _PRODUCTS, _ROUNDS = 2, 8, 5
_MOST_ROWS = 128  # of an expert at a time


@functools.cache
def product_seconds(shape: tuple[int, int], rows: int, dtype: np.dtype) -> tuple[float, float]:
    """Seconds of one `linear` as the layers run it: its weights taken from a stack, int8 rows quantized within.

    Medians over a few rounds, the two in turn.
    """
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((_LAYERS, *shape), np.float32)
    x = jnp.asarray(rng.standard_normal((rows, shape[1])), dtype)
    weights = [jnp.asarray(floats, dtype), jax.device_put(quantize(floats, QUANT_MODES[0]))]

    @jax.jit
    def run(x: jax.Array, weight: Matrix) -> jax.Array:
        def product(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
            y = linear(x, matrix_at(weight, layer))
            return x + y.mean(-1, keepdims=True) * jnp.asarray(1e-6, x.dtype), None  # one after another

        return lax.scan(product, x, jnp.arange(_PRODUCTS) % _LAYERS)[0]

    taken: list[list[float]] = [[], []]
    for _ in range(1 + _ROUNDS):
        for weight, seconds in zip(weights, taken, strict=True):
            begin = time.perf_counter()
            run(x, weight).block_until_ready()
            seconds.append((time.perf_counter() - begin) / _PRODUCTS)
    in_float, in_int8 = (float(np.median(seconds[1:])) for seconds in taken)  # the first one compiles
    return in_float, in_int8


def int8_leaves(config: ModelConfig, dtype: DTypeLike, rows: int, seconds: Seconds = product_seconds) -> frozenset[str]:
    """The leaves (see `named_leaves`) that are faster in int8 than as floats of `dtype`.

    Routed and shared experts are decided together, as are the two matrices of an MLP: one may stand beside the other on
    a rank, and rows travel in one format.

    Args:
        config: of the model.
        dtype: of the weights that stay floats, and of activations.
        rows: of a step on one device: its sequences in decode, its tokens in prefill. An expert is taken to receive its
            share of as many.
        seconds: measures one product.
    """
    groups: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for name, leaf in named_leaves(abstract_params(config, dtype)).items():
        if is_quantized(name):
            groups.setdefault(_group(name), {})[name] = leaf
    chosen: set[str] = set()
    for leaves in groups.values():
        in_float = in_int8 = 0.0
        for name, leaf in leaves.items():
            shape, seen, count = _product(config, name, leaf, rows)
            one = seconds(shape, seen, np.dtype(dtype))
            in_float, in_int8 = in_float + count * one[0], in_int8 + count * one[1]
        if in_int8 < in_float:
            chosen |= leaves.keys()
    return frozenset(chosen)


def _group(name: str) -> str:
    if expert_kind(name) is not None:
        return "experts"
    return "mlp" if ".mlp." in name else name.rsplit(".", 1)[-1]


def _product(config: ModelConfig, name: str, leaf: jax.ShapeDtypeStruct, rows: int) -> tuple[tuple[int, int], int, int]:
    """Shape of the leaf's matrices, the rows that each multiplies, and how many do in a step."""
    *lead, out, width = leaf.shape
    if expert_kind(name) == "routed":
        share = -(-rows * config.num_topk // config.num_routed_experts)
        visits = min(rows * config.num_topk, config.num_routed_experts)
        return (out, width), min(share, _MOST_ROWS), lead[0] * visits
    if name.endswith("q_b"):
        return (lead[1] * out, width), rows, lead[0]
    return (out, width), rows, lead[0] if lead else 1
