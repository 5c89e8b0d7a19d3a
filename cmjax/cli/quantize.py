"""`cmjax quantize`: a checkpoint into int8, calibrated on text."""

from pathlib import Path

import click
import numpy as np

from cmjax.bench.ablation import TECHNIQUES
from cmjax.checkpoint import CalibrationSettings, Techniques, calibration_ids, quantize_folder
from cmjax.cli.flags import options_for
from cmjax.cli.options import CALIBRATION, data_option, find_model
from cmjax.cli.progress import shown_progress
from cmjax.errors import UserError


@click.command(
    epilog="""\b
    Examples:
      cmjax quantize models/demo out/demo-int8       with all techniques, on the bundled calibration text
      cmjax quantize DIR OUT --data texts.jsonl      one JSON object a line: path, area, text
      cmjax quantize DIR OUT --techniques none       rounded to the nearest; needs no text
      cmjax generate --model out/demo-int8 --prompt 'def main():'
    \b
    OUT is a Hugging Face folder in the compressed-tensors W8A8 layout: int8 weights with a scale a channel, activations
    quantized a token at a time when it runs. Interrupted, the same command goes on after the last finished layer."""
)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@data_option(
    CALIBRATION,
    "Calibration text, JSON lines with path, area and text.  [default: Python source, beside the bundled model]",
)
@options_for("text", CalibrationSettings)
@click.option(
    "--techniques",
    "chosen",
    default=",".join(TECHNIQUES),
    show_default=True,
    metavar="LIST",
    help="Which of them, separated by commas; none: rounded to the nearest.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sequences chosen and of rotations.")
def quantize(source: Path, out: Path, data: Path, text: CalibrationSettings, chosen: str, seed: int) -> None:
    """Quantize the checkpoint in folder IN (bfloat16, float32, float16 or FP8 blocks) into the new folder OUT."""
    techniques = parse_techniques(chosen, seed)
    find_model(str(source))
    ids = calibration_ids(source, data, text.sequences, text.length, seed) if chosen != "none" else _no_text()
    with shown_progress("layers") as report:
        quantize_folder(source, out, ids, techniques, lambda done, total: report("quantizing", done, total))
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, out)]
    click.echo(f"{out}: {sizes[1] / 1e6:,.1f} MB, from {sizes[0] / 1e6:,.1f} MB.")


def parse_techniques(chosen: str, seed: int) -> Techniques:
    """The techniques that a list names."""
    names = [] if chosen == "none" else [name.strip() for name in chosen.split(",")]
    for name in names:
        if name not in TECHNIQUES:
            raise UserError(f"--techniques: {name!r} is not one of {', '.join(TECHNIQUES)}, none")
    return Techniques(**{name: name in names for name in TECHNIQUES}, seed=seed)


def _no_text() -> np.ndarray:
    """What layers are run on where nothing is learnt from it."""
    return np.zeros((1, 3), np.int32)
