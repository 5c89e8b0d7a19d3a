"""How a checkpoint may store a matrix: as floats, FP8 in blocks with a scale each, or int8 with a scale a channel.

The last is the `compressed-tensors` layout of a W8A8 model: `X.weight` int8[out, in], `X.weight_scale` [out, 1], and
activations that are quantized per token at run time.
"""

from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, final

import ml_dtypes
import numpy as np

from cmjax.errors import UserError
from cmjax.quant import QuantArray, quantize

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_SCALE = np.dtype(ml_dtypes.float8_e8m0fnu)
_INT8 = np.dtype(np.int8)
_FLOATS = {np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2)}
_METHODS = ("fp8", "compressed-tensors")

Stored: TypeAlias = np.ndarray | QuantArray


class TensorSource(Protocol):
    """Named tensors from anywhere: shapes and dtypes at once, contents one at a time."""

    where: str  # for messages

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...


class StoredFormat(Protocol):
    """How a checkpoint stores its matrices."""

    def check(self, source: TensorSource, name: str, shape: tuple[int, ...], names: Container[str]) -> None:
        """Raise UserError where a tensor is stored in another way than this."""

    def read(self, source: TensorSource, name: str, names: Container[str]) -> Stored:
        """The tensor as floats, or quantized as it is stored."""
        ...


@final
@dataclass(frozen=True)
class Floats(StoredFormat):
    """Weights as they are."""

    def check(self, source: TensorSource, name: str, shape: tuple[int, ...], names: Container[str]) -> None:
        dtype = source.dtype(name)
        if dtype not in _FLOATS | {_FP8}:
            raise UserError(f"{source.where}: tensor {name} has dtype {dtype.name}; weights must be floating-point")
        if name + "_scale_inv" in names:
            raise UserError(
                f"{source.where}: {name}_scale_inv needs quantization_config.weight_block_size in config.json"
            )
        if name + "_scale" in names:
            raise UserError(
                f"{source.where}: {name}_scale needs a quantization_config of compressed-tensors in config.json"
            )

    def read(self, source: TensorSource, name: str, names: Container[str]) -> np.ndarray:
        stored = source.read(name)
        return stored.astype(np.float32) if stored.dtype.itemsize == 1 else stored


