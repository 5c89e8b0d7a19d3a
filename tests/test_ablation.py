"""What int8 costs the demonstration model, and what each technique mends: the bounds of its documentation.

Minutes, and so in `make soak`; `cmjax eval --ablation` prints the whole tables.
"""

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from cmjax.bench.ablation import REFERENCE, ROUNDED, compare, make_models
from cmjax.bench.evaluate import evaluate_together
from cmjax.bench.outliers import REMEDIES, plant_outliers
from cmjax.checkpoint import Tokenizer, calibration_ids, load, quantize_folder, read_texts, save_hf
from cmjax.cli.options import BUNDLED_MODEL, CALIBRATION, HELDOUT
from cmjax.mesh import Supernode, carve
from cmjax.serve import EngineSettings

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def process():
    """One of their own: that of the suite compiles without optimizations, and this text is long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            yield pool


def measure(models, num_files, num_characters):
    """The rows of `compare`, by model; `num_files` of each of the 16 areas, so many characters of each."""
    files, seen = [], {}
    for file in read_texts(HELDOUT):
        seen[file.area] = seen.get(file.area, 0) + 1
        if seen[file.area] <= num_files:
            files.append(dataclasses.replace(file, text=file.text[:num_characters]))
    pools = carve(Supernode.preset("cloudmatrix384"), ep_size=1, num_prefill_instances=0)
    settings = EngineSettings(max_num_batched_tokens=8192)
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    reports = evaluate_together(models, tokenizer, files, pools.decode[0], context=512, stride=256, settings=settings)
    return {row["model"]: row for row in compare(reports)}


def calibration():
    return calibration_ids(BUNDLED_MODEL, CALIBRATION, 32, 256, 0)


def without_outliers(work):
    quantize_folder(BUNDLED_MODEL, work / "int8", calibration())
    models = {"bfloat16": load(BUNDLED_MODEL, "bfloat16"), "int8": load(work / "int8", "bfloat16")}
    return measure(models, 2, 12_000)


def with_all_outliers(work):
    floats = load(BUNDLED_MODEL)
    save_hf(work / "planted", floats.config, plant_outliers(floats).params)
    quantize_folder(work / "planted", work / "int8", calibration())
    models = {REFERENCE: floats, ROUNDED: load(work / "planted", quant="int8"), "calibrated": load(work / "int8")}
    return measure(models, 1, 6000)


def with_one_kind(kind, technique, work):
    names = {"kinds": (kind,), "alone": True, "names": (technique,)}
    return measure(make_models(BUNDLED_MODEL, work, calibration(), dtype="float32", **names), 1, 6000)


def test_nothing_is_lost(process, tmp_path):
    row = process.submit(without_outliers, tmp_path).result()["int8"]
    print(row)
    # Of 92,374 tokens; the smallest area has 1,470, and one of them is 0.07 points.
    assert row["top1_change"] > -0.3
    assert row["worst_area_change"] > -1
    assert row["bits_per_byte_change"] < 0.005


def test_outliers_of_all_kinds(process, tmp_path):
    rows = process.submit(with_all_outliers, tmp_path).result()
    print(rows)
    assert rows[ROUNDED]["top1_change"] < -3
    assert rows["calibrated"]["top1_change"] > -0.5


@pytest.mark.parametrize(("kind", "technique"), REMEDIES.items())
def test_each_technique_alone_mends_its_outliers(process, kind, technique, tmp_path):
    rows = process.submit(with_one_kind, kind, technique, tmp_path).result()
    print(rows)
    lost = rows[ROUNDED]["top1_change"]
    assert lost < -3
    assert rows[f"{technique} alone"]["top1_change"] > lost / 2
