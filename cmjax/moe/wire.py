"""What a token row looks like while it travels: as it is, cast, or int8 with its scale in the same message."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from cmjax.errors import UserError
from cmjax.quant import dequantize_rows, quantize_rows

WireDtype = Literal["float32", "bfloat16", "float16", "int8"]

_SCALE_BYTES = 4


def check_wire_dtype(name: str, value: str | None, *, allow_int8: bool) -> None:
    """Raise `UserError` where the setting `name` is no wire dtype (None: rows travel as they are)."""
    allowed = ("float32", "bfloat16", "float16", *(("int8",) if allow_int8 else ()))
    if value is not None and value not in allowed:
        raise UserError(f"{name} {value!r} is not one of {', '.join(allowed)}")


def message_bytes(hidden: int, dtype: jnp.dtype, wire: WireDtype | None) -> int:
    """Bytes of one row of `hidden` activations on the wire."""
    if wire == "int8":
        return hidden + _SCALE_BYTES
    return hidden * jnp.dtype(wire or dtype).itemsize


def pack_rows(x: jax.Array, wire: WireDtype | None) -> jax.Array:
    """Turn `x[rows, hidden]` into messages `[rows, width]`; for int8 the last four bytes are the float32 scale."""
    if wire != "int8":
        return x if wire is None else x.astype(wire)
    qvalue, scale = quantize_rows(x)
    return jnp.concatenate([qvalue, lax.bitcast_convert_type(scale, jnp.int8)], axis=-1)


def unpack_rows(messages: jax.Array, wire: WireDtype | None, dtype: jnp.dtype) -> jax.Array:
    """Turn messages `[rows, width]` back into `[rows, hidden]` in `dtype`."""
    if wire != "int8":
        return messages.astype(dtype)
    scale = lax.bitcast_convert_type(messages[:, -_SCALE_BYTES:], jnp.float32)
    return dequantize_rows(messages[:, :-_SCALE_BYTES], scale, dtype)
