"""Requests and the shapes of steps: host code alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.serve import SamplingParams
from cmjax.serve.instance import bucket
from cmjax.serve.request import Request


@given(value=st.integers(1, 5000), multiple=st.integers(1, 320))
def test_bucket(value, multiple):
    size = bucket(value, multiple)
    assert size >= value
    assert size % multiple == 0
    assert (size // multiple).bit_count() == 1
    assert size == multiple or size < 2 * value


def test_a_request_ends_at_its_limit_or_its_stop_token():
    request = Request("prompt 0", [1, 2, 3], SamplingParams(max_tokens=4))
    assert request.num_tokens == 6
    assert request.append([7]) == 1
    assert request.finish_reason is None
    with pytest.raises(ValueError, match="prompt 0 has not finished"):
        request.output()
    assert request.append([8, 9, 10, 11, 12]) == 3
    assert request.output().token_ids == [7, 8, 9, 10]
    assert request.output().finish_reason == "length"
    assert request.append([13]) == 0

    request = Request("prompt 0", [1], SamplingParams(max_tokens=9, stop_token_ids=(5, 6)))
    assert request.append([4, 6, 5]) == 2
    assert request.output().token_ids == [4, 6]
    assert request.output().finish_reason == "stop"

    request = Request("prompt 0", [1], SamplingParams(max_tokens=1, stop_token_ids=(6,)))
    request.append([6])
    assert request.finish_reason == "stop"
