"""`cmjax bench`: how fast the fabric, a decode step and one device are, with the machine and the commit beside them."""

from pathlib import Path

import click
from rich.console import Console

from cmjax.bench import decode, engine, fabric, kernels, peer, pipeline, quant, speculative, training
from cmjax.checkpoint import ModelFormats, load
from cmjax.cli.bench_cache import cache
from cmjax.cli.bench_each import run_each
from cmjax.cli.bench_sampling import bench_sampling
from cmjax.cli.bench_serve import serve
from cmjax.cli.command import Commands
from cmjax.cli.flags import options_for
from cmjax.cli.options import count_option, find_model, json_option, model_option
from cmjax.cli.tables import print_report
from cmjax.errors import UserError
from cmjax.mesh import bring_up
from cmjax.text import JsonObject

ALL = ("fabric", "decode", "pipeline", "engine", "peer", "kernels", "training", "quant", "cache")
EXIT_DIFFERENT = 1

rounds_option = count_option("--rounds", 7, "Timed runs of each; medians count.")


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


bench.add_command(serve)
bench.add_command(bench_sampling)
bench.add_command(cache)


@bench.command("fabric", epilog="\b\nExamples:\n  cmjax bench fabric\n  cmjax bench fabric --json")
@rounds_option
@json_option
def bench_fabric(rounds: int, as_json: bool) -> None:
    """The fabric's all_to_all beside lax and a memory copy, and how much of a delay its two halves hide."""
    report = fabric.run(repeats=rounds)
    print_report(report, fabric.tables(report), as_json)


@bench.command(
    "decode",
    epilog="""\b
    Examples:
      cmjax bench decode
      cmjax bench decode --ep 64 --seqs-per-rank 4 --json
      cmjax bench decode --mtp 1 --ep 1 --seqs-per-rank 1 --seqs-per-rank 8""",
)
@model_option
@count_option("--ep", 320, "Devices of the instance.")
@click.option(
    "--seqs-per-rank",
    type=click.IntRange(min=1),
    multiple=True,
    default=(8,),
    show_default=True,
    help="Sequences of a rank; with --mtp several times.",
)
@count_option("--cache", 128, "Tokens cached of each.")
@click.option("--steps", type=click.IntRange(min=2), help="Decode steps a call.  [default: 4, with --mtp 16]")
@click.option("--mtp", type=click.IntRange(min=1), help="Compare with so many drafts a step of the MTP module.")
@options_for("formats", ModelFormats, only=("quant",))
@rounds_option
@json_option
def bench_decode(
    folder: str,
    ep: int,
    seqs_per_rank: tuple[int, ...],
    cache: int,
    steps: int | None,
    mtp: int | None,
    formats: ModelFormats,
    rounds: int,
    as_json: bool,
) -> None:
    """A decode step over hundreds of devices: launch, exchange and math, and the same tokens on one device.

    With --mtp: decoding with drafts beside decoding without, from the model's own prompts.
    """
    path = find_model(folder)
    bring_up(ep)
    model = load(path, quant=formats.quant, rows=max(seqs_per_rank))
    if mtp:
        report = speculative.run(
            model, path, num_drafts=mtp, ep_size=ep, batches=seqs_per_rank, num_steps=steps or 16, rounds=rounds
        )
        print_report(report, speculative.tables(report), as_json)
        return
    if len(seqs_per_rank) > 1:
        raise UserError("--seqs-per-rank several times goes with --mtp")
    report = decode.run(
        model, ep_size=ep, seqs_per_rank=seqs_per_rank[0], cache_tokens=cache, num_steps=steps or 4, rounds=rounds
    )
    print_report(report, decode.tables(report), as_json)


@bench.command(
    "pipeline", epilog="\b\nExamples:\n  cmjax bench pipeline\n  cmjax bench pipeline --ep 320 --plot timeline.png"
)
@click.option("--model", "folder", metavar="DIR", help="Another model.  [default: random weights, a long cache]")
@count_option("--ep", 8, "Devices of the instance.")
@count_option("--seqs-per-rank", 8, "Sequences of a rank.")
@count_option("--cache", 8000, "Tokens cached of each.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw what a device did, as PNG or SVG.")
@rounds_option
@json_option
def bench_pipeline(
    folder: str | None, ep: int, seqs_per_rank: int, cache: int, plot: Path | None, rounds: int, as_json: bool
) -> None:
    """A decode step whose exchanges take time, in one microbatch and in two that take turns."""
    model = None if folder is None else load(find_model(folder))
    bring_up(ep)
    report, spans = pipeline.run(model, ep_size=ep, seqs_per_rank=seqs_per_rank, cache_tokens=cache, rounds=rounds)
    if plot is not None:
        pipeline.draw(plot, spans, f"A decode step on device 0 of {ep}, two microbatches, exchanges delayed")
    print_report(report, pipeline.tables(report), as_json)


