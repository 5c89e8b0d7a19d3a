"""How work is cut into steps of a few sizes: never slower than any other cut, by brute force."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.schedule.autotune import StepTimes


def fastest(num_tokens, sizes, seconds):
    """Seconds and steps of the best cut."""

    @functools.cache
    def best(left):
        if left <= 0:
            return (0.0, 0)
        options = [(seconds[size] + best(left - size)[0], 1 + best(left - size)[1]) for size in sizes]
        return min(options)

    return best(num_tokens)


@given(
    num_tokens=st.integers(1, 300),
    smallest=st.integers(1, 20),
    factors=st.lists(st.integers(2, 4), max_size=2),
    milliseconds=st.lists(st.integers(1, 50), min_size=3, max_size=3),
)
def test_the_cut_is_the_fastest(num_tokens, smallest, factors, milliseconds):
    sizes = [smallest]
    for factor in factors:
        sizes.append(sizes[-1] * factor)
    seconds = dict(zip(sizes, map(float, milliseconds), strict=False))
    times = StepTimes()
    for size, value in seconds.items():
        times.add(size, value)
    taken, left, num_steps = 0.0, num_tokens, 0
    while left > 0:
        size = times.first_step(left, sizes)
        taken, left, num_steps = taken + seconds[size], left - size, num_steps + 1
    assert (pytest.approx(taken), num_steps) == fastest(num_tokens, tuple(sizes), seconds)


SIZES = [128, 512, 2048]


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 128), (128, 128), (129, 512), (600, 2048), (2048, 2048), (5000, 2048)]
)
def test_without_experience_everything_goes_into_as_few_steps_as_can_be(num_tokens, expected):
    assert StepTimes().first_step(num_tokens, SIZES) == expected


def test_the_example_of_the_docstring():
    fast, slow = StepTimes(), StepTimes()
    for times, values in ((fast, (0.03, 0.045, 0.15)), (slow, (0.1, 0.11, 0.15))):
        for size, seconds in zip(SIZES, values, strict=True):
            times.add(size, seconds)
    assert [times.first_step(600, SIZES) for times in (fast, slow)] == [512, 2048]


def test_one_slow_step_changes_nothing_and_many_do():
    times = StepTimes()
    for size, seconds in zip(SIZES, (0.03, 0.045, 0.15), strict=True):
        for _ in range(5):
            times.add(size, seconds)
    times.add(512, 5.0)
    assert times.first_step(600, SIZES) == 512
    for _ in range(StepTimes.NUM_KEPT):
        times.add(512, 5.0)
    assert times.first_step(600, SIZES) != 512


def test_a_size_that_was_never_tried_is_tried_where_it_could_pay():
    times = StepTimes()
    times.add(2048, 0.3)
    assert times.first_step(100, SIZES) == 128
    assert times.first_step(600, SIZES) == 512


@pytest.mark.parametrize(("num_tokens", "expected"), [(100, [128]), (600, [2048]), (1000, [2048]), (1500, [2048])])
def test_larger_steps_are_found_to_be_faster_as_they_come(num_tokens, expected):
    """As an engine comes up: with its smallest step, then the largest, then that between."""
    seconds, times = {128: 0.1, 512: 0.11, 2048: 0.15}, StepTimes()

    def cut(sizes):
        left, found = num_tokens, []
        while left > 0:
            found.append(times.first_step(left, sizes))
            times.add(found[-1], seconds[found[-1]])
            left -= found[-1]
        return found

    for sizes in ([128], [128, 2048], SIZES):
        for _ in range(5):
            cuts = cut(sizes)
    assert cuts == expected


@pytest.mark.parametrize("sizes", [[192, 768, 2016], [256, 1000], [7, 30], [5]])
def test_sizes_that_are_no_multiples_of_each_other_cover_what_they_hold(sizes):
    times = StepTimes()
    assert times.first_step(sizes[-1], sizes) == sizes[-1]
    for size in sizes:
        times.add(size, 1.0)
    assert times.first_step(sizes[-1], sizes) == times.first_step(10 * sizes[-1], sizes) == sizes[-1]
