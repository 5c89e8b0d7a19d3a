"""Targets by name, and how many devices can stand together."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.errors import UserError
from cmjax.targets import HERE, Target, machines
from cmjax.targets.machines import gpu_description


def test_a_target_is_a_name_and_a_size():
    target = Target.parse("v5p:8x8x5")
    assert (target.machine.key, target.layout, target.num_devices) == ("v5p", "8x8x5", 320)
    target = Target.parse("H100:320")
    assert (target.machine.key, target.layout, target.num_devices) == ("h100", None, 320)
    assert Target.parse("ironwood:4x4x10").num_devices == 320  # two devices a chip
    assert Target.parse("v6e").num_devices is None
    assert Target.parse(HERE).machine is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v9", "target 'v9' is unknown; there is v5e, v5p, .* and here"),
        ("", "is unknown"),
        ("v5p:8x8", "'8x8' is no topology of TPU v5p; expected a number, or NxNxN"),
        ("v5e:0x4", "'0x4' is no topology of TPU v5e; expected a number, or NxN"),
        ("h100:8x8", "'8x8' is no topology of NVIDIA H100 80GB HBM3; expected a number of GPUs"),
        ("h100:0", "is no topology"),
        ("v5p:-8", "is no topology"),
        ("here:8", "target 'here:8' is unknown"),
    ],
)
def test_what_is_no_target_is_said_in_one_line(text, words):
    with pytest.raises(UserError, match=words) as raised:
        Target.parse(text)
    assert "\n" not in str(raised.value)


@given(st.integers(1, 4096), st.sampled_from(sorted(machines())))
def test_layouts_have_as_many_devices_as_are_wanted(num_devices, key):
    machine = machines()[key]
    for layout in machine.layouts(num_devices):
        assert math.prod(map(int, layout.split("x"))) * machine.facts.get("devices_per_chip", 1) == num_devices


def test_the_most_compact_layout_comes_first():
    assert machines()["v5p"].layouts(320)[0] == "8x8x5"  # a host has two by two of the first axes
    assert machines()["v5e"].layouts(256)[0] == "16x16"
    assert machines()["h100"].layouts(320) == ["40x1x8"]
    assert machines()["gb200"].layouts(320) == ["5x16x4"]  # hosts of a domain, with links of their own
    assert machines()["h100"].layouts(12) == []
    assert machines()["ironwood"].layouts(3) == []


def test_devices_that_cannot_stand_together_are_a_clear_line():
    with pytest.raises(UserError, match="target h100: 12 devices cannot stand together: no layout has so many devices"):
        Target.parse("h100").devices(12)


def test_every_machine_says_where_its_figures_are_from():
    for machine in machines().values():
        assert machine.facts["source"]
        assert machine.memory_bytes > 15e9
        assert machine.clock_hz > 1e9


def test_a_gpu_is_described_as_xla_takes_it():
    text = gpu_description(machines()["b200"])
    assert 'name: "NVIDIA B200"' in text
    assert "core_count: 148" in text
    assert "cuda_compute_capability { major: 10 minor: 0" in text
    assert text.count("{") == text.count("}")


def test_more_devices_than_a_target_has_are_refused():
    with pytest.raises(UserError, match="target v5p has 8 devices, 16 were asked for"):
        Target.parse("v5p:2x2x2").devices(16)
