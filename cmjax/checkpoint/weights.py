"""Parameters from a Hugging Face checkpoint, and back: which tensor goes where, and in which form it may be stored.

`tensor_slots` is the one table of names. Loading checks every name, shape and dtype against it before it reads a byte
of weights, then fills the preallocated tree tensor by tensor, so that the peak of memory is the result and one tensor.
"""

import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Container, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from cmjax.checkpoint import orbax as checkpoint
from cmjax.checkpoint.auto_quant import int8_leaves
from cmjax.checkpoint.formats import (
    Floats,
    Stored,
    StoredFormat,
    TensorSource,
    compressed_config,
    fill,
    is_finite,
    stored_format,
    stored_tensors,
)
from cmjax.checkpoint.safetensors import SafetensorsFolder, write_safetensors
from cmjax.errors import UserError
from cmjax.model import (
    AttentionParams,
    LayerParams,
    MlpParams,
    ModelConfig,
    MoeParams,
    MtpParams,
    Params,
    aligned_empty,
    build_params,
    convert_params,
    is_quantized,
    named_leaves,
    num_params,
    params_digest,
    quant_mode,
)
from cmjax.quant import QuantMode
from cmjax.text import read_json

_log = logging.getLogger(__name__)

_TARGETS = {np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)}
Quant: TypeAlias = QuantMode | Literal["none", "auto"]
Slots = Iterator[tuple[str, Stored]]  # (name in the checkpoint, numpy view of its place)

# Far above any model: an array of more has no size that numpy could hold.
_MOST_PARAMS = 2**50
_MOST_MISSING = 100_000
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SCALE = re.compile(r"_(scale|scale_inv|zero_point)$")
# Rotary frequencies that old exports hold, which follow from the config.
_HARMLESS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def load_checkpoint(
    path: str | Path, dtype: DTypeLike = np.float32, quant: Quant | None = None, rows: int = 1
) -> tuple[ModelConfig, Params, str]:
    """Config, parameters (numpy, 64-byte aligned) and digest of the checkpoint in folder `path`.

    The folder is a Hugging Face one (`config.json` and `*.safetensors`) or one that `save` of `cmjax.model` wrote.
    Norms and the router are float32, everything else has `dtype`: FP8 weights are multiplied by their block scales in
    float32 first. With `quant` "int8" or "fake" the large matrices are int8 (`QuantArray`), rounded to the nearest
    where they are stored as floats; with "none" they are floats, with "auto" (see `int8_leaves`) those are int8 that
    it makes faster at `rows` rows a step; by default they are what is stored: nothing is rounded, and matrices of one
    array that are stored partly in int8 are floats of the same values. The digest is `params_digest`: the same values
    give the same one from either kind of folder. Raises UserError naming the file, the tensor or the field that is
    missing, malformed, not finite, not what the config declares or not supported.
    """
    folder, target = Path(path), _target_dtype(dtype)
    try:
        if not folder.is_dir():
            raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
        is_ours, has_config = checkpoint.is_checkpoint(folder), (folder / "config.json").is_file()
    except OSError as error:
        raise UserError(f"{folder}: cannot read this folder: {error.strerror}") from error
    if not is_ours and not has_config:
        raise UserError(f"{folder}: config.json is missing: not a Hugging Face checkpoint, nor one that cmjax saved")
    if is_ours:
        # As stored: what is rounded is what was saved, whatever the dtype of the rest.
        config, params, digest = checkpoint.restore(folder, dtype=target if quant is None else None)
        _check_finite(params, folder)
        if quant is None:
            return config, params, digest
        mode, quantized = _chosen(quant, config, target, rows)
        params = convert_params(params, mode, target, quantized)
        return config, params, params_digest(config, params)
    hf = read_json(folder / "config.json")
    config = ModelConfig.from_hf(hf)
    stored = stored_format(hf)
    mode, quantized = _chosen(quant, config, target, rows)
    config, params = load_params(
        SafetensorsFolder(folder), config, target, stored, quant=mode if quant else "stored", quantized=quantized
    )
    return config, params, params_digest(config, params)


