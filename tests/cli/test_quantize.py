"""`cmjax quantize`, and what `cmjax eval` compares: small runs of the real thing, and mistakes in one line."""

import json

import pytest

from cmjax.checkpoint import load
from cmjax.cli import main
from tests.helpers import assert_only_progress, save_with_tokenizer, tiny_model

CALIBRATION = ("--sequences", "4", "--length", "32")


def run(capsys, *args):
    capsys.readouterr()
    status = main([*map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the bundled tokenizer."""
    model = tiny_model(seed=2, vocab_size=2048, num_nextn_predict_layers=1)
    return save_with_tokenizer(tmp_path_factory.mktemp("quantize") / "model", model)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = {"first": "import os\n\nprint(os.getcwd())\n" * 8, "second": "for i in range(10):\n    print(i)\n" * 8}
    path.write_text("".join(json.dumps({"path": k, "area": k, "text": v}) + "\n" for k, v in texts.items()))
    return path


def test_quantize_then_compare(capsys, folder, data, tmp_path):
    out = tmp_path / "int8"
    status, text, err = run(capsys, "quantize", folder, out, "--data", data, *CALIBRATION)
    assert status == 0
    assert err.startswith("quantizing: 0 of 4 layers\n")
    assert_only_progress(err)
    assert text.startswith(f"{out}: ")
    assert load(out).quant == "int8"
    assert (out / "tokenizer.json").is_file()

    sizes = ("--data", data, "--context", 32, "--max-num-batched-tokens", 128)
    status, text, err = run(capsys, "eval", "--model", folder, "--compare", out, *sizes, "--json")
    assert status == 0
    assert_only_progress(err)
    report = json.loads(text)
    first, second = report["comparison"]
    assert (first["model"], second["model"]) == ("model", "int8")
    assert first["kl_divergence"] == first["top1_change"] == 0
    assert 0 < second["kl_divergence"] < 0.1
    assert abs(second["bits_per_byte_change"]) < 0.05
    assert set(report["models"]["int8"]["areas"]) == {"first", "second"}


@pytest.mark.soak
def test_ablation_with_outliers(capsys, folder, data):
    sizes = ("--data", data, "--context", 32, "--max-num-batched-tokens", 128)
    which = ("--ablation", "--planted", "inputs", "--alone", "--calibration-sequences", 8)
    status, text, err = run(capsys, "eval", "--model", folder, *which, *sizes, "--json")
    assert status == 0
    assert err.startswith("making floats\nmaking int8\nmaking scales\n")
    rows = {row["model"]: row["kl_divergence"] for row in json.loads(text)["comparison"]}
    assert list(rows)[:4] == ["floats", "int8", "scales alone", "rotations alone"]
    assert rows["scales alone"] < 0.2 * rows["int8"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--techniques", "scale"),
            "--techniques: 'scale' is not one of scales, rotations, clipping, compensation, none",
        ),
        (("--length", "4000"), "a sequence needs 4000: lower --length"),
        (("--data", "missing.jsonl"), "missing.jsonl: cannot be read"),
    ],
)
def test_mistakes(capsys, folder, data, tmp_path, args, message):
    status, text, err = run(capsys, "quantize", folder, tmp_path / "out", "--data", data, *args)
    assert (status, text) == (2, "")
    assert err.startswith("cmjax quantize: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_named(capsys, folder, data, tmp_path):
    """Whichever argument names it, and before anything is computed."""
    missing = tmp_path / "missing"
    for command in (("quantize", missing, tmp_path / "out"), ("eval", "--model", missing)):
        status, _, err = run(capsys, *command, "--data", data)
        assert (status, err) == (2, f"cmjax {command[0]}: error: {missing}: no such folder\n")
    status, _, err = run(capsys, "eval", "--model", folder, "--compare", missing, "--data", data)
    assert (status, err) == (2, f"cmjax eval: error: {missing}: no such folder\n")


def test_options_that_go_with_the_ablation(capsys, folder, data):
    status, _, err = run(capsys, "eval", "--model", folder, "--data", data, "--alone")
    assert (status, err) == (2, "cmjax eval: error: --alone goes with --ablation\n")
