"""This machine among those that traced steps are priced on, from the costs of its operators.

Coarser than `cmjax.perf.host.price_program`: a trace does not say how many operators XLA will make of a stage.
"""

from cmjax.perf.hardware import Figure, Hardware, Mark
from cmjax.perf.host import HostCosts

NAME = "host"
_GIB = 2**30
# Operators that XLA launches for one product of a layer: what decode's compiled program had for each of its kernels
# before norms, the router's choices and packing became kernels themselves.
_BESIDE_A_KERNEL = 8


def host_hardware(costs: HostCosts) -> Hardware:
    """One device of as many as an instance has; alone until `Hardware.among` says how many."""
    return _among(costs, 1)


def _among(costs: HostCosts, devices: int) -> Hardware:
    """What each of so many devices has of the machine."""
    turns, measured = costs.turns(devices), "measured alone on this machine"
    rate = costs.at("memory_bytes_per_s", devices) / devices
    bf16, f32 = (costs.product_rate(dtype, 64, devices) / devices for dtype in ("bfloat16", "float32"))
    exchange, ragged = (costs.at(name, devices) if devices > 1 else 0.0 for name in ("exchange_s", "ragged_s"))
    launch = turns * (costs.at("kernel_s", devices) + _BESIDE_A_KERNEL * costs.at("operator_s", devices)) / 2
    sent = costs.at("sent_bytes_per_s", devices) / devices
    given: list[tuple[str, float, str, str, Mark]] = [
        ("memory_bytes", costs.machine["memory_gib"] * _GIB / devices, "bytes", "a share of the machine's", "measured"),
        ("memory_bytes_per_s", rate, "bytes/s", measured, "measured"),
        ("peak_int8", bf16, "ops/s", "as bfloat16", "assumed"),
        ("peak_bf16", bf16, "ops/s", f"{measured}: products of 64 rows", "measured"),
        ("peak_f32", f32, "ops/s", f"{measured}: products of 64 rows", "measured"),
        ("launch_s", launch, "s", f"half of a kernel and {_BESIDE_A_KERNEL} operators beside it", "assumed"),
        ("step_overhead_s", costs.at("launch_s", devices), "s", f"{measured}: a program's launch", "measured"),
        ("dispatch_latency_s", 2 * exchange + ragged, "s", "counts, offsets and rows", "measured"),
        ("combine_latency_s", ragged, "s", "an exchange of rows", "measured"),
        ("link_bytes_per_s", sent, "bytes/s", f"{measured}: rows", "measured"),
        ("link_latency_s", exchange, "s", "an exchange of next to nothing", "measured"),
        ("balance", 1.0, "busiest/mean", "devices share the cores: only the sum counts", "assumed"),
    ]
    given += [(name, 1.0, "of peak", "in the rates", "measured") for name in _EFFICIENCIES]
    given += [(name, rate, "bytes/s", "as memory", "assumed") for name in _OTHER_RATES]
    given.append(("exchange_slowdown", 1.0, "times", "in the latencies", "measured"))
    return Hardware(
        name=NAME,
        title=f"This machine: {costs.machine['cpu']}, {costs.cores} cores, one of {devices:,} virtual devices",
        figures={name: Figure(value, unit, source, mark) for name, value, unit, source, mark in given},
        devices_per_package=1,
        devices_per_node=1_000_000,
        domain=1_000_000,
        cores=costs.cores,
        decode_overlap="none",
        prefill_overlap="none",
        fused=frozenset(),
        by_devices=lambda count: _among(costs, count),
    )


_EFFICIENCIES = ("matmul_efficiency", "attention_efficiency", "memory_efficiency", "matmul_memory_efficiency")
_OTHER_RATES = ("far_bytes_per_s", "host_bytes_per_s", "storage_bytes_per_s")
