"""Generated folders of mixed formats against a plain dequantization: the same values, or an error naming the tensor."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.checkpoint import SafetensorsFolder, load_checkpoint, save_hf, write_safetensors
from cmjax.checkpoint.weights import tensor_slots
from cmjax.errors import UserError
from cmjax.model import Params
from cmjax.quant import QuantArray
from tests.helpers import tiny_model

BLOCK = (7, 10)
LINEAR = re.compile(r"\.(\w+_proj|kv_a_proj_with_mqa)\.weight$")
# Linear layers or not, as one likes: read in the form that they have.
OPEN = re.compile(r"(^lm_head|\.eh_proj|\.shared_head\.head|\.mlp\.gate)\.weight$")

INT8_TARGETS = [
    [["Linear"]],
    [["re:.*_proj$", "re:.*_with_mqa$"]],
    [["re:.*self_attn.*"], ["re:.*mlp\\..*(up|gate|down)_proj"]],
    [["model.layers.1.self_attn.o_proj", "model.layers.3.eh_proj", "lm_head"]],
    [["model.embed_tokens"], ["Linear"]],
]
INT8_IGNORE = [
    "lm_head",
    "model.layers.0.mlp.up_proj",
    "model.layers.3.eh_proj",
    "re:.*layers\\.1\\.",
    "re:.*(q_a|kv_b)_proj$",
]
INT8_IGNORE += [
    "re:model\\.layers\\.3",
    "re:.*\\.experts\\.\\d\\.down_proj",
    "re:.*mlp.gate$",
    "re:layers",
    "model.layers.9.x",
]
INT8_IGNORE += ["model.layers.0.self_attn", "o_proj", "experts.1"]  # parts of paths, which name nothing here
FP8_SKIPPED = [
    "lm_head",
    "model.layers.0.mlp.up_proj",
    "model.layers.3",
    "kv_b_proj",
    "model.layers.1.mlp.experts",
    "gate",
]
FP8_SKIPPED += [
    "experts.1",
    "self_attn.o_proj",
    ".*down_proj",
    "re:.*q_[ab]_proj",
    "layers.9",
    "proj",
    "model.layers.[12]",
]


def is_ignored(module: str, entries: list[str]) -> bool:
    """As compressed-tensors has it."""
    return any(re.match(e[3:], module) if e.startswith("re:") else e == module for e in entries)


def is_skipped(module: str, entries: list[str]) -> bool:
    """As the FP8 configs have it: whole components, or a pattern for a path or a parent of it."""
    parts = module.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        re.match(e[3:], module)
        if e.startswith("re:")
        else f".{e}." in f".{module}." or any(re.fullmatch(e, path) for path in paths)
        for e in entries
    )


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """Config and tensors of a model with dense layers, experts and an MTP module, and where to write others."""
    base = tmp_path_factory.mktemp("declared")
    model = tiny_model(num_nextn_predict_layers=1, n_routed_experts=12, first_k_dense_replace=1)
    save_hf(base / "floats", model.config, model.params)
    source = SafetensorsFolder(base / "floats")
    config = json.loads((base / "floats" / "config.json").read_text())
    (base / "out").mkdir()
    return base / "out", config, {name: source.read(name) for name in source.names()}


class Mixed:
    """A folder being made: its tensors, and the float32 values that they stand for."""

    def __init__(self, tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        self.tensors, self.rng = dict(tensors), rng
        self.values = dict(tensors)
        self.quantized: list[str] = []
        for name, values in tensors.items():
            if rng.random() < 0.3:
                self.tensors[name] = values.astype(rng.choice(["float16", "float64"]))
            elif rng.random() < 0.3:
                self.tensors[name] = values.astype(ml_dtypes.bfloat16)
            self.values[name] = self.tensors[name].astype(np.float32)

    def store_int8(self, name: str) -> None:
        rows, columns = self.values[name].shape
        qvalue = self.rng.integers(-128, 128, (rows, columns), dtype=np.int8)
        scale = self.rng.uniform(0, 0.01, (rows, 1)).astype(self.rng.choice(["float32", "float16"]))
        self.tensors |= {name: qvalue, name + "_scale": scale if self.rng.random() < 0.5 else scale[:, 0]}
        if self.rng.random() < 0.3:
            self.tensors[name + "_zero_point"] = np.zeros((rows, 1), np.int8)
        self.values[name] = qvalue.astype(np.float32) * scale.astype(np.float32)
        self.quantized.append(name)

    def store_fp8(self, name: str) -> None:
        shape = self.values[name].shape
        stored = self.rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
        blocks = [-(-size // block) for size, block in zip(shape, BLOCK, strict=True)]
        scale = self.rng.uniform(0.001, 0.1, blocks).astype(np.float32)
        if self.rng.random() < 0.3:
            scale = scale.astype(ml_dtypes.float8_e8m0fnu)
        whole = np.kron(scale.astype(np.float32), np.ones(BLOCK, np.float32))[: shape[0], : shape[1]]
        self.tensors |= {name: stored, name + "_scale_inv": scale}
        self.values[name] = stored.astype(np.float32) * whole
        self.quantized.append(name)


def matrices(tensors: dict[str, np.ndarray]) -> list[str]:
    return [name for name, values in tensors.items() if values.ndim == 2]


def make_int8(mixed: Mixed, groups: list[list[str]], ignore: list[str]) -> tuple[dict, set[str]]:
    """The `quantization_config`, and the names that must be as they are now."""
    certain = set()
    targets = [target for group in groups for target in group]
    for name in matrices(mixed.values):
        module = name.removesuffix(".weight")
        is_named, is_linear = is_ignored(module, targets), LINEAR.search(name) or OPEN.search(name)
        chosen = (is_named or ("Linear" in targets and is_linear)) and not is_ignored(module, ignore)
        is_open = chosen and not is_named and OPEN.search(name)
        if chosen and not (is_open and mixed.rng.random() < 0.5):
            mixed.store_int8(name)
        if not is_open:
            certain.add(name)
    activations = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True, "type": "int"}
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "int"}
    parts = {"weights": weights, "input_activations": activations, "format": None}
    config = {f"group_{i}": {"targets": group} | parts for i, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": None, "config_groups": config, "ignore": ignore}, certain


def make_fp8(mixed: Mixed, skipped: list[str], field: str) -> tuple[dict, set[str]]:
    certain = set()
    for name in matrices(mixed.values):
        module = name.removesuffix(".weight")
        is_linear, is_open = LINEAR.search(name), OPEN.search(name)
        chosen = (is_linear or is_open) and not is_skipped(module, skipped)
        if chosen and not (is_open and mixed.rng.random() < 0.5):
            mixed.store_fp8(name)
        if not (chosen and is_open):
            certain.add(name)
    return {"quant_method": "fp8", "weight_block_size": list(BLOCK), field: skipped or None}, certain


@st.composite
def folders(draw):
    """(format, targets or the field's name, entries, seed)."""
    kind = draw(st.sampled_from(["float", "int8", "fp8"]))
    groups = draw(st.sampled_from(INT8_TARGETS))
    field = draw(st.sampled_from(["modules_to_not_convert", "ignored_layers"]))
    entries = draw(st.lists(st.sampled_from(FP8_SKIPPED if kind == "fp8" else INT8_IGNORE), max_size=4, unique=True))
    return kind, groups if kind == "int8" else field, entries, draw(st.integers(0, 2**32 - 1))


def make(floats, folder) -> tuple[Mixed, dict, set[str]]:
    (_, config, tensors), (kind, how, entries, seed) = floats, folder
    mixed = Mixed(tensors, np.random.default_rng(seed))
    if kind == "float":
        return mixed, config, set(matrices(tensors))
    quantization, certain = make_int8(mixed, how, entries) if kind == "int8" else make_fp8(mixed, entries, how)
    return mixed, config | {"quantization_config": quantization}, certain


def load(floats, mixed: Mixed, config: dict, quant: str | None = None):
    path = floats[0]
    (path / "config.json").write_text(json.dumps(config))
    write_safetensors(path / "model.safetensors", mixed.tensors)
    return load_checkpoint(path, quant=quant)[:2]


def assert_values(config, params: Params, mixed: Mixed) -> None:
    found = dict(tensor_slots(config, params))
    assert found.keys() == mixed.values.keys()
    for name, view in found.items():
        if isinstance(view, QuantArray):
            assert name in mixed.quantized, name
            np.testing.assert_array_equal(view.qvalue, mixed.tensors[name], err_msg=name)
            view = view.qvalue.astype(np.float32) * view.scale[:, None]
        np.testing.assert_array_equal(view, mixed.values[name], err_msg=name)


@settings(max_examples=60)
@given(folder=folders())
def test_each_matrix_is_what_is_stored(floats, folder):
    mixed, config, _ = make(floats, folder)
    model, params = load(floats, mixed, config)
    assert_values(model, params, mixed)
    slots = dict(tensor_slots(model, params))
    if folder[0] == "int8" and folder[1] == [["Linear"]] and not folder[2]:
        # Nothing is ignored, so what is computed in int8 is all that may be; the MTP module's projection is as stored.
        for name in filter(LINEAR.search, slots):
            if not name.endswith(("kv_b_proj.weight", "eh_proj.weight")):
                assert isinstance(slots[name], QuantArray), name
    model, params = load(floats, mixed, config, "none")
    assert not any(isinstance(view, QuantArray) for _, view in tensor_slots(model, params))
    assert_values(model, params, mixed)


def not_finite(mixed: Mixed, certain: set[str]) -> str:
    """In any tensor of floats: weights, scales, norms, biases, embeddings."""
    names = [n for n, values in mixed.tensors.items() if values.dtype.kind != "i"]
    name = str(mixed.rng.choice(names))
    values = mixed.tensors[name].copy()
    bad = np.nan if values.dtype.itemsize == 1 else mixed.rng.choice([np.nan, np.inf, -np.inf])
    values.flat[mixed.rng.integers(values.size)] = bad
    mixed.tensors[name] = values
    return name


def no_scale(mixed: Mixed, certain: set[str]) -> str | None:
    if not mixed.quantized:
        return None
    name = str(mixed.rng.choice(mixed.quantized))
    del mixed.tensors[next(name + end for end in ("_scale", "_scale_inv") if name + end in mixed.tensors)]
    return name


def no_matrix(mixed: Mixed, certain: set[str]) -> str | None:
    if not mixed.quantized:
        return None
    name = str(mixed.rng.choice(mixed.quantized))
    del mixed.tensors[name]
    return name


def stray_scale(mixed: Mixed, certain: set[str]) -> str:
    name = str(mixed.rng.choice([n for n in mixed.values if n not in mixed.quantized]))
    name += str(mixed.rng.choice(["_scale", "_scale_inv", "_zero_point"]))
    mixed.tensors[name] = np.ones((3, 1), np.float32)
    return name


def floats_for_quantized(mixed: Mixed, certain: set[str]) -> str | None:
    names = sorted(certain & set(mixed.quantized))
    if not names:
        return None
    name = str(mixed.rng.choice(names))
    mixed.tensors[name] = mixed.values[name]
    for end in ("_scale", "_scale_inv", "_zero_point"):
        if mixed.rng.random() < 0.5:
            mixed.tensors.pop(name + end, None)
    return name


def integers_for_floats(mixed: Mixed, certain: set[str]) -> str:
    name = str(mixed.rng.choice([n for n in mixed.values if n not in mixed.quantized]))
    mixed.tensors[name] = np.ones(
        mixed.values[name].shape, mixed.rng.choice(["int8", "uint8", "int32", "int64", "bool"])
    )
    return name


def raw_fp8(mixed: Mixed, certain: set[str]) -> str:
    """Floats of 8 bits, without a scale, wherever they lie."""
    name = str(mixed.rng.choice(list(mixed.values)))
    kind = ml_dtypes.float8_e4m3fn if mixed.rng.random() < 0.5 else ml_dtypes.float8_e5m2
    mixed.tensors[name] = mixed.values[name].astype(kind)
    for end in ("_scale", "_scale_inv", "_zero_point"):
        mixed.tensors.pop(name + end, None)
    return name


def quantized_for_floats(mixed: Mixed, certain: set[str]) -> str | None:
    """Whole, with its scale, but the config says otherwise."""
    names = sorted(certain - set(mixed.quantized))
    if not names:
        return None
    name = str(mixed.rng.choice(names))
    (mixed.store_int8 if mixed.rng.random() < 0.5 else mixed.store_fp8)(name)
    return name


def some_zero_point(mixed: Mixed, certain: set[str]) -> str | None:
    names = [name for name in mixed.quantized if mixed.tensors[name].dtype == np.int8]
    if not names:
        return None
    name = f"{mixed.rng.choice(names)}_zero_point"
    mixed.tensors[name] = np.zeros((len(mixed.values[name.removesuffix("_zero_point")]), 1), np.int8)
    mixed.tensors[name][-1] = -3
    return name


DAMAGES = [not_finite, no_scale, no_matrix, stray_scale, floats_for_quantized, integers_for_floats, raw_fp8]
DAMAGES += [quantized_for_floats, some_zero_point]


@settings(max_examples=25)
@given(folder=folders())
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_declared_is_named(floats, damage, folder):
    mixed, config, certain = make(floats, folder)
    name = damage(mixed, certain)
    if name is None:  # nothing in this folder that could be damaged so
        return
    with pytest.raises(UserError) as caught:
        load(floats, mixed, config, None if folder[3] % 2 else "none")
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(rf"tensors? {re.escape(name)}", message), message
