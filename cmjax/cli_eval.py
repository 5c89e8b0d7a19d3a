"""`cmjax eval`: how well a model predicts held-out text, beside a compressor, by subject area."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmjax.cli_options import HELDOUT, find_model, format_options, json_option, model_option

if TYPE_CHECKING:
    from rich.console import Console


@click.command(
    name="eval",
    epilog="""\b
    Examples:
      cmjax eval                                  the bundled model, on one device
      cmjax eval --ep 320                         the same numbers from 320 devices
      cmjax eval --model DIR --context 1024 --json
      cmjax eval --data texts.jsonl               one JSON object a line: path, area, text
    \b
    top-1: the most probable token is the next one. MTP: the MTP module's draft is the model's own choice.
    compared: bits per byte of the first 64 KiB of files of 4 KiB and more; LZMA: what raw LZMA2 (preset 9) needs for
    the same bytes, file by file; ratio: the one over the other.""",
)
@model_option
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=HELDOUT,
    metavar="FILE",
    help="JSON lines with path, area and text.  [default: held-out files of the Python standard library]",
)
@click.option("--ep", type=click.IntRange(min=1), default=1, show_default=True, help="Devices to spread the model on.")
@format_options
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Most tokens to look at together.  [default: the model's max_position_embeddings, at most 2048]",
)
@click.option(
    "--stride", type=click.IntRange(min=1), help="Tokens between the windows of a long text.  [default: context / 2]"
)
@click.option(
    "--max-num-batched-tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Tokens of a step, over all devices.",
)
@click.option("--files", "max_files", type=click.IntRange(min=1), help="Only so many files of each area.")
@json_option
def evaluate_command(
    folder: str,
    data: Path,
    ep: int,
    dtype: str,
    quant: Any,
    context: int | None,
    stride: int | None,
    max_files: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a model on held-out text, teacher-forced.

    Bits per byte beside a compressor's, next-token accuracy, how often the MTP module's draft is the model's own
    choice, and the balance of the experts, by subject area.
    """
    from rich.console import Console

    from cmjax.bench.evaluate import evaluate, read_heldout
    from cmjax.mesh import Supernode, carve
    from cmjax.model import Tokenizer, load
    from cmjax.serve import EngineSettings

    begin = time.perf_counter()
    files = read_heldout(data)
    if max_files is not None:
        files = [file for i, file in enumerate(files) if [f.area for f in files[:i]].count(file.area) < max_files]
    path = find_model(folder)
    tokenizer = Tokenizer.from_folder(path)
    pools = carve(Supernode.preset("cloudmatrix384"), ep_size=ep, num_prefill_instances=0)
    model = load(path, dtype=dtype, quant=quant)
    context = context or min(model.config.max_position_embeddings, 2048)
    stride = stride or max(1, context // 2)
    with progress_bar(Console(stderr=True)) as progress:
        report = evaluate(
            model,
            tokenizer,
            files,
            pools.decode[0],
            context=context,
            stride=stride,
            settings=EngineSettings(**options),
            progress=progress,
        )
    report = {
        "model": str(folder),
        "data": str(data),
        "ep_size": ep,
        "dtype": dtype,
        "quant": model.quant,
        "context": context,
    } | report
    report |= {"stride": stride, "seconds": time.perf_counter() - begin}
    if as_json:
        click.echo(json.dumps(report))
    else:
        show(report, Console(file=sys.stdout))


@contextmanager
def progress_bar(console: "Console") -> Iterator[Callable[[int, int], None]]:
    """A callback (tokens done, tokens in all) that draws a bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("evaluating", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def show(report: dict[str, Any], console: "Console") -> None:
    """Print the report as a table."""
    from cmjax.cli_generate import new_table

    columns = ("area", "KB", "bits/byte", "top-1 %", "MTP %", "compared", "LZMA", "ratio")
    table = new_table(f"Held-out text, context {report['context']}, EP{report['ep_size']}", *columns, numbers_from=1)
    for name, row in [*report["areas"].items(), ("mean of areas", report["area_mean"]), ("all", report["all"])]:
        if name == "mean of areas":
            table.add_section()
        table.add_row(
            name,
            _number(row.get("bytes"), "{:,.0f}", 1e-3),
            _number(row["bits_per_byte"], "{:.3f}"),
            _number(row["top1"], "{:.1f}", 100),
            _number(row["mtp_agreement"], "{:.1f}", 100),
            _number(row["compared_bits_per_byte"], "{:.3f}"),
            _number(row["lzma_bits_per_byte"], "{:.3f}"),
            _number(row["ratio_to_lzma"], "{:.3f}"),
        )
    console.print(table)
    if report["expert_balance"]:
        balance = ", ".join(f"layer {name} {value:.2f}x" for name, value in report["expert_balance"].items())
        console.print(f"Busiest routed expert over the mean: {balance}.", highlight=False, soft_wrap=True)
    console.print(f"{report['seconds']:.0f} s.", highlight=False)


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)
