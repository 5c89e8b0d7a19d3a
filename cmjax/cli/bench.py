"""`cmjax bench`: how fast the fabric, a decode step and one device are, with the machine and the commit beside them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmjax.cli.bench_engine import engine
from cmjax.cli.bench_serve import serve
from cmjax.cli.command import Commands
from cmjax.cli.generate import new_table
from cmjax.cli.options import find_model, json_option, model_option, quant_option
from cmjax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

ALL = ("fabric", "decode", "pipeline", "engine", "peer", "training", "quant")
EXIT_DIFFERENT = 1

rounds_option = click.option(
    "--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Timed runs of each; medians count."
)


@click.group(
    cls=Commands,
    epilog="""\b
    Examples:
      cmjax bench decode              a decode step over 320 devices, and the same tokens on one
      cmjax bench peer --json         one device against transformers, where torch is installed
      cmjax bench all                 each in a process of its own""",
)
def bench() -> None:
    """Measure; every figure comes with its machine, its versions and its commit."""


bench.add_command(engine)
bench.add_command(serve)


@bench.command(epilog="\b\nExamples:\n  cmjax bench fabric\n  cmjax bench fabric --json")
@rounds_option
@json_option
def fabric(rounds: int, as_json: bool) -> None:
    """The fabric's all_to_all beside lax and a memory copy, and how much of a delay its two halves hide."""
    from cmjax.bench import fabric as bench_fabric

    report = bench_fabric.run(repeats=rounds)
    print_report(report, bench_fabric.tables(report), as_json)


