"""Bringing up devices, and carving them into instances.

A virtual device is a CPU device of this process standing in for an NPU. How many there are is settled when JAX brings
up its backend and never after, so these functions run before anything else touches a device.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from cmjax.errors import UserError
from cmjax.mesh.fabric_ragged import try_native_ragged
from cmjax.mesh.topology import PRESETS, InstanceSpec, Role, Supernode, plan_instances
from cmjax.options import option

EP_AXIS = "ep"


@dataclass(frozen=True)
class Instance:
    """One serving engine's share of the machine: a role, and the devices it runs on, in rank order."""

    name: str
    role: Role
    devices: tuple[jax.Device, ...]
    first_rank: int = 0  # the supernode's rank of devices[0]; the others follow

    @property
    def ep_size(self) -> int:
        return len(self.devices)

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.ep_size)

    @property
    def is_virtual(self) -> bool:
        """Whether its devices are a CPU's."""
        return self.devices[0].platform == "cpu"

    @property
    def mesh(self) -> Mesh:
        """The instance's devices along the one axis "ep"."""
        return Mesh(np.array(self.devices, dtype=object), (EP_AXIS,))


@dataclass(frozen=True)
class Pools:
    """The instances of one machine by role. Each pool holds at least one instance."""

    supernode: Supernode
    prefill: tuple[Instance, ...]
    decode: tuple[Instance, ...]

    @property
    def instances(self) -> tuple[Instance, ...]:
        return self.prefill + self.decode

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """Every device of every instance, once, in rank order."""
        by_rank = {rank: device for one in self.instances for rank, device in zip(one.ranks, one.devices, strict=True)}
        return tuple(by_rank[rank] for rank in sorted(by_rank))

    @property
    def is_shared(self) -> bool:
        """Whether prefill runs on devices of a decode instance, the machine being too small for both."""
        return len(self.devices) < sum(one.ep_size for one in self.instances)


@dataclass(frozen=True, kw_only=True)
class InstanceLayout:
    """A machine, and how it is divided into instances: what `carve` is told. It also says what does not fit."""

    supernode: str = option(
        next(iter(PRESETS)),
        "Machine to stand in for; with -dies, a device is one die of an NPU.",
        flag="--supernode",
        choices=tuple(PRESETS),
    )
    ep_size: int | None = option(
        None, "Devices of a decode instance.", flag="--ep", unset="320, or an equal share of all"
    )
    prefill_ep_size: int | None = option(
        None, "Devices of a prefill instance.", flag="--prefill-ep", unset="min(ep, 32)"
    )
    num_prefill_instances: int | None = option(
        None,
        "Prefill instances; 0 lets prefill share decode's devices.",
        flag="--prefill-instances",
        unset="what fits, at most 2",
    )
    num_decode_instances: int = option(1, "Decode instances.", flag="--decode-instances")

    def carve(self) -> Pools:
        """The instances, on devices that are brought up for them."""
        return carve(
            Supernode.preset(self.supernode),
            ep_size=self.ep_size,
            prefill_ep_size=self.prefill_ep_size,
            num_prefill_instances=self.num_prefill_instances,
            num_decode_instances=self.num_decode_instances,
        )


# What keeps libtpu from looking for a TPU's surroundings, and from telling of it on standard error, where none is.
ABSENT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # each describes machines of its own, and touches none
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# Elements of a row of a TPU's tiles. A row that does not fill its last tile takes it up all the same, unless the
# compiler stores the array by columns: it does so with an argument, and then copies all of it before and after use.
_TPU_ROW = 128