def _check_finite(params: Params, folder: Path) -> None:
    for name, leaf in named_leaves(params).items():
        if not name.endswith(".qvalue") and not is_finite(leaf):
            raise UserError(f"{folder}: {name} holds NaN or infinity")


def _chosen(
    quant: Quant | None, config: ModelConfig, dtype: np.dtype, rows: int
) -> tuple[QuantMode | None, Container[str] | None]:
    """The mode, and the leaves it is for (None: all that may be)."""
    if quant != "auto":
        return None if quant == "none" else quant, None
    leaves = int8_leaves(config, dtype, rows)
    return ("int8" if leaves else None), leaves


def load_params(
    source: TensorSource,
    config: ModelConfig,
    dtype: DTypeLike = np.float32,
    stored: StoredFormat | None = None,
    *,
    quant: QuantMode | Literal["stored"] | None = None,
    quantized: Container[str] | None = None,
) -> tuple[ModelConfig, Params]:
    """The parameters of `config` from `source`, and `config` as `source` bears it out; formats as in `build_params`.

    With `quant` "stored", those arrays are int8 all of whose matrices are stored so.
    The MTP module is taken out of `config` where `source` has none of its tensors, and tying where it has another head;
    both are logged, as are layers beyond those of `config`, which are left out. Raises UserError, before any memory is
    taken, where a tensor is missing, unknown, misshapen or not in its declared form; and where one is not finite.
    """
    target, stored = _target_dtype(dtype), stored or Floats()
    names = frozenset(source.names())
    mtp = f"model.layers.{config.num_hidden_layers}."
    if config.num_mtp_layers and not any(name.startswith(mtp) for name in names):
        _log.warning("%s: no tensors of the declared MTP layer (%s*): loading without an MTP module", source.where, mtp)
        config = dataclasses.replace(config, num_mtp_layers=0)
    if config.tie_word_embeddings and _has_own_head(source, names):
        _log.warning("%s: tie_word_embeddings is true, but lm_head.weight differs: it is used", source.where)
        config = dataclasses.replace(config, tie_word_embeddings=False)
    options: dict[str, Any] = {
        "mtp_head": mtp + "shared_head.head.weight" in names,
        "mtp_embed": mtp + "embed_tokens.weight" in names,
    }

    if num_params(build_params(config, target, jax.ShapeDtypeStruct, **options)) > _MOST_PARAMS:
        raise UserError(
            f"{source.where}: the config's sizes make more parameters than any model has ({_MOST_PARAMS:,})"
        )
    # The plan has the real tree's views, each leaf over its number: every check comes before the memory is taken.
    numbers = itertools.count()
    plan = build_params(config, target, lambda shape, _: np.broadcast_to(np.int32(next(numbers)), shape), **options)
    # A config that wants far more tensors than there are misses some of them whatever comes after.
    slots = itertools.islice(tensor_slots(config, plan, names), len(names) + _MOST_MISSING)
    expected = {name: (view.shape, view.flat[0]) for name, view in slots if isinstance(view, np.ndarray)}
    _check_names(source, config, names, expected.keys())
    for name, (shape, _) in expected.items():
        _check_shape(source, name, shape)
        stored.check(source, name, shape, names)

    if quant == "stored":
        leaves = {leaf.flat[0]: name for name, leaf in named_leaves(plan).items()}
        is_int8 = {name: stored.is_int8(source, name) for name in expected}
        quantized = _all_int8({name: leaves[number] for name, (_, number) in expected.items()}, is_int8, source.where)
        quant = "int8" if quantized else None
    params = build_params(config, target, aligned_empty, quant=quant, quantized=quantized, **options)
    for name, view in tensor_slots(config, params, names):
        fill(view, stored.read(source, name, names), f"{source.where}: tensor {name}")
    return config, params


