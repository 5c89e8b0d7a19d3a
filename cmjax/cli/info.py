"""`cmjax info`: the machine, its instances and planes, and the collectives in use."""

import dataclasses
import json
import platform
import sys
from typing import TYPE_CHECKING, Any

import click

import cmjax
from cmjax.cli.options import instance_options, json_option
from cmjax.cli.running import carve_from

if TYPE_CHECKING:
    from rich.table import Table

    from cmjax.mesh import Instance, Pools, Supernode

GB = 1e9


@click.command(
    epilog="""\b
    Examples:
      cmjax info                            the preset cloudmatrix384 and its default instances
      cmjax info --ep 8 --prefill-ep 4      a small machine
      cmjax info --supernode cloudmatrix384-dies --ep 320
      cmjax info --json | jq .collectives""",
)
@instance_options
@json_option
def info(as_json: bool, **options: Any) -> None:
    """Show devices, instances, planes, and which collectives are in use and why."""
    report = collect(carve_from(options))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)


def collect(pools: "Pools") -> dict[str, Any]:
    """All that `cmjax info` says, as JSON-ready values."""
    import jax
    import jaxlib

    from cmjax.mesh import describe, fabric

    machine = pools.supernode
    return {
        "versions": {
            "cmjax": cmjax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
        },
        "devices": describe(pools.devices),
        "supernode": _supernode(machine),
        "instances": [_instance(one, machine) for one in pools.instances],
        "prefill_shares_decode_devices": pools.is_shared,
        "planes": [dataclasses.asdict(plane) for plane in machine.planes],
        "collectives": {name: dataclasses.asdict(form) for name, form in fabric.status().items()},
    }


def _supernode(machine: "Supernode") -> dict[str, Any]:
    counts = ("num_nodes", "num_npus", "num_dies", "num_cpus", "num_ranks", "ranks_per_npu", "ranks_per_node")
    chips = ("num_l1_chips", "num_l2_chips", "rank_memory_bytes")
    return {"name": machine.name, **{name: getattr(machine, name) for name in counts + chips}}


def _instance(one: "Instance", machine: "Supernode") -> dict[str, Any]:
    first, last = machine.location(one.ranks[0]), machine.location(one.ranks[-1])
    return {
        "name": one.name,
        "role": one.role,
        "ep_size": one.ep_size,
        "ranks": [one.ranks[0], one.ranks[-1]],
        "npus": [first.npu, last.npu],
        "nodes": [first.node, last.node],
        "device_ids": [one.devices[0].id, one.devices[-1].id],
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    versions, devices = report["versions"], report["devices"]
    kind = (
        "virtual devices on the CPU" if devices["is_virtual"] else f"{devices['platform']} devices ({devices['kind']})"
    )
    console.print(
        f"cmjax {versions['cmjax']}, jax {versions['jax']}, Python {versions['python']}: "
        f"{devices['num_devices']} {kind}",
        highlight=False,
    )
    for table in (*topology_tables(report), collectives_table(report["collectives"])):
        console.print(table)


def topology_tables(report: dict[str, Any]) -> "tuple[Table, ...]":
    """The supernode, its instances and its planes; `cmjax demo` opens with the same tables."""
    machine = report["supernode"]
    parts = _table(f"Supernode {machine['name']}", "part", "number")
    per_rank = "an NPU" if machine["ranks_per_npu"] == 1 else f"1/{machine['ranks_per_npu']} of an NPU"
    for part, number in (
        ("nodes", machine["num_nodes"]),
        ("NPUs (dies)", f"{machine['num_npus']} ({machine['num_dies']})"),
        ("CPUs", machine["num_cpus"]),
        (f"ranks, each {per_rank}", machine["num_ranks"]),
        ("memory a rank", f"{machine['rank_memory_bytes'] / GB:g} GB"),
        ("UB switch chips L1, L2", f"{machine['num_l1_chips']}, {machine['num_l2_chips']}"),
    ):
        parts.add_row(part, str(number))
    shared = " (prefill shares decode's devices)" if report["prefill_shares_decode_devices"] else ""
    instances = _table(f"Instances{shared}", "name", "role", "EP", "ranks", "NPUs", "nodes")
    for one in report["instances"]:
        spans = (f"{low}-{high}" if low < high else str(low) for low, high in (one["ranks"], one["npus"], one["nodes"]))
        instances.add_row(one["name"], one["role"], str(one["ep_size"]), *spans)
    return parts, instances, _planes_table(report["planes"])


def _planes_table(planes: list[dict[str, Any]]) -> "Table":
    table = _table(
        "Planes: GB/s one way of a die (vpc: of a node), latency in us, between nodes and within one",
        *("plane", "path", "GB/s between", "within", "us between", "within"),
    )
    for plane in planes:
        rows: dict[str, dict[bool, tuple[float, float]]] = {}
        for row in plane["figures"]:
            path = f"{row['path'].replace('_', '-').upper()} {row['op']}"
            rows.setdefault(path, {})[row["inter_node"]] = (row["bytes_per_s"] / GB, row["latency_s"] * 1e6)
        if all(reach == next(iter(rows.values())) for reach in rows.values()):
            rows = {"any": next(iter(rows.values()))}
        for path, reach in rows.items():
            figures = (reach[True][0], reach[False][0], reach[True][1], reach[False][1])
            table.add_row(plane["name"], path, *(f"{figure:g}" for figure in figures))
    table.caption = "\n".join(f"{plane['name']}: {plane['source']}" for plane in planes)
    return table


def collectives_table(collectives: dict[str, dict[str, str]]) -> "Table":
    """Which form each collective takes, and why; those that take the same form for the same reason share a row."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, status in collectives.items():
        names.setdefault((status["form"], status["reason"]), []).append(name)
    table = _table("Collectives", "collective", "form", "why")
    for (form, reason), alike in names.items():
        table.add_row("\n".join(alike), form, reason)
    return table


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
