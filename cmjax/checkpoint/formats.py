"""How a checkpoint may store a matrix: as floats, FP8 in blocks with a scale each, or int8 with a scale a channel.

The last is the `compressed-tensors` layout of a W8A8 model: `X.weight` int8[out, in], `X.weight_scale` [out, 1], and
activations that are quantized per token at run time. A tensor has the form that `config.json` declares (see
`declared`), or it is an error that names it.
"""

from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, final

import ml_dtypes
import numpy as np

from cmjax.checkpoint.declared import CompressedModules, Declared, Fp8Modules, ModuleNames
from cmjax.errors import UserError
from cmjax.quant import QuantArray, quantize
from cmjax.text import JsonObject

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_SCALE = np.dtype(ml_dtypes.float8_e8m0fnu)
_INT8 = np.dtype(np.int8)
_FLOATS = {np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_METHODS = ("fp8", "compressed-tensors")
# What a quantized matrix has beside it.
_COMPANIONS = ("_scale", "_scale_inv", "_zero_point")

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
        """Raise UserError where a tensor is stored in another way than this, or lacks what it needs."""

    def is_int8(self, source: TensorSource, name: str) -> bool:
        """Whether `read` gives a `QuantArray`."""
        ...

    def read(self, source: TensorSource, name: str, names: Container[str]) -> Stored:
        """The tensor as floats, or quantized as it is stored."""
        ...


@final
@dataclass(frozen=True)
class Floats(StoredFormat):
    """Weights as they are; `why` they are floats, for messages."""

    why: str = "config.json has no quantization_config"

    def check(self, source: TensorSource, name: str, shape: tuple[int, ...], names: Container[str]) -> None:
        dtype = source.dtype(name)
        if dtype not in _FLOATS:
            raise UserError(
                f"{source.where}: tensor {name} has dtype {dtype.name}; weights must be floating-point here: {self.why}"
            )
        _check_companions(source, name, names, (), self.why)

    def is_int8(self, source: TensorSource, name: str) -> bool:
        return False

    def read(self, source: TensorSource, name: str, names: Container[str]) -> np.ndarray:
        return source.read(name)


@final
@dataclass(frozen=True)
class Fp8Blocks(StoredFormat):
    """The matrices of `modules` in e4m3, a scale each `rows` x `columns` values (the published DeepSeek-V3 layout)."""

    rows: int
    columns: int
    modules: Fp8Modules

    def check(self, source: TensorSource, name: str, shape: tuple[int, ...], names: Container[str]) -> None:
        declared = self.modules.of(name)
        if not _check_form(source, name, shape, names, declared, _FP8):
            return
        scale = f"{name}_scale_inv"
        _check_companions(source, name, names, ("_scale_inv",), declared.why)
        if scale not in names:
            raise UserError(f"{source.where}: tensor {name} is {_FP8.name}, but its {scale} is missing")
        blocks = [-(-size // block) for size, block in zip(shape, (self.rows, self.columns), strict=True)]
        if list(source.shape(scale)) != blocks:
            raise UserError(
                f"{source.where}: tensor {scale} has shape {list(source.shape(scale))}; {list(shape)} in blocks of "
                f"{[self.rows, self.columns]} wants {blocks}"
            )
        if source.dtype(scale) not in _FLOATS | {_FP8_SCALE}:
            raise UserError(
                f"{source.where}: tensor {scale} has dtype {source.dtype(scale).name}; scales must be floats"
            )

    def is_int8(self, source: TensorSource, name: str) -> bool:
        return False

    def read(self, source: TensorSource, name: str, names: Container[str]) -> Stored:
        stored = source.read(name)
        if stored.dtype != _FP8:
            return stored
        factors = _read_scale(source, f"{name}_scale_inv")
        # One row of blocks at a time; the last block of a row or a column may be partial.
        values = np.empty(stored.shape, np.float32)
        wide = np.repeat(factors, self.columns, axis=1)[:, : stored.shape[1]]
        with np.errstate(over="ignore", invalid="ignore"):  # `fill` finds what is not finite
            for block, factor in enumerate(wide):
                part = slice(block * self.rows, (block + 1) * self.rows)
                values[part] = stored[part].astype(np.float32) * factor
        return values


@final
@dataclass(frozen=True)
class Int8Channels(StoredFormat):
    """The matrices of `modules` in int8, a scale each output channel."""

    modules: CompressedModules

    def check(self, source: TensorSource, name: str, shape: tuple[int, ...], names: Container[str]) -> None:
        declared = self.modules.of(name)
        if not _check_form(source, name, shape, names, declared, _INT8):
            return
        scale = f"{name}_scale"
        _check_companions(source, name, names, ("_scale", "_zero_point"), declared.why)
        if scale not in names:
            raise UserError(f"{source.where}: tensor {name} is int8, but its {scale} is missing")
        if source.shape(scale) not in ((shape[0], 1), (shape[0],)) or source.dtype(scale) not in _FLOATS:
            raise UserError(
                f"{source.where}: tensor {scale} is {source.dtype(scale).name}{list(source.shape(scale))}; a scale a "
                f"channel wants floats of shape {[shape[0], 1]}"
            )

    def is_int8(self, source: TensorSource, name: str) -> bool:
        return source.dtype(name) == _INT8

    def read(self, source: TensorSource, name: str, names: Container[str]) -> Stored:
        stored = source.read(name)
        if stored.dtype != _INT8:
            return stored
        zero_point = f"{name}_zero_point"
        if zero_point in names and np.any(source.read(zero_point)):
            raise UserError(
                f"{source.where}: tensor {zero_point} is not zero: only symmetric quantization is supported"
            )
        scale = _read_scale(source, f"{name}_scale").reshape(-1)
        if (scale < 0).any():
            raise UserError(f"{source.where}: tensor {name}_scale holds negative scales")
        return QuantArray(stored, scale)


def _check_form(
    source: TensorSource,
    name: str,
    shape: tuple[int, ...],
    names: Container[str],
    declared: Declared,
    quantized: np.dtype,
) -> bool:
    """Whether a tensor is quantized (to the dtype `quantized`); UserError where that is not what is declared."""
    dtype = source.dtype(name)
    if declared.form == "float" or (declared.form == "either" and dtype != quantized):
        Floats(declared.why).check(source, name, shape, names)
        return False
    if dtype != quantized:
        raise UserError(
            f"{source.where}: tensor {name} has dtype {dtype.name}, but must be {quantized.name}: {declared.why}"
        )
    if len(shape) != 2:
        raise UserError(
            f"{source.where}: tensor {name} is {quantized.name} and must be a matrix, found shape {list(shape)}"
        )
    return True


def _check_companions(source: TensorSource, name: str, names: Container[str], known: Collection[str], why: str) -> None:
    for suffix in _COMPANIONS:
        if name + suffix in names and suffix not in known:
            raise UserError(
                f"{source.where}: tensor {name}{suffix} does not belong to a {source.dtype(name).name} tensor: {why}"
            )


def _read_scale(source: TensorSource, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        scale = source.read(name).astype(np.float32)
    if not is_finite(scale):
        raise UserError(f"{source.where}: tensor {name} holds NaN or infinity")
    return scale


def is_finite(values: np.ndarray) -> bool:
    """Whether floats, of any size but 8 bits, hold neither NaN nor infinity. It takes no memory, and two passes."""
    signed, unsigned = np.dtype(f"i{values.dtype.itemsize}"), np.dtype(f"u{values.dtype.itemsize}")
    # As integers, infinity and NaN are the largest bits of either sign.
    most, least = np.array(np.inf, values.dtype).view(signed), np.array(-np.inf, values.dtype).view(unsigned)
    return not values.size or bool(values.view(signed).max() < most and values.view(unsigned).max() < least)


def stored_format(hf: Mapping[str, object]) -> StoredFormat:
    """How a parsed `config.json` says that its checkpoint stores matrices; UserError on what is not supported."""
    quantization = hf.get("quantization_config")
    if quantization is None:
        return Floats()
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(quantization, dict) or method not in _METHODS:
        listed = ", ".join(_METHODS)
        raise UserError(f"config: quantization_config.quant_method {method!r} is not supported; supported: {listed}")
    if method == "compressed-tensors":
        return Int8Channels(_compressed_modules(quantization))
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise UserError(f"config: quantization_config.weight_block_size must be [rows, columns], got {block!r}")
    if quantization.get("fmt") not in (None, "e4m3"):
        raise UserError(f"config: quantization_config.fmt {quantization['fmt']!r} is not supported; supported: 'e4m3'")
    # Two tools' names for the same list.
    fields = ("modules_to_not_convert", "ignored_layers")
    skipped = [
        ModuleNames.read(f"quantization_config.{field}", quantization.get(field), parts=True) for field in fields
    ]
    return Fp8Blocks(rows=block[0], columns=block[1], modules=Fp8Modules(tuple(skipped)))


# What a group's `weights` and `input_activations` must say, and what an absent or null field means.
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = _WEIGHTS | {"strategy": "token", "dynamic": True}
_ABSENT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
# They change what the weights mean, or what is computed with them.
_UNSUPPORTED = ("transform_config", "kv_cache_scheme")


def _compressed_modules(quantization: JsonObject) -> CompressedModules:
    kind = _format(quantization, "quantization_config", "int-quantized")
    for field in _UNSUPPORTED:
        if quantization.get(field):
            raise UserError(f"config: quantization_config.{field} is not supported; supported: none")
    sparsity = quantization.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format") not in (None, "dense")):
        raise UserError("config: quantization_config.sparsity_config is not supported; supported: none, or dense")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError("config: quantization_config.config_groups must be an object of groups")
    targets: list[str] = []
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        _check_group(group, where)
        # Of mixed formats, each group has to name its own.
        _format(group, where, None if kind == _MIXED else kind)
        ModuleNames.read(f"{where}.targets", group.get("targets"))
        if not group.get("targets"):
            raise UserError(f"config: {where}.targets is missing")
        targets += group["targets"]
    return CompressedModules(
        targets=ModuleNames.read("quantization_config.config_groups", targets),
        ignore=ModuleNames.read("quantization_config.ignore", quantization.get("ignore")),
    )


_MIXED = "mixed-precision"


def _format(stated: JsonObject, where: str, default: str | None) -> str:
    """The format of a config, or of one group of it; null is `default`."""
    kind = default if stated.get("format") is None else stated["format"]
    is_known = kind == "int-quantized" or (kind == _MIXED and where == "quantization_config")
    if not is_known:
        raise UserError(f"config: {where}.format {kind!r} is not supported; supported: 'int-quantized'")
    return str(kind)


def _check_group(group: JsonObject, where: str) -> None:
    for part, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        stated = group.get(part)
        if not isinstance(stated, dict):
            raise UserError(
                f"config: {where}.{part} is missing; supported: int8 weights with activations quantized per token"
            )
        absent = _ABSENT | ({"strategy": "channel"} if stated.get("group_size") == -1 else {})
        for field, supported in wanted.items():
            value = absent[field] if stated.get(field) is None else stated[field]
            if value != supported or type(value) is not type(supported):
                raise UserError(f"config: {where}.{part}.{field} {value!r} is not supported; supported: {supported!r}")
    if group.get("output_activations"):
        raise UserError(f"config: {where}.output_activations is not supported; supported: none")


def stored_tensors(name: str, values: Stored) -> dict[str, np.ndarray]:
    """The tensors that a checkpoint holds for one matrix."""
    if isinstance(values, QuantArray):
        return {name: np.asarray(values.qvalue), name + "_scale": np.asarray(values.scale)[:, None]}
    return {name: values}


def compressed_config(names: Collection[str]) -> JsonObject:
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
    """Write a tensor into its place, in the place's format: floats are rounded to the nearest int8 where it is int8.

    UserError, which begins with `name`, where a float that is stored is not finite, or not one in the place's dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(view, QuantArray):
            if not isinstance(stored, QuantArray):
                if not is_finite(stored):
                    raise UserError(f"{name} holds NaN or infinity, which cannot be quantized")
                stored = quantize(stored)
            view.qvalue[...], view.scale[...] = stored.qvalue, stored.scale
        elif isinstance(stored, QuantArray):
            view[...] = stored.qvalue.astype(np.float32) * stored.scale[:, None]
        else:
            view[...] = stored
    # In its place: one check for what is stored, and for what is too large for another dtype.
    place = np.asarray(view.scale) if isinstance(view, QuantArray) else view
    if not is_finite(place):
        is_stored = isinstance(stored, np.ndarray) and not is_finite(stored)
        raise UserError(f"{name} holds {'NaN or infinity' if is_stored else f'values beyond {place.dtype.name}'}")
