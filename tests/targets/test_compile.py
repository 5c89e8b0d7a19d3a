"""Steps compiled for machines that are not here: DeepSeek-R1 and a small model, by libtpu, each in its own process."""

import dataclasses
import sys
from importlib.util import find_spec

import pytest

from cmjax.checkpoint.configs import find_config
from cmjax.errors import UserError
from cmjax.targets import StepReport, StepRequest, compile_apart
from cmjax.targets.advice import advice
from cmjax.targets.apart import crash_reason
from tests.helpers import TINY

GIB = 2**30
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs pip install 'jax[tpu]'")
R1 = find_config("deepseek-r1").config.to_hf()


@pytest.fixture(autouse=True)
def _own_flags(monkeypatch):
    """Those of this process are for a host's devices, without optimizations."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def request(role="decode", ep_size=8, config=TINY, target="v5p", quant=None, **settings):
    defaults = {"max_model_len": 96, "max_num_seqs_per_rank": 2, "max_num_batched_tokens": 64}
    return StepRequest(target, role, ep_size, config, {**defaults, **settings}, quant=quant)


SLOW = pytest.mark.soak  # compiling for a TPU takes seconds each time


@needs_libtpu
@pytest.mark.parametrize(
    ("role", "quant", "microbatches"),
    [
        ("decode", "int8", 2),
        ("prefill", None, 1),
        pytest.param("decode", None, 1, marks=SLOW),
        pytest.param("prefill", "int8", 2, marks=SLOW),
    ],
)
def test_a_small_model_compiles_for_a_tpu(role, quant, microbatches):
    config = {**TINY, "num_nextn_predict_layers": 1}
    asked = request(role, config=config, quant=quant, microbatches=microbatches, num_speculative_tokens=1)
    report = compile_apart(dataclasses.replace(asked, any_sampling=quant is None))
    assert (report.status, report.reason) == ("ok", None)
    assert report.fits
    # Two exchanges a MoE layer and microbatch, those of the MTP module in whole steps.
    assert report.collectives["ragged-all-to-all"]["calls"] >= 4
    assert report.total >= report.weights + report.cache
    assert report.estimate_s > 0
    assert {"jax", "jaxlib", "libtpu"} <= report.versions.keys()


@needs_libtpu
@SLOW
def test_r1_decodes_at_ep320_without_a_copy_of_its_cache_or_weights(tmp_path):
    asked = request(
        ep_size=320,
        config=R1,
        target="v5p:8x8x5",
        max_model_len=4096,
        max_num_seqs_per_rank=48,
        block_size=128,
        steps_per_call=1,
        num_speculative_tokens=1,
        quant="int8",
    )
    report = compile_apart(dataclasses.replace(asked, output=str(tmp_path / "programs")))
    assert (report.status, report.reason) == ("ok", None)
    assert (report.tokens, report.sequences) == (320 * 96, 48)
    # What XLA lays out is what the engine says that it has, within tiles, and less the head of a module of its own.
    assert abs(report.arguments - report.weights - report.cache) < 0.5 * GIB
    assert report.temporaries < report.exchange + 0.5 * GIB
    # One exchange each way in 58 layers and in the MTP module's, rows of worst-case size.
    assert report.collectives["ragged-all-to-all"]["calls"] == 2 * 59
    programs = {path.suffixes[-2]: path.read_text() for path in (tmp_path / "programs").iterdir()}
    assert "ragged-all-to-all" in programs[".hlo"]
    assert "stablehlo" in programs[".stablehlo"]


@needs_libtpu
@SLOW
def test_r1_prefills_16384_tokens_at_ep32(monkeypatch):
    # libtpu's compiler crashed here: the gate's product was fused with the reshape into expert groups.
    settings = {"max_model_len": 4096, "block_size": 128, "max_num_batched_tokens": 16_384, "microbatches": 1}
    report = compile_apart(request("prefill", 32, R1, **settings))
    assert (report.status, report.reason) == ("ok", None)
    assert report.temporaries < report.exchange + 1.0 * GIB


@needs_libtpu
def test_what_does_not_fit_says_by_how_much_and_what_to_change():
    report = compile_apart(request(ep_size=256, config=R1, target="v5e", steps_per_call=1))
    assert report.status == "too large"
    assert report.fits is False
    assert report.reason == f"needs {report.total / GIB:.1f} GiB of 15.8"
    assert report.advice[0].startswith("the weights alone are 45.8 GiB")
    assert any("--quant int8" in line for line in report.advice)


@needs_libtpu
def test_the_padded_exchange_is_one_of_worst_case_size():
    native = compile_apart(request(microbatches=1))
    padded = compile_apart(dataclasses.replace(request(microbatches=1), ragged="padded"))
    assert "ragged-all-to-all" not in padded.collectives
    assert padded.collectives["all-to-all"]["num_bytes"] > native.collectives["all-to-all"]["num_bytes"]


def test_a_step_runs_where_its_devices_are():
    report = compile_apart(dataclasses.replace(request(ep_size=2, target="here"), dtype="float32", num_runs=2))
    assert report.status == "ok"
    assert report.memory is None  # virtual devices share the host's
    assert report.fits is None
    assert report.seconds["run_median"] > 0


def test_a_crash_is_one_line(tmp_path, monkeypatch):
    dying = tmp_path / "python"
    dying.write_text(
        "#!/bin/sh\n"
        "echo 'F1129 01:05:25.455860     993 learning/fusion_util.cc:5151] Check failed: window of a dim' >&2\n"
        "kill -ABRT $$\n"
    )
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    report = compile_apart(request())
    assert report.status == "crashed"
    assert (
        report.reason == "the compiler crashed in fusion_util.cc:5151 (signal SIGABRT): Check failed: window of a dim"
    )
    assert report.fits is None


@pytest.mark.parametrize(
    ("status", "errors", "expected"),
    [
        (-9, "", "the compiler was killed (signal SIGKILL): this machine has too little memory for it"),
        (-11, "one\n\nlast words \n", "the compiler ended with signal SIGSEGV: last words"),
        (1, "", "the compiler ended with exit status 1: it gave no reason"),
    ],
)
def test_other_ends_are_one_line_too(status, errors, expected):
    assert crash_reason(status, errors) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "v9"}, "target 'v9' is unknown"),
        ({"settings": {"num_speculative_tokens": 1}}, "the model has no MTP module"),
        ({"settings": {"max_model_len": 10**6}}, "max_model_len 1000000 exceeds the model's max_position_embeddings"),
        ({"settings": {"microbatches": 2, "max_num_seqs_per_rank": 3}}, "microbatches 2 do not divide"),
        ({"settings": {"num_redundant_experts": 1, "max_model_len": 96}}, "num_redundant_experts"),
    ],
)
def test_a_wrong_request_is_the_user_s_mistake(changes, words):
    with pytest.raises(UserError, match=words) as raised:
        compile_apart(dataclasses.replace(request(target="here", ep_size=2), **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is not None, reason="the compiler for GPUs is here")
def test_a_missing_compiler_is_named():
    with pytest.raises(UserError, match=r"target h100 needs pip install 'jax\[cuda13\]'"):
        compile_apart(request(target="h100"))


def report_of(total, memory=80 * GIB, **fields):
    defaults = {"status": "too large", "tokens": 8 * 96, "sequences": 96, "weights": 20 * GIB, "cache": 60 * GIB}
    return StepReport(total=total, memory=memory, **{**defaults, **fields})


def test_advice_names_the_batch_that_fits():
    found = advice(report_of(100 * GIB), request(quant="int8"))
    assert found[0] == "--max-num-seqs 72 (of 96)"
    assert any(line.startswith("--max-model-len or --num-kv-blocks: the cache is 60.0 GiB") for line in found)
    assert not any("--quant" in line for line in found)
    prefill = advice(report_of(100 * GIB, tokens=16_384), request("prefill"))
    assert prefill[0] == "--max-num-batched-tokens 12288 (of 16384)"
    assert any(line.startswith("--quant int8") for line in prefill)


def test_advice_can_be_followed_with_two_microbatches():
    found = advice(report_of(97 * GIB), request(microbatches=2))
    assert found[0] == "--max-num-seqs 74 (of 96)"
    found = advice(report_of(97 * GIB, tokens=1008), request("prefill", ep_size=12, microbatches=2))
    assert found[0] == "--max-num-batched-tokens 768 (of 1008)"


def test_a_folder_that_cannot_be_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: File exists"):
        compile_apart(dataclasses.replace(request(target="here", ep_size=1), output=str(tmp_path / "file")))


def test_advice_for_weights_that_do_not_fit_names_no_batch():
    found = advice(report_of(130 * GIB, weights=90 * GIB), request())
    assert found[0] == "the weights alone are 90.0 GiB a device"
    assert not any("--max-num-seqs" in line for line in found)


def test_nothing_is_advised_where_nothing_is_known():
    assert advice(report_of(None), request()) == []
