"""`cmjax info`: the machine, its instances and planes, and the collectives and kernels in use."""

import json
import sys

import click
from rich.console import Console

from cmjax.cli.flags import options_for
from cmjax.cli.options import json_option
from cmjax.cli.report import machine_report
from cmjax.cli.running import carve
from cmjax.cli.tables import forms_table, print_tables, topology_tables
from cmjax.mesh import InstanceLayout
from cmjax.text import JsonObject


@click.command(
    epilog="""\b
    Examples:
      cmjax info                            the preset cloudmatrix384 and its default instances
      cmjax info --ep 8 --prefill-ep 4      a small machine
      cmjax info --supernode cloudmatrix384-dies --ep 320
      cmjax info --json | jq .collectives""",
)
@options_for("layout", InstanceLayout)
@json_option
def info(layout: InstanceLayout, as_json: bool) -> None:
    """Show devices, instances, planes, and which collectives and kernels are in use, and why."""
    report = machine_report(carve(layout))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)


def show(report: JsonObject) -> None:
    """Print the report as tables."""
    console = Console(file=sys.stdout)
    versions, devices = report["versions"], report["devices"]
    kind = (
        "virtual devices on the CPU" if devices["is_virtual"] else f"{devices['platform']} devices ({devices['kind']})"
    )
    console.print(
        f"cmjax {versions['cmjax']}, jax {versions['jax']}, Python {versions['python']}: "
        f"{devices['num_devices']} {kind}",
        highlight=False,
        soft_wrap=True,
    )
    forms = (
        forms_table("Collectives", "collective", report["collectives"]),
        forms_table("Kernels", "kernel", report["kernels"]),
    )
    print_tables(console, (*topology_tables(report), *forms))