@bench.command(
    epilog="""\b
    Examples:
      cmjax bench decode
      cmjax bench decode --ep 64 --seqs-per-rank 4 --json
      cmjax bench decode --mtp 1 --ep 1 --seqs-per-rank 1 --seqs-per-rank 8"""
)
@model_option
@click.option("--ep", type=click.IntRange(min=1), default=320, show_default=True, help="Devices of the instance.")
@click.option(
    "--seqs-per-rank",
    type=click.IntRange(min=1),
    multiple=True,
    default=(8,),
    show_default=True,
    help="Sequences of a rank; with --mtp several times.",
)
@click.option("--cache", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens cached of each.")
@click.option("--steps", type=click.IntRange(min=2), help="Decode steps a call.  [default: 4, with --mtp 16]")
@click.option("--mtp", type=click.IntRange(min=1), help="Compare with so many drafts a step of the MTP module.")
@quant_option
@rounds_option
@json_option
def decode(
    folder: str,
    ep: int,
    seqs_per_rank: tuple[int, ...],
    cache: int,
    steps: int | None,
    mtp: int | None,
    quant: Any,
    rounds: int,
    as_json: bool,
) -> None:
    """A decode step over hundreds of devices: launch, exchange and math, and the same tokens on one device.

    With --mtp: decoding with drafts beside decoding without, from the model's own prompts.
    """
    from cmjax.bench import decode as bench_decode
    from cmjax.bench import speculative
    from cmjax.checkpoint import load
    from cmjax.mesh import bring_up

    path = find_model(folder)
    bring_up(ep)
    model = load(path, quant=quant, rows=max(seqs_per_rank))
    if mtp:
        report = speculative.run(
            model, path, num_drafts=mtp, ep_size=ep, batches=seqs_per_rank, num_steps=steps or 16, rounds=rounds
        )
        print_report(report, speculative_tables(report), as_json)
        return
    if len(seqs_per_rank) > 1:
        raise UserError("--seqs-per-rank several times goes with --mtp")
    report = bench_decode.run(
        model, ep_size=ep, seqs_per_rank=seqs_per_rank[0], cache_tokens=cache, num_steps=steps or 4, rounds=rounds
    )
    print_report(report, decode_tables(report), as_json)


@bench.command(epilog="\b\nExamples:\n  cmjax bench pipeline\n  cmjax bench pipeline --ep 320 --plot timeline.png")
@click.option("--model", "folder", metavar="DIR", help="Another model.  [default: random weights, a long cache]")
@click.option("--ep", type=click.IntRange(min=1), default=8, show_default=True, help="Devices of the instance.")
@click.option("--seqs-per-rank", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences of a rank.")
@click.option("--cache", type=click.IntRange(min=1), default=8000, show_default=True, help="Tokens cached of each.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw what a device did, as PNG or SVG.")
@rounds_option
@json_option
def pipeline(
    folder: str | None, ep: int, seqs_per_rank: int, cache: int, plot: Path | None, rounds: int, as_json: bool
) -> None:
    """A decode step whose exchanges take time, in one microbatch and in two that take turns."""
    from cmjax.bench import pipeline as bench_pipeline
    from cmjax.checkpoint import load
    from cmjax.mesh import bring_up

    model = None if folder is None else load(find_model(folder))
    bring_up(ep)
    report, spans = bench_pipeline.run(
        model, ep_size=ep, seqs_per_rank=seqs_per_rank, cache_tokens=cache, rounds=rounds
    )
    if plot is not None:
        bench_pipeline.draw(plot, spans, f"A decode step on device 0 of {ep}, two microbatches, exchanges delayed")
    print_report(report, pipeline_tables(report), as_json)


@bench.command(
    epilog="\b\nExamples:\n  cmjax bench peer --dtype bfloat16 --json\n  cmjax bench peer --peer-python PATH"
)
@click.option("--dtype", type=click.Choice(("bfloat16", "float32")), help="Only this one.  [default: both]")
@click.option(
    "--peer-python",
    metavar="PATH",
    help="An interpreter that has torch and transformers.  [default: this one, where it has them]",
)
@rounds_option
@json_option
@click.pass_context
def peer(context: click.Context, dtype: str | None, peer_python: str | None, rounds: int, as_json: bool) -> None:
    """One device against Hugging Face transformers, on the same random weights.

    Where transformers runs under another interpreter, each side waits while the other works. Ends with status 1 where
    the two compute different logits.
    """
    from rich.console import Console

    from cmjax.bench import peer as bench_peer

    console = Console(stderr=True)

    def on_result(row: dict[str, Any]) -> None:
        console.print(f"{row['job']} {row['batch']} {row['dtype']}: {row['cmjax_s'] * 1e3:.1f} ms", highlight=False)

    dtypes = (dtype,) if dtype else bench_peer.DTYPES
    report = bench_peer.run(dtypes=dtypes, rounds=rounds, peer_python=peer_python, on_result=on_result)
    print_report(report, peer_tables(report), as_json)
    if report["logits_agree"] is False:
        context.exit(EXIT_DIFFERENT)


@bench.command(epilog="\b\nExamples:\n  cmjax bench training\n  cmjax bench training --tokens 4096 --json")
@click.option("--tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens of a step.")
@rounds_option
@json_option
def training(tokens: int, rounds: int, as_json: bool) -> None:
    """The routed experts of one layer, value and gradient, by the forms that a training step could use."""
    from cmjax.bench import training as bench_training

    report = bench_training.run(tokens=tokens, rounds=rounds)
    print_report(report, training_tables(report), as_json)


@bench.command(epilog="\b\nExamples:\n  cmjax bench quant\n  cmjax bench quant --tokens 4096 --json")
@click.option("--tokens", type=click.IntRange(min=256), default=2048, show_default=True, help="Tokens of the prefill.")
@rounds_option
@json_option
def quant(tokens: int, rounds: int, as_json: bool) -> None:
    """Products and a whole prefill in int8, beside bfloat16 and float32."""
    from cmjax.bench import quant as bench_quant

    report = bench_quant.run(tokens=tokens, rounds=rounds)
    print_report(report, quant_tables(report), as_json)


@bench.command(name="all", epilog="\b\nExamples:\n  cmjax bench all\n  cmjax bench all --json > bench.json")
@rounds_option
@json_option
@click.pass_context
def run_all(context: click.Context, rounds: int, as_json: bool) -> None:
    """Every benchmark, each in a process of its own: they need different numbers of devices."""
    reports, worst = {}, 0
    for name in ALL:
        command = [sys.executable, "-m", "cmjax", "bench", name, "--rounds", str(rounds)]
        if as_json:
            done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=False)
            reports[name] = json.loads(done.stdout) if done.stdout else None
        else:
            done = subprocess.run(command, check=False)
        worst = max(worst, abs(done.returncode))
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    if worst:
        context.exit(worst)


def print_report(report: dict[str, Any], tables: "Sequence[Table]", as_json: bool) -> None:
    """Print a report as tables under its machine, or as one JSON object."""
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console

    console = Console(file=sys.stdout)
    console.print(machine_line(report["machine"]), highlight=False, soft_wrap=True)
    for table in tables:
        console.print(table)


def machine_line(machine: dict[str, Any]) -> str:
    """The machine, versions and commit in one line."""
    packages = ("jax", "torch", "transformers")
    versions = ", ".join(f"{name} {machine[name]}" for name in packages if name in machine)
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']}, {versions}{commit}"
    )


