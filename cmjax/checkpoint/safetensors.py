"""Tensors by name from a folder of safetensors files, with or without an index, and a file of them from arrays.

Our own reader: the `safetensors` package hands NumPy neither bfloat16 nor FP8, and we owe the user the name of what is
wrong. A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range), and the bytes.
"""

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cmjax.errors import UserError
from cmjax.text import JsonObject, read_json

INDEX_NAME = "model.safetensors.index.json"

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """Where one tensor is."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class SafetensorsFolder:
    """The tensors of a folder's `*.safetensors` files; only headers are read until `read` is called.

    With a `model.safetensors.index.json`, the files that it names; otherwise every `*.safetensors` file. Raises
    UserError, naming the file (and the tensor), where one is missing, unreadable, truncated or contradicts the index.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        index = folder / INDEX_NAME
        if index.exists():
            self._entries = _indexed(folder, index)
            return
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no *.safetensors file in this folder")
        self._entries = {}
        for file in files:
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    raise UserError(f"{file}: tensor {name} is also in {self._entries[name].file.name}")
                self._entries[name] = entry

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored. Read, not mapped: mapped pages would count as memory beside the result."""
        entry = self._entries[name]
        values = np.empty(entry.shape, entry.dtype)
        try:
            with open(entry.file, "rb", buffering=0) as stream:
                stream.seek(entry.start)
                _read_into(stream, values, name)
        except OSError as error:
            raise UserError(f"{entry.file}: cannot read tensor {name}: {error.strerror}") from error
        return values


def _read_into(stream: io.FileIO, values: np.ndarray, name: str) -> None:
    rest = memoryview(values.reshape(-1).view(np.uint8))
    while len(rest):  # one raw read stops at 2 GiB
        count = stream.readinto(rest)
        if not count:
            raise UserError(f"{stream.name}: the file ends inside tensor {name}: it is truncated")
        rest = rest[count:]


def _indexed(folder: Path, index: Path) -> dict[str, _Entry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map must be an object of tensor name -> file name")
    headers: dict[str, dict[str, _Entry]] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: this file is missing; {index.name} names it")
        headers[file] = _read_header(folder / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(f"{folder / file}: tensor {name} is missing; {index.name} says that it is in this file")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_header(file: Path) -> dict[str, _Entry]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{file}: the file ends inside its header: it is truncated, or not a safetensors file")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"{file}: cannot read this file: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: the header is not valid JSON; is this a safetensors file?") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: the header is not a JSON object; is this a safetensors file?")
    header.pop("__metadata__", None)
    return {name: _entry(file, size, 8 + length, name, fields) for name, fields in header.items()}


def _entry(file: Path, size: int, data_start: int, name: str, fields: Any) -> _Entry:
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sizes_fit = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: the header's entry for tensor {name} is malformed") from error
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise UserError(f"{file}: tensor {name} has dtype {dtype_name!r}; supported: {', '.join(_DTYPES)}")
    if not sizes_fit or end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{file}: tensor {name}: {dtype_name} of shape {list(shape)} does not take the bytes {begin} to {end} "
            "that the header gives it"
        )
    if data_start + end > size:
        raise UserError(
            f"{file}: tensor {name} ends at byte {data_start + end}, but the file has {size}: it is truncated"
        )
    return _Entry(file, dtype, shape, data_start + begin)


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors of one file; UserError where it is not whole."""
    return list(_read_header(file))


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` to one file, in their order and dtypes."""
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + values.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for values in tensors.values():
            stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
