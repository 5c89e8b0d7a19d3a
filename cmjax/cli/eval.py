"""`cmjax eval`: how well a model predicts held-out text, by subject area, beside a compressor or other models."""

import json
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from cmjax.bench import ablation as bench_ablation
from cmjax.bench import evaluate
from cmjax.bench.ablation import AblationSettings
from cmjax.bench.evaluate import TextSettings
from cmjax.checkpoint import CalibrationSettings, ModelFormats, Tokenizer, calibration_ids, read_texts
from cmjax.cli.flags import options_for
from cmjax.cli.options import CALIBRATION, HELDOUT, count_option, data_option, find_model, json_option, model_option
from cmjax.cli.progress import shown_progress
from cmjax.cli.running import load_in
from cmjax.cli.tables import print_tables
from cmjax.errors import UserError
from cmjax.mesh import InstanceLayout
from cmjax.model import Model
from cmjax.serve import EngineSettings
from cmjax.text import JsonObject


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
@data_option(HELDOUT, "JSON lines with path, area and text.  [default: held-out files of the Python standard library]")
@count_option("--ep", 1, "Devices to spread the model on.")
@options_for("formats", ModelFormats)
@options_for(
    "engine",
    EngineSettings,
    only=("dispatch_dtype", "combine_dtype", "max_num_batched_tokens"),
    defaults={"max_num_batched_tokens": 8192},
)
@options_for("text", TextSettings)
@click.option(
    "--compare", "others", multiple=True, metavar="DIR", help="Another folder, measured beside --model; several times."
)
@options_for("ablation", AblationSettings)
@json_option
def evaluate_command(
    folder: str,
    data: Path,
    ep: int,
    formats: ModelFormats,
    engine: EngineSettings,
    text: TextSettings,
    others: tuple[str, ...],
    ablation: AblationSettings,
    as_json: bool,
) -> None:
    """Measure a model on held-out text, teacher-forced.

    Bits per byte beside a compressor's, next-token accuracy, how often the MTP module's draft is the model's own
    choice, and the balance of the experts, by subject area.
    """
    begin = time.perf_counter()
    files = text.cut(read_texts(data))
    path = find_model(folder)
    tokenizer = Tokenizer.from_folder(path)
    pools = InstanceLayout(ep_size=ep, num_prefill_instances=0).carve()
    if ablation.is_asked:
        models = _ablation(path, formats, ablation)
    else:
        models = _models(path, others, formats, rows=-(-engine.max_num_batched_tokens // ep))
    model = next(iter(models.values()))
    windows = text.windows(model.config)
    with shown_progress("tokens") as progress:
        reports = evaluate.evaluate_together(
            models,
            tokenizer,
            files,
            pools.decode[0],
            **windows,
            settings=engine,
            progress=lambda done, total: progress("evaluating", done, total),
        )
    report: JsonObject = {
        "model": folder,
        "data": str(data),
        "ep_size": ep,
        "dtype": formats.dtype,
        "quant": model.quant,
    }
    report |= windows | {"seconds": time.perf_counter() - begin} | next(iter(reports.values()))
    if len(reports) > 1:
        report |= {"comparison": bench_ablation.compare(reports), "models": reports}
    if as_json:
        click.echo(json.dumps(report))
        return
    out = Console(file=sys.stdout)
    print_tables(out, (evaluate if len(reports) == 1 else bench_ablation).tables(report))
    if len(reports) == 1 and report["expert_balance"]:
        balance = ", ".join(f"layer {name} {value:.2f}x" for name, value in report["expert_balance"].items())
        out.print(f"Busiest routed expert over the mean: {balance}.", highlight=False, soft_wrap=True)
    out.print(f"{report['seconds']:.0f} s.", highlight=False)


def _models(path: Path, others: tuple[str, ...], formats: ModelFormats, rows: int) -> dict[str, Model]:
    """The model, and those beside it, by their folders' names."""
    folders = {path.name: path}
    for other in others:
        name = Path(other).name if Path(other).name not in folders else other
        if name in folders:
            raise UserError(f"--compare {other}: given twice")
        folders[name] = find_model(other)
    return {name: load_in(folder, formats, rows) for name, folder in folders.items()}


def _ablation(path: Path, formats: ModelFormats, asked: AblationSettings) -> dict[str, Model]:
    with tempfile.TemporaryDirectory(prefix="cmjax-eval-") as work, shown_progress("models") as progress:
        ids = calibration_ids(path, CALIBRATION, asked.calibration_sequences, CalibrationSettings.length, 0)
        return bench_ablation.make_models(
            path,
            Path(work),
            ids,
            dtype=formats.dtype,
            kinds=asked.kinds,
            alone=asked.alone,
            progress=lambda name: progress(f"making {name}", 0, None),
        )
