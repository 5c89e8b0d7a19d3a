"""What is counted of the experts' load."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.schedule import EngineStats, InstanceStats, SlotLoad


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2**31)), max_size=20))
def test_steps_are_folded_into_one_count(steps):
    """Steps with and without the MTP module; what is taken is counted once."""
    load, expected = SlotLoad(), np.zeros((4, 6), np.int64)
    for num_layers, seed in steps:
        rows = np.random.default_rng(seed).integers(0, 50, (num_layers, 6))
        load.add(rows)
        expected[:num_layers] += rows
    total = load.take()
    np.testing.assert_array_equal(total, expected[: total.shape[0], : total.shape[1]])
    assert not expected[total.shape[0] :].any()
    assert not load.take().any()
    load.add(np.ones((4, 6), np.int64))
    np.testing.assert_array_equal(load.take(), np.ones((4, 6)))


def test_a_step_without_the_mtp_module_lacks_the_last_layer():
    load = SlotLoad()
    load.add(np.array([[1, 2]]))
    load.add(np.array([[10, 20], [30, 40]]))
    load.add(np.array([[100, 200]]))
    assert load.total.tolist() == [[111, 222], [30, 40]]


def test_imbalance_is_the_busiest_device_over_the_mean():
    load = SlotLoad()
    assert load.imbalance(2) == 1.0
    load.add(np.array([[3, 3, 1, 1], [0, 0, 0, 0]]))
    assert load.imbalance(2) == pytest.approx(6 / 4)  # a layer that has received nothing does not count
    assert load.imbalance(4) == pytest.approx(3 / 2)
    load.add(np.array([[0, 0, 0, 0], [1, 1, 1, 1]]))
    assert load.imbalance(2) == pytest.approx((6 / 4 + 1) / 2)
    load.take()
    assert load.imbalance(2) == pytest.approx((6 / 4 + 1) / 2)  # the window is not taken along


def test_no_layers_have_no_imbalance():
    load = SlotLoad()
    load.add(np.zeros((0, 8), np.int64))  # a model without experts
    assert load.imbalance(4) == 1.0
    assert load.take().size == 0


def test_the_window_forgets_steps_of_long_ago():
    load, steps = SlotLoad(), SlotLoad.WINDOW_STEPS
    for _ in range(steps):
        load.add(np.array([[4, 0]]))
    for index in range(2 * steps):
        assert load.imbalance(2) > 1.0 or index >= steps
        load.add(np.array([[1, 1]]))
    assert load.imbalance(2) == 1.0
    assert load.total.tolist() == [[4 * steps + 2 * steps, 2 * steps]]


def test_the_window_grows_with_the_layers():
    load = SlotLoad()
    load.add(np.array([[2, 0]]))
    load.add(np.array([[0, 0], [0, 6]]))
    assert load.imbalance(2) == pytest.approx(2.0)


def test_kv_usage_is_of_decode_instances_alone():
    def instance(role, num_blocks, num_used):
        return InstanceStats(f"{role}0", role, "ready", 1, 0, 0, num_blocks, num_used, 0, 0, 0.0)

    def stats_of(*instances):
        return EngineStats(list(instances), *[0] * 10, num_accepted_tokens_per_pos=[], plane_bytes={})

    stats = stats_of(instance("prefill", 10, 9), instance("decode", 30, 6), instance("decode", 10, 4))
    assert stats.kv_usage == 10 / 40
    assert stats_of(instance("prefill", 10, 9)).kv_usage == 0.0
