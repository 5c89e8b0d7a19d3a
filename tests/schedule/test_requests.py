"""Requests and their attempts: what they take, what they hold, and what their clients are told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.schedule import MAX_STEP_STOPS, Attempt, BlockPool, Request, SamplingParams, SamplingRows, TokenLogprobs
from cmjax.schedule.request import DecodeHold, PrefillHold
from tests.schedule.clusters import make_request


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


def test_stop_tokens_that_a_step_does_not_know_end_a_request_all_the_same():
    stops = tuple(range(100, 100 + MAX_STEP_STOPS + 3))
    request = make_request(0, [1], 20, stop_token_ids=stops)
    rows = SamplingRows.of([request.sampling], [request.seed], [request.prompt_ids])
    assert rows.stop_ids.values.tolist() == list(stops[:MAX_STEP_STOPS])
    assert request.append([1, 2, 3]) == 3
    assert request.append([4, stops[-1], 5]) == 2
    assert request.token_ids == [1, 2, 3, 4, stops[-1]]
    assert request.finish_reason == "stop"


@given(
    calls=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=8),
    max_tokens=st.integers(1, 12),
    stops=st.lists(st.integers(0, 9), max_size=2),
    min_tokens=st.integers(0, 12),
)
def test_a_request_takes_what_comes_until_its_end(calls, max_tokens, stops, min_tokens):
    min_tokens = min(min_tokens, max_tokens)
    request = make_request(0, [1, 2], max_tokens, stop_token_ids=tuple(stops), min_tokens=min_tokens)
    made = [token for tokens in calls for token in tokens]
    wanted = made[:max_tokens]
    end = next((index for index, token in enumerate(wanted) if token in stops and index >= min_tokens), None)
    wanted = wanted if end is None else wanted[: end + 1]
    assert sum(request.append(tokens) for tokens in calls) == len(wanted)
    assert request.token_ids == wanted
    is_full = len(wanted) == max_tokens
    assert request.finish_reason == ("stop" if end is not None else "length" if is_full else None)


def test_what_is_computed_again_is_all_but_the_newest_token():
    request = make_request(0, [1, 2, 3], 8)
    assert (request.num_cached, request.is_resumed) == (3, False)
    assert request.prefill_slice(0, 3) == [1, 2, 3]
    assert request.prefill_slice(2, 5) == [3]
    request.append([7])
    assert (request.num_cached, request.is_resumed) == (3, True)
    request.append([8, 9])
    assert request.num_cached == 5
    assert request.prefill_slice(0, 5) == [1, 2, 3, 7, 8]
    assert request.prefill_slice(1, 4) == [2, 3, 7]
    assert request.prefill_slice(4, 6) == [8, 9]
    assert request.prefill_slice(4, 4) == []


def test_the_urgent_and_those_that_came_first_go_first():
    late, early = make_request(0, [1], at=2.0), make_request(1, [1], at=1.0)
    important = make_request(2, [1], at=3.0, priority=-1)
    assert sorted([late, early, important], key=lambda one: one.urgency) == [important, early, late]


def test_a_request_without_a_seed_gets_one_of_its_own():
    seeds = {make_request(index, [1]).seed for index in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert make_request(0, [1], seed=5).seed == 5


def logprobs_of(tokens):
    return [TokenLogprobs(token, -1.0, 1, ()) for token in tokens]


def test_updates_tell_each_token_once():
    request = make_request(0, [1, 2], 5, logprobs=0, prompt_logprobs=0)
    assert request.take_update().token_ids == []
    assert request.take_update().prompt_logprobs is None
    request.prompt_logprobs[1:] = logprobs_of([2])
    request.append([7, 8])
    request.logprobs += logprobs_of([7, 8])
    first = request.take_update()
    assert first.token_ids == [7, 8]
    assert first.logprobs == logprobs_of([7, 8])
    assert first.prompt_logprobs == [None, *logprobs_of([2])]
    assert first.finish_reason is None
    request.append([9, 10, 11])
    request.logprobs += logprobs_of([9, 10, 11])
    request.num_preemptions = 2
    second = request.take_update()
    assert second.token_ids == [9, 10, 11]
    assert second.logprobs == logprobs_of([9, 10, 11])
    assert second.prompt_logprobs is None
    assert (second.finish_reason, second.num_preemptions) == ("length", 2)
    output = request.output()
    assert output.logprobs == logprobs_of([7, 8, 9, 10, 11])
    assert output.prompt_logprobs == [None, *logprobs_of([2])]


def test_an_attempt_gives_back_what_it_holds_once():
    places, blocks, slots, cache = (BlockPool(8) for _ in range(4))
    request = make_request(0, [1, 2, 3], 4)
    attempt = Attempt(7, request, "prefill0", "decode0", 3)
    assert attempt.leases() == []
    attempt.prefill = PrefillHold(places.take(1), blocks.take(2))
    attempt.decode = DecodeHold(1, slots.take(1), cache.take(3))
    assert len(attempt.leases()) == 4
    attempt.leave_source()
    assert (places.num_free, blocks.num_free, slots.num_free, cache.num_free) == (8, 8, 7, 5)
    attempt.leave_source()  # it has left: nothing is given back twice
    attempt.end()
    assert attempt.is_over
    assert (slots.num_free, cache.num_free) == (8, 8)
    assert attempt.leases() == []
