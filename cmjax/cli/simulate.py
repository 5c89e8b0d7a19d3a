"""`cmjax simulate`: what a model would reach on machines that are not there, and how far published figures are off."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from rich.console import Console
from rich.table import Table

from cmjax.bench.tables import new_table, number
from cmjax.cli.command import Commands
from cmjax.cli.flags import options_for
from cmjax.cli.options import count_option, json_option, model_config_option, plot_option
from cmjax.cli.progress import shown_progress
from cmjax.cli.simulate_host import find_hardware, host
from cmjax.cli.tables import print_tables
from cmjax.errors import UserError
from cmjax.perf.workload import Workload
from cmjax.text import JsonObject

if TYPE_CHECKING:
    from cmjax.perf.plan import Candidate

Function = TypeVar("Function", bound=Callable[..., Any])
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Duration(click.ParamType):
    """A time with its unit: `50ms`, `2s`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", str(value).strip())
        if not found or not float(found[1]):
            self.fail(f"{value!r} is no time; give one such as 50ms or 2s", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


def _hardware_option(function: Function) -> Function:
    return click.option(
        "--hardware",
        default="ascend-910",
        show_default=True,
        metavar="NAME",
        help="Machine to price on: host, which is this one, or one of `cmjax simulate hardware`.",
    )(function)


@click.group(
    cls=Commands,
    epilog="""\b
    Examples:
      cmjax simulate paper --plot paper.png      every published figure beside what is predicted for it
      cmjax simulate plan --devices 384 --tpot 50ms --ttft 2s
      cmjax simulate step --ep 320 --batch 48 --context 4096 --drafts 1 --microbatches 2
      cmjax simulate points points.csv           measured points of your own
      cmjax simulate host --model DIR            predicted beside measured, on this machine
      cmjax simulate whatif afd                  attention and experts on devices of their own""",
)
def simulate() -> None:
    """Price the engine's own steps, traced, on named hardware; only `host` measures and runs."""


simulate.add_command(host)


@simulate.command(
    "paper", epilog="\b\nExamples:\n  cmjax simulate paper\n  cmjax simulate paper --plot paper.png --json"
)
@plot_option
@json_option
def paper(plot: Path | None, as_json: bool) -> None:
    """Published figures of DeepSeek-R1 beside what is predicted for them, and why some miss."""
    from cmjax.checkpoint.configs import find_config
    from cmjax.perf import plots
    from cmjax.perf.paper import compare

    with shown_progress("rows") as tell:
        report = compare(find_config("deepseek-r1").config, lambda group: tell(group, 0, None))
    if plot is not None:
        plots.comparison(report, plot)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    groups: dict[str, list[JsonObject]] = {}
    for row in report["rows"]:
        groups.setdefault(row["group"], []).append(row)
    _print([_comparison(name, rows) for name, rows in groups.items()])
    for name, found in report["errors"].items():
        whose = "the paper's end-to-end figures" if name == "paper" else "other systems'"
        click.echo(
            f"Mean absolute error, {whose}: {100 * found['mean']:.1f} % over {found['rows']} rows, "
            f"at most {100 * found['largest']:.1f} %."
        )


def _comparison(title: str, rows: list[JsonObject]) -> Table:
    table = new_table(title, "figure", "published", "predicted", "unit", "error %", "why")
    for row in rows:
        published = row["published"]
        given = " to ".join(f"{one:,g}" for one in published) if isinstance(published, list) else _plain(published)
        cells = (_plain(row["predicted"]), row["unit"], number(row["error"], "{:+.1f}", 100))
        table.add_row(row["label"], given, *cells, row["reason"])
    return table


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


@simulate.command(
    "points",
    epilog="""\b
    Examples:
      cmjax simulate points deepseek_r1_gpu_decode.csv --plot points.png
    \b
    A CSV of GPU points (system, backend, precision, isl, osl, decode as 5x(TP1 DP8 EP8), running_per_gpu, tpot_ms), or
    of Ascend layouts (dies, ep, dp, batch, context, drafts, acceptance, balance; tpot_ms where it was measured).""",
)
@click.argument("file", type=click.Path(path_type=Path))
@model_config_option
@plot_option
@json_option
def points(file: Path, model: str, plot: Path | None, as_json: bool) -> None:
    """Time per output token of each line of FILE, beside what was measured."""
    from cmjax.checkpoint.configs import find_config
    from cmjax.perf import plots
    from cmjax.perf import points as reading

    config = find_config(model).config
    results = reading.predict(reading.read(file), config, str(file))
    errors = [abs(one["error"]) for one in results if one["error"] is not None]
    if plot is not None:
        plots.points(results, plot)
    if as_json:
        mean = sum(errors) / len(errors) if errors else None
        click.echo(json.dumps({"points": results, "mean_absolute_error": mean}, indent=2))
        return
    _print([_comparison(file.name, results)])
    if errors:
        click.echo(
            f"Mean absolute error: {100 * sum(errors) / len(errors):.1f} % over {len(errors)} points, "
            f"at most {100 * max(errors):.1f} %."
        )


@simulate.command(
    "plan",
    epilog="""\b
    Examples:
      cmjax simulate plan --devices 384 --tpot 50ms --ttft 2s --input-len 4096 --output-len 512
      cmjax simulate plan --hardware gb200 --devices 72 --tpot 20ms --price 3 --out serve.yaml --plot front.png
      cmjax serve --config serve.yaml --model DIR""",
)
@model_config_option
@_hardware_option
@click.option("--tpot", type=Duration(), default=0.05, show_default="50ms", help="Target of the time per output token.")
@click.option("--ttft", type=Duration(), default=2.0, show_default="2s", help="Target of the time to the first token.")
@options_for("workload", Workload)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write a YAML file for cmjax serve --config."
)
@plot_option
@json_option
def plan(
    model: str,
    hardware: str,
    tpot: float,
    ttft: float,
    workload: Workload,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """The layout of prefill, decode and cache that serves most requests and holds the targets."""
    from cmjax.checkpoint.configs import find_config
    from cmjax.perf import plots
    from cmjax.perf.plan import search

    machine, config = find_hardware(hardware), find_config(model).config
    with shown_progress("forms") as tell:
        found = search(config, machine, workload, tpot, ttft, tell)
    best, front, prefill = found["plan"], found["front"], found["prefill_front"]
    if plot is not None:
        plots.front(front, prefill, plot)
    if out is not None:
        _write_yaml(found["config"], out)
    report = {
        "model": model,
        "hardware": hardware,
        "decode": {"instances": best.num_decode, **best.decode.row},
        "prefill": {"instances": best.num_prefill, **best.prefill.row},
        "cache_nodes": best.cache_nodes,
        "devices_used": best.devices,
        "requests_per_s": best.requests_per_s,
        "output_tokens_per_s": found["output_tokens_per_s"],
        "cost_per_million_output_tokens": found["cost_per_million"],
        "config": found["config"],
        "decode_front": [one.row for one in front],
        "prefill_front": [one.row for one in prefill],
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    _print([_fronts("Decode: Pareto front", "TPOT ms", front), _fronts("Prefill: Pareto front", "TTFT ms", prefill)])
    for role, count, one in (("decode", best.num_decode, best.decode), ("prefill", best.num_prefill, best.prefill)):
        row = one.row
        click.echo(
            f"{count} {role} x EP{row['ep']}, batch {row['batch']} a device, microbatches {row['microbatches']}, "
            f"drafts {row['drafts']}, quant {row['quant']}: {row['latency_ms']:.1f} ms, "
            f"{row['tokens_per_s_per_device']:,.0f} tokens/s of a device, {row['memory_gib']:.1f} GiB."
        )
    cost = found["cost_per_million"]
    click.echo(
        f"{best.devices} of {workload.devices} devices, {best.cache_nodes} nodes' memory for the pool: "
        f"{best.requests_per_s:.1f} requests/s, {found['output_tokens_per_s']:,.0f} output tokens/s"
        + ("." if cost is None else f", {cost:.2f} a million output tokens.")
    )


def _fronts(title: str, latency: str, candidates: "list[Candidate]") -> Table:
    names = ("EP", "batch", "microbatches", "drafts", "quant", latency, "tokens/s of a device", "GiB")
    table = new_table(title, *names, numbers_from=0)
    for one in candidates:
        row = one.row
        whole = [str(row[name]) for name in ("ep", "batch", "microbatches", "drafts", "quant")]
        rates = (f"{row['latency_ms']:.1f}", f"{row['tokens_per_s_per_device']:,.0f}", f"{row['memory_gib']:.1f}")
        table.add_row(*whole, *rates)
    return table


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plot {path}: {error}") from error


def _write_yaml(config: JsonObject, path: Path) -> None:
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items())
    try:
        path.write_text("# cmjax serve --config THIS --model DIR\n" + text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: {error}") from error


@simulate.command(
    "step",
    epilog="""\b
    Examples:
      cmjax simulate step --ep 320 --batch 48 --context 4096 --drafts 1 --microbatches 2
      cmjax simulate step --phase prefill --ep 32 --batch 8192 --context 4096 --hardware gb200 --json""",
)
@model_config_option
@_hardware_option
@click.option("--phase", type=click.Choice(["prefill", "decode"]), default="decode", show_default=True, help="Which.")
@count_option("--ep", 320, "Devices of the instance.", most=8192)
@count_option("--batch", 48, "Of a device: requests, or tokens of a prefill step.", most=2**24)
@count_option("--context", 4096, "Tokens in the cache of a request, or of a prompt.", most=10**7)
@count_option("--drafts", 0, "MTP drafts of a decode step.", least=0, most=16)
@count_option("--microbatches", 1, "One or two.", most=2)
@json_option
def step(
    model: str,
    hardware: str,
    phase: str,
    ep: int,
    batch: int,
    context: int,
    drafts: int,
    microbatches: int,
    as_json: bool,
) -> None:
    """One step: what each stage computes, reads and sends, and what it takes."""
    from cmjax.checkpoint.configs import find_config
    from cmjax.perf.layout import Layout, Phase
    from cmjax.perf.price import price, stage_table

    machine = find_hardware(hardware)
    layout = Layout(
        config=find_config(model).config, phase=cast(Phase, phase), ep_size=ep, batch=batch, context=context,
        drafts=drafts, microbatches=microbatches, balance=machine.balance,
    )  # fmt: skip
    found = price(layout, machine)
    rows = stage_table(layout, machine, found)
    if as_json:
        whole = {"seconds": found.seconds, "streams": found.streams, "memory": dict(found.memory)}
        click.echo(json.dumps({**whole, "stages": rows}, indent=2))
        return
    columns = ("stage", "int8 GFLOP", "bf16", "f32", "MB weights", "cache", "activations", "sent", "operators", "ms")
    table = new_table(f"{machine.title}: {phase} at EP{ep}, of one device and step", *columns, numbers_from=1)
    for row in rows:
        numbers: list[Any] = list(row.values())[1:]
        scaled = [*(value / 1e9 for value in numbers[:3]), *(value / 1e6 for value in numbers[3:7])]
        cells = [*scaled, numbers[8], numbers[9] * 1e3]
        table.add_row(str(row["stage"]), *(f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in cells))
    _print([table])
    memory = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in found.memory.items())
    click.echo(f"The step takes {found.seconds * 1e3:.2f} ms; memory of a device in GiB: {memory}.")
    if found.streams[0]:
        first, second = (seconds * 1e3 for seconds in found.streams)
        if found.attention_share < 1:
            share = f"{found.attention_share:.0%} of the cores for attention"
            click.echo(f"Two microbatches: attention {first:.2f} ms beside experts {second:.2f} ms, {share}.")
        else:
            click.echo(f"Two microbatches: work {first:.2f} ms beside exchanges {second:.2f} ms.")


@simulate.command("whatif", epilog="\b\nExamples:\n  cmjax simulate whatif afd\n  cmjax simulate whatif all --plot DIR")
@click.argument("name", default="all")
@model_config_option
@_hardware_option
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it to this file, or several into this folder.")
@json_option
def what_if(name: str, model: str, hardware: str, plot: Path | None, as_json: bool) -> None:
    """The paper's discussion, priced: afd, supernode, plane, pooling, offload, or all."""
    from cmjax.checkpoint.configs import find_config
    from cmjax.perf import plots, whatif

    names = list(whatif.WHAT_IFS) if name == "all" else [name]
    if plot is not None and plot.exists() and plot.is_dir() != (name == "all"):
        wanted = "a folder: it takes one picture of each" if name == "all" else "a file"
        raise UserError(f"--plot {plot}: is there and is not {wanted}")
    config, machine = find_config(model).config, find_hardware(hardware)
    if plot is not None and name == "all":
        _make_folder(plot)
    results = {}
    with shown_progress("what-ifs") as tell:
        for index, one in enumerate(names):
            tell(one, index, len(names))
            results[one] = whatif.run(one, config, machine)
    for one, result in results.items():
        if plot is not None:
            plots.what_if(result, plot / f"{one}.png" if name == "all" else plot)
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for result in results.values():
        table = new_table(result["title"], *result["columns"])
        table.caption = "\n".join(f"- {text}" for text in result["assumptions"])
        for row in result["rows"]:
            table.add_row(*(whatif.shown(value) for value in row))
        _print([table])


@simulate.command("hardware", epilog="\b\nExamples:\n  cmjax simulate hardware\n  cmjax simulate hardware gb200 --json")
@click.argument("name", required=False)
@json_option
def show_hardware(name: str | None, as_json: bool) -> None:
    """The machines, or all numbers of the one named, each with its source and how it is known."""
    from cmjax.perf import hardware as known

    if name is None:
        names = [*known.names(), "host"]
        click.echo(json.dumps(names) if as_json else "\n".join(names))
        return
    machine = find_hardware(name)
    rows = [(key, one.value, one.unit, one.mark, one.source) for key, one in machine.figures.items()]
    if as_json:
        click.echo(
            json.dumps({key: dict(zip(("value", "unit", "mark", "source"), rest, strict=True)) for key, *rest in rows})
        )
        return
    table = new_table(machine.title, "number", "value", "unit", "known", "source")
    for key, value, *texts in rows:
        table.add_row(key, f"{value:.4g}", *texts)
    _print([table])


def _print(tables: list[Table]) -> None:
    print_tables(Console(file=sys.stdout), tables)
