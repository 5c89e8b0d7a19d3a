"""What int8 costs the demonstration model, and what each technique mends: the bounds of its documentation.

Minutes, and so in `make soak`; `cmjax eval --ablation` prints the whole tables.
"""

import dataclasses

import pytest

from cmjax.bench.ablation import ROUNDED, compare, make_models
from cmjax.bench.evaluate import evaluate_together, read_heldout
from cmjax.bench.outliers import REMEDIES
from cmjax.cli_options import BUNDLED_MODEL, CALIBRATION, HELDOUT
from cmjax.cli_quantize import calibration_ids
from cmjax.mesh import Supernode, carve
from cmjax.model import Techniques, Tokenizer, load, quantize_folder
from cmjax.serve import EngineSettings

pytestmark = pytest.mark.soak


def measure(models, num_files, num_characters):
    """The rows of `compare`, by model; `num_files` of each of the 16 areas, so many characters of each."""
    files, seen = [], {}
    for file in read_heldout(HELDOUT):
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


def test_nothing_is_lost(tmp_path):
    quantize_folder(BUNDLED_MODEL, tmp_path / "int8", calibration(), Techniques())
    models = {"bfloat16": load(BUNDLED_MODEL, "bfloat16"), "int8": load(tmp_path / "int8", "bfloat16")}
    row = measure(models, 2, 12_000)["int8"]
    print(row)
    assert row["top1_change"] > -0.3
    assert row["worst_area_change"] > -1
    assert row["bits_per_byte_change"] < 0.005


def test_outliers_of_all_kinds(tmp_path):
    models = make_models(BUNDLED_MODEL, tmp_path, calibration(), dtype="float32", kinds=tuple(REMEDIES))
    rows = measure({name: models[name] for name in ("floats", ROUNDED, "+ compensation")}, 1, 6000)
    print(rows)
    assert rows[ROUNDED]["top1_change"] < -3
    assert rows["+ compensation"]["top1_change"] > -0.5


@pytest.mark.parametrize(("kind", "technique"), REMEDIES.items())
def test_each_technique_alone_mends_its_outliers(kind, technique, tmp_path):
    models = make_models(
        BUNDLED_MODEL, tmp_path, calibration(), dtype="float32", kinds=(kind,), alone=True, names=(technique,)
    )
    rows = measure(models, 1, 6000)
    print(rows)
    lost = rows[ROUNDED]["top1_change"]
    assert lost < -1
    assert rows[f"{technique} alone"]["top1_change"] > lost / 2
