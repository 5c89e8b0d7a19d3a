"""Int8 checkpoints: folders as other tools write them, one clear error for every way they may be wrong, and back."""

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import cmjax
from cmjax.checkpoint import SafetensorsFolder, load_checkpoint, restore, save, save_hf
from cmjax.errors import UserError
from cmjax.model import convert_params, named_leaves, params_digest, quant_mode
from cmjax.model.params import QUANTIZED
from cmjax.quant import QUANT_MODES, QuantArray, dequantize_host, linear
from tests.parity import FOLDER, Checkpoint, load_case

IDS = np.random.default_rng(7).integers(0, 97, (4, 12))
NAME = "model.layers.2.mlp.experts.3.down_proj.weight"
SCALE = NAME + "_scale"
CASE = load_case("v3-odd")
# What llm-compressor 0.6 writes for its W8A8 scheme.
QUANTIZATION = {
    "config_groups": {
        "group_0": {
            "input_activations": {
                "actorder": None,
                "block_structure": None,
                "dynamic": True,
                "group_size": None,
                "num_bits": 8,
                "observer": None,
                "observer_kwargs": {},
                "strategy": "token",
                "symmetric": True,
                "type": "int",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "channel",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "int-quantized",
    "global_compression_ratio": 1.24,
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
}


class Folder(Checkpoint):
    """One that can be quantized, and made floats again."""

    def quantize(self, scale_dtype="bfloat16", *, is_flat=False) -> "Folder":
        """Every Linear but the head and the gates, in the manner of compressed-tensors: -128 to 127, by the nearest."""
        self.config["quantization_config"] = json.loads(json.dumps(QUANTIZATION))
        for name, values in list(self.tensors.items()):
            if name.endswith(("_proj.weight", "_with_mqa.weight")):
                values = values.astype(np.float32)
                largest = np.abs(values).max(1, keepdims=True)
                scale = np.where(largest > 0, largest / 127.5, 1e-8).astype(scale_dtype)
                steps = np.rint(values / scale.astype(np.float32))
                self.tensors[name] = np.clip(steps, -128, 127).astype(np.int8)
                self.tensors[name + "_scale"] = scale[:, 0] if is_flat else scale
        return self

    def dequantize(self) -> "Folder":
        """The same values as float32, in a folder that says nothing of quantization."""
        del self.config["quantization_config"]
        for name in [name for name in self.tensors if name.endswith("_scale")]:
            scale = self.tensors.pop(name).astype(np.float32).reshape(-1, 1)
            self.tensors[name.removesuffix("_scale")] = self.tensors[name.removesuffix("_scale")] * scale
        return self


@pytest.fixture
def folder() -> Folder:
    return Folder("v3-odd").quantize()


def distance(found, wanted):
    """Norm of the difference over that of `wanted`, at the typical position: routers may choose otherwise at some."""
    difference = np.linalg.norm(np.asarray(found) - wanted, axis=-1)
    return np.median(difference / np.linalg.norm(wanted, axis=-1))


# What a folder of another tool becomes


@pytest.mark.parametrize(
    ("scale_dtype", "is_flat"), [("bfloat16", False), ("float32", False), ("float32", True), ("float16", True)]
)
def test_a_folder_of_another_tool(tmp_path, scale_dtype, is_flat):
    folder = Folder("v3-odd").quantize(scale_dtype, is_flat=is_flat)
    assert folder.tensors[SCALE].shape == ((40,) if is_flat else (40, 1))
    assert min(values.min() for values in folder.tensors.values() if values.dtype == np.int8) == -128
    model = cmjax.load(folder.write(tmp_path / "int8"))
    assert model.quant == "int8"
    experts, attn = model.params.moe.mlp.experts, model.params.moe.attn
    np.testing.assert_array_equal(experts.w2[0, 3].qvalue, folder.tensors[NAME])
    np.testing.assert_array_equal(experts.w2[0, 3].scale, folder.tensors[SCALE].astype(np.float32).reshape(-1))
    # Three shared experts are one MLP, its gate's rows first.
    up = "model.layers.3.mlp.shared_experts.up_proj.weight"
    np.testing.assert_array_equal(model.params.moe.mlp.shared.w13[1, 39:].qvalue, folder.tensors[up])
    q_b, scale = (folder.tensors["model.layers.3.self_attn.q_b_proj.weight" + suffix] for suffix in ("", "_scale"))
    np.testing.assert_array_equal(attn.q_b[1].qvalue.reshape(q_b.shape), q_b)
    np.testing.assert_array_equal(attn.q_b[1].scale.reshape(-1), scale.astype(np.float32).reshape(-1))
    np.testing.assert_array_equal(model.params.head, folder.tensors["lm_head.weight"])

    floats = cmjax.load(folder.dequantize().write(tmp_path / "float"))
    # kv_b is a float here, whatever it is there.
    np.testing.assert_array_equal(attn.kv_b, floats.params.moe.attn.kv_b)
    assert cmjax.load(tmp_path / "int8", quant="none").digest == floats.digest
    assert not np.array_equal(attn.kv_b, load_case("v3-odd").params.moe.attn.kv_b)
    logits = {mode: cmjax.load(tmp_path / "int8", quant=mode).logits(IDS) for mode in ("none", *QUANT_MODES)}
    wanted = np.asarray(floats.logits(IDS))
    np.testing.assert_array_equal(logits["none"], wanted)
    assert 1e-3 < distance(logits["int8"], wanted) < 0.1
    assert np.median(np.abs(logits["fake"] - logits["int8"])) < 1e-5 * wanted.std()


def test_every_case_loads_as_its_dequantized_weights(tmp_path):
    """An MTP module among them, and queries without a rank."""
    for name in ("v3-mtp", "v2-lite"):
        folder = Folder(name).quantize()
        path = folder.write(tmp_path / name)
        config, params, _ = load_checkpoint(path)
        _, floats, digest = load_checkpoint(folder.dequantize().write(tmp_path / f"{name}-float"))
        assert load_checkpoint(path, quant="none")[2] == digest
        found = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
        for leaf, wanted in zip(found, jax.tree.leaves(floats), strict=True):
            values = dequantize_host(leaf, np.float32) if isinstance(leaf, QuantArray) else leaf
            np.testing.assert_array_equal(values, wanted)
        assert config.num_mtp_layers == (name == "v3-mtp")


def test_only_some_matrices_in_int8(folder, tmp_path, caplog):
    """Those that the config ignores stay the floats that they are."""
    original = Folder("v3-odd").tensors
    for name in [name for name in folder.tensors if name.endswith("_scale") and "self_attn" in name]:
        del folder.tensors[name]
        folder.tensors[name.removesuffix("_scale")] = original[name.removesuffix("_scale")]
    first = "model.layers.0.self_attn.q_a_proj"
    message = f"tensor {first}.weight has dtype float32, but must be int8: the targets of quantization_config"
    expect(folder.write(tmp_path), message)
    folder.config["quantization_config"]["ignore"].append("re:.*self_attn")
    _, params, _ = load_checkpoint(folder.write(tmp_path))
    np.testing.assert_array_equal(params.moe.mlp.experts.w2[0, 3].qvalue, folder.tensors[NAME])
    for stack, wanted in ((params.dense, CASE.params.dense), (params.moe, CASE.params.moe)):
        jax.tree.map(np.testing.assert_array_equal, stack.attn, wanted.attn)
    assert not caplog.records


def test_a_stack_that_is_int8_in_part_is_floats(folder, tmp_path, caplog):
    """One expert of all: its values are the stored ones, and so are the others'."""
    folder.config["quantization_config"]["ignore"].append(NAME.removesuffix(".weight"))
    folder.tensors[NAME] = Folder("v3-odd").tensors[NAME]
    del folder.tensors[SCALE]
    _, params, _ = load_checkpoint(folder.write(tmp_path))
    w2, other = params.moe.mlp.experts.w2, NAME.replace("experts.3", "experts.4")
    np.testing.assert_array_equal(w2[0, 3], CASE.params.moe.mlp.experts.w2[0, 3])
    scale = folder.tensors[other + "_scale"].astype(np.float32)
    np.testing.assert_array_equal(w2[0, 4], folder.tensors[other].astype(np.float32) * scale)
    assert isinstance(params.moe.mlp.experts.w13, QuantArray)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "moe.mlp.experts.w2 is stored partly in int8" in caplog.text


def test_settings_that_are_left_out_are_the_supported_ones(folder, tmp_path):
    digest = load_checkpoint(folder.write(tmp_path))[2]
    activations = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True, "type": "int"}
    weights = {"num_bits": 8, "strategy": "channel", "type": None, "symmetric": None, "dynamic": None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    stated = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": None}
    for kinds in ({}, {"format": None}, {"format": "mixed-precision"}):
        groups["group_0"]["format"] = "int-quantized" if kinds.get("format") else None
        folder.config["quantization_config"] = stated | kinds
        assert load_checkpoint(folder.write(tmp_path))[2] == digest
    del weights["strategy"]
    weights["group_size"] = -1
    assert load_checkpoint(folder.write(tmp_path))[2] == digest


# What is wrong is one clear error


def expect(path: Path, *messages: str, **options: str) -> None:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, **options)
    assert "\n" not in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scale: None, f"tensor {NAME} is int8, but its {SCALE} is missing"),
        (
            lambda scale: scale[:-1],
            f"tensor {SCALE} is bfloat16[39, 1]; a scale a channel wants floats of shape [40, 1]",
        ),
        (lambda scale: scale.T, f"tensor {SCALE} is bfloat16[1, 40]"),
        (lambda scale: scale[0], f"tensor {SCALE} is bfloat16[1]"),
        (lambda scale: np.repeat(scale, 13, axis=1), f"tensor {SCALE} is bfloat16[40, 13]"),
        (lambda scale: np.ones(scale.shape, np.int32), f"tensor {SCALE} is int32[40, 1]"),
        (lambda scale: scale * np.nan, f"tensor {SCALE} holds NaN or infinity"),
        (lambda scale: scale / 0, f"tensor {SCALE} holds NaN or infinity"),
        (lambda scale: -scale, f"tensor {SCALE} holds negative scales"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_scales(folder, tmp_path, change, message):
    changed = change(folder.tensors.pop(SCALE))
    if changed is not None:
        folder.tensors[SCALE] = changed.astype(changed.dtype)
    expect(folder.write(tmp_path), message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((40, 13), np.float32), f"tensor {NAME} has dtype float32, but must be int8: the targets"),
        (
            np.ones((40, 13), ml_dtypes.float8_e4m3fn),
            f"tensor {NAME} has dtype float8_e4m3fn, but must be int8: the targets",
        ),
        (np.ones((40, 13), np.uint8), f"tensor {NAME} has dtype uint8, but must be int8: the targets"),
        (np.ones((40, 12), np.int8), f"tensor {NAME} has shape [40, 12]; the config wants [40, 13]"),
    ],
)
def test_bad_weights(folder, tmp_path, values, message):
    folder.tensors[NAME] = values
    expect(folder.write(tmp_path), message)


