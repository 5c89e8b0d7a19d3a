"""What quantization costs: a model in floats, rounded to int8, and with each technique of the calibration added."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from rich.table import Table

from cmjax.bench.outliers import FACTORS, plant_outliers
from cmjax.bench.tables import new_table, number
from cmjax.checkpoint import CalibrationSettings, Techniques, load, quantize_folder, save_hf
from cmjax.errors import UserError
from cmjax.model import Model
from cmjax.options import check_bounds, option
from cmjax.text import JsonObject

TECHNIQUES = ("scales", "rotations", "clipping", "compensation")
REFERENCE, ROUNDED = "floats", "int8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """Which models are made of one and compared, if any."""

    is_asked: bool = option(False, "Compare --model with itself in int8, techniques added in turn.", flag="--ablation")
    alone: bool = option(False, "With --ablation: each technique alone.", flag="--alone")
    planted: str | None = option(
        None,
        "With --ablation: what is quantized computes the same, but has outliers.",
        flag="--planted",
        choices=("all", *FACTORS),
    )
    calibration_sequences: int = option(
        CalibrationSettings.sequences,
        "With --ablation: sequences to calibrate on.",
        flag="--calibration-sequences",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if (self.alone or self.planted) and not self.is_asked:
            raise UserError(f"{'--alone' if self.alone else '--planted'} goes with --ablation")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The outliers to plant."""
        if self.planted is None:
            return ()
        return tuple(FACTORS) if self.planted == "all" else (self.planted,)


def make_models(
    folder: Path,
    work: Path,
    input_ids: np.ndarray,
    *,
    dtype: DTypeLike,
    kinds: tuple[str, ...] = (),
    alone: bool = False,
    names: Sequence[str] = TECHNIQUES,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Model]:
    """The models to compare, by name, the one in floats first.

    Args:
        folder: of float weights.
        work: where quantized folders are written.
        input_ids: `int[sequences, length]`, the calibration text.
        dtype: of float weights and of activations.
        kinds: outliers to plant (`plant_outliers`) before anything is quantized; the model in floats is without them.
        alone: each technique alone, not added to those before it.
        names: the techniques, in this order.
        progress: called with the name of each model before it is made.
    """
    notify = progress or (lambda name: None)
    notify(REFERENCE)
    models = {REFERENCE: load(folder, dtype=dtype, quant="none")}
    source = folder
    if kinds:
        source = work / "planted"
        planted = plant_outliers(load(folder, quant="none"), kinds)
        save_hf(source, planted.config, planted.params)
    notify(ROUNDED)
    models[ROUNDED] = load(source, dtype=dtype, quant="int8")
    nothing = Techniques(**dict.fromkeys(TECHNIQUES, False))
    techniques = nothing
    for name in names:
        notify(name)
        techniques = dataclasses.replace(nothing if alone else techniques, **{name: True})
        out = work / name
        quantize_folder(source, out, input_ids, techniques)
        models[f"{name} alone" if alone else f"+ {name}"] = load(out, dtype=dtype)
    return models


def compare(reports: dict[str, JsonObject]) -> list[JsonObject]:
    """One row a model, means of the areas: its figures, and how far they are off the first model's.

    `top1_change` and `worst_area_change` are in points, `bits_per_byte_change` is a share.
    """
    first = next(iter(reports.values()))
    rows = []
    for name, report in reports.items():
        mean, base = report["area_mean"], first["area_mean"]
        changes = {area: 100 * (one["top1"] - first["areas"][area]["top1"]) for area, one in report["areas"].items()}
        worst = min(changes, key=lambda area: changes[area])
        rows.append(
            {
                "model": name,
                **{key: mean[key] for key in ("bits_per_byte", "top1", "kl_divergence", "mtp_agreement")},
                "bits_per_byte_change": mean["bits_per_byte"] / base["bits_per_byte"] - 1,
                "top1_change": 100 * (mean["top1"] - base["top1"]),
                "worst_area": worst,
                "worst_area_change": changes[worst],
            }
        )
    return rows


def tables(report: JsonObject) -> list[Table]:
    """A row for each model, and its top-1 by area."""
    columns = ("model", "bits/byte", "change %", "top-1 %", "points", "worst area", "points", "KL", "MTP %")
    table = new_table(f"Means of {len(report['areas'])} areas, context {report['context']}", *columns, numbers_from=1)
    for row in report["comparison"]:
        table.add_row(
            row["model"],
            number(row["bits_per_byte"], "{:.4f}"),
            number(row["bits_per_byte_change"], "{:+.2f}", 100),
            number(row["top1"], "{:.2f}", 100),
            number(row["top1_change"], "{:+.2f}"),
            row["worst_area"],
            number(row["worst_area_change"], "{:+.2f}"),
            number(row["kl_divergence"], "{:.5f}"),
            number(row["mtp_agreement"], "{:.2f}", 100),
        )
    areas = new_table("Top-1 by area, %", "area", *report["models"], numbers_from=1)
    for area in report["areas"]:
        cells = (number(one["areas"][area]["top1"], "{:.2f}", 100) for one in report["models"].values())
        areas.add_row(area, *cells)
    return [table, areas]
