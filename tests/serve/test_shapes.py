"""The shapes of steps: host code alone."""

from hypothesis import given
from hypothesis import strategies as st

from cmjax.serve.steps.shapes import bucket


@given(value=st.integers(1, 5000), multiple=st.integers(1, 320))
def test_bucket(value, multiple):
    size = bucket(value, multiple)
    assert size >= value
    assert size % multiple == 0
    assert (size // multiple).bit_count() == 1
    assert size == multiple or size < 2 * value
