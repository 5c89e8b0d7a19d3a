"""`cmjax compile`, as a user meets it; what it compiles is tested in tests/targets."""

import json

import pytest

from cmjax.cli import main
from cmjax.targets import StepReport
from tests.helpers import assert_only_progress

SMALL = ["--target", "here", "--model", "deepseek-v2-lite"]


@pytest.fixture
def fake(monkeypatch):
    """What came of a step, without compiling; the requests."""
    asked = []

    def compile_apart(request):
        asked.append(request)
        report = StepReport(tokens=64, sequences=8, weights=2**31, cache=2**30, exchange=2**28, memory=4 * 2**30)
        if request.role == "prefill":
            report.status, report.reason, report.total = "too large", "needs 5.0 GiB of 4.0", 5 * 2**30
            report.advice = ["--max-num-batched-tokens 1024 (of 2048)"]
        else:
            report.arguments, report.temporaries, report.outputs, report.code = 3 * 2**30, 2**29, 0, 2**20
            report.total = 3 * 2**30 + 2**29
            report.collectives = {"all-to-all": {"calls": 4, "num_bytes": 4_000_000}}
            report.estimate_s, report.seconds = 0.01, {"compile": 3.0}
        return report

    monkeypatch.setattr("cmjax.cli.compile.compile_apart", compile_apart)
    return asked


def test_both_steps_with_the_engine_s_settings(fake, capsys):
    options = ["--ep", "64", "--max-num-seqs", "6", "--mtp", "0", "--microbatches", "auto", "--quant", "int8"]
    assert main(["compile", *SMALL, *options]) == 1  # prefill does not fit
    out, err = capsys.readouterr()
    assert_only_progress(err)
    assert [(one.role, one.ep_size, one.settings["microbatches"]) for one in fake] == [
        ("decode", 64, 1),
        ("decode", 64, 2),
        ("prefill", 32, 1),
        ("prefill", 32, 2),
    ]
    assert {one.settings["max_num_seqs_per_rank"] for one in fake} == {6}
    assert {one.quant for one in fake} == {"int8"}
    assert {one.dtype for one in fake} == {"bfloat16"}
    assert "prefill-ep32-mb1: needs 5.0 GiB of 4.0" in out
    assert "  --max-num-batched-tokens 1024 (of 2048)" in out
    assert "all-to-all" in out


def test_json_has_all_that_is_known(fake, capsys):
    assert main(["compile", *SMALL, "--role", "decode", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "deepseek-v2-lite"
    (step,) = found["steps"]
    assert (step["role"], step["ep_size"], step["fits"]) == ("decode", 320, True)
    assert step["collectives"]["all-to-all"]["calls"] == 4


def test_a_target_s_size_is_the_default(fake):
    main(["compile", "--target", "v5p:4x4x4", "--role", "decode"])
    main(["compile", "--target", "v5p:4x4x4", "--role", "prefill"])
    assert [one.ep_size for one in fake] == [64, 32]


def test_targets_and_models_are_listed(capsys):
    assert main(["compile", "--list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"v5e", "v5p", "v6e", "ironwood", "h100", "h200", "b200", "gb200", "gb300"} == set(found["targets"])
    assert "kimi-k2" in found["models"]
    assert main(["compile", "--list"]) == 0
    out = capsys.readouterr().out
    assert "jax[tpu]" in out
    assert "deepseek-r1" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no target: give --target, such as v5p:8x8x5; --list names them"),
        (["--target", "v9:8"], "target 'v9:8' is unknown"),
        (["--target", "v5p:8x8"], "'8x8' is no topology of TPU v5p"),
        (["--target", "v5p", "--model", "gpt"], "model 'gpt' is no folder, no file and none of deepseek-r1"),
        (["--target", "v5p", "--run", "2"], "--run needs --target here"),
        (["--target", "v5p", "--quant", "auto"], "--quant auto measures this machine"),
        (["--target", "v5p", "--microbatches", "2", "--max-num-seqs", "3"], "microbatches 2 do not divide"),
        (["--target", "here", "--ep", "2", "--model", "deepseek-v2-lite", "--mtp", "1"], "the model has no MTP module"),
    ],
)
def test_a_mistake_is_one_line(options, words, capsys):
    assert main(["compile", *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    lines = [line for line in err.splitlines() if not line.startswith("compiling")]
    assert len(lines) == 1
