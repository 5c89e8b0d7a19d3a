"""Planted outliers: a model that computes the same, and that rounding to int8 as it is would spoil.

A few channels between two matrices are scaled, and the inverse goes into the other side. Each kind is one that a
technique of the calibration (`cmjax.model.Techniques`) undoes or softens alone.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from cmjax.model import AttentionParams, LayerParams, Model, MoeParams, Params, params_digest

# Kind -> how far its channels stick out: powers of two, which round nothing.
FACTORS = {"inputs": 128.0, "values": 256.0, "idle weights": 256.0, "weights": 128.0}
# The technique that each kind is made for.
REMEDIES = {"inputs": "scales", "values": "rotations", "idle weights": "clipping", "weights": "compensation"}
_CHANNELS = 3  # of the hidden state


def plant_outliers(
    model: Model, kinds: tuple[str, ...] = tuple(FACTORS), *, factor: float | None = None, seed: int = 0
) -> Model:
    """The same function with outliers, its weights float32.

    Args:
        model: of float weights.
        kinds: of "inputs": channels behind the norms stick out, and the columns that read them are small; "values": one
            value channel of each head sticks out, and its column of o is small; "idle weights": of each head the
            column of o that matters least is large, and its value small; "weights": columns of all matrices behind the
            norms are large, and the channels that they read small.
        factor: how far they stick out; by default what `FACTORS` says of each kind.
        seed: of the choice of channels.
    """
    rng = np.random.default_rng(seed)
    params = model.params
    for kind in kinds:
        size = np.float32(factor or FACTORS[kind])
        params = _map_layers(params, functools.partial(_plant, kind=kind, factor=size, rng=rng))
    return Model(model.config, params, params_digest(model.config, params))


def _map_layers(params: Params, function: Callable[[LayerParams], LayerParams]) -> Params:
    mtp = params.mtp
    return dataclasses.replace(
        params,
        dense=params.dense and function(params.dense),
        moe=params.moe and function(params.moe),
        mtp=mtp and dataclasses.replace(mtp, layer=function(mtp.layer)),
    )


def _plant(layer: LayerParams, kind: str, factor: np.float32, rng: np.random.Generator) -> LayerParams:
    if kind in ("inputs", "weights"):
        # In blocks: the two norms of a layer have outliers in channels of their own.
        return _scale_inputs(layer, factor if kind == "inputs" else 1 / factor, rng)
    return dataclasses.replace(layer, attn=_scale_values(layer.attn, factor, kind == "idle weights", rng))


def _scale_inputs(layer: LayerParams, factor: np.float32, rng: np.random.Generator) -> LayerParams:
    """Scale channels of both norms' outputs, and the columns behind them by the inverse."""
    hidden = layer.input_norm.shape[-1]
    scale = np.ones((2, hidden), np.float32)
    for row in scale:
        row[rng.choice(hidden, _CHANNELS, replace=False)] = factor
    attn, mlp = layer.attn, layer.mlp
    first_q = "q_b" if attn.q_a is None else "q_a"
    attn = dataclasses.replace(attn, **{first_q: getattr(attn, first_q) / scale[0], "kv_a": attn.kv_a / scale[0]})
    if isinstance(mlp, MoeParams):
        shared = mlp.shared and dataclasses.replace(mlp.shared, w13=mlp.shared.w13 / scale[1])
        experts = dataclasses.replace(mlp.experts, w13=mlp.experts.w13 / scale[1])
        mlp = dataclasses.replace(mlp, router=mlp.router / scale[1], experts=experts, shared=shared)
    else:
        mlp = dataclasses.replace(mlp, w13=mlp.w13 / scale[1])
    return dataclasses.replace(
        layer,
        input_norm=layer.input_norm * scale[0],
        attn=attn,
        post_attn_norm=layer.post_attn_norm * scale[1],
        mlp=mlp,
    )


def _scale_values(
    attn: AttentionParams, factor: np.float32, is_idle: bool, rng: np.random.Generator
) -> AttentionParams:
    """Scale one value channel of each head, or (`is_idle`) the column of o that reads the least of it."""
    layers, out, _ = attn.o.shape
    heads = attn.kv_b.shape[1]
    o = np.asarray(attn.o, np.float32).reshape(layers, out, heads, -1)
    v_dim = o.shape[-1]
    values = np.asarray(attn.kv_b[:, :, -v_dim:], np.float32)
    scale = np.ones((layers, heads, v_dim), np.float32)
    if is_idle:
        matters = np.linalg.norm(values * attn.kv_a_norm[:, None, None], axis=-1) * np.linalg.norm(o, axis=1)
        np.put_along_axis(scale, matters.argmin(-1)[..., None], 1 / factor, axis=-1)
    else:
        np.put_along_axis(scale, rng.integers(v_dim, size=(layers, heads, 1)), factor, axis=-1)
    kv_b = np.concatenate([np.asarray(attn.kv_b[:, :, :-v_dim], np.float32), values * scale[..., None]], axis=2)
    return dataclasses.replace(attn, kv_b=kv_b, o=(o / scale[:, None]).reshape(attn.o.shape))
