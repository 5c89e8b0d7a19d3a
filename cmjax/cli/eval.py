"""`cmjax eval`: how well a model predicts held-out text, by subject area, beside a compressor or other models."""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmjax.cli.options import (
    CALIBRATION,
    CALIBRATION_LENGTH,
    CALIBRATION_SEQUENCES,
    HELDOUT,
    find_model,
    format_options,
    json_option,
    model_option,
)
from cmjax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from cmjax.model import Model

# Kinds of outliers that can be planted: the keys of `cmjax.bench.outliers.FACTORS`.
PLANTED = ("inputs", "values", "idle weights", "weights")


@click.command(
    name="eval",
    epilog="""\b
    Examples:
      cmjax eval                                  the bundled model, on one device
      cmjax eval --ep 320                         the same numbers from 320 devices
      cmjax eval --model DIR --context 1024 --json
      cmjax eval --data texts.jsonl               one JSON object a line: path, area, text
      cmjax eval --compare out/demo-int8          two folders side by side, with the KL divergence
      cmjax eval --ablation --dtype bfloat16      floats, int8, and each calibration technique added
      cmjax eval --ablation --planted all         the same, for a model with planted outliers
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
@click.option(
    "--compare", "others", multiple=True, metavar="DIR", help="Another folder, measured beside --model; several times."
)
@click.option("--ablation", is_flag=True, help="Compare --model with itself in int8, techniques added in turn.")
@click.option("--alone", is_flag=True, help="With --ablation: each technique alone.")
@click.option(
    "--planted",
    type=click.Choice(("all", *PLANTED)),
    help="With --ablation: what is quantized computes the same, but has outliers.",
)
@click.option(
    "--calibration-sequences",
    type=click.IntRange(min=1),
    default=CALIBRATION_SEQUENCES,
    show_default=True,
    help="With --ablation: sequences to calibrate on.",
)
@click.option("--characters", type=click.IntRange(min=1), help="Only so many characters of each file.")
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
    others: tuple[str, ...],
    ablation: bool,
    alone: bool,
    planted: str | None,
    calibration_sequences: int,
    characters: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a model on held-out text, teacher-forced.

    Bits per byte beside a compressor's, next-token accuracy, how often the MTP module's draft is the model's own
    choice, and the balance of the experts, by subject area.
    """
    from rich.console import Console

    from cmjax.bench.evaluate import evaluate_together, read_heldout
    from cmjax.checkpoint import Tokenizer
    from cmjax.mesh import Supernode, carve
    from cmjax.serve import EngineSettings

    if (alone or planted) and not ablation:
        raise UserError(f"{'--alone' if alone else '--planted'} goes with --ablation")
    begin = time.perf_counter()
    files = read_heldout(data)
    if max_files is not None:
        files = [file for i, file in enumerate(files) if [f.area for f in files[:i]].count(file.area) < max_files]
    files = [dataclasses.replace(file, text=file.text[:characters]) for file in files]
    path = find_model(folder)
    tokenizer = Tokenizer.from_folder(path)
    pools = carve(Supernode.preset("cloudmatrix384"), ep_size=ep, num_prefill_instances=0)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="cmjax-eval-") as work:
        if ablation:
            models = _ablation(path, Path(work), dtype, alone, planted, calibration_sequences, console)
        else:
            rows = -(-EngineSettings(**options).max_num_batched_tokens // ep)
            models = _models(path, others, dtype, quant, rows)
    model = next(iter(models.values()))
    context = context or min(model.config.max_position_embeddings, 2048)
    stride = stride or max(1, context // 2)
    with progress_bar(console) as progress:
        reports = evaluate_together(
            models,
            tokenizer,
            files,
            pools.decode[0],
            context=context,
            stride=stride,
            settings=EngineSettings(**options),
            progress=progress,
        )
    common = {"model": str(folder), "data": str(data), "ep_size": ep, "dtype": dtype, "quant": model.quant}
    common |= {"context": context, "stride": stride, "seconds": time.perf_counter() - begin}
    first = next(iter(reports.values()))
    report = common | first
    if len(reports) > 1:
        from cmjax.bench.ablation import compare

        report |= {"comparison": compare(reports), "models": reports}
    if as_json:
        click.echo(json.dumps(report))
        return
    out = Console(file=sys.stdout)
    if len(reports) == 1:
        show(report, out)
    else:
        show_comparison(report, out)


def _models(path: Path, others: tuple[str, ...], dtype: str, quant: Any, rows: int) -> "dict[str, Model]":
    """The model, and those beside it, by their folders' names."""
    from cmjax.cli.running import load_from

    formats = {"dtype": dtype, "quant": quant}
    models = {path.name: load_from(path, formats, rows)}
    for other in others:
        name = Path(other).name if Path(other).name not in models else other
        if name in models:
            raise UserError(f"--compare {other}: given twice")
        models[name] = load_from(Path(other), formats, rows)
    return models


def _ablation(
    path: Path, work: Path, dtype: str, alone: bool, planted: str | None, sequences: int, console: "Console"
) -> "dict[str, Model]":
    from cmjax.bench.ablation import make_models
    from cmjax.cli.quantize import calibration_ids

    kinds = () if planted is None else PLANTED if planted == "all" else (planted,)
    with console.status("quantizing"):
        ids = calibration_ids(path, CALIBRATION, sequences, CALIBRATION_LENGTH, 0)
        return make_models(path, work, ids, dtype=dtype, kinds=kinds, alone=alone)


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
    from cmjax.cli.generate import new_table

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


def show_comparison(report: dict[str, Any], console: "Console") -> None:
    """Print a row for each model, and its top-1 by area."""
    from cmjax.cli.generate import new_table

    columns = ("model", "bits/byte", "change %", "top-1 %", "points", "worst area", "points", "KL", "MTP %")
    table = new_table(f"Means of {len(report['areas'])} areas, context {report['context']}", *columns, numbers_from=1)
    for row in report["comparison"]:
        table.add_row(
            row["model"],
            _number(row["bits_per_byte"], "{:.4f}"),
            _number(row["bits_per_byte_change"], "{:+.2f}", 100),
            _number(row["top1"], "{:.2f}", 100),
            _number(row["top1_change"], "{:+.2f}"),
            row["worst_area"],
            _number(row["worst_area_change"], "{:+.2f}"),
            _number(row["kl_divergence"], "{:.5f}"),
            _number(row["mtp_agreement"], "{:.2f}", 100),
        )
    console.print(table)
    areas = new_table("Top-1 by area, %", "area", *report["models"], numbers_from=1)
    for area in report["areas"]:
        cells = (_number(one["areas"][area]["top1"], "{:.2f}", 100) for one in report["models"].values())
        areas.add_row(area, *cells)
    console.print(areas)
    console.print(f"{report['seconds']:.0f} s.", highlight=False)


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)
