"""Loading Hugging Face folders: every way a tensor may be stored, and one clear error for every way it may be wrong."""

import dataclasses
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from cmjax.checkpoint import SafetensorsFolder, load_checkpoint, load_params, save_hf, write_safetensors
from cmjax.checkpoint.weights import tensor_slots
from cmjax.errors import UserError
from cmjax.model import ModelConfig, abstract_params, init_params, named_leaves, num_bytes, params_digest
from tests.parity import CASES, FOLDER, Checkpoint, load_case

INDEX = "model.safetensors.index.json"


@pytest.fixture
def v3_odd() -> Checkpoint:
    return Checkpoint("v3-odd")


def assert_same(params, expected) -> None:
    found, wanted = named_leaves(params), named_leaves(expected)
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        assert leaf.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


# What a good checkpoint becomes


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_leaves_have_their_shapes_dtypes_and_alignment(name, dtype):
    config, params, digest = load_checkpoint(FOLDER / name, dtype)
    own = {"mtp_head": name != "v3-tied", "mtp_embed": name != "v3-tied"}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert shapes == abstract_params(config, dtype, **own)
    assert all(leaf.ctypes.data % 64 == 0 for leaf in jax.tree.leaves(params))
    assert params.norm.dtype == np.float32
    assert digest == params_digest(config, params)
    assert (digest == load_case(name).digest) == (dtype == np.float32)


def test_device_put_shares_the_buffer():
    leaf = load_case("v3-small").params.moe.mlp.experts.w13
    assert jax.device_put(leaf, jax.devices("cpu")[0]).unsafe_buffer_pointer() == leaf.ctypes.data


def test_every_tensor_is_in_its_place(v3_odd):
    case, tensors = load_case("v3-odd"), v3_odd.tensors
    params, layer = case.params, "model.layers.3."
    assert (case.config.dense_layer_ids, case.config.moe_layer_ids) == ((0, 1), (2, 3))
    np.testing.assert_array_equal(params.embed, tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params.head, tensors["lm_head.weight"])
    np.testing.assert_array_equal(params.dense.mlp.w13[1, :56], tensors["model.layers.1.mlp.gate_proj.weight"])
    np.testing.assert_array_equal(params.dense.mlp.w13[1, 56:], tensors["model.layers.1.mlp.up_proj.weight"])
    np.testing.assert_array_equal(params.moe.post_attn_norm[1], tensors[layer + "post_attention_layernorm.weight"])
    np.testing.assert_array_equal(
        params.moe.mlp.experts.w13[1, 5, :13], tensors[layer + "mlp.experts.5.gate_proj.weight"]
    )
    np.testing.assert_array_equal(params.moe.mlp.experts.w2[1, 15], tensors[layer + "mlp.experts.15.down_proj.weight"])
    np.testing.assert_array_equal(
        params.moe.mlp.shared.w13[1, 39:], tensors[layer + "mlp.shared_experts.up_proj.weight"]
    )
    # Heads are rows of 11 + 10 in q_b_proj, of 11 + 9 in kv_b_proj.
    np.testing.assert_array_equal(
        params.moe.attn.q_b[1, 2, 3], tensors[layer + "self_attn.q_b_proj.weight"][2 * 21 + 3]
    )
    np.testing.assert_array_equal(
        params.moe.attn.kv_b[1, 4, 12], tensors[layer + "self_attn.kv_b_proj.weight"][4 * 20 + 12]
    )


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_every_float_type_is_read(v3_odd, tmp_path, stored, target):
    v3_odd.tensors = {name: values.astype(stored) for name, values in v3_odd.tensors.items()}
    _, params, _ = load_checkpoint(v3_odd.write(tmp_path), target)
    head, norm = v3_odd.tensors["lm_head.weight"], v3_odd.tensors["model.norm.weight"]
    np.testing.assert_array_equal(params.head, head.astype(np.float32).astype(target))
    assert params.head.dtype == np.dtype(target)
    np.testing.assert_array_equal(params.norm, norm.astype(np.float32))
    router = v3_odd.tensors["model.layers.2.mlp.gate.weight"]
    np.testing.assert_array_equal(params.moe.mlp.router[0], router.astype(np.float32))