def _definitions(table: "Table", definitions: dict[str, str]) -> "Table":
    table.caption = "\n".join(f"{name}: {text}" for name, text in definitions.items())
    return table


def decode_tables(report: dict[str, Any]) -> "list[Table]":
    """Step times and shares of `cmjax bench decode`."""
    settings, one = report["settings"], report["one_device"]
    title = (
        f"A decode step of {settings['num_sequences']:,} sequences, {settings['cache_tokens']} tokens cached of each; "
        f"median of {settings['rounds']} calls of {settings['num_steps']} steps"
    )
    columns = ("devices", "wire", "ms a step", "tokens/s", "launch", "exchange", "math", "x one device")
    table = new_table(title, *columns, numbers_from=2)
    for row in report["results"]:
        shares = (f"{row['shares'][part]:.0%}" for part in ("launch", "exchange", "math"))
        figures = (f"{row['step_s'] * 1e3:.1f}", f"{row['tokens_per_s']:,.0f}", *shares)
        table.add_row(str(settings["ep_size"]), row["wire"], *figures, f"{row['times_one_device']:.2f}")
    figures = (f"{one['step_s'] * 1e3:.1f}", f"{one['tokens_per_s']:,.0f}", "", "", "")
    table.add_row("1", "", *figures, "1.00")
    notes = {
        f"first tokens, {row['wire']}": f"{row['first_tokens_equal_to_one_device']:,} of "
        f"{settings['num_sequences']:,} are those of one device"
        for row in report["results"]
    }
    notes["x one device"] = f"the bound is {report['bound']:g}"
    notes["load"] = f"the busiest expert had {report['busiest_expert_over_mean']:.1f} times the mean"
    return [_definitions(table, report["definitions"] | notes)]


def pipeline_tables(report: dict[str, Any]) -> "list[Table]":
    """Step times of `cmjax bench pipeline`."""
    settings, step_s = report["settings"], report["step_s"]
    title = (
        f"A decode step, {settings['ep_size']} devices, {settings['seqs_per_rank']} sequences a rank, "
        f"{settings['cache_tokens']:,} tokens cached of each; median of {settings['rounds']} calls of "
        f"{settings['num_steps']} steps"
    )
    table = new_table(title, "exchanges", "one, ms", "two, ms", "ratio", "bound", numbers_from=1)
    for name, suffix, key in (("as they are", "", "without_delay"), ("delayed", " delayed", "with_delay")):
        times = (f"{step_s[form + suffix] * 1e3:.1f}" for form in ("plain", "two"))
        table.add_row(name, *times, f"{report['results'][key]:.2f}", f"{report['bounds'][key]:g}")
    exposed = f"{report['exposed']['plain']:.0%} with one, {report['exposed']['two']:.0%} with two"
    notes = {"equal": f"{report['definitions']['equal']}: {report['equal']:.2%}"}
    notes["exposed"] = f"{report['definitions']['exposed']}: {exposed}"
    return [_definitions(table, report["definitions"] | notes)]


def speculative_tables(report: dict[str, Any]) -> "list[Table]":
    """Both forms of `cmjax bench decode --mtp`."""
    settings = report["settings"]
    title = (
        f"{settings['num_drafts']} drafts a step, {settings['ep_size']} devices; "
        f"medians of {settings['rounds']} rounds of {settings['num_calls']} calls of {settings['num_steps']} steps"
    )
    columns = (
        "a rank",
        "ms a step",
        "with",
        "tokens/s",
        "with",
        "tokens a step",
        "kept",
        "forced",
        "speedup",
        "bound",
    )
    table = new_table(title, *columns, numbers_from=0)
    for row in report["results"]:
        forms = ("plain", "drafting")
        table.add_row(
            str(row["seqs_per_rank"]),
            *(f"{row['step_s'][form] * 1e3:.2f}" for form in forms),
            *(f"{row['tokens_per_s'][form]:,.0f}" for form in forms),
            f"{row['tokens_a_step']:.2f}",
            *(f"{row[name]:.0%}" for name in ("kept", "teacher_forced")),
            *(f"{row[name]:.2f}" for name in ("speedup", "bound")),
        )
    notes = {"equal": "the tokens of each form are the same in as many of the sequences: "}
    notes["equal"] += ", ".join(f"{row['equal_sequences']} of {row['num_sequences']}" for row in report["results"])
    return [_definitions(table, report["definitions"] | notes)]