@bench.command(
    "engine",
    epilog="""\b
    Examples:
      cmjax bench engine
      cmjax bench engine --ep 64 --seqs-per-rank 4 --json""",
)
@model_option
@count_option("--ep", 320, "Devices of the decode instance.")
@count_option("--seqs-per-rank", 8, "Places of a rank.")
@count_option("--prompt-tokens", 4096, "Of the long prompt.", least=2)
@count_option("--steps", 8, "Decode steps in a call.")
@click.option("--rounds", type=int, hidden=True, expose_value=False, help="Taken, for `bench all`, and not used.")
@json_option
def bench_engine(folder: str, ep: int, seqs_per_rank: int, prompt_tokens: int, steps: int, as_json: bool) -> None:
    """A full decode step beside one with one request, and how long decode waits while a long prompt is prefilled."""
    report = engine.run(
        load(find_model(folder)), ep_size=ep, seqs_per_rank=seqs_per_rank, prompt_tokens=prompt_tokens, num_steps=steps
    )
    print_report(report, engine.tables(report), as_json)


@bench.command(
    "peer",
    epilog="""\b
    Examples:
      cmjax bench peer --format bfloat16 --json
      cmjax bench peer --peer-python PATH
      cmjax bench peer --llama-python PATH --format int8""",
)
@click.option(
    "--format",
    "--dtype",
    "name",
    type=click.Choice(peer.FORMATS),
    help="Only this one.  [default: bfloat16 and float32, with --llama-python int8 too]",
)
@click.option(
    "--peer-python",
    metavar="PATH",
    help="An interpreter that has torch and transformers.  [default: this one, where it has them]",
)
@click.option(
    "--llama-python", metavar="PATH", help="An interpreter that has llama-cpp-python and gguf: llama.cpp is a peer."
)
@rounds_option
@json_option
@click.pass_context
def bench_peer(
    context: click.Context,
    name: str | None,
    peer_python: str | None,
    llama_python: str | None,
    rounds: int,
    as_json: bool,
) -> None:
    """One device against Hugging Face transformers and llama.cpp, on the same random weights.

    A peer under another interpreter and cmjax run in turn: each waits while another works. Their logits are compared
    first; where they differ, nothing is timed and the status is 1.
    """
    console = Console(stderr=True)

    def on_result(row: JsonObject) -> None:
        times = ", ".join(f"{side} {found['seconds'] * 1e3:.1f} ms" for side, found in row["sides"].items())
        console.print(f"{row['job']} {row['batch']} {row['format']}: {times}", highlight=False)

    report = peer.run(
        formats=(name,) if name else None,
        rounds=rounds,
        peer_python=peer_python,
        llama_python=llama_python,
        on_result=on_result,
    )
    print_report(report, peer.tables(report), as_json)
    for one in report["logits"]:
        if not one["agrees"]:
            click.echo(
                f"cmjax bench peer: error: {one['format']}: the logits of {one['peer']} and cmjax {peer.describe(one)}",
                err=True,
            )
    if report["logits_agree"] is False:
        context.exit(EXIT_DIFFERENT)


@bench.command("kernels", epilog="\b\nExamples:\n  cmjax bench kernels\n  cmjax bench kernels --format int8 --json")
@click.option("--format", "name", type=click.Choice(kernels.FORMATS), help="Only this one.  [default: all]")
@rounds_option
@json_option
def bench_kernels(name: str | None, rounds: int, as_json: bool) -> None:
    """Decode and prefill on one device, with and without the C++ kernels, in each format, in turn."""
    console = Console(stderr=True)

    def on_result(row: JsonObject) -> None:
        console.print(f"{row['format']} {row['job']} {row['batch']}: {row['speedup']:.2f} times", highlight=False)

    report = kernels.run(formats=(name,) if name else kernels.FORMATS, rounds=rounds, on_result=on_result)
    print_report(report, kernels.tables(report), as_json)


@bench.command("training", epilog="\b\nExamples:\n  cmjax bench training\n  cmjax bench training --tokens 4096 --json")
@count_option("--tokens", 1024, "Tokens of a step.")
@rounds_option
@json_option
def bench_training(tokens: int, rounds: int, as_json: bool) -> None:
    """The routed experts of one layer, value and gradient, by the forms that a training step could use."""
    report = training.run(tokens=tokens, rounds=rounds)
    print_report(report, training.tables(report), as_json)


@bench.command("quant", epilog="\b\nExamples:\n  cmjax bench quant\n  cmjax bench quant --tokens 4096 --json")
@count_option("--tokens", 2048, "Tokens of the prefill.", least=256)
@rounds_option
@json_option
def bench_quant(tokens: int, rounds: int, as_json: bool) -> None:
    """Products and a whole prefill in int8, beside bfloat16 and float32."""
    report = quant.run(tokens=tokens, rounds=rounds)
    print_report(report, quant.tables(report), as_json)


@bench.command(name="all", epilog="\b\nExamples:\n  cmjax bench all\n  cmjax bench all --json > bench.json")
@rounds_option
@json_option
@click.pass_context
def run_all(context: click.Context, rounds: int, as_json: bool) -> None:
    """Every benchmark, each in a process of its own: they need different numbers of devices."""
    commands = {name: ["cache", "all"] if name == "cache" else [name] for name in ALL}
    run_each(context, {name: [*words, "--rounds", str(rounds)] for name, words in commands.items()}, as_json)
