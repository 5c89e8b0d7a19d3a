"""`cmjax generate`: tokens equal the references', the report is whole, and every mistake is one line and status 2."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cmjax.checkpoint import Tokenizer
from cmjax.cli import main
from cmjax.cli import options as cli_options
from cmjax.cli.running import memory_errors
from cmjax.cli.tables import readable
from cmjax.errors import UserError
from cmjax.serve import EngineSettings
from tests.conftest import ROOT
from tests.helpers import assert_only_progress, save_with_tokenizer, tiny_model
from tests.parity import FOLDER, load_case

EP320, SMALL = "v3-ep320", "v3-small"
# One prefill instance: each is a compilation of its own.
EP2 = ("--ep", 2, "--prefill-instances", 1)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def prompt_options(prompts: np.ndarray) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt-ids", ",".join(map(str, prompt)))]


def generate(capsys: pytest.CaptureFixture[str], *args: object) -> dict:
    status, out, err = run(capsys, "generate", *args, "--json")
    assert status == 0
    assert_only_progress(err)
    return json.loads(out)


@pytest.mark.smoke
def test_tokens_equal_the_reference_and_the_report_is_whole(capsys):
    case = load_case(EP320)
    num_tokens = case.generated.shape[1]
    options = [*prompt_options(case.prompt), "--max-tokens", num_tokens, "--ep", 8]
    report = generate(capsys, "--model", case.path, *options)
    for row, output in enumerate(report["outputs"]):
        assert output["prompt_ids"] == case.prompt[row].tolist()
        clear = case.num_clear(row)
        assert clear > 0
        assert output["token_ids"][:clear] == case.generated[row, :clear].tolist()
        assert (len(output["token_ids"]), output["finish_reason"]) == (num_tokens, "length")

    seconds = report["timings"]
    assert seconds["prefill_tokens"] == case.prompt.size
    assert seconds["decode_tokens"] == case.generated.size - len(case.prompt)
    assert all(seconds[name] > 0 for name in ("load_s", "compile_s", "prefill_s", "handoff_s", "decode_s", "total_s"))

    # Only what these requests moved: the padding that compiled the steps is not counted.
    handoff = report["traffic"]["rdma"]["kv_handoff"]
    width = case.config.num_cache_layers * case.config.latent_width
    assert handoff["calls"] == len(case.prompt)
    assert handoff["bytes"] == 4 * (case.prompt.size * width + len(case.prompt) * case.config.hidden_size)
    assert report["traffic"]["ub"]["ragged_all_to_all"]["calls"] > 0

    topk = case.config.num_topk
    load = report["expert_load"]
    assert list(load["decode"]) == ["1", "2", "mtp"]
    assert sum(load["prefill"]["1"]) == case.prompt.size * topk
    # The step runs until the longest request ends, and not at all for those that have ended.
    assert sum(load["decode"]["2"]) == seconds["decode_tokens"] * topk
    assert len(load["decode"]["1"]) == case.config.num_routed_experts

    assert [(one["name"], one["ep_size"]) for one in report["instances"]] == [
        ("prefill0", 8),
        ("prefill1", 8),
        ("decode0", 8),
    ]
    assert report["instances"][0]["placement"]["num_redundant_experts"] == 8
    assert report["settings"]["max_model_len"] == 48  # 12 + 24 in blocks of 16


def test_stop_tokens_end_a_request_and_tables_show_it(capsys):
    case = load_case(EP320)
    stop = int(case.generated[0, 2])
    options = [*prompt_options(case.prompt), "--max-tokens", 24, *EP2, "--stop-token-ids", stop]
    status, out, err = run(capsys, "generate", "--model", case.path, *options, "--stats")
    assert status == 0
    assert "(ended by length, stop) in " in err.splitlines()[-1]
    titles = ("Generated", "Expert placement", "Phases", "Traffic", "Load of the routed experts")
    positions = [out.index(title) for title in titles]
    assert positions == sorted(positions)
    assert "stop" in out[positions[0] : positions[1]]
    # What was generated comes first, and without --stats nothing else.
    ids = [",".join(map(str, one)) for one in (case.prompt[0], case.generated[0, :3])]
    assert out.startswith(f"==> prompt 1 of {len(case.prompt)} <==\n{ids[0]} -> {ids[1]}\n\n==> prompt 2 of ")
    assert run(capsys, "generate", "--model", case.path, *options)[1] == out[: positions[0]]
    report = generate(capsys, "--model", case.path, *options)
    first = report["outputs"][0]
    assert (first["token_ids"], first["finish_reason"]) == (case.generated[0, :3].tolist(), "stop")


def test_formats_and_sizes_reach_the_engine(capsys):
    options = ("--dtype", "bfloat16", "--dispatch-dtype", "int8", "--combine-dtype", "float32", "--block-size", 4)
    options += ("--max-model-len", 9, "--max-num-seqs", 2, "--max-num-batched-tokens", 8, "--steps-per-call", 3)
    options += ("--mtp", 0, "--microbatches", 2)
    path = FOLDER / SMALL
    report = generate(capsys, "--model", path, "--prompt-ids", "1,2,3,4,5", "--max-tokens", 3, *EP2, *options)
    assert len(report["outputs"][0]["token_ids"]) == 3
    given = EngineSettings(
        max_model_len=9,
        max_num_seqs_per_rank=2,
        block_size=4,
        max_num_batched_tokens=8,
        steps_per_call=3,
        num_speculative_tokens=0,
        microbatches=2,
        dispatch_dtype="int8",
        combine_dtype="float32",
    )
    assert report["settings"] == dataclasses.asdict(given) | {"exchange": "FabricExchange"}


def test_more_prompts_than_places_wait(capsys):
    """Here on three ranks, a number that nothing divides; and the tokens stay the reference's."""
    case = load_case(SMALL)
    prompts = np.tile(case.prompt, (3, 1))
    sizes = ("--max-tokens", 4, "--ep", 3, "--prefill-instances", 1, "--max-num-seqs", 1)
    report = generate(capsys, "--model", case.path, *prompt_options(prompts), *sizes)
    assert report["instances"][-1]["ep_size"] == 3
    assert len(prompts) > 3
    for row, output in enumerate(report["outputs"]):
        clear = min(case.num_clear(row % len(case.prompt)), 4)
        assert output["prompt_ids"] == prompts[row].tolist()
        assert output["token_ids"][:clear] == case.generated[row % len(case.prompt), :clear].tolist()
        assert len(output["token_ids"]) == 4


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A folder with the tokenizer of the bundled model and random weights."""
    return save_with_tokenizer(tmp_path_factory.mktemp("text") / "model", tiny_model(seed=1, vocab_size=2048))


def test_text_prompts_come_before_those_of_ids(text_model, capsys):
    tokenizer = Tokenizer.from_folder(text_model)
    texts = ["def mean(values):\n    return", "üλ🙂"]
    ids = [tokenizer.encode(text) for text in texts]
    assert all(prompt[0] == tokenizer.bos_token_id for prompt in ids)
    options = ("--model", text_model, "--max-tokens", 5, *EP2)
    report = generate(capsys, *options, "--prompt", texts[0], "--prompt-ids", "7,8", "--prompt", texts[1])
    outputs = report["outputs"]
    assert [output["prompt_ids"] for output in outputs] == [*ids, [7, 8]]
    assert [output["prompt"] for output in outputs] == [*texts, tokenizer.decode([7, 8])]
    assert all(output["text"] == tokenizer.decode(output["token_ids"]) for output in outputs)
    # The same tokens as ids alone.
    alone = generate(capsys, *options, *prompt_options([*ids, [7, 8]]))
    assert alone["outputs"] == outputs


def test_what_is_printed_is_the_text_as_it_is(text_model, capsys):
    text = "def f(a):\n    # [bold]not markup[/bold] [/] " + "x" * 200 + "\n    return a[0"
    options = ("--model", text_model, "--prompt", text, "--max-tokens", 3, *EP2)
    report = generate(capsys, *options)
    status, out, err = run(capsys, "generate", *options)
    assert (status, out) == (0, f"{text}{report['outputs'][0]['text']}\n")
    assert re.fullmatch(
        r"3 tokens \(ended by length\) in .* s, after .* s of loading and .* s of compiling", err.split("\n")[-2]
    )


def test_a_terminal_tells_prompt_and_continuation_apart(text_model, capsys, monkeypatch):
    text = "a = [red] \x1b[31m"
    options = ("--model", text_model, "--prompt", text, "--max-tokens", 3, *EP2)
    expected = readable(generate(capsys, *options)["outputs"][0]["text"]).plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    status, out, _ = run(capsys, "generate", *options)
    assert (status, out) == (0, f"a = [red] \\x1b[31m\x1b[1;32m{expected}\x1b[0m\n")


def test_readable_text():
    assert readable("a\tb\n[red]\x1b[31m\x00\r").plain == "a\tb\n[red]\\x1b[31m\\x00\\r"
    assert readable("[red]x[/red]").spans == []


def test_sampling_and_drafts(capsys):
    """Equal seeds give equal tokens, with drafts and without; log probabilities where they are asked for."""
    case = load_case("v3-mtp")
    base = ("--model", case.path, "--prompt-ids", "1,2,3", "--max-tokens", 6, *EP2, "--temperature", 0.9)
    base += ("--top-p", 0.9, "--seed", 7, "--logprobs", 2)
    plain, drafting = generate(capsys, *base), generate(capsys, *base, "--mtp", 1)
    first, second = (report["outputs"][0] for report in (plain, drafting))
    assert first["token_ids"] == second["token_ids"]
    assert first.keys() == {"prompt_ids", "token_ids", "finish_reason", "logprobs"}
    assert [one["token_id"] for one in second["logprobs"]] == second["token_ids"]
    assert {len(one["top"]) for one in second["logprobs"]} == {2}
    assert len(plain["kept_drafts"]) == 1
    assert drafting["kept_drafts"][0] + 2 * drafting["kept_drafts"][1] == 5
    status, out, err = run(capsys, "generate", *base, "--top-k", -3)
    assert_one_line(status, out, err, "top_k -3 is out of range")
    dense = ("--model", FOLDER / SMALL, "--prompt-ids", "1", "--ep", 2, "--mtp", 1)
    assert_one_line(*run(capsys, "generate", *dense), "the model has no MTP module")


def test_text_without_a_tokenizer(capsys):
    status, out, err = run(capsys, "generate", "--model", FOLDER / SMALL, "--prompt", "x", "--ep", 2)
    assert_one_line(status, out, err, "tokenizer.json: not found; text needs the model's tokenizer")
    report = generate(capsys, "--model", FOLDER / SMALL, "--prompt-ids", "1,2", "--max-tokens", 2, *EP2)
    assert report["outputs"][0].keys() == {"prompt_ids", "token_ids", "finish_reason"}


def test_a_prompt_must_be_given(capsys):
    status, out, err = run(capsys, "generate")
    assert_one_line(status, out, err, "no prompt: give --prompt TEXT or --prompt-ids 1,2,3")


def test_bytes_that_are_no_text(text_model, capsys):
    status, out, err = run(capsys, "generate", "--model", text_model, "--prompt", "ab\udcff")
    assert_one_line(status, out, err, "is not Unicode text: surrogates not allowed at character 2")


def test_outside_a_clone_the_model_must_be_given(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_options, "BUNDLED_MODEL", tmp_path / "nothing")
    status, out, err = run(capsys, "generate", "--model", tmp_path / "nothing", "--prompt", "x")
    assert_one_line(status, out, err, "the bundled model is part of a clone of the repository; give --model")


# -- bad input --------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "token id outside": (["--prompt-ids", "1,999"], "token id 999 is outside the vocabulary (0 to 259)"),
    "negative token id": (["--prompt-ids", "-1,2"], "token id -1 is outside the vocabulary (0 to 259)"),
    "token id of no vocabulary": (["--prompt-ids", "99999999999"], "token id 99999999999 is outside every vocabulary"),
    "no integer": (["--prompt-ids", "1,,2"], "'' in '1,,2' is not a token id"),
    "no comma": (["--prompt-ids", "1 2"], "'1 2' in '1 2' is not a token id"),
    "empty prompt": (["--prompt-ids", ""], "'' in '' is not a token id"),
    "prompt longer than the cache": (["--max-model-len", "16", "--max-tokens", "24"], "exceeds max_model_len 16"),
    "prompt longer than the model": (["--max-tokens", "2400"], "exceed the model's max_position_embeddings 256"),
    "no tokens": (["--max-tokens", "0"], "Invalid value for '--max-tokens'"),
    "EP0": (["--ep", "0"], "the EP size is 0; it must be at least 1"),
    "more than the supernode": (["--ep", "400"], "decode at EP 400 needs 400 devices, there are 384"),
    "instances that do not fit": (
        ["--ep", "300", "--prefill-instances", "9"],
        "decode at EP 300 beside 9 prefill instance(s) at EP 32 needs 588 devices, there are 384",
    ),
    "experts that do not fill": (["--redundant-experts", "3"], "do not fill 8 ranks evenly"),
    "huge max_model_len": (["--max-model-len", "100000000"], "max_model_len 100000000 exceeds"),
    "huge batch": (["--max-num-seqs", "100000000"], "max_num_seqs_per_rank (100000000)"),
    "huge prefill step": (["--max-num-batched-tokens", "100000000000"], "max_num_batched_tokens (100000000000)"),
    "unknown dtype": (["--dispatch-dtype", "int4"], "Invalid value for '--dispatch-dtype'"),
    "no folder": (["--model", "/no/such/folder"], "/no/such/folder: no such folder"),
    "no folder for a text": (["--model", "/no/such/folder", "--prompt", "x"], "/no/such/folder: no such folder"),
    "a file": (["--model", str(FOLDER / EP320 / "config.json")], "config.json: not a folder"),
}


def assert_one_line(status: int, out: str, err: str, part: str) -> None:
    assert (status, out) == (2, "")
    assert err.startswith("cmjax generate: error: ")
    assert part in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_status_2(case, capsys):
    options, part = BAD_OPTIONS[case]
    given = {"--model": str(FOLDER / EP320), "--ep": "8", "--prompt-ids": "1,2,3"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    status, out, err = run(capsys, "generate", *(word for pair in given.items() for word in pair))
    assert_one_line(status, out, err, part)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, path)


def change(**fields: object) -> object:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


BAD_MODELS = {
    "truncated tensor": (truncate, "it is truncated"),
    "missing tensor": (drop, "missing tensor model.layers.1.mlp.gate.weight"),
    "misshapen tensor": (change(vocab_size=98), "tensor model.embed_tokens.weight has shape"),
    "unknown architecture": (change(architectures=["LlamaForCausalLM"]), "'LlamaForCausalLM' is not supported"),
    "unknown field value": (change(scoring_func="tanh"), "scoring_func 'tanh' is not supported"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_one_line_and_status_2(case, capsys, tmp_path):
    edit, part = BAD_MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / SMALL, folder)
    edit(folder)
    status, out, err = run(capsys, "generate", "--model", folder, "--ep", 2, "--prompt-ids", "1,2,3")
    assert_one_line(status, out, err, part)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), MemoryError()])
def test_running_out_of_memory_names_the_settings(error):
    with (
        pytest.raises(UserError, match=r"--max-num-seqs \(8\), --max-model-len \(1024\)"),
        memory_errors(EngineSettings()),
    ):
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_errors(EngineSettings()):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")


# -- the real command -------------------------------------------------------------------------------------------------


def command(*args: object, xla_flags: str = "") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"XLA_FLAGS": xla_flags, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "cmjax", "generate", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=200, check=False)


def test_the_command_refuses_more_devices_than_xla_flags_allow():
    flags = "--xla_force_host_platform_device_count=4"
    done = command("--model", FOLDER / SMALL, "--prompt-ids", "1,2,3", "--ep", 8, xla_flags=flags)
    assert_one_line(done.returncode, done.stdout, done.stderr, "needs 8 devices, there are 4")
    assert "--xla_force_host_platform_device_count in XLA_FLAGS is 4" in done.stderr


def test_the_command_refuses_a_truncated_checkpoint(tmp_path):
    shutil.copytree(FOLDER / SMALL, tmp_path / "model")
    truncate(tmp_path / "model")
    done = command("--model", tmp_path / "model", "--prompt-ids", "1,2,3", "--ep", 2)
    assert_one_line(done.returncode, done.stdout, done.stderr, "it is truncated")


def test_the_command_prints_one_object():
    flags = "--xla_force_host_platform_device_count=2"
    done = command(
        "--model", FOLDER / SMALL, "--prompt-ids", "1,2,3", "--max-tokens", 2, "--ep", 2, "--json", xla_flags=flags
    )
    assert done.returncode == 0
    assert_only_progress(done.stderr)
    report = json.loads(done.stdout)
    assert len(report["outputs"][0]["token_ids"]) == 2
    assert report["prefill_shares_decode_devices"] is True
