"""`cmjax bench`: small runs of the real thing; the figures add up, and the mistakes are one line."""

import json
import math

import pytest

from cmjax.bench import kernels as bench_kernels
from cmjax.bench import peer as bench_peer
from cmjax.bench.report import in_turn
from cmjax.cli import main
from cmjax.cli.options import BUNDLED_MODEL
from tests.helpers import tiny_config
from tests.parity import FOLDER


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["bench", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.soak
def test_decode_at_a_small_size(capsys):
    options = (
        "--ep",
        4,
        "--seqs-per-rank",
        2,
        "--cache",
        8,
        "--steps",
        2,
        "--rounds",
        2,
        "--model",
        FOLDER / "v3-small",
    )
    status, out, err = run(capsys, "decode", *options, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["settings"]["num_sequences"] == 8
    assert [row["wire"] for row in report["results"]] == ["float", "int8"]
    for row in report["results"]:
        assert math.isclose(sum(row["shares"].values()), 1.0)
        assert math.isclose(row["tokens_per_s"], 8 / row["step_s"])
    # The same sequences on one device go on with the same tokens.
    assert report["results"][0]["first_tokens_equal_to_one_device"] == 8


def test_the_forms_of_a_training_step(capsys):
    # The command itself checks that all forms give the same values and gradients.
    status, out, err = run(capsys, "training", "--tokens", 64, "--rounds", 1, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    forms = {row["form"]: row["times_best"] for row in report["results"]}
    assert len(forms) == 6
    assert min(forms.values()) == 1
    assert "lax.ragged_dot" in forms


@pytest.mark.soak
def test_the_engine_at_a_small_size(capsys):
    options = ("--ep", 4, "--seqs-per-rank", 2, "--prompt-tokens", 600, "--steps", 2, "--model", FOLDER / "v3-small")
    status, out, err = run(capsys, "engine", *options, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    step_s, gap_s = report["step_s"], report["gap_s"]
    assert math.isclose(report["results"]["full_over_one"], step_s["full"] / step_s["one"])
    assert math.isclose(report["results"]["longest_gap_over_median"], gap_s["longest"] / gap_s["median"])
    assert gap_s["calls"] > 0  # decode went on meanwhile


@pytest.mark.soak
def test_drafts_at_a_small_size(capsys):
    options = ("--mtp", 2, "--ep", 2, "--seqs-per-rank", 1, "--seqs-per-rank", 2, "--steps", 2, "--rounds", 1)
    # Prompts and calls are the command's own, and need more positions than the parity cases have.
    status, out, err = run(capsys, "decode", *options, "--model", BUNDLED_MODEL, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert [row["seqs_per_rank"] for row in report["results"]] == [1, 2]
    for row in report["results"]:
        assert row["equal_sequences"] == row["num_sequences"]
        assert math.isclose(row["tokens_a_step"], 1 + 2 * row["kept"])
        assert 0.3 < row["teacher_forced"] < 1
    status, out, err = run(capsys, "decode", "--mtp", 1, "--ep", 1, "--model", FOLDER / "v3-small")
    assert (status, out) == (2, "")
    assert "the model has no MTP module" in err


@pytest.mark.soak
def test_the_pipeline_at_a_small_size(capsys, tmp_path):
    options = ("--ep", 2, "--seqs-per-rank", 2, "--cache", 16, "--rounds", 1, "--model", FOLDER / "v3-mtp")
    status, out, err = run(capsys, "pipeline", *options, "--plot", tmp_path / "timeline.png", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["equal"] == 1
    step_s = report["step_s"]
    assert math.isclose(report["results"]["plain_delayed_over_plain"], step_s["plain delayed"] / step_s["plain"])
    assert math.isclose(report["results"]["with_delay"], step_s["two delayed"] / step_s["plain delayed"])
    assert report["delay_s_per_byte"] > 0
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_spans_of_a_profile():
    """An exchange lasts to the first operation that needs it; loops and operations outside the layers are no spans."""
    from cmjax.bench.pipeline import Span, spans_of

    scopes = {
        "dot.1": "jit(decode)/while/body/a/attention/dot_general",
        "fabric_ragged_all_to_all_start.1": "jit(decode)/while/body/a/dispatch/x",
        "dot.2": "jit(decode)/while/body/b/oproj/dot_general",
        "fabric_ragged_all_to_all_done.1": "jit(decode)/while/body/a/dispatch/x",
        "dot.3": "jit(decode)/while/body/a/moe/loop_8/while/body/dot_general",
        "dot.4": "jit(decode)/head/dot_general",
    }
    events = [(name, float(i), i + 0.5) for i, name in enumerate(scopes)]
    assert spans_of(events[::-1], scopes) == [
        Span("a", "attention", 0.0, 0.5),
        Span("b", "attention", 2.0, 2.5),
        Span("a", "exchange", 1.0, 4.0),
        Span("a", "experts", 4.0, 4.5),
    ]


def test_contenders_take_turns():
    order: list[str] = []
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert "".join(order) == "ab" * 3
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


def test_a_peer_python_that_cannot_run_is_one_line(capsys):
    status, out, err = run(capsys, "peer", "--peer-python", "/no/such/python")
    assert (status, out) == (2, "")
    assert err.startswith("cmjax bench peer: error: --peer-python /no/such/python: ")
    assert err.count("\n") == 1


def test_the_peer_model_has_about_200_million_parameters():
    from cmjax.model import abstract_params, num_params

    assert 190e6 < num_params(abstract_params(bench_peer.CONFIG)) < 210e6


def test_quant_at_a_small_size():
    from cmjax.bench import quant

    report = quant.run(tiny_config(), shapes=[(16, 32)], rows=[1, 8], tokens=64, length=32, rounds=1)
    assert [row["rows"] for row in report["products"]] == [1, 8]
    for row in report["products"]:
        assert math.isclose(
            row["speedup"], min(row["seconds"]["bfloat16"], row["seconds"]["float32"]) / row["seconds"]["int8"]
        )
    assert math.isclose(
        report["results"]["kept"], report["prefill"]["speedup"] / report["prefill_products"]["advantage"]
    )
    assert 0.2 < report["results"]["memory"] < 0.7  # a tiny model is half embedding
    model_products = quant.prefill_products(tiny_config(), 64)
    # q_a of all three layers, which reads the hidden state of every token.
    assert model_products[20, 32, 64] == 3


def test_kernels_at_a_small_size():
    sizes = bench_peer.Sizes(decode_batches=(2,), prefill_batch=2, length=16, num_steps=2)
    report = bench_kernels.run(tiny_config(), formats=("bfloat16", "int8"), sizes=sizes, rounds=1)
    assert [(row["format"], row["job"]) for row in report["results"]] == [
        (name, job) for job in ("decode", "prefill") for name in ("bfloat16", "int8")
    ]
    assert all(row["speedup"] > 0 for row in report["results"])
    assert [row["by_bfloat16"] == 1 for row in report["results"]] == [True, False, True, False]
    assert bench_kernels.tables(report)
