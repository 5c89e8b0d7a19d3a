"""Parts, digests, and the record that guards a value outside of DRAM."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.serve.caching import values

PARTS = st.lists(st.binary(max_size=40), min_size=1, max_size=5)


def record_of(digest, parts):
    copies = values.copied(parts)
    return b"".join([values.commit_record(digest, copies), *copies])


@given(parts=PARTS, digest=st.integers(0, 2**128 - 1))
def test_a_record_gives_back_what_was_put(parts, digest):
    data = record_of(digest, parts)
    assert len(data) == values.head_bytes(len(parts)) + sum(map(len, parts))
    assert [bytes(part) for part in values.parts_in(digest, memoryview(data))] == parts
    assert values.parts_in(digest ^ 1, memoryview(data)) is None


@given(parts=PARTS, data=st.data())
def test_nothing_that_was_changed_is_served(parts, data):
    """Every bit counts: of the record, of the lengths, of the parts."""
    right = record_of(7, parts)
    bit = data.draw(st.integers(0, 8 * len(right) - 1))
    flipped = bytearray(right)
    flipped[bit // 8] ^= 1 << bit % 8
    assert values.parts_in(7, memoryview(flipped)) is None
    end = data.draw(st.integers(0, len(right) - 1))
    assert values.parts_in(7, memoryview(right[:end])) is None
    assert values.parts_in(7, memoryview(right + b"\0")) is None


@given(junk=st.binary(max_size=200), is_marked=st.booleans())
def test_junk_is_no_value(junk, is_marked):
    assert values.parts_in(7, memoryview(b"cmjV\1\0" * is_marked + junk)) is None


def test_parts_are_copied_once_and_cannot_be_written():
    source = np.arange(6, dtype=np.float32).reshape(2, 3)
    [own] = values.copied([source])
    source[:] = 0
    assert np.array_equal(np.frombuffer(own, np.float32), np.arange(6))
    with pytest.raises(TypeError):
        own[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        np.frombuffer(own, np.uint8)[:] = 1


@pytest.mark.parametrize(
    "part",
    [b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), np.frombuffer(b"abcd", np.uint16), np.array(7.0, np.float32)],
)
def test_what_a_part_may_be(part):
    assert len(values.bytes_of(part)) == 4


def test_types_without_a_buffer_of_their_own_are_parts_too():
    latents = np.arange(4).astype(ml_dtypes.bfloat16)
    assert bytes(values.bytes_of(latents)) == latents.tobytes()


def test_what_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="not contiguous"):
        values.bytes_of(np.zeros((4, 4))[:, 1])


def test_namespaces_and_keys_do_not_run_into_each_other():
    digests = {values.digest_of(*pair) for pair in [("a", b"bc"), ("ab", b"c"), ("", b"abc"), ("abc", b"")]}
    assert len(digests) == 4