def test_int8_is_only_for_matrices(folder, tmp_path):
    name = "model.layers.2.input_layernorm.weight"
    folder.tensors |= {name: np.ones(40, np.int8), name + "_scale": np.ones((40, 1), np.float32)}
    expect(folder.write(tmp_path), f"tensor {name} has dtype int8; weights must be floating-point here: only matrices")


def test_zero_points(folder, tmp_path):
    digest = load_checkpoint(folder.write(tmp_path))[2]
    for shape in ((40, 1), (40,)):
        folder.tensors[NAME + "_zero_point"] = np.zeros(shape, np.int8)
        assert load_checkpoint(folder.write(tmp_path))[2] == digest
    folder.tensors[NAME + "_zero_point"][7] = 1
    expect(folder.write(tmp_path), f"tensor {NAME}_zero_point is not zero: only symmetric quantization is supported")
    del folder.tensors[NAME + "_zero_point"]
    folder.tensors["lm_head.weight_zero_point"] = np.zeros((97, 1), np.int8)
    expect(folder.write(tmp_path), "tensor lm_head.weight_zero_point does not belong to a float32 tensor")


FP8 = {"quant_method": "fp8", "weight_block_size": [24, 40]}


def test_int8_needs_a_config_that_says_so(folder, tmp_path):
    first = "model.layers.0.self_attn.q_a_proj.weight"
    for quantization, message in (
        (None, "has dtype int8; weights must be floating-point here: config.json has no quantization_config"),
        (FP8, "has dtype int8, but must be float8_e4m3fn: quantization_config does not list"),
        (FP8 | {"ignored_layers": ["self_attn"]}, "has dtype int8; weights must be floating-point here"),
    ):
        folder.config["quantization_config"] = quantization
        expect(folder.write(tmp_path), f"tensor {first} {message}")
        expect(tmp_path, f"tensor {first} has dtype int8", quant="int8")


