"""Messages: activations into rows on the wire and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.moe import FabricExchange, message_bytes, pack_rows, unpack_int8, unpack_rows
from cmjax.quant import quantize_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wire", [None, "float32", "bfloat16", "float16", "int8"])
def test_message_bytes_is_what_a_row_takes(rng, wire, dtype):
    x = jnp.asarray(rng.normal(size=(5, 24)), dtype)
    messages = pack_rows(x, wire)
    assert messages.nbytes == 5 * message_bytes(24, x.dtype, wire)
    back = unpack_rows(messages, wire, 24, x.dtype)
    assert back.shape == x.shape
    assert back.dtype == x.dtype


def test_rows_as_they_are_come_back_bit_for_bit(rng):
    x = jnp.asarray(rng.normal(size=(5, 24)), jnp.bfloat16)
    for wire in (None, "bfloat16", "float32"):
        np.testing.assert_array_equal(unpack_rows(pack_rows(x, wire), wire, 24, x.dtype), x)


def test_int8_rounds_by_half_a_step_at_most(rng):
    x = rng.normal(size=(50, 24)).astype(np.float32) * np.logspace(-20, 20, 50, dtype=np.float32)[:, None]
    back = np.asarray(unpack_rows(pack_rows(x, "int8"), "int8", 24, jnp.float32))
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(back - x) <= 0.5001 * step).all()
    assert (back != x).mean() > 0.9


@pytest.mark.parametrize(
    ("hidden", "slot", "size"), [(7168, 512, 7680), (2048, 128, 2176), (160, 8, 168), (40, 4, 44), (5, 4, 12)]
)
def test_int8_messages_have_the_papers_layout(rng, hidden, slot, size):
    # Section 4.2.1: 7 KiB of values, a scale in a slot of 512 bytes; the slot is aligned to its own size.
    assert message_bytes(hidden, jnp.bfloat16, "int8") == size
    x = rng.normal(size=(3, hidden)).astype(np.float32)
    messages = np.asarray(pack_rows(jnp.asarray(x), "int8"))
    qvalue, scale = quantize_rows(jnp.asarray(x))
    assert (size - slot) % slot == 0
    np.testing.assert_array_equal(messages[:, :hidden], qvalue)
    np.testing.assert_array_equal(messages[:, size - slot :][:, :4].copy().view(np.float32)[:, 0], scale)


def test_int8_rows_arrive_as_they_were_sent(rng):
    x = jnp.asarray(rng.normal(size=(5, 24)), jnp.bfloat16)
    sent = quantize_rows(x)
    for wire in ("int8", None):  # rows that travel as they are, are quantized at their expert: the same values
        rows = unpack_int8(pack_rows(x, wire), wire, 24, x.dtype)
        np.testing.assert_array_equal(rows.qvalue, sent[0])
        np.testing.assert_array_equal(rows.scale, sent[1])
        assert rows.dtype == x.dtype


@pytest.mark.parametrize("field", ["dispatch_dtype", "combine_dtype"])
def test_unknown_wire_dtypes_are_errors(field):
    with pytest.raises(UserError, match=f"{field} 'int4' is not one of float32, bfloat16, float16"):
        FabricExchange(axis_name="ep", num_local_experts=1, **{field: "int4"})


def test_combine_has_no_int8():
    with pytest.raises(UserError, match="combine_dtype 'int8'"):
        FabricExchange(axis_name="ep", num_local_experts=1, combine_dtype="int8")
