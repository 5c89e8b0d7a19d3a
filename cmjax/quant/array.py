"""Quantized values: matrices with a static scale an output channel, rows with a dynamic scale a token (section 4.5)."""

from typing import Any, Literal, TypeAlias, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, DTypeLike

# int8: a real int8 product, rescaled. fake: the same values as floats, multiplied as floats.
QuantMode = Literal["int8", "fake"]
QUANT_MODES: tuple[QuantMode, ...] = get_args(QuantMode)
INT8_MAX = 127
AnyArray: TypeAlias = jax.Array | np.ndarray  # on devices, or on the host


@flax.struct.dataclass
class QuantArray:
    """Matrices `[..., out, in]` in int8, each output channel with a scale: `qvalue * scale[..., None]`.

    It takes the place of the array in a tree of parameters: leading axes are indexed, scanned and sharded alike.

    Attributes:
        qvalue: `int8[..., out, in]`, -127 to 127.
        scale: `float32[..., out]`; 0 for a channel of zeros.
        mode: how `linear` multiplies by it.
    """

    qvalue: AnyArray
    scale: AnyArray
    mode: QuantMode = flax.struct.field(pytree_node=False, default="int8")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        return tuple(self.qvalue.shape)

    @property
    def ndim(self) -> int:
        """Axes of the matrices."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "QuantArray":
        """Index leading axes or output channels, the last axis never."""
        return QuantArray(self.qvalue[index], self.scale[index], self.mode)

    def reshape(self, *shape: int) -> "QuantArray":
        """Merge or split leading axes and output channels; the last axis stays."""
        if shape[-1] != self.shape[-1]:
            raise ValueError(f"the input axis stays {self.shape[-1]}, not {shape[-1]}")
        return QuantArray(self.qvalue.reshape(shape), self.scale.reshape(shape[:-1]), self.mode)


@flax.struct.dataclass
class InputMajor:
    """Float matrices `[..., out, in]` stored by inputs.

    XLA's CPU backend repacks a float32 matrix stored by outputs in every product with a few rows, which takes longer
    than the product. It takes the place of the array in a tree of parameters, where only `linear` meets it.

    Attributes:
        value: `[..., in, out]`.
    """

    value: AnyArray


@flax.struct.dataclass
class LayerMatrix:
    """One layer's matrix where it lies, among those of all layers: a product reads it there, nothing is copied out.

    It takes the place of the array in a layer's parameters, where only `linear` meets it.

    Attributes:
        stack: `[layers, ..., out, in]`.
        layer: `int32[]`.
    """

    stack: AnyArray | QuantArray | InputMajor
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix; not of one stored by inputs."""
        return tuple(self._by_outputs.shape[1:])

    def reshape(self, *shape: int) -> "LayerMatrix":
        """Merge or split axes of outputs; not of a matrix stored by inputs."""
        stack = self._by_outputs
        return LayerMatrix(stack.reshape(stack.shape[0], *shape), self.layer)

    @property
    def _by_outputs(self) -> AnyArray | QuantArray:
        assert not isinstance(self.stack, InputMajor)
        return self.stack


Matrix: TypeAlias = AnyArray | QuantArray | InputMajor | LayerMatrix


@flax.struct.dataclass
class QuantizedRows:
    """Activations `[rows, width]` in int8, each row with a scale, and the dtype that they had.

    Attributes:
        qvalue: `int8[rows, width]`.
        scale: `float32[rows]`.
        dtype: of what a product with them returns.
    """

    qvalue: jax.Array
    scale: jax.Array
    dtype: np.dtype = flax.struct.field(pytree_node=False, default=jnp.float32)


def quantize(weight: ArrayLike, mode: QuantMode = "int8") -> QuantArray:
    """Round `weight[..., out, in]` to the nearest, each output channel by its largest value (numpy, on the host)."""
    values = np.asarray(weight, np.float32)
    scale = np.abs(values).max(-1) / np.float32(INT8_MAX)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    qvalue = np.clip(np.rint(values * inverse[..., None]), -INT8_MAX, INT8_MAX).astype(np.int8)
    return QuantArray(qvalue, scale, mode)


def dequantize(weight: QuantArray, dtype: DTypeLike = np.float32) -> AnyArray:
    """The matrices as floats."""
    return (weight.qvalue.astype(np.float32) * weight.scale[..., None]).astype(np.dtype(dtype))


def dequantize_host(weight: QuantArray, dtype: DTypeLike) -> np.ndarray:
    """The matrices as floats of `dtype` (numpy, on the host)."""
    return (np.asarray(weight.qvalue, np.float32) * np.asarray(weight.scale)[..., None]).astype(dtype)


def split_inputs(weight: AnyArray | QuantArray, count: int) -> np.ndarray | QuantArray:
    """Cut `[lead, out, in]`, quantized or not, into `count` matrices that take a part of the inputs each:
    `[lead, count, out, in / count]` (numpy, on the host)."""
    if isinstance(weight, QuantArray):
        # Every part keeps the whole's scales: their products are summed.
        scale = np.repeat(np.asarray(weight.scale)[:, None], count, axis=1)
        return QuantArray(_split_inputs(weight.qvalue, count), scale, weight.mode)
    return _split_inputs(weight, count)


def _split_inputs(values: AnyArray, count: int) -> np.ndarray:
    lead, out, _ = values.shape
    return np.asarray(values).reshape(lead, out, count, -1).transpose(0, 2, 1, 3)


def is_by_inputs(weight: Matrix) -> bool:
    """Whether the matrix, or the stack that it lies in, is an `InputMajor`."""
    return isinstance(weight.stack if isinstance(weight, LayerMatrix) else weight, InputMajor)


def in_stack(weight: Matrix) -> LayerMatrix:
    """The matrix, stored by outputs, in its stack; one that has none is a stack of its own."""
    assert not isinstance(weight, InputMajor)
    if isinstance(weight, LayerMatrix):
        return weight
    return LayerMatrix(jax.tree.map(lambda leaf: leaf[None], weight), jnp.int32(0))


def own_matrix(weight: Matrix) -> Matrix:
    """The matrix apart from its stack, where it is a `LayerMatrix`; else as it is."""
    return matrix_at(weight.stack, weight.layer) if isinstance(weight, LayerMatrix) else weight


def matrix_at(weight: Matrix, *index: jax.Array | int) -> Matrix:
    """`weight[index]` for indices known at run time."""

    def take(leaf: jax.Array) -> jax.Array:
        rest = leaf.shape[len(index) :]
        part = lax.dynamic_slice(leaf, (*index, *(0,) * len(rest)), (*(1,) * len(index), *rest))
        return part.reshape(rest)

    return jax.tree.map(take, weight)
