"""The bundled model: it has learnt what docs/demo-model.md says, on a few files here, on all of them in `make soak`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import cmjax
from cmjax.checkpoint import Tokenizer
from cmjax.cli import main
from cmjax.cli.options import BUNDLED_MODEL, HELDOUT
from cmjax.model import num_params


def evaluate(capsys: pytest.CaptureFixture[str], *args: object) -> dict:
    capsys.readouterr()
    assert main(["eval", "--json", *map(str, args)]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_it_is():
    model = cmjax.load(BUNDLED_MODEL)
    config = model.config
    assert 9e6 < num_params(model.params) < 12e6
    assert (BUNDLED_MODEL / "model.safetensors").stat().st_size < 30e6
    assert config.model_type == "deepseek_v3"
    assert config.num_hidden_layers >= 6
    assert (config.num_routed_experts, config.num_shared_experts, config.num_topk) == (256, 1, 8)
    assert (config.num_expert_groups, config.num_mtp_layers, config.first_k_dense_replace) == (8, 1, 1)
    assert config.q_lora_rank is not None
    assert config.vocab_size == Tokenizer.from_folder(BUNDLED_MODEL).vocab_size
    assert np.any(model.params.moe.mlp.router_bias)  # balanced by it
    training = json.loads((BUNDLED_MODEL / "training.json").read_text())
    assert training["curve"][-1]["step"] == training["recipe"]["steps"]


def test_it_has_learnt_python(capsys, tmp_path):
    # The shortest files that count in the comparison: quick, and with little of their own to learn from.
    lines = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    chosen = sorted((one for one in lines if len(one["text"].encode()) >= 4096), key=lambda one: len(one["text"]))[:6]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chosen))
    report = evaluate(capsys, "--data", tmp_path / "some.jsonl", "--context", 1024)
    assert report["all"]["compared_files"] == 6
    assert report["all"]["ratio_to_lzma"] < 0.82
    assert report["all"]["mtp_agreement"] > 0.5


def evaluate_apart(*args: object) -> dict:
    """As users run it: this process compiles without LLVM's optimizations, which takes several times as long here."""
    words = [sys.executable, "-m", "cmjax", "eval", "--json", *map(str, args)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_all_of_the_heldout_text_on_one_device_and_on_320():
    one = evaluate_apart()
    # 16 tokens a rank. The buffers of the exchange grow with their square: at twice as many they take 15 GB.
    many = evaluate_apart("--ep", 320, "--max-num-batched-tokens", 5120)
    assert len(one["areas"]) == 16
    assert one["all"]["ratio_to_lzma"] <= 0.82
    assert one["all"]["mtp_agreement"] >= 0.5
    assert max(one["expert_balance"].values()) <= 4
    for name, report in [*one["areas"].items(), ("all", one["all"])]:
        found = many["all"] if name == "all" else many["areas"][name]
        assert found["tokens"] == report["tokens"]
        assert found["bits_per_byte"] == pytest.approx(report["bits_per_byte"], rel=1e-4)
        # A few of half a million choices are closer than the rounding of another order of sums.
        assert found["top1"] == pytest.approx(report["top1"], abs=1e-3)
        assert found["mtp_agreement"] == pytest.approx(report["mtp_agreement"], abs=1e-3)
