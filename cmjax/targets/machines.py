"""Accelerators to compile for that need not be there, by name: what the compiler is told of each, and its memory."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from cmjax.errors import UserError

GIB = 2**30
# The devices that JAX finds where the command runs: the steps can be run there, too.
HERE = "here"
# As JAX says that a platform's compiler is not installed.
_NO_COMPILER = re.compile(r"not installed|not implemented for|not in the list of known|no module named", re.IGNORECASE)
_WHEELS = {"tpu": "jax[tpu]", "cuda": "jax[cuda13]"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of accelerator.

    Attributes:
        key: such as "v5p".
        facts: see `machines.json`.
    """

    key: str
    facts: dict[str, Any]

    @property
    def compiler(self) -> str:
        """ "tpu" or "cuda"."""
        return str(self.facts["compiler"])

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def memory_bytes(self) -> int:
        """Of a device."""
        if "memory_gib" in self.facts:
            return int(self.facts["memory_gib"] * GIB)
        return int(self.facts["memory_bytes"])

    @property
    def clock_hz(self) -> float:
        return float(self.facts["clock_ghz"]) * 1e9

    @property
    def wheel(self) -> str:
        """What brings the compiler."""
        return _WHEELS[self.compiler]

    def layouts(self, num_devices: int) -> list[str]:
        """How so many devices may stand together, as `get_topology_desc` takes it, the best first; [] if not at all."""
        if self.compiler == "cuda":
            return _hosts(num_devices, self.facts["devices_per_host"], self.facts["hosts_per_domain"])
        chips, rest = divmod(num_devices, self.facts["devices_per_chip"])
        return [] if rest else ["x".join(map(str, shape)) for shape in _boxes(chips, self.facts["axes"])]


@dataclasses.dataclass(frozen=True)
class Target:
    """So many devices of a machine.

    Attributes:
        machine: None: the devices that are here.
        layout: such as "8x8x5" for a TPU; None: the best for as many devices as are wanted.
        num_devices: that were named; None: as many as are wanted.
    """

    machine: Machine | None
    layout: str | None = None
    num_devices: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Target":
        """From `v5p:8x8x5`, `h100:320`, or a name alone; UserError on anything else."""
        key, _, size = text.strip().lower().partition(":")
        if key == HERE and not size:
            return cls(None)
        known = machines()
        if key not in known:
            raise UserError(f"target {text!r} is unknown; there is {', '.join(known)} and {HERE}")
        machine = known[key]
        if not size:
            return cls(machine)
        if size.isdecimal() and int(size) > 0:
            return cls(machine, None, int(size))
        axes = machine.facts.get("axes")
        if axes is None or not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{axes - 1}}}", size):
            wanted = f"a number, or {'x'.join(['N'] * axes)}" if axes else "a number of GPUs"
            raise UserError(f"target {text!r}: {size!r} is no topology of {machine.name}; expected {wanted}")
        num_chips = math.prod(map(int, size.split("x")))
        return cls(machine, size, num_chips * machine.facts["devices_per_chip"])

    def devices(self, num_devices: int) -> Sequence[Any]:
        """So many devices to compile for, in an order that neighbours follow each other.

        Raises:
            UserError: there is no such topology, or no compiler for it.
        """
        machine = self.machine
        if machine is None:
            from cmjax.mesh import bring_up

            found = bring_up(num_devices)
            if len(found) < num_devices:
                raise UserError(f"{num_devices} devices were asked for, {len(found)} are here")
            return found
        if self.num_devices is not None and num_devices > self.num_devices:
            raise UserError(f"target {machine.key} has {self.num_devices} devices, {num_devices} were asked for")
        # A part of a machine stands together as compactly as a machine of its own.
        layouts = machine.layouts(num_devices)
        if self.layout is not None and self.num_devices == num_devices:
            layouts = [self.layout]
        problem = "no layout has so many devices"
        for layout in layouts:
            try:
                return _described(machine, layout)
            except _TopologyError as error:
                problem = str(error)
        raise UserError(f"target {machine.key}: {num_devices} devices cannot stand together: {problem}")


@functools.cache
def machines() -> dict[str, Machine]:
    """All there are by name."""
    found = json.loads(resources.files(__package__).joinpath("machines.json").read_text(encoding="utf-8"))
    return {key: Machine(key, facts) for key, facts in found.items()}


class _TopologyError(Exception):
    pass


def _described(machine: Machine, layout: str) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        if machine.compiler == "tpu":
            found = topologies.get_topology_desc(f"{machine.facts['topology']}:{layout}", platform="tpu")
        else:
            found = topologies.get_topology_desc(
                platform="cuda", target_config=gpu_description(machine), topology=layout
            )
    except Exception as error:  # JAX raises several kinds for an absent plugin, and XLA for what it does not accept
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if _NO_COMPILER.search(text):
            raise UserError(f"target {machine.key} needs pip install '{machine.wheel}' ({text})") from error
        raise _TopologyError(text) from error
    return list(found.devices)


def _hosts(num_devices: int, per_host: int, hosts_per_domain: int) -> list[str]:
    """`domains x hosts of a domain x GPUs of a host`, where links of a domain are the fast ones."""
    if num_devices < per_host:
        return [f"1x1x{num_devices}"]
    hosts, rest = divmod(num_devices, per_host)
    if rest:
        return []
    together = max(count for count in range(1, hosts_per_domain + 1) if not hosts % count)
    return [f"{hosts // together}x{together}x{per_host}"]


def _boxes(num_chips: int, axes: int) -> list[tuple[int, ...]]:
    """Shapes of so many chips, the most compact first; a host has two by two of the first axes: odd ones come last."""
    if axes == 1:
        return [(num_chips,)]
    found = {
        tuple(sorted((side, *rest), key=lambda length: (length % 2, length)))
        for side in range(1, num_chips + 1)
        if not num_chips % side
        for rest in _boxes(num_chips // side, axes - 1)
    }
    return sorted(found, key=lambda shape: (sum(shape), shape))


def gpu_description(machine: Machine) -> str:
    """What XLA's CUDA compiler takes in place of a GPU: a `GpuTargetConfig` as text."""
    facts = machine.facts
    major, minor = facts["compute_capability"]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": facts["shared_bytes"],
        "threads_per_core_limit": 2048,
        "core_count": facts["multiprocessors"],
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": facts["memory_bytes_per_s"],
        "l2_cache_size": facts["l2_bytes"],
        "clock_rate_ghz": facts["clock_ghz"],
        "device_memory_size": facts["memory_bytes"],
        "shared_memory_per_block_optin": facts["shared_bytes"] - 1024,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
        "ecc_enabled": "true",
    }
    words = {
        "device_vendor": "NVIDIA Corporation",
        "platform_version": f"Compute Capability {major}.{minor}a",
        "name": machine.name,
        "driver_version": "13.0.0",
        "runtime_version": "12.8.0",
        "compile_time_toolkit_version": "12.8.0",
        "dnn_version": "9.10.0",
    }
    capability = f"major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES"
    lines = [f"{key}: {value}" for key, value in device.items()]
    lines += [f'{key}: "{value}"' for key, value in words.items()]
    return (
        f"gpu_device_info {{ {' '.join(lines)} cuda_compute_capability {{ {capability} }} }}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
        f'device_description_str: "{machine.name}"\n'
    )