def test_fp8_blocks_are_multiplied_in_float32():
    case, stored = load_case("v3-fp8"), Checkpoint("v3-fp8")
    assert stored.config["quantization_config"]["weight_block_size"] == [24, 40]
    name = "model.layers.2.mlp.experts.3.down_proj.weight"  # 64 x 32: blocks partial at both edges
    values, scales = stored.tensors[name], stored.tensors[name + "_scale_inv"]
    assert (values.dtype, scales.shape) == (ml_dtypes.float8_e4m3fn, (3, 1))
    expected = np.zeros(values.shape, np.float32)
    for row, column in np.ndindex(values.shape):
        expected[row, column] = np.float32(values[row, column]) * scales[row // 24, column // 40]
    np.testing.assert_array_equal(case.params.moe.mlp.experts.w2[1, 3], expected)
    assert (expected != expected.astype(ml_dtypes.bfloat16)).any()
    in_bfloat16 = load_checkpoint(case.path, "bfloat16")[1].moe.mlp.experts.w2[1, 3]
    np.testing.assert_array_equal(in_bfloat16, expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "int8", "int32", "uint8", "bool"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.2.mlp.gate.weight"])
def test_nothing_is_read_raw_that_the_config_does_not_declare(v3_odd, tmp_path, name, kind):
    v3_odd.tensors[name] = v3_odd.tensors[name].astype(kind)
    expect(v3_odd.write(tmp_path), f"tensor {name} has dtype {kind}; weights must be floating-point here", "no quantiz")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.3.mlp.experts.15.up_proj.weight",
    ],
)
def test_what_is_not_finite_is_found_at_load(v3_odd, tmp_path, name, bad):
    v3_odd.tensors[name].flat[-1] = bad
    expect(v3_odd.write(tmp_path), f"tensor {name} holds NaN or infinity")


def test_what_another_dtype_cannot_hold_is_found_at_load(v3_odd, tmp_path):
    v3_odd.tensors["lm_head.weight"][3, 4] = -7e4
    load_checkpoint(v3_odd.write(tmp_path), "bfloat16")
    with pytest.raises(UserError, match=r"tensor lm_head.weight holds values beyond float16"):
        load_checkpoint(tmp_path, "float16")
    name = "model.layers.0.mlp.up_proj.weight"
    v3_odd.tensors[name] = v3_odd.tensors[name].astype(np.float64)
    v3_odd.tensors[name][0, 0] = 1e300
    for quant in (None, "int8"):
        with pytest.raises(UserError, match=f"tensor {name} holds values beyond float32"):
            load_checkpoint(v3_odd.write(tmp_path), quant=quant)


def test_shards_give_what_one_file_gives(v3_odd, tmp_path):
    names = sorted(v3_odd.tensors)
    files = {f"part-{i}.safetensors": names[i::3] for i in range(3)}
    (tmp_path / "config.json").write_text(json.dumps(v3_odd.config))
    for file, part in files.items():
        write_safetensors(tmp_path / file, {name: v3_odd.tensors[name] for name in part})
    assert load_checkpoint(tmp_path)[2] == load_case("v3-odd").digest
    (tmp_path / "old.safetensors").write_bytes(b"not named by the index")
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert load_checkpoint(tmp_path)[2] == load_case("v3-odd").digest


def test_stacked_experts(v3_odd, tmp_path):
    for layer in ("model.layers.2.mlp.experts.", "model.layers.3.mlp.experts."):
        gate, up, down = (
            np.stack([v3_odd.tensors.pop(f"{layer}{e}.{kind}_proj.weight") for e in range(16)])
            for kind in ("gate", "up", "down")
        )
        v3_odd.tensors |= {layer + "gate_up_proj": np.concatenate([gate, up], axis=1), layer + "down_proj": down}
    assert load_checkpoint(v3_odd.write(tmp_path))[2] == load_case("v3-odd").digest


def test_any_source_of_bytes(v3_odd):
    class InMemory:
        where = "memory"

        def names(self):
            return v3_odd.tensors

        def shape(self, name):
            return v3_odd.tensors[name].shape

        def dtype(self, name):
            return v3_odd.tensors[name].dtype

        def read(self, name):
            return v3_odd.tensors[name]

    config, params = load_params(InMemory(), ModelConfig.from_hf(v3_odd.config))
    assert params_digest(config, params) == load_case("v3-odd").digest


