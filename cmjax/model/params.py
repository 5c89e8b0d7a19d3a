"""The parameter tree of a DeepSeek model: its dataclasses, its shapes before any array, and random values for it.

Layers of one kind are stacked: a leading axis L runs over `config.dense_layer_ids` or `config.moe_layer_ids`. Matrices
keep the checkpoint's orientation, [out, in]. Norms and the router are float32, the rest has the load dtype. The trees
are generic in their leaves (see `Leaf`): `Params[np.ndarray]` as loaded, `Params[jax.ShapeDtypeStruct]` abstract.

Letters in shapes: V vocabulary, H hidden, F / f intermediate size of a dense MLP / of an expert, E routed experts,
n shared experts, heads, nope / rope / v the parts of a head.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Literal, TypeAlias

import flax.struct
import jax
import numpy as np
from numpy.typing import DTypeLike

from cmjax.errors import UserError
from cmjax.model.config import ModelConfig
from cmjax.moe import Leaf, MlpParams
from cmjax.quant import InputMajor, LayerMatrix, Matrix, QuantArray, QuantMode, dequantize_host, matrix_at, quantize

ExpertKind = Literal["routed", "shared"]
MakeLeaf: TypeAlias = Callable[[tuple[int, ...], DTypeLike], Leaf]  # (shape, dtype) -> array


@flax.struct.dataclass
class AttentionParams(Generic[Leaf]):
    """MLA's projections."""

    q_a: Leaf | None  # [L, q_lora, H]; None: queries are projected directly
    q_a_bias: Leaf | None  # [L, q_lora]
    q_a_norm: Leaf | None  # [L, q_lora]
    q_b: Leaf  # [L, heads, nope + rope, q_lora, or H without q_a]
    kv_a: Leaf  # [L, kv_lora + rope, H]
    kv_a_bias: Leaf | None  # [L, kv_lora + rope]
    kv_a_norm: Leaf  # [L, kv_lora]
    kv_b: Leaf  # [L, heads, nope + v, kv_lora]
    o: Leaf  # [L, H, heads * v]
    o_bias: Leaf | None  # [L, H]


@flax.struct.dataclass
class MoeParams(Generic[Leaf]):
    """Router, routed experts and the shared experts, which are one MLP n experts wide."""

    router: Leaf  # [L, E, H] float32
    router_bias: Leaf | None  # [L, E] float32, where topk_method is noaux_tc
    experts: MlpParams[Leaf]  # w13 [L, E, 2f, H], w2 [L, E, H, f]
    shared: MlpParams[Leaf] | None  # w13 [L, 2nf, H], w2 [L, H, nf]


@flax.struct.dataclass
class LayerParams(Generic[Leaf]):
    """Decoder layers of one kind, stacked."""

    input_norm: Leaf  # [L, H]
    attn: AttentionParams[Leaf]
    post_attn_norm: Leaf  # [L, H]
    mlp: MlpParams[Leaf] | MoeParams[Leaf]


@flax.struct.dataclass
class MtpParams(Generic[Leaf]):
    """The multi-token prediction module."""

    enorm: Leaf  # [H], for the embedding
    hnorm: Leaf  # [H], for the hidden state
    eh_proj: Leaf  # [H, 2H]: embedding's columns first
    layer: LayerParams[Leaf]  # L = 1
    norm: Leaf  # [H]
    head: Leaf | None  # [V, H]; None: the model's
    embed: Leaf | None  # [V, H]; None: the model's


@flax.struct.dataclass
class Params(Generic[Leaf]):
    """All weights of a model."""

    embed: Leaf  # [V, H]
    dense: LayerParams[Leaf] | None
    moe: LayerParams[Leaf] | None
    norm: Leaf  # [H]
    head: Leaf | None  # [V, H]; None: tied to embed
    mtp: MtpParams[Leaf] | None


# The fields of `MoeParams` that hold experts. Everything else that tells experts from the rest asks `expert_kind`.
_EXPERT_FIELDS: dict[str, ExpertKind] = {"experts": "routed", "shared": "shared"}