@final
@dataclass(frozen=True)
class Fp8Blocks(StoredFormat):
    """Some matrices in e4m3, a scale each `rows` x `columns` values (the published DeepSeek-V3 layout)."""

    rows: int = 128
    columns: int = 128

    def check(self, source: TensorSource, name: str, shape: tuple[int, ...], names: Container[str]) -> None:
        scale = f"{name}_scale_inv"
        if scale not in names:
            Floats().check(source, name, shape, names)
            return
        dtype = source.dtype(name)
        if dtype != _FP8 or len(shape) != 2:
            raise UserError(
                f"{source.where}: tensor {name} has a _scale_inv and must be an e4m3 matrix, found {dtype.name}"
            )
        blocks = [-(-size // block) for size, block in zip(shape, (self.rows, self.columns), strict=True)]
        if list(source.shape(scale)) != blocks:
            raise UserError(
                f"{source.where}: tensor {scale} has shape {list(source.shape(scale))}; {list(shape)} in blocks of "
                f"{[self.rows, self.columns]} wants {blocks}"
            )
        if source.dtype(scale) not in _FLOATS | {_FP8, _FP8_SCALE}:
            raise UserError(
                f"{source.where}: tensor {scale} has dtype {source.dtype(scale).name}; scales must be floats"
            )

    def read(self, source: TensorSource, name: str, names: Container[str]) -> Stored:
        scale = f"{name}_scale_inv"
        if scale not in names:
            return Floats().read(source, name, names)
        stored, factors = source.read(name), source.read(scale).astype(np.float32)
        # One row of blocks at a time; the last block of a row or a column may be partial.
        values = np.empty(stored.shape, np.float32)
        wide = np.repeat(factors, self.columns, axis=1)[:, : stored.shape[1]]
        for block, factor in enumerate(wide):
            part = slice(block * self.rows, (block + 1) * self.rows)
            values[part] = stored[part].astype(np.float32) * factor
        return values


@final
@dataclass(frozen=True)
class Int8Channels(StoredFormat):
    """Some matrices in int8, a scale each output channel."""

    def check(self, source: TensorSource, name: str, shape: tuple[int, ...], names: Container[str]) -> None:
        scale = f"{name}_scale"
        if source.dtype(name) != _INT8:
            if scale in names:
                raise UserError(
                    f"{source.where}: tensor {name} has a _scale and must be int8, found {source.dtype(name).name}"
                )
            Floats().check(source, name, shape, names)
            return
        if len(shape) != 2:
            raise UserError(f"{source.where}: tensor {name} is int8 and must be a matrix, found shape {list(shape)}")
        if scale not in names:
            raise UserError(f"{source.where}: tensor {name} is int8, but its {scale} is missing")
        if source.shape(scale) not in ((shape[0], 1), (shape[0],)) or source.dtype(scale) not in _FLOATS:
            raise UserError(
                f"{source.where}: tensor {scale} is {source.dtype(scale).name}{list(source.shape(scale))}; a scale a "
                f"channel wants floats of shape {[shape[0], 1]}"
            )

    def read(self, source: TensorSource, name: str, names: Container[str]) -> Stored:
        stored = source.read(name)
        if stored.dtype != _INT8:
            return stored
        scale = source.read(f"{name}_scale").astype(np.float32).reshape(-1)
        if not np.isfinite(scale).all() or (scale < 0).any():
            raise UserError(f"{source.where}: tensor {name}_scale holds scales that are not finite, or negative")
        return QuantArray(stored, scale)


def stored_format(hf: Mapping[str, Any]) -> StoredFormat:
    """How a parsed `config.json` says that its checkpoint stores matrices; UserError on what is not supported."""
    quantization = hf.get("quantization_config")
    if quantization is None:
        return Floats()
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(quantization, dict) or method not in _METHODS:
        listed = ", ".join(_METHODS)
        raise UserError(f"config: quantization_config.quant_method {method!r} is not supported; supported: {listed}")
    if method == "compressed-tensors":
        _check_compressed(quantization)
        return Int8Channels()
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise UserError(f"config: quantization_config.weight_block_size must be [rows, columns], got {block!r}")
    return Fp8Blocks(rows=block[0], columns=block[1])


# What a group's `weights` and `input_activations` must say; a field that is absent has the first value.
_WEIGHTS = {"num_bits": (8,), "type": ("int",), "symmetric": (True,), "strategy": ("channel",), "dynamic": (False,)}
_ACTIVATIONS = _WEIGHTS | {"strategy": ("token",), "dynamic": (True,)}


def _check_compressed(quantization: Mapping[str, Any]) -> None:
    kind = quantization.get("format", "int-quantized")
    if kind != "int-quantized":
        raise UserError(f"config: quantization_config.format {kind!r} is not supported; supported: 'int-quantized'")
    for field in ("transform_config", "kv_cache_scheme"):  # they change what the weights mean
        if quantization.get(field):
            raise UserError(f"config: quantization_config.{field} is not supported; supported: none")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError("config: quantization_config.config_groups must be an object of groups")
    for name, group in groups.items():
        for part, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
            stated = group.get(part)
            where = f"config: quantization_config.config_groups.{name}.{part}"
            if not isinstance(stated, dict):
                raise UserError(f"{where} is missing; supported: int8 weights with activations quantized per token")
            for field, supported in wanted.items():
                if stated.get(field, supported[0]) not in supported:
                    raise UserError(f"{where}.{field} {stated[field]!r} is not supported; supported: {supported[0]!r}")


def stored_tensors(name: str, values: Stored) -> dict[str, np.ndarray]:
    """The tensors that a checkpoint holds for one matrix."""
    if isinstance(values, QuantArray):
        return {name: np.asarray(values.qvalue), name + "_scale": np.asarray(values.scale)[:, None]}
    return {name: values}


def compressed_config(names: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of a W8A8 checkpoint with these tensors; modules with float weights are listed."""
    modules = {
        name.removesuffix(".weight")
        for name in names
        if name.endswith(".weight") and name + "_scale" not in names and "norm" not in name
    }
    ignored = sorted(modules - {"model.embed_tokens"})
    common = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "block_structure": None}
    weights = common | {"strategy": "channel", "dynamic": False, "observer": "minmax"}
    activations = common | {"strategy": "token", "dynamic": True, "observer": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
        },
        "ignore": ignored,
    }


def fill(view: Stored, stored: Stored, name: str) -> None:
    """Write a tensor into its place, in the place's format: floats are rounded to the nearest int8 where it is int8."""
    if isinstance(view, QuantArray):
        if not isinstance(stored, QuantArray):
            if not np.isfinite(stored.astype(np.float32)).all():
                raise UserError(f"{name}: holds NaN or infinite weights, which cannot be quantized")
            stored = quantize(stored)
        view.qvalue[...], view.scale[...] = stored.qvalue, stored.scale
    elif isinstance(stored, QuantArray):
        view[...] = stored.qvalue.astype(np.float32) * stored.scale[:, None]
    else:
        view[...] = stored