@pytest.mark.parametrize("name", ["v3-tied", "v3-mtp", "v2-bias", "v3-noqlora", "v3-dense"])
def test_save_hf_gives_the_same_model_back(name, tmp_path):
    case = load_case(name)
    save_hf(tmp_path / "out", case.config, case.params)
    config, params, digest = load_checkpoint(tmp_path / "out")
    assert (config, digest) == (case.config, case.digest)
    assert_same(params, case.params)


def test_save_hf_takes_device_arrays_and_bfloat16(tmp_path):
    config = load_case("v3-odd").config
    params = init_params(config, seed=1, dtype="bfloat16")
    save_hf(tmp_path / "out", config, jax.device_put(params))
    assert_same(load_checkpoint(tmp_path / "out", "bfloat16")[1], params)
    assert SafetensorsFolder(tmp_path / "out").dtype("lm_head.weight") == ml_dtypes.bfloat16


def test_dense_layers_between_moe_layers(tmp_path):
    config = dataclasses.replace(
        load_case("v3-odd").config, num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2
    )
    assert (config.dense_layer_ids, config.moe_layer_ids) == ((0, 1, 3, 5), (2, 4))
    params = init_params(config, seed=3)
    save_hf(tmp_path / "out", config, params)
    source = SafetensorsFolder(tmp_path / "out")
    np.testing.assert_array_equal(source.read("model.layers.3.mlp.down_proj.weight"), params.dense.mlp.w2[2])
    np.testing.assert_array_equal(source.read("model.layers.4.mlp.gate.weight"), params.moe.mlp.router[1])
    assert load_checkpoint(tmp_path / "out")[2] == params_digest(config, params)


def test_peak_memory_is_the_result_and_one_tensor():
    load_checkpoint(FOLDER / "v3-fp8")  # imports and caches are not what is measured
    tracemalloc.start()
    try:
        params = load_checkpoint(FOLDER / "v3-ep320")[1]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    bookkeeping = 3e6  # the headers of 1,600 tensors, as Python objects
    assert peak < num_bytes(params) + params.embed.nbytes + bookkeeping


def test_digest_depends_on_every_value():
    case = load_case("v3-odd")
    router = case.params.moe.mlp.router.copy()
    router[1, 3, 4] = np.nextafter(router[1, 3, 4], np.float32(9))
    moe = case.params.moe
    changed = case.params.replace(moe=moe.replace(mlp=moe.mlp.replace(router=router)))
    assert params_digest(case.config, changed) != case.digest
    assert params_digest(case.config, jax.device_put(case.params)) == case.digest


# The MTP module, tied embeddings, and what is left out


def test_a_declared_mtp_layer_without_tensors_means_no_module(v3_odd, tmp_path, caplog):
    v3_odd.config["num_nextn_predict_layers"] = 1
    config, params, digest = load_checkpoint(v3_odd.write(tmp_path))
    assert (config, params.mtp, digest) == (load_case("v3-odd").config, None, load_case("v3-odd").digest)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "without an MTP module" in caplog.text


@pytest.mark.parametrize("kept", ["enorm.weight", "mlp.experts.7.up_proj.weight"])
def test_some_tensors_of_a_declared_mtp_layer_are_an_error(tmp_path, kept):
    stored, layer = Checkpoint("v3-mtp"), "model.layers.4."
    stored.tensors = {n: t for n, t in stored.tensors.items() if not n.startswith(layer) or n == layer + kept}
    with pytest.raises(UserError, match=r"missing tensors model\.layers\.4\."):
        load_checkpoint(stored.write(tmp_path))


def test_the_mtp_module_may_share_head_and_embedding(tmp_path):
    assert load_case("v3-mtp").params.mtp.head is not None
    stored = Checkpoint("v3-mtp")
    del stored.tensors["model.layers.4.shared_head.head.weight"]
    mtp = load_checkpoint(stored.write(tmp_path))[1].mtp
    assert mtp.head is None
    assert mtp.embed is not None
    assert load_case("v3-tied").params.mtp.embed is None


def test_undeclared_layers_are_left_out_with_a_warning(tmp_path, caplog):
    stored = Checkpoint("v3-mtp")
    stored.config |= {"num_nextn_predict_layers": 0, "num_hidden_layers": 3}
    config, params, _ = load_checkpoint(stored.write(tmp_path))
    assert (config.num_hidden_layers, params.mtp) == (3, None)
    assert "left out layers [3, 4]" in caplog.text


def test_rotary_frequencies_are_left_out_in_silence(v3_odd, tmp_path, caplog):
    v3_odd.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)
    assert load_checkpoint(v3_odd.write(tmp_path))[2] == load_case("v3-odd").digest
    assert not caplog.records