def expert_kind(name: str) -> ExpertKind | None:
    """Which experts the leaf with this name (see `named_leaves`) belongs to; None where it is no expert's."""
    return next((kind for field, kind in _EXPERT_FIELDS.items() if field in name.split(".")), None)


def split_experts(layers: LayerParams) -> tuple[LayerParams, MlpParams | None]:
    """The layers without their routed experts (None takes their place), and those; None where there are none."""
    if not isinstance(layers.mlp, MoeParams):
        return layers, None
    nothing: Any = None
    return dataclasses.replace(layers, mlp=dataclasses.replace(layers.mlp, experts=nothing)), layers.mlp.experts


# What the layers multiply by: `linear` and absorbed attention read a matrix in its stack.
_READ_IN_PLACE = frozenset({"q_a", "q_b", "kv_a", "kv_b", "o", "w13", "w2", "router"})


def layer_at(layers: LayerParams, index: jax.Array) -> LayerParams:
    """One of stacked layers: matrices as `LayerMatrix`, the rest copied out."""

    def take(path: tuple, leaf: Matrix) -> Matrix:
        assert not isinstance(leaf, LayerMatrix)  # a stack
        return LayerMatrix(leaf, index) if path[-1].name in _READ_IN_PLACE else matrix_at(leaf, index)

    return jax.tree_util.tree_map_with_path(
        take, layers, is_leaf=lambda leaf: isinstance(leaf, QuantArray | InputMajor)
    )


# The large products of attention and FFN, which quantization puts in int8 (paper section 4.5). Norms, router, embedding
# and head stay floats, and so does kv_b, which decode absorbs into queries and outputs, where its output channels are
# summed over and could have no scales of their own.
QUANTIZED = frozenset({"q_a", "q_b", "kv_a", "o", "w13", "w2", "eh_proj"})


def is_quantized(name: str) -> bool:
    """Whether the leaf with this name (see `named_leaves`) is one of those that quantization puts in int8."""
    return name.rsplit(".", 1)[-1] in QUANTIZED


