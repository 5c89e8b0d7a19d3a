"""This machine among those that traced steps are priced on, from the costs of its operators.

Coarser than `cmjax.perf.host.price_program`: a trace does not say how many operators XLA will make of a stage.
"""

from cmjax.perf.hardware import Figure, Hardware, Mark
from cmjax.perf.host import HostCosts
from cmjax.perf.host_kernels import matrix_amounts

NAME = "host"
_GIB = 2**30
_ROWS, _WIDTH = 64, 512
# Operators of XLA, and kernels that are no product, for each product that decode's compiled program has
# (`tests/perf/test_host.py` counts them in one).
BESIDE_A_PRODUCT = {"operator_s": 4.4, "norm_s": 1.3}


def host_hardware(costs: HostCosts) -> Hardware:
    """One device of as many as an instance has; alone until `Hardware.among` says how many."""
    return _among(costs, 1)


def _among(costs: HostCosts, devices: int) -> Hardware:
    """What each of so many devices has of the machine."""
    turns, measured = costs.turns(devices), "measured alone on this machine"
    rate = costs.at("memory_bytes_per_s", devices) / devices
    flops = 2.0 * _ROWS * _WIDTH**2
    # Not below what it takes to read the matrix, whatever noise made of the costs.
    rows = {"s8": "bf16", "bf16": "bf16", "f32": "f32"}
    counted = [matrix_amounts(kind, _ROWS, _WIDTH, _WIDTH, given) for kind, given in rows.items()]
    s8, bf16, f32 = (
        flops / max(turns * costs.of(amounts, devices), num_bytes / rate) for amounts, num_bytes in counted
    )
    exchange, ragged = (turns * costs.at(name, devices) if devices > 1 else 0.0 for name in ("exchange_s", "ragged_s"))
    beside = costs.of(BESIDE_A_PRODUCT, devices)
    beside += (1 + sum(BESIDE_A_PRODUCT.values())) * costs.at("among_others_s", devices)
    launch = turns * (costs.at("product_s", devices) + beside) / 2
    sent = 1 / max(turns * costs.at("sent_byte_s", devices), 1e-15)
    given: list[tuple[str, float, str, str, Mark]] = [
        ("memory_bytes", costs.machine["memory_gib"] * _GIB / devices, "bytes", "a share of the machine's", "measured"),
        ("memory_bytes_per_s", rate, "bytes/s", measured, "measured"),
        ("peak_int8", s8, "ops/s", f"{measured}: products of {_ROWS} rows", "measured"),
        ("peak_bf16", bf16, "ops/s", f"{measured}: products of {_ROWS} rows", "measured"),
        ("peak_f32", f32, "ops/s", f"{measured}: products of {_ROWS} rows", "measured"),
        ("launch_s", launch, "s", "half of a product and what runs beside it", "assumed"),
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