def test_a_tied_head_may_be_stored_too(tmp_path, caplog):
    stored = Checkpoint("v3-tied")
    stored.tensors["lm_head.weight"] = stored.tensors["model.embed_tokens.weight"]
    assert load_checkpoint(stored.write(tmp_path))[2] == load_case("v3-tied").digest
    assert not caplog.records
    other = stored.tensors["lm_head.weight"] + 1
    stored.tensors["lm_head.weight"] = other
    config, params, _ = load_checkpoint(stored.write(tmp_path))
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params.head, other)
    assert "lm_head.weight differs" in caplog.text


# What is wrong with a checkpoint is one clear error


def expect(path: Path, *parts: str) -> None:
    with pytest.raises(UserError, match=".*".join(re.escape(part) for part in parts)) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_not_a_checkpoint(tmp_path):
    expect(tmp_path / "absent", "absent: no such folder")
    (tmp_path / "file").touch()
    expect(tmp_path / "file", "file: not a folder")
    expect(tmp_path, "config.json is missing")
    (tmp_path / "config.json").write_text("{")
    expect(tmp_path, "config.json: not valid JSON")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\xfa")
    expect(tmp_path, "config.json: not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    expect(tmp_path, "config.json: expected a JSON object, found list")
    shutil.copy(FOLDER / "v3-odd" / "config.json", tmp_path)
    expect(tmp_path, "no *.safetensors file")
    (tmp_path / "pytorch_model.bin").touch()
    expect(tmp_path, "no *.safetensors file")


def test_dtype_must_be_a_float():
    for dtype in ("int8", "float8_e4m3fn", "nonsense", None):
        with pytest.raises(UserError, match="is not supported; supported: bfloat16, float16, float32"):
            load_checkpoint(FOLDER / "v3-odd", dtype)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.experts.15.up_proj.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
    ],
)
def test_missing_tensor(v3_odd, tmp_path, name):
    del v3_odd.tensors[name]
    expect(v3_odd.write(tmp_path), "missing tensor " + name)


def test_many_missing_tensors_are_counted(v3_odd, tmp_path):
    v3_odd.config["num_hidden_layers"] = 5
    first = "model.layers.4.input_layernorm.weight, model.layers.4.self_attn.q_a_proj.weight"
    expect(v3_odd.write(tmp_path), f"missing tensors {first}", "and 59 more")


def test_misshapen_tensor(v3_odd, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    v3_odd.tensors[name] = v3_odd.tensors[name].T
    expect(v3_odd.write(tmp_path), f"tensor {name} has shape [45, 40]; the config wants [40, 45]")


def test_integer_weights(v3_odd, tmp_path):
    v3_odd.tensors["model.norm.weight"] = np.ones(40, np.int8)
    expect(v3_odd.write(tmp_path), "tensor model.norm.weight has dtype int8; weights must be floating-point")


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_a_proj.bias", "model.layers.2.mlp.experts.16.up_proj.weight"]
)
def test_unknown_tensor(v3_odd, tmp_path, name):
    v3_odd.tensors[name] = np.zeros(3, np.float32)
    expect(v3_odd.write(tmp_path), "the config does not account for tensor " + name)


