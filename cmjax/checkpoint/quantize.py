"""One decoder layer into int8: what it computes on calibration tokens, and the techniques of `cmjax.quant.calibrate`.

A layer is handled alone, on the host, so that a checkpoint larger than memory can be quantized layer by layer. Its
matrices fall into groups that read one input; a group's input scale is absorbed where the input is made: in the norm
before it, in the value rows of kv_b before o, in the up rows of an expert before its w2.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.checkpoint.formats import Stored
from cmjax.errors import UserError
from cmjax.model import LATENT_NORM_EPS, AttentionParams, LayerParams, ModelConfig, MoeParams, rms_norm, split_experts
from cmjax.moe import MlpParams, route
from cmjax.quant import QuantArray, dequantize_host
from cmjax.quant.calibrate import (
    blended_gram,
    orthogonal_matrix,
    output_error,
    quantized_rows,
    round_compensated,
    round_to,
    rounded,
    search_clip,
    search_scale,
)
from cmjax.training import attend_whole

Tree = TypeVar("Tree")
FloatLayer: TypeAlias = LayerParams[np.ndarray]  # on the host, without the axis of layers
QuantLayer: TypeAlias = LayerParams[Stored]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Techniques:
    """Which parts of the calibration run (paper section 4.5); each works alone.

    Attributes:
        scales: adaptive scale search (equation 3), absorbed into neighbouring weights.
        rotations: orthogonal transforms of the query latent and of the values of each head, where less is lost then.
        clipping: block-level clipping (equation 4).
        compensation: rounding errors made up for by the weights that are rounded later.
        block_channels: output channels of a block that clips alike.
        least_rows: calibration rows that an expert has of its own before those of its layer are left out of account.
        search_rows: rows of an input that the scale search looks at.
        seed: of rotations and of the choice of rows.
    """

    scales: bool = True
    rotations: bool = True
    clipping: bool = True
    compensation: bool = True
    block_channels: int = 1
    least_rows: int = 256
    search_rows: int = 512
    seed: int = 0


@dataclasses.dataclass
class Trace:
    """What a layer's matrices read on the calibration tokens; float32, `[rows, in]`.

    Attributes:
        attn: q_a (or q_b without it) and kv_a.
        q_b: q_b behind q_a, or None.
        o: o.
        ffn: w13 of every MLP of the layer, and the router.
        topk_idx: `int32[rows, topk]`, the experts of each row, or None.
    """

    attn: np.ndarray
    q_b: np.ndarray | None
    o: np.ndarray
    ffn: np.ndarray
    topk_idx: np.ndarray | None
    topk_weights: np.ndarray | None


def _f32(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


@functools.partial(jax.jit, static_argnames=("config", "batch"))
def _trace(
    layer: LayerParams[jax.Array], x: jax.Array, config: ModelConfig, batch: int
) -> tuple[dict[str, jax.Array | None], jax.Array]:
    """The inputs of a layer's matrices, and the hidden state before its FFN; experts take no part."""
    attn = layer.attn
    normed = rms_norm(x, layer.input_norm, config.rms_norm_eps)
    attended, _ = attend_whole(config, batch, x.shape[0] // batch)(attn, normed, jnp.zeros(0), 0)
    q_in = None
    if attn.q_a is not None and attn.q_a_norm is not None:
        low = normed @ attn.q_a.T + (0 if attn.q_a_bias is None else attn.q_a_bias)
        q_in = rms_norm(low, attn.q_a_norm, LATENT_NORM_EPS)
    x = x + attended @ attn.o.T + (0 if attn.o_bias is None else attn.o_bias)
    ffn = rms_norm(x, layer.post_attn_norm, config.rms_norm_eps)
    found: dict[str, jax.Array | None] = {
        "attn": normed,
        "q_b": q_in,
        "o": attended,
        "ffn": ffn,
        "topk_idx": None,
        "topk_weights": None,
    }
    if isinstance(layer.mlp, MoeParams):
        idx, weights = route(ffn, layer.mlp.router, layer.mlp.router_bias, config.router)
        found |= {"topk_idx": idx, "topk_weights": weights}
    return found, x


def trace_layer(layer: FloatLayer, config: ModelConfig, x: np.ndarray, batch: int) -> tuple[Trace, np.ndarray]:
    """Run attention and router of a float layer on `x[tokens, hidden]`, `batch` sequences of equal length.

    Returns:
        What its matrices read, and the hidden state that its FFN is added to.
    """
    found, middle = _trace(split_experts(layer)[0], jnp.asarray(x), config, batch)
    arrays: dict[str, Any] = {name: None if value is None else np.asarray(value) for name, value in found.items()}
    trace = Trace(**arrays)
    return trace, np.asarray(middle)


def hidden_rows(rows: np.ndarray, w13: np.ndarray) -> np.ndarray:
    """What w2 of a gated MLP reads: `silu(gate) * up`."""
    gate, up = np.split(rows @ w13.T, 2, axis=-1)
    return gate / (1 + np.exp(-np.clip(gate, -80, 80))) * up


# -- rotations --------------------------------------------------------------------------------------------------------


def rotate_queries(attn: AttentionParams[np.ndarray], seed: int) -> AttentionParams[np.ndarray]:
    """Turn the query latent; its norm is taken into q_b first, since a rotation passes only a norm without weights."""
    if attn.q_a is None or attn.q_a_norm is None:
        return attn
    turn = orthogonal_matrix(len(attn.q_a), seed)
    return dataclasses.replace(
        attn,
        q_a=turn.T @ attn.q_a,
        q_a_bias=None if attn.q_a_bias is None else turn.T @ attn.q_a_bias,
        q_a_norm=np.ones_like(attn.q_a_norm),
        q_b=(attn.q_b * attn.q_a_norm) @ turn,
    )


def rotate_values(attn: AttentionParams[np.ndarray], config: ModelConfig, seed: int) -> AttentionParams[np.ndarray]:
    """Turn the values of each head, between kv_b and o."""
    nope, v_dim = config.qk_nope_head_dim, config.v_head_dim
    turn = orthogonal_matrix(v_dim, seed)
    values = np.einsum("vw,hvl->hwl", turn, attn.kv_b[:, nope:])
    o = attn.o.reshape(len(attn.o), -1, v_dim) @ turn
    return dataclasses.replace(
        attn, kv_b=np.concatenate([attn.kv_b[:, :nope], values], axis=1), o=o.reshape(attn.o.shape)
    )


def rotate_layer(
    layer: FloatLayer, config: ModelConfig, x: np.ndarray, batch: int, trace: Trace, techniques: Techniques
) -> tuple[FloatLayer, Trace]:
    """Turn the query latent and each head's values where less is lost then; the function stays the same.

    A rotation spreads a channel that stands out over all. Where small channels meet large weights it would spread those
    instead, hence the comparison. The residual stream is not turned: the MTP module's norm reads it behind the final
    norm's weights.
    """
    seed = techniques.seed
    found = layer.attn
    for site, turned in (
        ("q_b", rotate_queries(layer.attn, seed)),
        ("o", rotate_values(layer.attn, config, seed + 1)),
    ):
        before = getattr(trace, site)
        if before is None:
            continue
        other, _ = trace_layer(dataclasses.replace(layer, attn=_f32(turned)), config, x, batch)
        after = getattr(other, site)
        if _rounding_error(after, getattr(turned, site), techniques) < _rounding_error(
            before, getattr(layer.attn, site), techniques
        ):
            names = ("q_a", "q_a_bias", "q_a_norm", "q_b") if site == "q_b" else ("kv_b", "o")
            found = dataclasses.replace(found, **{name: getattr(turned, name) for name in names})
            trace = dataclasses.replace(trace, **{site: after})
    return dataclasses.replace(layer, attn=_f32(found)), trace


def _some_rows(rows: np.ndarray, techniques: Techniques) -> np.ndarray:
    """As many rows as the searches look at."""
    if len(rows) <= techniques.search_rows:
        return rows
    return rows[np.random.default_rng(techniques.seed).choice(len(rows), techniques.search_rows, replace=False)]


def _rounding_error(rows: np.ndarray, weight: np.ndarray, techniques: Techniques) -> float:
    rows, flat = _some_rows(rows, techniques), weight.reshape(-1, weight.shape[-1])
    return output_error(rows, flat, quantized_rows(rows), rounded(flat))


# -- scales -----------------------------------------------------------------------------------------------------------


def scale_layer(layer: FloatLayer, config: ModelConfig, trace: Trace, techniques: Techniques) -> FloatLayer:
    """Search and absorb a scale for each shared input of a layer, and change `trace` to what is read then."""
    some = functools.partial(_some_rows, techniques=techniques)
    attn = layer.attn
    first_q = "q_b" if attn.q_a is None else "q_a"
    q = getattr(attn, first_q)
    scale = search_scale(some(trace.attn), [q.reshape(-1, q.shape[-1]), attn.kv_a])
    layer = dataclasses.replace(layer, input_norm=layer.input_norm / scale)
    attn = dataclasses.replace(attn, **{first_q: q * scale, "kv_a": attn.kv_a * scale})
    trace.attn = trace.attn / scale
    if trace.q_b is not None:
        scale = search_scale(some(trace.q_b), [attn.q_b.reshape(-1, attn.q_b.shape[-1])])
        attn = dataclasses.replace(attn, q_b=attn.q_b * scale, q_a_norm=attn.q_a_norm / scale)
        trace.q_b = trace.q_b / scale
    scale = search_scale(some(trace.o), [attn.o])
    nope = config.qk_nope_head_dim
    values = attn.kv_b[:, nope:] / scale.reshape(attn.kv_b.shape[0], -1, 1)
    kv_b = np.concatenate([attn.kv_b[:, :nope], values], axis=1)
    attn = dataclasses.replace(attn, o=attn.o * scale, kv_b=kv_b)
    trace.o = trace.o / scale
    layer = dataclasses.replace(layer, attn=attn)
    return _scale_ffn(layer, trace, some)


def _scale_ffn(layer: FloatLayer, trace: Trace, some: Callable[[np.ndarray], np.ndarray]) -> FloatLayer:
    mlp = layer.mlp
    if isinstance(mlp, MlpParams):
        scale = search_scale(some(trace.ffn), [mlp.w13])
        w13 = mlp.w13 * scale
        trace.ffn = trace.ffn / scale
        w13, w2 = _scale_inner(some(trace.ffn), w13, mlp.w2)
        return dataclasses.replace(layer, mlp=MlpParams(w13=w13, w2=w2), post_attn_norm=layer.post_attn_norm / scale)
    assert trace.topk_idx is not None  # a MoE layer has a router
    # All experts read one input: those that more rows reach have more to say.
    counts = np.bincount(trace.topk_idx.reshape(-1), minlength=len(mlp.router))
    consumers, importance = list(mlp.experts.w13), list(counts / len(trace.ffn))
    if mlp.shared is not None:
        consumers.append(mlp.shared.w13)
        importance.append(1.0)
    scale = search_scale(some(trace.ffn), consumers, importance)
    trace.ffn = trace.ffn / scale
    w13s, w2s = [], []
    for expert, (w13, w2) in enumerate(zip(mlp.experts.w13 * scale, mlp.experts.w2, strict=True)):
        rows = trace.ffn[(trace.topk_idx == expert).any(1)]
        w13, w2 = _scale_inner(some(rows if len(rows) else trace.ffn), w13, w2)
        w13s.append(w13)
        w2s.append(w2)
    shared = mlp.shared
    if shared is not None:
        w13, w2 = _scale_inner(some(trace.ffn), shared.w13 * scale, shared.w2)
        shared = MlpParams(w13=w13, w2=w2)
    experts = MlpParams(w13=np.stack(w13s), w2=np.stack(w2s))
    mlp = dataclasses.replace(mlp, router=mlp.router * scale, experts=experts, shared=shared)
    return dataclasses.replace(layer, mlp=mlp, post_attn_norm=layer.post_attn_norm / scale)


def _scale_inner(rows: np.ndarray, w13: np.ndarray, w2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale of what w2 reads goes into the up rows of w13."""
    scale = search_scale(hidden_rows(rows, w13), [w2])
    gate, up = np.split(w13, 2)
    return np.concatenate([gate, up / scale[:, None]]), w2 * scale


# -- rounding ---------------------------------------------------------------------------------------------------------


def round_matrix(weight: np.ndarray, gram: np.ndarray, techniques: Techniques) -> QuantArray:
    """Round one matrix, `[..., in]`, with the techniques that work on it alone."""
    flat = weight.reshape(-1, weight.shape[-1])
    reach = np.abs(flat).max(1)
    if techniques.clipping:
        reach = search_clip(gram, flat, techniques.block_channels)
    found = round_compensated(gram, flat, reach) if techniques.compensation else round_to(flat, reach)
    return found.reshape(*weight.shape)


def input_gram(rows: np.ndarray) -> np.ndarray:
    """Of the rows as the int8 product will see them."""
    seen = quantized_rows(rows)
    return seen.T @ seen


def round_layer(layer: FloatLayer, trace: Trace, techniques: Techniques) -> QuantLayer:
    """Every large matrix of a layer as a `QuantArray`."""
    attn = layer.attn
    inputs = {"q_a": trace.attn, "kv_a": trace.attn, "q_b": trace.attn if attn.q_a is None else trace.q_b, "o": trace.o}
    grams: dict[int, np.ndarray] = {}
    changed: dict[str, Any] = {}
    for name, rows in inputs.items():
        weight = getattr(attn, name)
        if weight is not None and rows is not None:
            if id(rows) not in grams:
                grams[id(rows)] = input_gram(rows)
            changed[name] = round_matrix(weight, grams[id(rows)], techniques)
    whole = input_gram(trace.ffn)
    attn, mlp = dataclasses.replace(attn, **changed), layer.mlp
    if isinstance(mlp, MlpParams):
        return _with_matrices(layer, attn=attn, mlp=_round_mlp(mlp, trace.ffn, whole, techniques))
    shared = mlp.shared and _round_mlp(mlp.shared, trace.ffn, whole, techniques)
    assert trace.topk_idx is not None  # a MoE layer has a router
    rounded = []
    for expert, (w13, w2) in enumerate(zip(mlp.experts.w13, mlp.experts.w2, strict=True)):
        rows = trace.ffn[(trace.topk_idx == expert).any(1)]
        rounded.append(_round_expert(w13, w2, rows, trace.ffn, whole, techniques))
    experts = jax.tree.map(lambda *parts: np.stack(parts), *rounded)
    return _with_matrices(layer, attn=attn, mlp=_with_matrices(mlp, experts=experts, shared=shared))


def _with_matrices(params: Any, **quantized: Any) -> Any:
    """`dataclasses.replace` that changes the kind of leaves."""
    return dataclasses.replace(params, **quantized)


def _round_mlp(
    mlp: MlpParams[np.ndarray], rows: np.ndarray, gram: np.ndarray, techniques: Techniques
) -> MlpParams[QuantArray]:
    w13 = round_matrix(mlp.w13, gram, techniques)
    inner = hidden_rows(quantized_rows(rows), dequantize_host(w13, np.float32))
    return MlpParams(w13=w13, w2=round_matrix(mlp.w2, input_gram(inner), techniques))


def _round_expert(
    w13: np.ndarray, w2: np.ndarray, rows: np.ndarray, layer_rows: np.ndarray, whole: np.ndarray, techniques: Techniques
) -> MlpParams[QuantArray]:
    """An expert that few rows reached also learns from what the layer's other rows would make of it."""
    least = techniques.least_rows
    gram = blended_gram(input_gram(rows) if len(rows) else 0 * whole, len(rows), whole, len(layer_rows), least)
    found = round_matrix(w13, gram, techniques)
    seen = dequantize_host(found, np.float32)
    inner = hidden_rows(quantized_rows(rows), seen)
    inner_gram = input_gram(inner) if len(rows) else np.zeros((w2.shape[1],) * 2, np.float32)
    if len(rows) < least:
        others = hidden_rows(quantized_rows(layer_rows[: 4 * least]), seen)
        inner_gram = blended_gram(inner_gram, len(rows), input_gram(others), len(others), least)
    return MlpParams(w13=found, w2=round_matrix(w2, inner_gram, techniques))


# -- the layer --------------------------------------------------------------------------------------------------------


def quantize_layer(
    layer: FloatLayer, config: ModelConfig, x: np.ndarray, batch: int, techniques: Techniques, where: str
) -> tuple[QuantLayer, np.ndarray]:
    """Quantize one layer, and run it.

    Args:
        layer: one layer's floats, without the axis of layers.
        config: the model's.
        x: `float32[tokens, hidden]`, calibration tokens as they reach the layer.
        batch: sequences that they make up.
        techniques: what runs.
        where: the layer's name, for messages.

    Returns:
        The layer with its matrices as `QuantArray`s, and what it makes of `x`.
    """
    layer = _f32(layer)
    trace, _ = trace_layer(layer, config, x, batch)
    for name, rows in vars(trace).items():
        if rows is not None and not np.isfinite(rows).all():
            raise UserError(f"{where}: calibration activations ({name}) hold NaN or infinity")
    if techniques.scales:
        layer = scale_layer(layer, config, trace, techniques)
    if techniques.rotations:
        layer, trace = rotate_layer(layer, config, x, batch, trace, techniques)
        if techniques.scales:
            layer = scale_layer(layer, config, trace, techniques)
    quantized = round_layer(layer, trace, techniques)
    return quantized, run_layer(quantized, config, x, batch)


def run_layer(layer: QuantLayer, config: ModelConfig, x: np.ndarray, batch: int) -> np.ndarray:
    """What a quantized layer makes of `x[tokens, hidden]`, its activations rounded where products read them."""
    floats: FloatLayer = jax.tree.map(
        lambda leaf: dequantize_host(leaf, np.float32) if isinstance(leaf, QuantArray) else leaf,
        layer,
        is_leaf=lambda leaf: isinstance(leaf, QuantArray),
    )
    trace, middle = trace_layer(floats, config, x, batch)
    rows, mlp = quantized_rows(trace.ffn), floats.mlp
    if isinstance(mlp, MlpParams):
        return middle + quantized_rows(hidden_rows(rows, mlp.w13)) @ mlp.w2.T
    y = np.zeros_like(middle)
    assert trace.topk_idx is not None  # a MoE layer has a router
    assert trace.topk_weights is not None
    for expert, (w13, w2) in enumerate(zip(mlp.experts.w13, mlp.experts.w2, strict=True)):
        token, choice = np.nonzero(trace.topk_idx == expert)
        if len(token):
            out = quantized_rows(hidden_rows(rows[token], w13)) @ w2.T
            y[token] += out * trace.topk_weights[token, choice, None]
    if mlp.shared is not None:
        y += quantized_rows(hidden_rows(rows, mlp.shared.w13)) @ mlp.shared.w2.T
    return middle + y
