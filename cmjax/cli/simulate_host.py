"""`cmjax simulate host`, and `--hardware host`: this very machine, by what its operators take."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmjax.cli.options import count_option, json_option, model_config_option
from cmjax.cli.progress import shown_progress
from cmjax.cli.tables import print_report

if TYPE_CHECKING:
    from cmjax.perf.hardware import Hardware
    from cmjax.perf.host import HostCosts
    from cmjax.quant import QuantMode

_RANKS = (1, 8, 64, 320)


def find_hardware(name: str) -> "Hardware":
    """A machine by its name; `host` is calibrated the first time."""
    from cmjax.perf.hardware import hardware
    from cmjax.perf.host_hardware import NAME, host_hardware

    return host_hardware(_calibrated(False)) if name == NAME else hardware(name)


def _calibrated(is_anew: bool) -> "HostCosts":
    """What is kept of this machine, its versions and this commit; else it is measured, and kept."""
    from cmjax.bench.calibrate import calibrate
    from cmjax.bench.host import kept

    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cmjax" / "host.json"
    costs = None if is_anew else kept(path)
    if costs is None:
        with shown_progress("measurements") as tell:
            costs = calibrate(_RANKS, lambda what, done, total: tell(f"calibrating: {what}", done, total))
        try:
            costs.save(path)
        except OSError as error:
            click.echo(f"{path}: {error.strerror}; the calibration is not kept", err=True)
        else:
            click.echo(f"calibrated this machine; kept in {path}", err=True)
    return costs


@click.command(
    "host",
    epilog="""\b
    Examples:
      cmjax simulate host --model DIR --calibrate
      cmjax simulate host --model DIR --ep 8 --ep 64 --json""",
)
@model_config_option
@click.option(
    "--ep", type=click.IntRange(min=1, max=1024), multiple=True, default=_RANKS, show_default=True, help="Devices."
)
@count_option("--batch", 8, "Requests of a decode device.")
@count_option("--tokens", 2048, "Of a prefill step of all devices.", least=16)
@count_option("--rounds", 7, "Timed runs of each, more of a short one; medians count.")
@click.option("--calibrate", "is_anew", is_flag=True, help="Measure the operators anew.  [default: once a commit]")
@json_option
def host(model: str, ep: tuple[int, ...], batch: int, tokens: int, rounds: int, is_anew: bool, as_json: bool) -> None:
    """Steps of virtual devices on this machine: what is predicted of them from single operators, then measured.

    The costs of operators are measured once (about a minute), alone and never in a step, and kept for
    `--hardware host`.
    The steps run on random weights, which must fit in memory as often as there are devices.
    """
    from cmjax.bench import host as bench
    from cmjax.checkpoint.configs import find_config

    found = find_config(model)
    costs = _calibrated(is_anew)
    cases = [bench.Case("decode", one, batch) for one in ep] + [bench.Case("prefill", one, tokens) for one in ep]
    with shown_progress("steps") as tell:
        quant: QuantMode | None = "int8" if found.is_int8 else None
        report = bench.run(found.config, costs, cases, quant=quant, rounds=rounds, tell=tell)
    print_report(report, bench.tables(report), as_json)
