"""Options that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

SUPERNODES = ("cloudmatrix384", "cloudmatrix384-dies")


def instance_options(function: Function) -> Function:
    """`--supernode`, `--ep`, `--prefill-ep`, `--prefill-instances`: the arguments of `cmjax.mesh.carve`."""
    options = (
        click.option(
            "--supernode",
            type=click.Choice(SUPERNODES),
            default=SUPERNODES[0],
            show_default=True,
            help="Machine to stand in for; with -dies, a device is one die of an NPU.",
        ),
        click.option("--ep", type=int, help="Devices of the decode instance.  [default: 320, or all there are]"),
        click.option("--prefill-ep", type=int, help="Devices of a prefill instance.  [default: min(ep, 32)]"),
        click.option(
            "--prefill-instances",
            type=int,
            help="Prefill instances; 0 lets prefill share decode's devices.  [default: what fits, at most 2]",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def json_option(function: Function) -> Function:
    """`--json`: one JSON object on standard output, nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)