def _all_int8(leaf_of: Mapping[str, str], is_int8: Mapping[str, bool], where: str) -> set[str]:
    """The leaves that may be int8 and have only tensors that are."""
    wanted = {leaf for leaf in leaf_of.values() if is_quantized(leaf)}
    floats = {leaf_of[name] for name, stored in is_int8.items() if not stored}
    for leaf in sorted(wanted & floats & {leaf_of[name] for name, stored in is_int8.items() if stored}):
        _log.warning("%s: %s is stored partly in int8, partly as floats: it is computed as floats", where, leaf)
    return wanted - floats


def _target_dtype(dtype: DTypeLike | None) -> np.dtype:
    try:
        target = None if dtype is None else np.dtype(dtype)  # numpy takes None for float64
    except TypeError:
        target = None
    if target is None or target not in _TARGETS:
        raise UserError(f"dtype {dtype!r} is not supported; supported: {', '.join(sorted(t.name for t in _TARGETS))}")
    return target


def _has_own_head(source: TensorSource, names: Container[str]) -> bool:
    """Whether a checkpoint whose config ties the head to the embedding holds another head all the same."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if head not in names or embed not in names or source.shape(head) != source.shape(embed):
        return head in names
    return not np.array_equal(source.read(head), source.read(embed))


def _check_names(source: TensorSource, config: ModelConfig, names: Set[str], expected: Set[str]) -> None:
    missing = [name for name in expected if name not in names]
    if missing:
        raise UserError(f"{source.where}: missing tensor{_listed(missing)}")
    num_layers = config.num_hidden_layers + config.num_mtp_layers
    unknown, beyond = [], set()
    for name in names:
        layer = _LAYER.match(name)
        if name in expected or _SCALE.sub("", name) in expected or _HARMLESS.search(name):
            continue
        if layer and int(layer[1]) >= num_layers:
            beyond.add(int(layer[1]))
        elif not (config.tie_word_embeddings and name == "lm_head.weight"):
            unknown.append(name)
    if unknown:
        raise UserError(f"{source.where}: the config does not account for tensor{_listed(sorted(unknown))}")
    if beyond:
        _log.warning("%s: left out layers %s, beyond the config's %d", source.where, sorted(beyond), num_layers)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ("s " if len(names) > 1 else " ") + ", ".join(names[:3]) + more


def _check_shape(source: TensorSource, name: str, shape: tuple[int, ...]) -> None:
    found = source.shape(name)
    if found != shape:
        raise UserError(f"{source.where}: tensor {name} has shape {list(found)}; the config wants {list(shape)}")


def tensor_slots(config: ModelConfig, params: Params, names: Container[str] = ()) -> Slots:
    """(checkpoint name, view of its place in `params`) of every tensor, layer by layer; views have the stored shape.

    `names` are those of the checkpoint: experts that it keeps stacked (`experts.gate_up_proj`) have one slot a layer.
    """
    yield "model.embed_tokens.weight", params.embed
    seen = {False: 0, True: 0}
    for layer_id in range(config.num_hidden_layers):
        sparse = config.is_moe_layer(layer_id)
        stack = params.moe if sparse else params.dense
        assert stack is not None  # the tree was built for this config
        yield from layer_slots(f"model.layers.{layer_id}.", stack, seen[sparse], names)
        seen[sparse] += 1
    yield "model.norm.weight", params.norm
    if params.head is not None:
        yield "lm_head.weight", params.head
    if params.mtp is not None:
        yield from _mtp_slots(f"model.layers.{config.num_hidden_layers}.", params.mtp, names)


def _mtp_slots(prefix: str, mtp: MtpParams, names: Container[str]) -> Slots:
    yield prefix + "enorm.weight", mtp.enorm
    yield prefix + "hnorm.weight", mtp.hnorm
    yield prefix + "eh_proj.weight", mtp.eh_proj
    if mtp.embed is not None:
        yield prefix + "embed_tokens.weight", mtp.embed
    yield from layer_slots(prefix, mtp.layer, 0, names)
    yield prefix + "shared_head.norm.weight", mtp.norm
    if mtp.head is not None:
        yield prefix + "shared_head.head.weight", mtp.head


def layer_slots(prefix: str, layer: LayerParams, idx: int, names: Container[str]) -> Slots:
    yield prefix + "input_layernorm.weight", layer.input_norm[idx]
    yield from _attention_slots(prefix + "self_attn.", layer.attn, idx)
    yield prefix + "post_attention_layernorm.weight", layer.post_attn_norm[idx]
    if isinstance(layer.mlp, MlpParams):
        yield from _mlp_slots(prefix + "mlp.", layer.mlp.w13[idx], layer.mlp.w2[idx])
    else:
        yield from _moe_slots(prefix + "mlp.", layer.mlp, idx, names)


def _attention_slots(prefix: str, attn: AttentionParams, idx: int) -> Slots:
    direct = attn.q_a is None
    matrices = {
        "q_a_proj.weight": attn.q_a,
        "q_a_proj.bias": attn.q_a_bias,
        "q_a_layernorm.weight": attn.q_a_norm,
        "q_proj.weight" if direct else "q_b_proj.weight": attn.q_b,
        "kv_a_proj_with_mqa.weight": attn.kv_a,
        "kv_a_proj_with_mqa.bias": attn.kv_a_bias,
        "kv_a_layernorm.weight": attn.kv_a_norm,
        "kv_b_proj.weight": attn.kv_b,
        "o_proj.weight": attn.o,
        "o_proj.bias": attn.o_bias,
    }
    for name, stack in matrices.items():
        if stack is not None:
            view = stack[idx]
            # Heads have an axis of their own in the tree, and none in the checkpoint.
            yield prefix + name, view.reshape(-1, view.shape[-1]) if view.ndim == 3 else view


def _moe_slots(prefix: str, moe: MoeParams, idx: int, names: Container[str]) -> Slots:
    yield prefix + "gate.weight", moe.router[idx]
    if moe.router_bias is not None:
        yield prefix + "gate.e_score_correction_bias", moe.router_bias[idx]
    if prefix + "experts.gate_up_proj" in names:
        yield prefix + "experts.gate_up_proj", moe.experts.w13[idx]
        yield prefix + "experts.down_proj", moe.experts.w2[idx]
    else:
        for expert, (w13, w2) in enumerate(zip(moe.experts.w13[idx], moe.experts.w2[idx], strict=True)):
            yield from _mlp_slots(f"{prefix}experts.{expert}.", w13, w2)
    if moe.shared is not None:
        yield from _mlp_slots(prefix + "shared_experts.", moe.shared.w13[idx], moe.shared.w2[idx])


def _mlp_slots(prefix: str, w13: Stored, w2: Stored) -> Slots:
    width = w13.shape[0] // 2
    yield prefix + "gate_proj.weight", w13[:width]
    yield prefix + "up_proj.weight", w13[width:]
    yield prefix + "down_proj.weight", w2


def save_hf(path: str | Path, config: ModelConfig, params: Params) -> None:
    """Write a Hugging Face folder (`config.json` in the published style, `model.safetensors`), whole or not at all.

    Tensors have the dtypes of `params`; quantized ones the `compressed-tensors` layout. Raises UserError where `path`
    already holds something.
    """
    host = jax.tree.map(np.asarray, params)
    tensors: dict[str, np.ndarray] = {}
    for name, view in tensor_slots(config, host):
        tensors |= stored_tensors(name, view)
    hf = config.to_hf() | {"torch_dtype": host.embed.dtype.name}
    if quant_mode(params):
        hf["quantization_config"] = compressed_config(tensors)
    with checkpoint.new_folder(path) as folder:
        write_safetensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