@pytest.mark.parametrize("quantization", [None, FP8 | {"modules_to_not_convert": ["model"]}])
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv", "_zero_point"])
@pytest.mark.parametrize("name", [NAME, "lm_head.weight", "model.layers.2.self_attn.kv_a_layernorm.weight"])
def test_a_scale_that_the_config_does_not_explain_is_not_ignored(tmp_path, quantization, suffix, name):
    folder = Folder("v3-odd")
    folder.config["quantization_config"] = quantization
    folder.tensors[name + suffix] = np.ones((40, 1), np.float32)
    expect(folder.write(tmp_path), f"tensor {name}{suffix} does not belong to a float32 tensor")
    del folder.tensors[name]
    expect(folder.write(tmp_path), f"missing tensor {name}")


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (None, "quant_method", "awq", "quant_method 'awq' is not supported; supported: fp8, compressed-tensors"),
        (None, "format", "pack-quantized", "format 'pack-quantized' is not supported; supported: 'int-quantized'"),
        (None, "format", "float-quantized", "format 'float-quantized' is not supported; supported: 'int-quantized'"),
        (None, "transform_config", {"config_groups": {"R1": {}}}, "transform_config is not supported"),
        (None, "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is not supported"),
        (None, "sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config is not supported"),
        (None, "ignore", "lm_head", "ignore must be a list of module names, got 'lm_head'"),
        (None, "ignore", ["re:("], "ignore: 're:(' is not a valid pattern"),
        (None, "format", "mixed-precision", "group_0.format None is not supported; supported: 'int-quantized'"),
        ("format", None, "pack-quantized", "group_0.format 'pack-quantized' is not supported"),
        ("targets", None, None, "group_0.targets is missing"),
        ("targets", None, [3], "group_0.targets must be a list of module names, got [3]"),
        ("output_activations", None, {"num_bits": 8}, "group_0.output_activations is not supported"),
        ("weights", "strategy", None, "group_0.weights.strategy 'tensor' is not supported; supported: 'channel'"),
        ("input_activations", "dynamic", None, "group_0.input_activations.dynamic False is not supported"),
        (None, "config_groups", {}, "config_groups must be an object of groups"),
        (None, "config_groups", ["W8A8"], "config_groups must be an object of groups"),
        (None, "config_groups", {"group_0": "W8A8"}, "config_groups must be an object of groups"),
        ("weights", None, None, "group_0.weights is missing; supported: int8 weights with activations quantized"),
        ("weights", "num_bits", 4, "group_0.weights.num_bits 4 is not supported; supported: 8"),
        ("weights", "type", "float", "group_0.weights.type 'float' is not supported; supported: 'int'"),
        ("weights", "symmetric", False, "group_0.weights.symmetric False is not supported; supported: True"),
        ("weights", "strategy", "group", "group_0.weights.strategy 'group' is not supported; supported: 'channel'"),
        ("weights", "strategy", "tensor", "group_0.weights.strategy 'tensor' is not supported; supported: 'channel'"),
        ("input_activations", None, None, "group_0.input_activations is missing; supported: int8 weights with"),
        ("input_activations", "num_bits", 4, "group_0.input_activations.num_bits 4 is not supported; supported: 8"),
        ("input_activations", "dynamic", False, "group_0.input_activations.dynamic False is not supported"),
        ("input_activations", "symmetric", False, "group_0.input_activations.symmetric False is not supported"),
        ("input_activations", "strategy", "tensor", "group_0.input_activations.strategy 'tensor' is not supported"),
    ],
)
def test_unsupported_schemes(folder, tmp_path, part, field, value, message):
    quantization = folder.config["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    if field is None:
        group[part] = value
    else:
        (quantization if part is None else group[part])[field] = value
    expect(folder.write(tmp_path), "config: quantization_config.", message)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_cannot_be_rounded(tmp_path, dtype, bad):
    folder = Folder("v3-odd")
    folder.tensors[NAME] = folder.tensors[NAME].astype(dtype)
    folder.tensors[NAME][5, 6] = bad
    path = folder.write(tmp_path / "hf")
    expect(path, f"tensor {NAME} holds NaN or infinity")
    expect(path, f"tensor {NAME} holds NaN or infinity, which cannot be quantized", quant="int8")
    params = jax.tree.map(np.copy, CASE.params)
    params.moe.mlp.experts.w2[0, 3, 5, 6] = bad
    save(tmp_path / "orbax", CASE.config, params)
    for quant in (None, "int8", "none"):
        expect(tmp_path / "orbax", "orbax: moe.mlp.experts.w2 holds NaN or infinity", quant=quant)


# Values


def test_a_channel_of_zeros_stays_zero(tmp_path):
    folder = Folder("v3-odd")
    folder.tensors[NAME][[0, 7]] = 0
    _, params, digest = load_checkpoint(folder.write(tmp_path / "float"), quant="int8")
    expert = params.moe.mlp.experts.w2[0, 3]
    np.testing.assert_array_equal(expert.scale == 0, np.isin(np.arange(40), [0, 7]))
    np.testing.assert_array_equal(expert.qvalue[[0, 7]], 0)
    x = np.random.default_rng(0).normal(size=(5, 13)).astype(np.float32)
    for mode in QUANT_MODES:
        y = np.asarray(linear(x, expert.replace(mode=mode)))
        np.testing.assert_array_equal((y == 0).all(0), expert.scale == 0)
    # Another tool may give such a channel any scale.
    folder.quantize("float32")
    for scale in (1e-8, 0.0):
        folder.tensors[SCALE][[0, 7]] = scale
        theirs = load_checkpoint(folder.write(tmp_path / "int8"))[1].moe.mlp.experts.w2[0, 3]
        np.testing.assert_array_equal((np.asarray(linear(x, theirs)) == 0).all(0), expert.scale == 0)
    config, params, _ = load_checkpoint(tmp_path / "float", quant="int8")
    save_hf(tmp_path / "again", config, params)
    assert load_checkpoint(tmp_path / "again")[2] == digest


# There and back


@pytest.mark.parametrize("name", ["v3-mtp", "v3-tied", "v2-bias", "v2-lite", "v3-dense"])
def test_an_int8_model_comes_back_as_it_was(name, tmp_path):
    config, params, digest = load_checkpoint(FOLDER / name, quant="int8")
    assert digest != load_case(name).digest
    save_hf(tmp_path / "hf", config, params)
    assert save(tmp_path / "orbax", config, params) == digest
    assert restore(tmp_path / "orbax")[2] == digest
    fake = load_checkpoint(FOLDER / name, quant="fake")
    assert save(tmp_path / "fake", *fake[:2]) == fake[2]
    found = load_checkpoint(tmp_path / "fake")
    assert (found[2], quant_mode(found[1])) == (fake[2], "fake")
    assert load_checkpoint(tmp_path / "fake", quant="int8")[2] == digest
    floats = params_digest(config, convert_params(params, None, np.float32))
    for path in (tmp_path / "hf", tmp_path / "orbax"):
        for quant in (None, "int8"):
            found, again, found_digest = load_checkpoint(path, quant=quant)
            assert (found, found_digest, quant_mode(again)) == (config, digest, "int8")
        found, again, found_digest = load_checkpoint(path, quant="fake")
        assert (found, found_digest, quant_mode(again)) == (config, fake[2], "fake")
        assert load_checkpoint(path, quant="none")[2] == floats
    for key, leaf in named_leaves(restore(tmp_path / "orbax")[1]).items():
        np.testing.assert_array_equal(leaf, named_leaves(params)[key], err_msg=key)


def test_what_is_rounded_is_what_is_stored(tmp_path):
    """Whatever the dtype of the rest, from either kind of folder."""
    config, params, _ = load_checkpoint(FOLDER / "v3-odd")
    save(tmp_path / "orbax", config, params)
    digests = {load_checkpoint(path, "bfloat16", "int8")[2] for path in (FOLDER / "v3-odd", tmp_path / "orbax")}
    assert len(digests) == 1


def test_what_another_tool_wrote_comes_back_as_it_was(folder, tmp_path):
    """Their -128 and their scales; kv_b alone becomes a float."""
    config, params, digest = load_checkpoint(folder.write(tmp_path / "theirs"))
    save_hf(tmp_path / "ours", config, params)
    assert load_checkpoint(tmp_path / "ours")[2] == digest
    ours = SafetensorsFolder(tmp_path / "ours")
    for name, values in folder.tensors.items():
        if "kv_b_proj" not in name:
            np.testing.assert_array_equal(ours.read(name), values.astype(ours.dtype(name)), err_msg=name)
    assert {name for name in folder.tensors if "kv_b_proj" not in name} == {
        name for name in ours.names() if "kv_b_proj" not in name
    }


def test_the_config_that_is_written(tmp_path):
    """In the words of compressed-tensors, what is a float listed by module."""
    config, params, _ = load_checkpoint(FOLDER / "v3-mtp", quant="int8")
    save_hf(tmp_path / "hf", config, params)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    group = written["config_groups"]["group_0"]
    theirs = QUANTIZATION["config_groups"]["group_0"]
    assert group["targets"] == theirs["targets"]
    for part in ("weights", "input_activations"):
        fields = ("num_bits", "type", "symmetric", "strategy", "dynamic")
        assert {field: group[part][field] for field in fields} == {field: theirs[part][field] for field in fields}
    for field in ("quant_method", "format", "quantization_status"):
        assert written[field] == QUANTIZATION[field]
    stored = SafetensorsFolder(tmp_path / "hf")
    ignored = set(written["ignore"])
    linears = re.compile(r"(_proj|_with_mqa|gate|head)\.weight$")
    for name in filter(linears.search, stored.names()):
        assert (stored.dtype(name) == np.int8) == (name.removesuffix(".weight") not in ignored), name
    assert {"lm_head", "model.layers.2.mlp.gate", "model.layers.2.self_attn.kv_b_proj"} <= ignored


def test_fp8_becomes_int8_by_its_exact_values():
    case = load_case("v3-fp8")
    _, params, digest = load_checkpoint(case.path, quant="int8")
    wanted = convert_params(case.params, "int8", np.float32)
    assert digest == params_digest(case.config, wanted)
    names = {name.rsplit(".", 2)[-2] for name in named_leaves(params) if name.endswith(".qvalue")}
    assert names == QUANTIZED - {"eh_proj"}
    logits = cmjax.load(case.path, quant="int8").logits(case.input_ids)
    assert 1e-3 < distance(logits, case.logits) < 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_that_of_the_floats(folder, tmp_path, dtype):
    """Values and scales are what is stored, whatever the dtype of the rest."""
    wide = named_leaves(load_checkpoint(folder.write(tmp_path))[1])
    for name, leaf in named_leaves(load_checkpoint(tmp_path, dtype)[1]).items():
        if name.endswith((".qvalue", ".scale")):
            np.testing.assert_array_equal(leaf, wide[name], err_msg=name)
        elif wide[name].ndim > 1 and "norm" not in name and "router" not in name:
            assert leaf.dtype == np.dtype(dtype), name
            np.testing.assert_array_equal(leaf, wide[name].astype(dtype), err_msg=name)
