"""Virtual devices (in fresh processes, since a backend starts once) and instances carved from them."""

import os
import subprocess
import sys

import jax
import pytest

from cmjax.errors import UserError
from cmjax.mesh import Supernode, bring_up, carve, describe, virtual_devices

FLAG = "--xla_force_host_platform_device_count"


def run_fresh(code: str, **environment: str) -> str:
    """The last line that `code` prints in a new interpreter whose environment says nothing about JAX but this."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", "from cmjax.mesh import *\nimport jax\n" + code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


@pytest.mark.smoke
def test_brings_up_as_many_as_asked():
    assert run_fresh("print(len(virtual_devices(24)), len(jax.devices()))") == "24 24"


def test_a_flag_that_gives_enough_is_respected():
    assert run_fresh("print(len(virtual_devices(5)), len(jax.devices()))", XLA_FLAGS=f"{FLAG}=9") == "5 9"
    assert run_fresh("print(len(virtual_devices(5)), len(jax.devices()))", JAX_NUM_CPU_DEVICES="9") == "5 9"


def test_a_setting_that_gives_too_few_is_one_clear_error():
    error = run_fresh("virtual_devices(9)", XLA_FLAGS=f"{FLAG}=5")
    assert error.startswith("cmjax.errors.UserError: 9 virtual devices are needed, but ")
    assert error.endswith(f"{FLAG} in XLA_FLAGS is 5: raise it to 9 or unset it")
    error = run_fresh("virtual_devices(9)", JAX_NUM_CPU_DEVICES="5", XLA_FLAGS=f"{FLAG}=16")
    assert "but jax_num_cpu_devices is 5" in error


def test_the_failed_wish_can_be_corrected():
    code = "try:\n  virtual_devices(9)\nexcept ValueError:\n  print(len(virtual_devices(4)), len(jax.devices()))"
    assert run_fresh(code, XLA_FLAGS=f"{FLAG}=5") == "4 5"


def test_bring_up_never_gives_more_than_asked_nor_fails_for_few():
    assert run_fresh("print(len(bring_up(6)), len(jax.devices()))") == "6 6"
    assert run_fresh("print(len(bring_up(6)))", XLA_FLAGS=f"{FLAG}=3") == "3"


def test_what_is_left_open_shrinks_to_the_machine_at_hand():
    code = "pools = carve(Supernode.preset('cloudmatrix384'), ep_size=6)\n"
    code += "print([one.ep_size for one in pools.instances], pools.is_shared)"
    assert run_fresh(code) == "[6, 6, 6] False"
    assert run_fresh(code, XLA_FLAGS=f"{FLAG}=12") == "[6, 6] False"
    assert run_fresh(code, XLA_FLAGS=f"{FLAG}=7") == "[6, 6] True"
    error = run_fresh(code, XLA_FLAGS=f"{FLAG}=5")
    assert "decode at EP 6 needs 6 devices, there are 5" in error
    assert error.endswith(f"or start JAX with more ({FLAG} in XLA_FLAGS is 5)")


@pytest.mark.smoke
def test_a_backend_that_is_up_serves_what_it_has(devices):
    assert virtual_devices(8) == devices[:8] == jax.devices()[:8] == bring_up(8)
    with pytest.raises(UserError, match=f"385 virtual devices are needed, but JAX is already up with {len(devices)}"):
        virtual_devices(len(devices) + 1)
    assert bring_up(len(devices) + 1) == devices
    for function in (virtual_devices, bring_up):
        with pytest.raises(UserError, match="at least 1"):
            function(0)


@pytest.mark.smoke
def test_default_instances_cover_the_supernode(devices):
    pools = carve(Supernode.preset("cloudmatrix384"))
    assert [(one.name, one.role, one.ep_size) for one in pools.instances] == [
        ("prefill0", "prefill", 32),
        ("prefill1", "prefill", 32),
        ("decode0", "decode", 320),
    ]
    assert list(pools.devices) == devices
    assert not pools.is_shared
    for one in pools.instances:
        assert one.mesh.axis_names == ("ep",)
        assert one.mesh.shape == {"ep": one.ep_size}
        assert [devices.index(device) for device in one.mesh.devices] == list(one.ranks)


def test_carving_devices(devices):
    pools = carve(devices[10:18], ep_size=4, prefill_ep_size=2)
    assert [one.devices for one in pools.instances] == [
        tuple(devices[10:12]),
        tuple(devices[12:14]),
        tuple(devices[14:18]),
    ]
    assert pools.supernode.num_ranks == 8


def test_a_small_machine_shares(devices):
    pools = carve(devices[:1])
    assert pools.is_shared
    assert pools.prefill[0].devices == pools.decode[0].devices == tuple(devices[:1])
    assert pools.devices == tuple(devices[:1])
    pools = carve(devices[:8], ep_size=8, prefill_ep_size=2)
    assert pools.is_shared
    assert pools.devices == tuple(devices[:8])
    assert pools.prefill[0].devices == tuple(devices[:2])


def test_too_many_devices_wanted(devices):
    with pytest.raises(UserError, match="decode at EP 9 needs 9 devices, there are 8"):
        carve(devices[:8], ep_size=9)
    with pytest.raises(UserError, match="needs 400 devices, there are 384"):
        carve(Supernode.preset("cloudmatrix384"), ep_size=400)
    # Rank 384 and up exist on this machine only with a rank for each die.
    with pytest.raises(UserError, match=r"decode at EP 400 needs 400 devices, there are 384: .* start JAX with more"):
        carve(Supernode.preset("cloudmatrix384-dies"), ep_size=400)


def test_instances_are_values(devices):
    first, second = carve(devices[:8], ep_size=4), carve(devices[:8], ep_size=4)
    assert first == second
    assert hash(first) == hash(second)
    assert first.decode[0].mesh == second.decode[0].mesh


def test_describe(devices):
    assert describe(devices[:3]) == {"platform": "cpu", "kind": "cpu", "num_devices": 3, "is_virtual": True}