def build_params(
    config: ModelConfig,
    dtype: DTypeLike,
    leaf: MakeLeaf[Leaf],
    *,
    mtp_head: bool = True,
    mtp_embed: bool = True,
    quant: QuantMode | None = None,
    quantized: Container[str] | None = None,
) -> Params:
    """The tree for `config`, each leaf made by `leaf(shape, dtype)`.

    `mtp_head` and `mtp_embed` say whether the MTP module has its own head and embedding, which `config` does not know.
    With `quant`, the leaves that `quantized` names (see `named_leaves`) are `QuantArray`s; by default all those that
    `is_quantized` names.
    """
    shapes = _float_params(config, dtype, jax.ShapeDtypeStruct, mtp_head=mtp_head, mtp_embed=mtp_embed)

    def make(path: tuple, like: jax.ShapeDtypeStruct) -> Leaf | QuantArray:
        if quant is not None and _is_chosen(leaf_name(path), quantized):
            qvalue: Any = leaf(like.shape, np.dtype(np.int8))
            scale: Any = leaf(like.shape[:-1], np.dtype(np.float32))
            return QuantArray(qvalue, scale, quant)
        return leaf(like.shape, like.dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


def _float_params(
    config: ModelConfig, dtype: DTypeLike, leaf: MakeLeaf[Leaf], *, mtp_head: bool, mtp_embed: bool
) -> Params[Leaf]:
    dtype = np.dtype(dtype)
    hidden, vocab = config.hidden_size, config.vocab_size
    num_dense, num_moe = len(config.dense_layer_ids), len(config.moe_layer_ids)
    mtp = None
    if config.num_mtp_layers:
        mtp = MtpParams(
            enorm=leaf((hidden,), np.float32),
            hnorm=leaf((hidden,), np.float32),
            eh_proj=leaf((hidden, 2 * hidden), dtype),
            layer=build_layers(config, 1, config.is_moe_layer(config.num_hidden_layers), dtype, leaf),
            norm=leaf((hidden,), np.float32),
            head=leaf((vocab, hidden), dtype) if mtp_head else None,
            embed=leaf((vocab, hidden), dtype) if mtp_embed else None,
        )
    return Params(
        embed=leaf((vocab, hidden), dtype),
        dense=build_layers(config, num_dense, False, dtype, leaf) if num_dense else None,
        moe=build_layers(config, num_moe, True, dtype, leaf) if num_moe else None,
        norm=leaf((hidden,), np.float32),
        head=None if config.tie_word_embeddings else leaf((vocab, hidden), dtype),
        mtp=mtp,
    )


def build_layers(
    config: ModelConfig, num: int, sparse: bool, dtype: np.dtype, leaf: MakeLeaf[Leaf]
) -> LayerParams[Leaf]:
    """`num` decoder layers of one kind, each leaf made by `leaf(shape, dtype)`."""
    hidden, experts, width = config.hidden_size, config.num_routed_experts, config.moe_intermediate_size
    shared = config.num_shared_experts * width
    mlp: MlpParams[Leaf] | MoeParams[Leaf]
    if sparse:
        mlp = MoeParams(
            router=leaf((num, experts, hidden), np.float32),
            router_bias=leaf((num, experts), np.float32) if config.topk_method == "noaux_tc" else None,
            experts=_mlp((num, experts), hidden, width, dtype, leaf),
            shared=_mlp((num,), hidden, shared, dtype, leaf) if shared else None,
        )
    else:
        mlp = _mlp((num,), hidden, config.intermediate_size, dtype, leaf)
    return LayerParams(
        input_norm=leaf((num, hidden), np.float32),
        attn=_attention(config, num, dtype, leaf),
        post_attn_norm=leaf((num, hidden), np.float32),
        mlp=mlp,
    )


def _mlp(lead: tuple[int, ...], hidden: int, width: int, dtype: np.dtype, leaf: MakeLeaf[Leaf]) -> MlpParams[Leaf]:
    return MlpParams(w13=leaf((*lead, 2 * width, hidden), dtype), w2=leaf((*lead, hidden, width), dtype))


def _attention(config: ModelConfig, num: int, dtype: np.dtype, leaf: MakeLeaf[Leaf]) -> AttentionParams[Leaf]:
    hidden, heads, rank, bias = (
        config.hidden_size,
        config.num_attention_heads,
        config.q_lora_rank,
        config.attention_bias,
    )
    return AttentionParams(
        q_a=leaf((num, rank, hidden), dtype) if rank else None,
        q_a_bias=leaf((num, rank), dtype) if rank and bias else None,
        q_a_norm=leaf((num, rank), np.float32) if rank else None,
        q_b=leaf((num, heads, config.qk_head_dim, rank or hidden), dtype),
        kv_a=leaf((num, config.latent_width, hidden), dtype),
        kv_a_bias=leaf((num, config.latent_width), dtype) if bias else None,
        kv_a_norm=leaf((num, config.kv_lora_rank), np.float32),
        kv_b=leaf((num, heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank), dtype),
        o=leaf((num, hidden, heads * config.v_head_dim), dtype),
        o_bias=leaf((num, hidden), dtype) if bias else None,
    )


def abstract_params(config: ModelConfig, dtype: DTypeLike = np.float32, **options: Any) -> Params[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters, no memory taken: for tracing, sharding, and memory totals of any size.

    `options`: see `build_params`.
    """
    return build_params(config, dtype, jax.ShapeDtypeStruct, **options)


def quant_mode(params: Params) -> QuantMode | None:
    """How quantized parameters are multiplied; None for floats."""
    modes = {leaf.mode for leaf in jax.tree.leaves(params, is_leaf=_is_quant_array) if _is_quant_array(leaf)}
    return modes.pop() if modes else None


def convert_params(
    params: Params, quant: QuantMode | None, dtype: DTypeLike, quantized: Container[str] | None = None
) -> Params:
    """Host parameters in another format: floats of `dtype` (norms and router stay float32), and the leaves that
    `quantized` names (see `build_params`) in int8 with `quant`.

    Floats are rounded to the nearest; what is in int8 keeps its values. A NaN or an infinity that would be rounded is a
    UserError that names the matrix.
    """
    dtype = np.dtype(dtype)

    def convert(path: tuple, leaf: QuantArray | np.ndarray) -> Matrix:
        name = leaf_name(path)
        if quant is not None and _is_chosen(name, quantized):
            if isinstance(leaf, QuantArray):
                return dataclasses.replace(leaf, mode=quant)
            if not np.isfinite(np.asarray(leaf, np.float32)).all():
                raise UserError(f"{name}: holds NaN or infinite weights, which cannot be quantized")
            return quantize(leaf, quant)
        if isinstance(leaf, QuantArray):
            return dequantize_host(leaf, dtype)
        is_wide = name.endswith("norm") or path[-1].name.startswith("router")
        return leaf if is_wide or leaf.dtype == dtype else np.asarray(leaf).astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, params, is_leaf=_is_quant_array)


def input_major_params(params: Params) -> Params:
    """Host parameters with the float matrices that every rank multiplies by stored as `InputMajor`, a tied head too.

    Experts keep their form, shared ones included: a placement cuts them.
    """

    def convert(path: tuple, leaf: QuantArray | np.ndarray) -> Matrix:
        name = path[-1].name
        if isinstance(leaf, QuantArray) or expert_kind(leaf_name(path)) or name not in QUANTIZED | {"router", "head"}:
            return leaf
        outputs = leaf.reshape(leaf.shape[0], -1, leaf.shape[-1]) if name == "q_b" else leaf
        by_input = np.swapaxes(outputs, -1, -2)
        value = aligned_empty(by_input.shape, by_input.dtype)
        value[...] = by_input
        return InputMajor(value)

    if params.head is None:
        params = dataclasses.replace(params, head=params.embed)
    return jax.tree_util.tree_map_with_path(convert, params, is_leaf=_is_quant_array)


def leaf_name(path: tuple) -> str:
    """The name (see `named_leaves`) of the leaf at a path of `jax.tree_util`."""
    return ".".join(key.name for key in path)


def _is_chosen(name: str, quantized: Container[str] | None) -> bool:
    return is_quantized(name) if quantized is None else name in quantized


def _is_quant_array(leaf: object) -> bool:
    return isinstance(leaf, QuantArray)


def num_params(params: Params) -> int:
    """Number of values in all leaves; a tied or shared matrix counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def num_bytes(params: Params) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Uninitialised array on a 64-byte boundary, so that `jax.device_put` on a CPU shares its buffer."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def init_params(config: ModelConfig, seed: int = 0, dtype: DTypeLike = np.float32) -> Params[np.ndarray]:
    """Random parameters (numpy): norms near 1, matrices scaled by 1/sqrt(in), a router bias that matters.

    Equal seeds give equal values.
    """
    params = build_params(config, dtype, aligned_empty)
    rng = np.random.default_rng(seed)
    for name, leaf in named_leaves(params).items():
        # One layer at a time: the float32 draw of a stacked bfloat16 leaf would be the largest array of all.
        for part in leaf if leaf.ndim > 2 else [leaf]:
            draw = rng.standard_normal(part.shape, dtype=np.float32)
            if name.endswith("norm"):
                part[...] = 1.0 + 0.1 * draw
            elif name.endswith("embed"):
                part[...] = draw
            else:
                part[...] = draw * np.float32(0.1 if name.endswith("bias") else part.shape[-1] ** -0.5)
    return params


def named_leaves(params: Params[Leaf]) -> dict[str, Leaf]:
    """Every leaf by its place in the tree, such as `moe.mlp.experts.w13`, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {leaf_name(path): leaf for path, leaf in leaves}


def params_digest(config: ModelConfig, params: Params) -> str:
    """SHA-256 (hex) of `config` and of every leaf's place, dtype, shape and contents.

    It does not depend on where the values were loaded from, or on which devices they are.
    """
    whole = hashlib.sha256(config.digest.encode())
    if mode := quant_mode(params):
        whole.update(f"quant {mode}".encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, leaf in named_leaves(params).items():
            # Slice by slice, so that the threads share the work of the one large leaf that the experts are.
            values = np.asarray(leaf)
            parts = list(values) if values.ndim > 2 else [values]
            whole.update(f"{name} {values.dtype.name} {values.shape}".encode())
            for digest in pool.map(_bytes_digest, parts):
                whole.update(digest)
    return whole.hexdigest()


def _bytes_digest(values: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8)).digest()
