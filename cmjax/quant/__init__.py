"""Number formats: the one matrix product of the layers, int8 matrices, and the int8 rows that travel between ranks.

`calibrate`, for offline quantization, is a module of its own.
"""

from cmjax.quant.array import (
    QUANT_MODES,
    AnyArray,
    InputMajor,
    LayerMatrix,
    Matrix,
    QuantArray,
    QuantizedRows,
    QuantMode,
    dequantize,
    dequantize_host,
    in_stack,
    is_by_inputs,
    matrix_at,
    own_matrix,
    quantize,
    split_inputs,
)
from cmjax.quant.matmul import einsum_f32, linear
from cmjax.quant.rows import dequantize_rows, quantize_rows

__all__ = [
    "QUANT_MODES",
    "AnyArray",
    "InputMajor",
    "LayerMatrix",
    "Matrix",
    "QuantArray",
    "QuantMode",
    "QuantizedRows",
    "dequantize",
    "dequantize_host",
    "dequantize_rows",
    "einsum_f32",
    "in_stack",
    "is_by_inputs",
    "linear",
    "matrix_at",
    "own_matrix",
    "quantize",
    "quantize_rows",
    "split_inputs",
]