def peer_tables(report: dict[str, Any]) -> "list[Table]":
    """Both sides of `cmjax bench peer`, or ours alone."""
    settings = report["settings"]
    title = (
        f"{settings['num_parameters'] / 1e6:.0f} M parameters on one device, {settings['length']} tokens; "
        f"median of {settings['rounds']}"
    )
    columns = ("job", "batch", "dtype", "cmjax ms", "tokens/s", "transformers ms", "tokens/s", "its experts", "speedup")
    table = new_table(title, *columns, numbers_from=3)
    for row in report["results"]:
        cells = [row["job"], str(row["batch"]), row["dtype"]]
        for side in ("cmjax", "transformers"):
            has_side = f"{side}_s" in row
            cells += (
                [f"{row[f'{side}_s'] * 1e3:.1f}", f"{row[f'{side}_tokens_per_s']:,.0f}"] if has_side else ["-", "-"]
            )
        speedup = f"{row['speedup']:.2f}" if "speedup" in row else "-"
        table.add_row(*cells, row["peer_experts"] or "-", speedup)
    notes = {}
    if report["peer"] is None:
        notes["the peer is absent"] = "install torch and transformers in this environment, or give --peer-python"
    for dtype, diff in report["logits_max_abs_diff"].items():
        notes[f"logits, {dtype}"] = f"the two differ by at most {diff:.2g}"
    return [_definitions(table, report["definitions"] | notes)]


def training_tables(report: dict[str, Any]) -> "Sequence[Table]":
    """The forms with their times."""
    shape = report["shape"]
    title = (
        f"{shape['tokens']:,} tokens, {shape['num_experts']} experts of width {shape['width']}, forward and backward"
    )
    table = new_table(title, "form", "ms", "times the fastest", numbers_from=1)
    for row in report["results"]:
        table.add_row(row["form"], f"{row['seconds'] * 1e3:.0f}", f"{row['times_best']:.2f}")
    return [table]


def quant_tables(report: dict[str, Any]) -> "list[Table]":
    """Products by shape and rows, the prefill, and the bounds."""
    from cmjax.bench.quant import FORMATS

    columns = ("out x in", "rows", *(f"{name} ms" for name in FORMATS), "int8 speedup", "faster")

    def cells(row: dict[str, Any]) -> list[str]:
        times = [f"{row['seconds'][name] * 1e3:.3f}" for name in FORMATS]
        fastest = min(row["seconds"], key=lambda name: row["seconds"][name])
        return [*times, f"{row['speedup']:.2f}", fastest]

    rounds = report["settings"]["rounds"]
    products = new_table(f"One product, activations quantized within it; median of {rounds}", *columns, numbers_from=1)
    for row in report["products"]:
        products.add_row(f"{row['out']} x {row['in']}", str(row["rows"]), *cells(row))
    settings, results, bounds = report["settings"], report["results"], report["bounds"]
    title = f"A model of {settings['num_parameters'] / 1e6:.0f} M parameters, {settings['tokens']:,} tokens"
    whole = new_table(title, "", *columns[2:], numbers_from=1)
    whole.add_row("prefill", *cells(report["prefill"]))
    alone = report["prefill_products"]
    whole.add_row("its products alone", *cells({"seconds": alone["seconds"], "speedup": alone["advantage"]}))
    notes = {
        "prefill": f"{results['prefill_speedup']:.2f} times the best float, the bound is {bounds['prefill_speedup']:g}",
        "kept": f"{results['kept']:.0%} of the products' advantage, the bound is {bounds['kept']:.0%}",
        "memory": f"{results['memory']:.3f} of float32, the bound is {bounds['memory']:g}",
    }
    return [products, _definitions(whole, report["definitions"] | {f"measured, {k}": v for k, v in notes.items()})]