def test_truncated_file(v3_odd, tmp_path):
    file = v3_odd.write(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    last = list(v3_odd.tensors)[-1]
    file.write_bytes(whole[:-1])
    expect(tmp_path, f"model.safetensors: tensor {last} ends at byte {len(whole)}, but the file has", "truncated")
    file.write_bytes(whole[:300])
    expect(tmp_path, "the file ends inside its header")
    file.write_bytes(b"")
    expect(tmp_path, "the file ends inside its header")


def test_file_that_shrinks_after_its_header_was_read(v3_odd, tmp_path):
    source = SafetensorsFolder(v3_odd.write(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="the file ends inside tensor"):
        source.read(list(v3_odd.tensors)[-1])
    file.unlink()
    with pytest.raises(UserError, match="cannot read tensor"):
        source.read("model.norm.weight")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "the header is not valid JSON"),
        (b"[1, 2]", "the header is not a JSON object"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "the header's entry for tensor x is malformed"),
        ({"x": [1]}, "the header's entry for tensor x is malformed"),
        ({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}, "tensor x has dtype 'F4'; supported: F64, F32"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "tensor x: F32 of shape [3] does not take"),
        ({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, "tensor x: F32 of shape [-2] does not take"),
        ({"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}, "tensor x: F32 of shape ['2'] does not take"),
    ],
)
def test_bad_header(v3_odd, tmp_path, header, message):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = v3_odd.write(tmp_path) / "model.safetensors"
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(8))
    expect(tmp_path, "model.safetensors: ", message)


def test_bad_index(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(FOLDER / "v3-bf16-shards", folder)
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "aside")
    expect(folder, "model-00002-of-00002.safetensors: this file is missing; " + INDEX)
    (tmp_path / "aside").rename(folder / "model-00002-of-00002.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["model.embed_tokens.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    expect(folder, "model-00001-of-00002.safetensors: tensor model.", "is missing; " + INDEX)
    (folder / INDEX).write_text('{"weight_map": [1]}')
    expect(folder, INDEX + ": weight_map must be an object")
    (folder / INDEX).write_text("nothing")
    expect(folder, INDEX + ": not valid JSON")


def test_a_tensor_in_two_files(v3_odd, tmp_path):
    write_safetensors(v3_odd.write(tmp_path) / "second.safetensors", {"model.norm.weight": np.ones(40, np.float32)})
    expect(tmp_path, "second.safetensors: tensor model.norm.weight is also in model.safetensors")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq' is not supported; supported: fp8"),
        ("fp4", "quant_method 'fp4' is not supported"),
        ({"quant_method": "fp8"}, "weight_block_size must be [rows, columns], got None"),
        ({"quant_method": "fp8", "weight_block_size": [24]}, "weight_block_size must be [rows, columns], got [24]"),
        (
            {"quant_method": "fp8", "weight_block_size": [24, 0]},
            "weight_block_size must be [rows, columns], got [24, 0]",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [24, 16]},
            "_scale_inv has shape [2, 2]; [32, 64] in blocks of [24, 16] wants [2, 4]",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [24, 40], "fmt": "e5m2"},
            "fmt 'e5m2' is not supported; supported: 'e4m3'",
        ),
        (None, "has dtype float8_e4m3fn; weights must be floating-point here: config.json has no quantization_config"),
    ],
)
def test_bad_fp8_config(tmp_path, quantization, message):
    stored = Checkpoint("v3-fp8")
    stored.config["quantization_config"] = quantization
    expect(stored.write(tmp_path), message)


def test_bad_fp8_tensors(tmp_path):
    stored, name = Checkpoint("v3-fp8"), "model.layers.0.mlp.up_proj.weight"
    good, scale = stored.tensors[name], stored.tensors[name + "_scale_inv"]
    stored.tensors[name] = good.astype(np.float32)
    expect(stored.write(tmp_path), f"tensor {name} has dtype float32, but must be float8_e4m3fn: quantization_config")
    stored.tensors |= {name: good, name + "_scale_inv": scale.T}
    expect(stored.write(tmp_path), f"tensor {name}_scale_inv has shape [2, 6]", "wants [6, 2]")
    stored.tensors[name + "_scale_inv"] = scale.astype(np.int32)
    expect(stored.write(tmp_path), f"tensor {name}_scale_inv has dtype int32")
    for bad in (np.nan, np.inf):
        stored.tensors[name + "_scale_inv"] = np.where(np.arange(6)[:, None] == 2, bad, scale).astype(np.float32)
        expect(stored.write(tmp_path), f"tensor {name}_scale_inv holds NaN or infinity")
    del stored.tensors[name + "_scale_inv"]
    expect(stored.write(tmp_path), f"tensor {name} is float8_e4m3fn, but its {name}_scale_inv is missing")
    stored.tensors[name + "_scale_inv"] = scale
    stored.tensors[name] = good.copy()
    stored.tensors[name].flat[5] = np.nan
    expect(stored.write(tmp_path), f"tensor {name} holds NaN or infinity")
    stored.tensors[name] = good
    stored.tensors["model.layers.9.x_scale_inv"] = scale
    stored.tensors["odd_scale_inv"] = scale
    expect(stored.write(tmp_path), "the config does not account for tensor odd_scale_inv")


def test_slots_cover_the_tree_once():
    case = load_case("v3-mtp")
    marked = jax.tree.map(np.zeros_like, case.params)
    for _, view in tensor_slots(case.config, marked):
        view += 1
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(marked))
