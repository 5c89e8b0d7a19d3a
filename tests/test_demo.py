"""`cmjax demo`: it runs at EP320, compares with the reference, and can fail."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cmjax import cli_demo
from cmjax.cli import main
from cmjax.cli_demo import Reference
from tests.parity import FOLDER, load_case

MODEL = FOLDER / "v3-ep320"
PNG = b"\x89PNG\r\n"
SMALL = ("--ep", "8", "--prompts", "6", "--max-tokens", "4")


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["demo", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_demo_at_ep320(capsys, tmp_path):
    status, out, err = run(capsys, "--json", "--out", tmp_path)
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["reference"] == {
        "num_sequences": 3,
        "num_tokens": 72,
        "num_equal": 72,
        "num_first": 317,
        "num_first_equal": 317,
    }
    assert [one["ep_size"] for one in report["instances"]] == [32, 32, 320]
    assert report["instances"][2]["placement"] == {
        "num_routed_experts": 256,
        "num_redundant_experts": 32,
        "num_shared_replicas": 32,
        "num_experts_per_rank": 1,
    }
    assert len(report["outputs"]) == 320
    assert report["traffic"]["rdma"]["kv_handoff"]["calls"] == 320
    assert report["traffic"]["ub"]["ragged_all_to_all"]["bytes"] > 1e6
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


def test_tables_and_the_verdict(capsys, tmp_path):
    status, out, err = run(capsys, *SMALL, "--out", tmp_path / "new" / "folder")
    assert (status, err) == (0, "")
    for title in ("Supernode", "Instances", "Planes", "Expert placement", "Generated", "Phases", "Traffic", "Load of"):
        assert title in out
    flat = " ".join(out.split())
    assert "The generated tokens equal the reference's: 12 of 12 tokens of 3 reference sequences" in flat
    assert (tmp_path / "new" / "folder" / "demo.png").read_bytes().startswith(PNG)


def copy_with(folder: object, **changes: np.ndarray) -> None:
    """A copy of the model whose reference says something else."""
    shutil.copytree(MODEL, folder)
    with np.load(MODEL / "reference.npz") as stored:
        arrays = dict(stored)
    np.savez(folder / "reference.npz", **(arrays | changes))


def test_a_different_token_is_status_1(capsys, tmp_path):
    generated = load_case("v3-ep320").generated.copy()
    generated[1, 3] += 1
    copy_with(tmp_path / "model", generated=generated)
    status, out, _ = run(capsys, *SMALL, "--model", tmp_path / "model", "--out", tmp_path)
    assert status == 1
    assert "DIFFERENT from the reference: 11 of 12 tokens" in " ".join(out.split())


def test_without_matplotlib_there_is_no_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "cmjax.cli_picture", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, _ = run(capsys, *SMALL, "--out", tmp_path)
    assert status == 0
    assert "No picture: matplotlib is missing" in out
    assert not (tmp_path / "demo.png").exists()


def answers(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    """What a right engine answers: the reference's tokens, and the best first token of every other prompt."""
    answered = [row.tolist() for row in reference.generated]
    for prompt in prompts[len(answered) :]:
        row = next(r for r, ids in enumerate(reference.input_ids) if ids[: len(prompt)].tolist() == prompt)
        answered.append([int(reference.logits[row, len(prompt) - 1].argmax()), 0])
    return answered


def compare(reference: Reference, token_ids: list[list[int]]) -> cli_demo.Comparison:
    return reference.compare(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids) for ids in token_ids]))


def test_comparison_counts_every_prompt_and_only_clear_margins():
    reference = Reference.read(MODEL)
    prompts = reference.prompts(100)
    assert len({tuple(prompt) for prompt in prompts[3:]}) == 97
    right = answers(reference, prompts)
    assert compare(reference, right).is_equal

    # One wrong first token is enough.
    wrong = [ids.copy() for ids in right]
    wrong[50][0] += 1
    assert not compare(reference, wrong).is_equal

    # From a close call on, a row may differ; before it, not.
    close = Reference(
        reference.folder,
        reference.input_ids,
        reference.logits,
        reference.prompt,
        reference.generated,
        reference.margin.copy(),
    )
    close.margin[0, 5] = 9e-4
    wrong = [ids.copy() for ids in right]
    wrong[0][5:] = [0] * len(wrong[0][5:])
    assert compare(close, wrong).is_equal
    assert compare(close, wrong).num_tokens == 5 + 24 + 24
    wrong[0][4] += 1
    assert not compare(close, wrong).is_equal

    # Nothing compared is no proof.
    close.margin[:] = 0
    assert not compare(close, right[:3]).is_equal


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda folder: (folder / "reference.npz").unlink(), "no reference.npz there"),
        (lambda folder: (folder / "reference.npz").write_bytes(b"no zip"), "reference.npz: cannot be read"),
        (lambda folder: np.savez(folder / "reference.npz", prompt=[1]), "reference.npz: input_ids is missing"),
    ],
)
def test_a_bad_reference_is_one_line_and_status_2(change, part, capsys, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    change(tmp_path / "model")
    status, out, err = run(capsys, "--model", tmp_path / "model")
    assert (status, out) == (2, "")
    assert part in err
    assert err.count("\n") == 1


def test_outside_a_clone_the_model_must_be_given(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_demo, "BUNDLED_MODEL", tmp_path / "nothing")
    status, _, err = run(capsys)
    assert status == 2
    assert "give --model" in err


def test_a_folder_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, *SMALL, "--out", tmp_path / "file")
    assert status == 2
    assert err.startswith("cmjax demo: error: --out ")
