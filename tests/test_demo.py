"""`cmjax demo`: it runs at EP320, compares with the reference, and can fail."""

import json
import shutil
import sys

import numpy as np
import pytest

from cmjax.bench.reference import Comparison, Completion, Reference, compare, compare_to_one_device
from cmjax.checkpoint import Tokenizer, load
from cmjax.cli import main
from cmjax.cli import options as cli_options
from cmjax.cli.demo import completion_lines
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.cli.picture import draw_picture, layers_shown, left_out
from tests.helpers import assert_only_progress
from tests.parity import FOLDER, load_case

PNG = b"\x89PNG\r\n"
# One prefill instance: each is a compilation of its own.
EP8 = ("--ep", "8", "--prefill-instances", "1")
SMALL = (*EP8, "--prompts", "6", "--max-tokens", "4")


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["demo", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def completions() -> list[dict]:
    """The greedy continuations that the parity case holds, as `reference.json` has them."""
    case = load_case("v3-ep320")
    arrays = zip(case.prompt, case.generated, case.margin, strict=True)
    names = ("prompt_ids", "token_ids", "margins")
    return [dict(zip(names, map(np.ndarray.tolist, row), strict=True)) for row in arrays]


def write_reference(folder: object, entries: object, source: object = "a test") -> None:
    (folder / "reference.json").write_text(json.dumps({"source": source, "completions": entries}))


@pytest.fixture
def folder(tmp_path):
    """A small model without a tokenizer, and its reference."""
    path = tmp_path / "model"
    shutil.copytree(FOLDER / "v3-ep320", path)
    write_reference(path, completions())
    return path


def test_a_quantized_model_is_compared_with_itself_on_one_device(capsys, folder):
    status, out, err = run(capsys, "--model", folder, *SMALL, "--quant", "int8", "--json")
    assert status == 0
    assert_only_progress(err)
    report = json.loads(out)
    assert report["reference"]["source"] == "the same model in int8 on one device"
    assert report["reference"]["num_equal"] == report["reference"]["num_tokens"] > 12
    # The check can fail: a token that the model would not choose.
    prompts, generated = ([one[name] for one in report["outputs"]] for name in ("prompt_ids", "token_ids"))
    model = load(folder, quant="int8")
    assert compare_to_one_device(model, prompts, generated).is_equal
    generated[1][-1] = (generated[1][-1] + 1) % model.config.vocab_size
    assert not compare_to_one_device(model, prompts, generated).is_equal


# As it is run without options, 32 tokens of 320 prompts, with the long tests: the same steps, only more of them.
@pytest.mark.parametrize(("num_prompts", "num_tokens"), [(48, 4), pytest.param(320, 32, marks=pytest.mark.soak)])
def test_the_demo_at_ep320(num_prompts, num_tokens, capsys, tmp_path):
    options = () if num_tokens == 32 else ("--prompts", num_prompts, "--max-tokens", num_tokens)
    status, out, err = run(capsys, *options, "--json", "--out", tmp_path)
    assert status == 0
    assert_only_progress(err)
    report = json.loads(out)
    compared = report["reference"]
    assert "transformers" in compared["source"]
    assert compared["num_sequences"] == len(report["outputs"]) == num_prompts
    assert compared["num_equal"] == compared["num_tokens"]
    assert compared["num_tokens"] + compared["num_unclear"] == num_prompts * num_tokens
    assert compared["num_tokens"] > compared["num_unclear"]
    assert [one["ep_size"] for one in report["instances"]] == [32, 32, 320]
    assert report["instances"][2]["placement"] == {
        "num_routed_experts": 256,
        "num_redundant_experts": 32,
        "num_shared_replicas": 32,
        "num_experts_per_rank": 1,
    }
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    for output in report["outputs"]:
        assert len(output["token_ids"]) == num_tokens
        assert output["text"] == tokenizer.decode(output["token_ids"])
        assert tokenizer.encode(output["prompt"]) == output["prompt_ids"]
    assert report["traffic"]["rdma"]["kv_handoff"]["calls"] == num_prompts
    assert report["traffic"]["ub"]["ragged_all_to_all"]["bytes"] > 1e6
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


def test_tables_and_the_verdict(folder, capsys, tmp_path):
    status, out, err = run(capsys, *SMALL, "--model", folder, "--out", tmp_path / "new" / "folder")
    assert status == 0
    assert_only_progress(err)
    titles = ("Supernode", "Instances", "Planes", "Expert placement", "token ids", "Phases", "Traffic", "Load of")
    positions = [out.index(title) for title in titles]
    assert positions == sorted(positions)
    assert "The generated tokens equal the reference's: 24 of 24 tokens of 6 sequences.\nReference: a test.\n" in out
    assert (tmp_path / "new" / "folder" / "demo.png").read_bytes().startswith(PNG)


def test_with_a_tokenizer_completions_are_text(folder, capsys, tmp_path):
    shutil.copy(BUNDLED_MODEL / "tokenizer.json", folder)
    status, out, err = run(capsys, *SMALL, "--model", folder, "--out", tmp_path)
    assert status == 0
    assert_only_progress(err)
    assert "token ids" not in out
    decode = Tokenizer.from_folder(folder).decode
    outputs = [{"prompt": decode(one["prompt_ids"]), "text": decode(one["token_ids"][:4])} for one in completions()]
    # Without the spaces, for a tab becomes some of them.
    expected = "".join("".join(line.plain for line in completion_lines(outputs[:3])).split()[5:])
    assert expected in "".join(out.split())
    assert "Generated: 3 of 6 completions" in out


def test_prompts_come_again_and_tokens_end_with_the_reference(folder, capsys, tmp_path):
    entries = completions()
    entries[1] = entries[1] | {"token_ids": entries[1]["token_ids"][:5], "margins": entries[1]["margins"][:5]}
    write_reference(folder, entries)
    options = ("--model", folder, *EP8, "--prompts", 5, "--max-tokens", 100, "--out", tmp_path, "--json")
    status, out, _ = run(capsys, *options)
    report = json.loads(out)
    assert status == 0
    assert [len(output["token_ids"]) for output in report["outputs"]] == [24, 5, 24, 24, 5]
    assert report["outputs"][3:] == report["outputs"][:2]
    expected = {"source": "a test", "num_sequences": 5, "num_tokens": 82, "num_equal": 82, "num_unclear": 0}
    assert report["reference"] == expected


def test_a_different_token_is_status_1(folder, capsys, tmp_path):
    entries = completions()
    entries[1]["token_ids"][3] += 1
    write_reference(folder, entries)
    status, out, _ = run(capsys, *SMALL, "--model", folder, "--out", tmp_path)
    assert status == 1
    assert "DIFFERENT from the reference: 22 of 24 tokens of 6 sequences.\n" in out


def test_without_matplotlib_there_is_no_picture(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "cmjax.cli.picture", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, _ = run(capsys, *SMALL, "--model", folder, "--out", tmp_path)
    assert status == 0
    assert "No picture: matplotlib is missing" in out
    assert not (tmp_path / "demo.png").exists()


def test_comparison_stops_at_a_close_call():
    right = [[1, 2, 3, 4], [5, 6]]
    expected = [Completion([0], right[0], [1.0, 1.0, 9e-4, 1.0]), Completion([0], right[1], [1e-3, 2.0])]
    assert compare(expected, right) == Comparison(num_sequences=2, num_tokens=4, num_equal=4, num_unclear=2)
    # From a close call on, a sequence may differ; before it, not.
    assert compare(expected, [[1, 2, 0, 0], [5, 6]]).is_equal
    different = compare(expected, [[1, 0, 3, 4], [5, 6]])
    assert not different.is_equal
    assert different.sentence() == (
        "DIFFERENT from the reference: 3 of 4 tokens of 2 sequences (2 more come after a close call)."
    )
    # Nothing compared is no proof.
    assert not compare([Completion([0], [1], [0.0])], [[1]]).is_equal


def test_completion_lines_tell_prompt_from_continuation():
    outputs = [{"prompt": "x = 1\n\ndef f(a):", "text": "\n    return a[bold]\x1b"}] * 5
    lines = [line.plain for line in completion_lines(outputs)]
    one = ["", "  | x = 1", "  | ", "  | def f(a):", "  >     return a[bold]\\x1b"]
    assert lines == [lines[0], *one, *one, *one, ""]
    assert lines[0].startswith("Generated: 3 of 5 completions")


# -- bad references ---------------------------------------------------------------------------------------------------

GOOD = {"prompt_ids": [1, 2], "token_ids": [3, 4], "margins": [0.5, 1]}
BAD_COMPLETIONS = {
    "no object": ([1], "must be a JSON object"),
    "no prompt": ({"token_ids": [3], "margins": [1]}, "prompt_ids is missing"),
    "no margins": ({"prompt_ids": [1], "token_ids": [3]}, "margins is missing"),
    "no list": (GOOD | {"token_ids": 3}, "token_ids must be a list of token ids"),
    "empty prompt": (GOOD | {"prompt_ids": []}, "prompt_ids must be a list of token ids, at least one"),
    "negative token id": (GOOD | {"token_ids": [3, -4]}, "token_ids must be a list of token ids"),
    "no integer": (GOOD | {"prompt_ids": [1.5]}, "prompt_ids must be a list of token ids"),
    "no number": (GOOD | {"margins": [0.5, None]}, "margins must be a list of numbers from 0"),
    "not a number": (GOOD | {"margins": [0.5, float("nan")]}, "margins must be a list of numbers from 0"),
    "unequal lengths": (GOOD | {"margins": [0.5]}, "2 token_ids, but 1 margins"),
    "token outside": (GOOD | {"token_ids": [3, 260]}, "token id 260 is outside the model's vocabulary (0 to 259)"),
    "prompt outside": (GOOD | {"prompt_ids": [999]}, "token id 999 is outside the model's vocabulary (0 to 259)"),
}
BAD_FILES = {
    "no file": (lambda folder: (folder / "reference.json").unlink(), "model: no reference.json there to compare with"),
    "no JSON": (lambda folder: (folder / "reference.json").write_text("{"), "reference.json: not valid JSON"),
    "a list": (lambda folder: (folder / "reference.json").write_text("[]"), "reference.json: expected a JSON object"),
    "no source": (lambda folder: write_reference(folder, [GOOD], None), "reference.json: source must be a text"),
    "no completions": (lambda folder: write_reference(folder, []), "completions must be a list of at least one"),
    "completions no list": (lambda folder: write_reference(folder, GOOD), "completions must be a list of at least one"),
}
for name, (entry, part) in BAD_COMPLETIONS.items():
    BAD_FILES[name] = (lambda folder, entry=entry: write_reference(folder, [GOOD, entry]), f"completion 1: {part}")


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_reference_is_one_line_and_status_2(case, folder, capsys):
    change, part = BAD_FILES[case]
    change(folder)
    status, out, err = run(capsys, "--model", folder, "--ep", 8)
    assert (status, out) == (2, "")
    assert err.startswith("cmjax demo: error: ")
    assert part in err
    assert err.count("\n") == 1


def test_a_good_reference_is_read(folder):
    write_reference(folder, [GOOD | {"prompt": "text for people"}])
    reference = Reference.read(folder)
    assert (reference.source, reference.completions) == ("a test", [Completion(**GOOD)])
    reference.check_vocabulary(5)


def test_outside_a_clone_the_model_must_be_given(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_options, "BUNDLED_MODEL", tmp_path / "nothing")
    status, _, err = run(capsys, "--model", tmp_path / "nothing")
    assert status == 2
    assert "give --model" in err


def test_a_folder_that_cannot_be_written_is_one_line(folder, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, *SMALL, "--model", folder, "--out", tmp_path / "file")
    assert status == 2
    assert err.splitlines()[-1].startswith("cmjax demo: error: --out ")


# -- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_says_which_layers_it_leaves_out(tmp_path):
    load = np.ones((6, 4), np.int64)  # five layers, and the MTP module's
    assert layers_shown(5) == [0, 1, 2, 4]
    assert left_out([1, 2, 3, 4, 5], load) == "not shown: layer 4 and the MTP module's"
    load[5] = 0  # it was not used
    assert left_out([1, 2, 3, 4, 5], load) == "not shown: layer 4"
    assert left_out([3, 4, 5, 6], load[:4]) == ""
    assert left_out([], np.zeros((0, 4), np.int64)) == ""
    many = np.ones((58, 4), np.int64)
    assert layers_shown(58) == [0, 19, 38, 57]
    assert left_out(range(3, 61), many) == "not shown: layers 4-21, 23-40, 42-59"
    assert left_out(range(3, 9), np.ones((6, 4), np.int64)) == "not shown: layers 5, 7"
    # It is in the picture: a line that one with nothing left out has not.
    pictures = [
        draw_picture(tmp_path / f"{count}.svg", range(1, count + 1), load[:count], np.ones((4, 4)), {})
        for count in (4, 5)
    ]
    assert [path.read_text().count("not shown: layer 4") for path in pictures] == [0, 1]
