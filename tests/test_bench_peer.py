"""The peers of `cmjax bench peer`: the file that llama.cpp reads, the process of another interpreter, its failures."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cmjax.bench import peer as bench_peer
from cmjax.bench.peer_process import LLAMA, Kind, Peer, SideProcess, start
from cmjax.checkpoint import load, save_hf
from cmjax.cli import main
from cmjax.errors import UserError
from cmjax.model import ModelConfig, init_params

LLAMA_PYTHON = os.environ.get("CMJAX_LLAMA_PYTHON")
CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,
    moe_intermediate_size=32,
    num_routed_experts=8,
    num_shared_experts=1,
    num_topk=2,
    num_expert_groups=4,
    num_topk_groups=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    max_position_embeddings=512,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("peer") / "model"
    save_hf(path, CONFIG, init_params(CONFIG, seed=1))
    return path


def fake(tmp_path: Path, body: str) -> Kind:
    """A peer whose side is this code."""
    file = tmp_path / "fake_side.py"
    file.write_text(f"import os, sys, time\nclass Side:\n    def versions(self): return {{}}\n    {body}\n")
    return Kind("fake", "--fake-python", "nothing", file, ("float32",))


@pytest.mark.parametrize("number_format", ["float32", "bfloat16", "int8"])
def test_the_gguf_holds_the_checkpoint(folder, tmp_path, number_format):
    gguf = pytest.importorskip("gguf", reason="needs pip install gguf")
    from cmjax.bench.gguf_file import write_gguf

    write_gguf(str(folder), str(tmp_path / "model.gguf"), number_format)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "deepseek2"
    assert fields["deepseek2.attention.key_length_mla"] == 64
    assert fields["deepseek2.expert_group_used_count"] == 2
    assert fields["deepseek2.expert_gating_func"] == 2
    tensors = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    params = load(folder).params
    kv_b = np.asarray(params.moe.attn.kv_b[0]).reshape(2, 96, 64)
    w13 = np.asarray(params.moe.mlp.experts.w13[0])
    wanted = {
        "token_embd.weight": params.embed,
        "output.weight": params.head,
        "blk.1.attn_k_b.weight": kv_b[:, :32].swapaxes(1, 2),
        "blk.1.attn_v_b.weight": kv_b[:, 32:],
        "blk.1.ffn_gate_exps.weight": w13[:, :32],
        "blk.1.ffn_up_exps.weight": w13[:, 32:],
        "blk.1.ffn_down_exps.weight": params.moe.mlp.experts.w2[0],
        "blk.1.ffn_gate_inp.weight": params.moe.mlp.router[0],
        "blk.1.exp_probs_b.bias": params.moe.mlp.router_bias[0],
        "blk.0.attn_kv_a_mqa.weight": params.dense.attn.kv_a[0],
    }
    # Half a step of what the format keeps of the largest value.
    share = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 254 + 2**-10}[number_format]
    for name, tensor in wanted.items():
        tensor = np.asarray(tensor, np.float32)
        exact = name.endswith((".bias", "ffn_gate_inp.weight"))
        assert tensors[name].shape == tensor.shape, name
        np.testing.assert_allclose(tensors[name], tensor, rtol=0, atol=0 if exact else share * np.abs(tensor).max())
    assert {"blk.0.ffn_gate.weight", "blk.2.ffn_up_shexp.weight", "output_norm.weight"} <= set(tensors)
    assert len(tensors) == 3 + 10 * 3 + 3 + 2 * 8


def test_a_peer_answers_in_a_process_of_its_own(tmp_path):
    kind = fake(
        tmp_path, "def logits(self, input_ids, into): print('noise'); import numpy; numpy.save(into, input_ids)"
    )
    peer = start(kind, sys.executable)
    try:
        assert np.array_equal(peer.logits(np.arange(6).reshape(2, 3)), np.arange(6).reshape(2, 3))
    finally:
        peer.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def run(self): os.abort()", "killed by SIGABRT at 'run'"),
        ("def run(self): sys.stderr.write('GGML_ASSERT(x) failed\\n'); os._exit(3)", "status 3 at 'run': GGML_ASSERT"),
        ("def run(self): raise ValueError('of\\nno use')", "ValueError: of no use"),
        ("def run(self): time.sleep(600)", "no answer to 'run' in 5 s"),
    ],
    ids=["crashed", "asserted", "raised", "hangs"],
)
def test_what_goes_wrong_over_there_is_one_line(tmp_path, body, message):
    process = SideProcess(fake(tmp_path, body), sys.executable, reply_s=5)
    try:
        with pytest.raises(UserError, match="--fake-python") as caught:
            process.ask("run")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        process.close()


def test_a_busy_side_is_ended(tmp_path):
    process = SideProcess(fake(tmp_path, "def run(self): time.sleep(600)"), sys.executable)
    process.ask("versions")
    process._process.stdin.write('{"do": "run"}\n')
    process._process.stdin.flush()
    time.sleep(0.2)
    process.close()
    assert process._process.returncode is not None


def test_an_interpreter_without_llama_cpp(capsys):
    status = main(["bench", "peer", "--llama-python", sys.executable])
    err = capsys.readouterr().err
    assert status == 2
    assert "No module named 'llama_cpp'; it needs llama-cpp-python and gguf" in err
    assert err.count("\n") == 1


def test_peers_that_differ_are_not_timed(tmp_path, monkeypatch):
    class Wrong:
        name, formats, versions = "wrong", ("float32",), {}

        def load(self, path, number_format): ...

        def logits(self, ids):
            return np.zeros((1, *ids.shape, CONFIG.vocab_size), np.float32)

    monkeypatch.setattr(bench_peer, "start_peers", lambda *_: [Wrong()])
    report = bench_peer.run(CONFIG, formats=("float32",), rounds=1)
    assert report["logits_agree"] is False
    assert report["results"] == []
    assert bench_peer.tables(report)


@pytest.mark.skipif(not LLAMA_PYTHON, reason="CMJAX_LLAMA_PYTHON names no interpreter with llama-cpp-python and gguf")
def test_llama_cpp_computes_the_same():
    sizes = bench_peer.Sizes(decode_batches=(2,), prefill_batch=2, length=16, num_steps=2)
    report = bench_peer.run(CONFIG, formats=("float32",), sizes=sizes, rounds=1, llama_python=LLAMA_PYTHON)
    assert report["logits_agree"], report["logits"]
    assert report["logits"][0]["max_abs"] < 1e-4
    assert [set(row["sides"]) for row in report["results"]] == [{"cmjax", "llama.cpp"}] * 2


@pytest.mark.skipif(not LLAMA_PYTHON, reason="CMJAX_LLAMA_PYTHON names no interpreter with llama-cpp-python and gguf")
def test_llama_cpp_decodes_the_same_tokens(folder, tmp_path):
    process = SideProcess(LLAMA, LLAMA_PYTHON)
    peer, prompts = Peer(LLAMA, process.ask), np.random.default_rng(0).integers(0, 128, (3, 9))
    try:
        peer.load(folder, "float32")
        peer.prepare("decode", prompts, 4)
        peer.run()
        process.ask("tokens", into=str(tmp_path / "tokens.npy"))
    finally:
        process.close()
    model, ids = load(folder), prompts
    first = np.asarray(model.logits(ids))[:, -1].argmax(-1)
    ids = np.concatenate([ids, first[:, None], np.load(tmp_path / "tokens.npy")], axis=1)
    # Every token that it made is the one that cmjax finds likeliest after those before.
    assert np.array_equal(np.asarray(model.logits(ids))[:, 9:-1].argmax(-1), ids[:, 10:])