def stored_width(width: int, mesh: Mesh | AbstractMesh) -> int:
    """How wide a row of `width` elements should be where arrays have many of them."""
    if isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform != "tpu":
        return width
    return -(-width // _TPU_ROW) * _TPU_ROW


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_crowded(mesh: Mesh | AbstractMesh) -> bool:
    """Whether the devices are virtual ones that outnumber the cores."""
    if isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform != "cpu":
        return False
    return mesh.size > num_cores()


def virtual_devices(num_devices: int) -> list[jax.Device]:
    """The first `num_devices` CPU devices, brought up here when JAX has no backend yet.

    Selects the CPU platform. A number the user has set (`XLA_FLAGS`, `JAX_NUM_CPU_DEVICES`, `jax_num_cpu_devices`) is
    respected when it is enough. UserError with both numbers when that setting, or the backend that is already up, has
    too few: the number cannot change any more.
    """
    if num_devices < 1:
        raise UserError(f"{num_devices} virtual devices were asked for; at least 1 is needed")
    if not _backend_is_up():
        wanted = _configured_num_devices()
        if wanted is None:
            jax.config.update("jax_num_cpu_devices", num_devices)
        elif wanted[0] < num_devices:
            raise UserError(
                f"{num_devices} virtual devices are needed, but {wanted[1]} is {wanted[0]}: "
                f"raise it to {num_devices} or unset it"
            )
        jax.config.update("jax_platforms", "cpu")
    return _first_cpu_devices(num_devices)


def describe(devices: Sequence[jax.Device]) -> dict[str, str | int | bool]:
    """What the devices are, for people: platform, kind, number, and whether they are virtual."""
    platform = devices[0].platform
    return {
        "platform": platform,
        "kind": devices[0].device_kind,
        "num_devices": len(devices),
        "is_virtual": platform == "cpu",
    }


def bring_up(num_devices: int) -> list[jax.Device]:
    """At most `num_devices` devices: accelerators where JAX finds any, virtual devices otherwise.

    Fewer come back only when there are fewer: on an accelerator, or where the user's own setting or an earlier start of
    JAX fixed the number.
    """
    if num_devices < 1:
        raise UserError(f"{num_devices} devices were asked for; at least 1 is needed")
    if not _backend_is_up():
        if _configured_num_devices() is None:
            jax.config.update("jax_num_cpu_devices", num_devices)
        if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":  # JAX has found no TPU when it was imported
            for name, value in ABSENT_TPU.items():
                os.environ.setdefault(name, value)
    return jax.devices()[:num_devices]


def carve(
    machine: Supernode | Sequence[jax.Device],
    *,
    ep_size: int | None = None,
    prefill_ep_size: int | None = None,
    num_prefill_instances: int | None = None,
    num_decode_instances: int = 1,
) -> Pools:
    """Divide a machine into prefill and decode instances; see `topology.plan_instances` for sizes and defaults.

    Given a Supernode, brings up as many devices as its instances take (`bring_up`); given devices, divides those, as a
    Supernode of that size. Rank r of the machine is the r-th device. UserError where the instances do not fit.
    """
    sizes = (ep_size, prefill_ep_size, num_prefill_instances, num_decode_instances)
    if isinstance(machine, Supernode):
        supernode = machine
        specs = supernode.plan_instances(*sizes)
        num_wanted = max(spec.ranks[-1] for spec in specs) + 1
        devices = bring_up(num_wanted)
        if len(devices) < num_wanted:
            specs = _plan_on_fewer(devices, sizes)
    else:
        devices = list(machine)
        supernode = Supernode.of_size(len(devices))
        specs = supernode.plan_instances(*sizes)
    try_native_ragged(devices)
    instances = [_instance(spec, devices) for spec in specs]
    return Pools(
        supernode,
        prefill=tuple(one for one in instances if one.role == "prefill"),
        decode=tuple(one for one in instances if one.role == "decode"),
    )


def _instance(spec: InstanceSpec, devices: Sequence[jax.Device]) -> Instance:
    return Instance(spec.name, spec.role, tuple(devices[rank] for rank in spec.ranks), spec.first_rank)


def _plan_on_fewer(
    devices: Sequence[jax.Device], sizes: tuple[int | None, int | None, int | None, int]
) -> tuple[InstanceSpec, ...]:
    # The machine at hand is smaller than the supernode: what the user left open shrinks to it, the rest is an error
    # that says how to get more.
    try:
        return plan_instances(len(devices), *sizes)
    except UserError as error:
        if devices[0].platform == "cpu":
            fixed_by = _configured_num_devices()
            reason = f"{fixed_by[1]} is {fixed_by[0]}" if fixed_by else f"it is up with {len(devices)}"
            advice = f"start JAX with more ({reason})"
        else:
            advice = "set JAX_PLATFORMS=cpu to run on virtual devices"
        raise UserError(f"{error}; or {advice}") from None


def _configured_num_devices() -> tuple[int, str] | None:
    # What the user has asked JAX for, and where; JAX's own option wins over the XLA flag (checked on 0.10.2 and 0.12).
    configured = int(jax.config.jax_num_cpu_devices)
    if configured >= 0:
        return configured, "jax_num_cpu_devices"
    flag = "--xla_force_host_platform_device_count"
    found = re.findall(rf"{flag}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return (int(found[-1]), f"{flag} in XLA_FLAGS") if found else None


def _backend_is_up() -> bool:
    # JAX has no public question for this, but refuses to change this option once a backend exists.
    current = jax.config.jax_num_cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", current + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", current)
    return False


def _first_cpu_devices(num_devices: int) -> list[jax.Device]:
    try:
        devices = jax.devices("cpu")
    except RuntimeError as error:
        raise UserError(
            f"{num_devices} virtual devices are needed, but JAX is already up without its CPU platform ({error}): "
            "call virtual_devices before anything else touches a device"
        ) from None
    if len(devices) < num_devices:
        raise UserError(
            f"{num_devices} virtual devices are needed, but JAX is already up with {len(devices)}: call "
            f"virtual_devices({num_devices}) before anything else touches a device, or start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}"
        )
    return devices[:num_devices]
