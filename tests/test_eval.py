"""`cmjax eval` on files of its own: its figures are those of the logits and of the compressor, on any devices."""

import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest

import cmjax
from cmjax.bench.evaluate import MAX_COMPARED_BYTES, MIN_COMPARED_BYTES, compared_tokens, lzma_bytes
from cmjax.checkpoint import Tokenizer, save_hf
from cmjax.cli import main
from cmjax.cli.options import BUNDLED_MODEL, HELDOUT
from cmjax.serve import plan_windows
from tests.helpers import assert_only_progress, save_with_tokenizer, tiny_model

CONTEXT, STRIDE = 64, 40
SIZES = ("--context", str(CONTEXT), "--stride", str(STRIDE), "--max-num-batched-tokens", "256")


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["eval", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the bundled tokenizer."""
    model = tiny_model(seed=2, vocab_size=2048, num_nextn_predict_layers=1)
    return save_with_tokenizer(tmp_path_factory.mktemp("eval") / "model", model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Short and long texts of two areas, one of them with characters of several bytes."""
    long = "".join(f"value_{i} = compute({i}, {i * 7})\n" for i in range(150))
    texts = [
        ("a.py", "first", "import os\n\nprint(os.getcwd())\n"),
        ("b.py", "first", long),
        ("c.py", "second", "# naïve Größe 漢字\nname = '漢字' * 3\n"),
    ]
    path = tmp_path_factory.mktemp("eval") / "texts.jsonl"
    path.write_text("".join(json.dumps(dict(zip(("path", "area", "text"), t, strict=True))) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def one_device(folder, data):
    """The report on one device."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["eval", "--model", str(folder), "--data", str(data), *SIZES, "--json"]) == 0
    return json.loads(out.getvalue())


def test_the_figures_are_those_of_the_logits(one_device, folder, data):
    model, tokenizer = cmjax.load(folder), Tokenizer.from_folder(folder)
    files = [json.loads(line) for line in data.read_text().splitlines()]
    sums = {area: np.zeros(6) for area in ("first", "second")}
    for file in files:
        ids = tokenizer.encode(file["text"])
        assert ids[0] == tokenizer.bos_token_id
        for w in plan_windows([len(ids)], CONTEXT, STRIDE):
            window = np.zeros(CONTEXT, np.int64)  # of one length, and so one program
            window[: w.stop - w.start] = ids[w.start : w.stop]
            logits = np.asarray(model.logits(window[None]), np.float64)[0]
            drafts = np.asarray(model.mtp_logits(window[None]))[0].argmax(-1)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            for token in range(w.first_scored - w.start, w.stop - w.start):
                best = logits[token - 1].argmax()
                drafted = token >= 2
                agrees = drafted and drafts[token - 2] == best
                row = [0, 1, -logits[token - 1, window[token]], best == window[token], drafted, agrees]
                sums[file["area"]] += row
        sums[file["area"]][0] += len(file["text"].encode())
    for area, (num_bytes, tokens, nats, top1, drafted, agrees) in sums.items():
        found = one_device["areas"][area]
        assert (found["bytes"], found["tokens"]) == (num_bytes, tokens)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
        assert found["top1"] == pytest.approx(top1 / tokens)
        assert found["mtp_agreement"] == pytest.approx(agrees / drafted)
    total = sum(sums.values())
    assert one_device["all"]["bits_per_byte"] == pytest.approx(total[2] / math.log(2) / total[0], rel=1e-5)
    mean = np.mean([one["bits_per_byte"] for one in one_device["areas"].values()])
    assert one_device["area_mean"]["bits_per_byte"] == pytest.approx(mean)


def test_only_long_files_are_compared_with_the_compressor(one_device, data):
    long = json.loads(data.read_text().splitlines()[1])["text"].encode()
    assert MIN_COMPARED_BYTES <= len(long) <= MAX_COMPARED_BYTES
    found = one_device["all"]
    assert (found["compared_files"], found["compared_bytes"]) == (1, len(long))
    assert one_device["areas"]["second"]["ratio_to_lzma"] is None
    packed = lzma.compress(long, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
    assert found["lzma_bits_per_byte"] == pytest.approx(8 * len(packed) / len(long))
    assert found["ratio_to_lzma"] == pytest.approx(found["compared_bits_per_byte"] / found["lzma_bits_per_byte"])


def test_eight_devices_give_the_same(one_device, folder, data, capsys):
    status, out, err = run(capsys, "--model", folder, "--data", data, *SIZES, "--ep", 8, "--json")
    assert status == 0
    found = json.loads(out)
    assert err.startswith(f"evaluating: 0 of {found['all']['tokens']:,} tokens\n")
    assert_only_progress(err)
    assert found["ep_size"] == 8
    for area, report in one_device["areas"].items():
        assert found["areas"][area].keys() == report.keys()
        for name, value in report.items():
            assert found["areas"][area][name] == (value if value is None else pytest.approx(value, rel=1e-5)), name
    assert found["expert_balance"] == one_device["expert_balance"]


def test_table(folder, data, capsys):
    status, out, _ = run(capsys, "--model", folder, "--data", data, *SIZES, "--files", 1)
    assert status == 0
    for word in ("first", "second", "mean of areas", "all", "Busiest routed expert over the mean: layer 1", "mtp"):
        assert word in out


def test_compared_tokens_end_where_the_bytes_do():
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    text = "漢字 = 'größer'  # naïve\n" * 4000
    ids, ends = tokenizer.encode_with_ends(text)
    count, compared = compared_tokens(text, ends)
    assert MAX_COMPARED_BYTES - 16 <= len(compared) <= MAX_COMPARED_BYTES
    assert tokenizer.backend.decode(ids[:count], skip_special_tokens=False).encode() == compared
    assert compared_tokens("x = 1\n", [1, 2, 3]) == (0, b"")
    assert lzma_bytes(compared) < len(compared) / 100


def test_the_bundled_text():
    files = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    assert len({file["area"] for file in files}) == 16
    assert sum(len(file["text"].encode()) for file in files) <= 3_000_000
    assert len({file["path"] for file in files}) == len(files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ('{"path": "a", "area": "b"}\n', "line 1 is no JSON object with path, area and text"),
        ('{"path": "a", "area": "b", "text": "c"}\nnonsense\n', "line 2 is no JSON object"),
        ("[1]\n", "line 1 is no JSON object"),
    ],
)
def test_data_that_is_none(capsys, tmp_path, content, message):
    (tmp_path / "texts.jsonl").write_text(content)
    status, out, err = run(capsys, "--data", tmp_path / "texts.jsonl")
    assert (status, out) == (2, "")
    assert err.startswith("cmjax eval: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_model_without_tokenizer(capsys, data, tmp_path):
    model = tiny_model()
    save_hf(tmp_path / "model", model.config, model.params)
    status, _, err = run(capsys, "--model", tmp_path / "model", "--data", data)
    assert status == 2
    assert "tokenizer.json: not found" in err


def test_a_tokenizer_of_another_model(capsys, data, tmp_path):
    folder = save_with_tokenizer(tmp_path / "model", tiny_model())
    status, _, err = run(capsys, "--model", folder, "--data", data)
    assert status == 2
    assert "the tokenizer has 2048 tokens, the model's vocabulary 101" in err


def test_data_that_is_not_there(capsys, tmp_path):
    status, _, err = run(capsys, "--data", Path(tmp_path) / "none.jsonl")
    assert status == 2
    assert "none.jsonl: cannot be read" in err
