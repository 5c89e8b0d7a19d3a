"""Number formats: the one matrix product of the layers, and the int8 rows that travel between ranks."""

from cmjax.quant.matmul import einsum_f32, linear
from cmjax.quant.rows import dequantize_rows, quantize_rows

__all__ = ["dequantize_rows", "einsum_f32", "linear", "quantize_rows"]
