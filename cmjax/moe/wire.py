"""What a token row looks like while it travels: as it is, cast, or int8 with its scale in the same message."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from cmjax.errors import UserError
from cmjax.quant import QuantizedRows, dequantize_rows, quantize_rows

WireDtype = Literal["float32", "bfloat16", "float16", "int8"]

_SCALE_BYTES = 4
# The paper's slot for the scale is 512 bytes behind a row of 7,168: a fourteenth. Shorter rows keep the proportion.
_MOST_SLOT_BYTES = 512
_ROW_OVER_SLOT = 14


def scale_slot_bytes(hidden: int) -> int:
    """Bytes of the slot that holds an int8 row's scale, a power of two; the slot begins at a multiple of it."""
    wanted = min(_MOST_SLOT_BYTES, max(_SCALE_BYTES, hidden // _ROW_OVER_SLOT))
    return 1 << (wanted.bit_length() - 1)


def padded_row(hidden: int) -> int:
    """Where the scale's slot begins."""
    return -(-hidden // scale_slot_bytes(hidden)) * scale_slot_bytes(hidden)


def check_wire_dtype(name: str, value: str | None, *, allow_int8: bool) -> None:
    """Raise `UserError` where the setting `name` is no wire dtype (None: rows travel as they are)."""
    allowed = [wire for wire in get_args(WireDtype) if allow_int8 or wire != "int8"]
    if value is not None and value not in allowed:
        raise UserError(f"{name} {value!r} is not one of {', '.join(allowed)}")


def message_bytes(hidden: int, dtype: jnp.dtype, wire: WireDtype | None) -> int:
    """Bytes of one row of `hidden` activations on the wire."""
    if wire == "int8":
        return padded_row(hidden) + scale_slot_bytes(hidden)
    return hidden * jnp.dtype(wire or dtype).itemsize


def pack_rows(x: jax.Array, wire: WireDtype | None) -> jax.Array:
    """Turn `x[rows, hidden]` into messages `[rows, width]`.

    An int8 message is the row, padded so that the slot behind it is aligned, and the slot, whose first four bytes are
    the float32 scale (paper section 4.2.1: 7,168 values and their scale are 7.5 KiB).
    """
    if wire != "int8":
        return x if wire is None else x.astype(wire)
    rows, hidden = x.shape
    qvalue, scale = quantize_rows(x)
    gap = jnp.zeros((rows, padded_row(hidden) - hidden), jnp.int8)
    rest = jnp.zeros((rows, scale_slot_bytes(hidden) - _SCALE_BYTES), jnp.int8)
    return jnp.concatenate([qvalue, gap, lax.bitcast_convert_type(scale, jnp.int8), rest], axis=-1)


def unpack_int8(messages: jax.Array, wire: WireDtype | None, hidden: int, dtype: jnp.dtype) -> QuantizedRows:
    """Turn messages `[rows, width]` into int8 rows for a product that takes them; their products have `dtype`.

    Rows that travelled as int8 are what was sent, bit for bit; others are quantized here.
    """
    if wire != "int8":
        return QuantizedRows(*quantize_rows(messages), dtype)
    at = padded_row(hidden)
    scale = lax.bitcast_convert_type(messages[:, at : at + _SCALE_BYTES], jnp.float32)
    return QuantizedRows(messages[:, :hidden], scale, dtype)


def unpack_rows(messages: jax.Array, wire: WireDtype | None, hidden: int, dtype: jnp.dtype) -> jax.Array:
    """Turn messages `[rows, width]` back into `[rows, hidden]` in `dtype`."""
    if wire != "int8":
        return messages.astype(dtype)
    rows = unpack_int8(messages, wire, hidden, dtype)
    return dequantize_rows(rows.qvalue, rows.scale, dtype)
