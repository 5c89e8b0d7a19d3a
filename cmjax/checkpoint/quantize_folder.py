"""A checkpoint into int8, one layer at a time: from a Hugging Face folder into another, each larger than memory.

What is finished lies in a hidden folder beside the output, a file of weights and one of calibration activations for
each layer, whole or not there; the output gets its name when all of it is. Interrupted, the same call goes on after the
last finished layer.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from cmjax.checkpoint.formats import Int8Channels, compressed_config, fill, is_finite, stored_format, stored_tensors
from cmjax.checkpoint.quantize import Techniques, input_gram, quantize_layer, round_matrix
from cmjax.checkpoint.safetensors import INDEX_NAME, SafetensorsFolder, read_json, tensor_names, write_safetensors
from cmjax.checkpoint.weights import layer_slots
from cmjax.errors import UserError
from cmjax.model import LayerParams, ModelConfig, aligned_empty, build_layers, check_token_ids
from cmjax.quant import dequantize_host
from cmjax.quant.calibrate import quantized_rows, search_scale

Progress = Callable[[int, int], None]  # (layers done, layers in all)
_MANIFEST = "quantize.json"


def quantize_folder(
    source: str | Path,
    out: str | Path,
    input_ids: np.ndarray,
    techniques: Techniques | None = None,
    progress: Progress | None = None,
) -> None:
    """Quantize the checkpoint in folder `source` into the new folder `out`, in the `compressed-tensors` W8A8 layout.

    Args:
        source: Hugging Face folder; weights bfloat16, float32, float16, or FP8 with block scales.
        out: must not exist, or be empty.
        input_ids: `int[sequences, length]`, the calibration text.
        techniques: what to calibrate with, everything by default.
        progress: called at the start, and after each layer.

    Raises:
        UserError: what is wrong with the source, the output or the calibration text.
    """
    # The products are small: a second BLAS thread only spins, and beside a busy process takes ten times as long.
    with threadpool_limits(1, "blas"):
        _Job(Path(source), Path(out), input_ids, techniques or Techniques()).run(progress or (lambda *_: None))


class _Job:
    """One quantization, which may have been begun before."""

    def __init__(self, source: Path, out: Path, input_ids: np.ndarray, techniques: Techniques) -> None:
        self.source, self.out, self.techniques = source, out.absolute(), techniques
        if not (source / "config.json").is_file():
            raise UserError(f"{source}: config.json is missing: not a Hugging Face checkpoint")
        self.hf = read_json(source / "config.json")
        self.config = ModelConfig.from_hf(self.hf)
        self.stored = stored_format(self.hf)
        if isinstance(self.stored, Int8Channels):
            raise UserError(f"{source}: is quantized already; give the checkpoint that it was made from")
        self.tensors = SafetensorsFolder(source)
        self.names = frozenset(self.tensors.names())
        if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 3:
            raise UserError(
                f"the calibration text has shape {list(input_ids.shape)}; it needs sequences of 3 tokens or more"
            )
        self.input_ids = check_token_ids(input_ids, self.config)
        self.work = self.out.with_name(f".{self.out.name}.quantizing")

    def run(self, progress: Progress) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out}: already exists; a checkpoint is saved to a new folder")
        self._claim()
        config, total = self.config, self.config.num_cache_layers
        progress(0, total)
        rows = self.input_ids.reshape(-1)
        x = self._read("model.embed_tokens.weight").astype(np.float32)[rows]
        batch = len(self.input_ids)
        for layer_id in range(config.num_hidden_layers):
            x = self._layer(layer_id, x, batch)
            progress(layer_id + 1, total)
        if config.num_mtp_layers:
            self._mtp(x)
            progress(total, total)
        self._rest()
        self._finish()

    # -- what has been done before ------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Say what the unfinished folder is of, or find that it is of something else."""
        sizes = {path.name: path.stat().st_size for path in sorted(self.source.glob("*.safetensors"))}
        identity = {
            "config": self.config.digest,
            "files": sizes,
            "techniques": dataclasses.asdict(self.techniques),
            "calibration": hashlib.sha256(np.ascontiguousarray(self.input_ids, np.int32)).hexdigest(),
        }
        manifest = self.work / _MANIFEST
        if manifest.exists():
            if read_json(manifest) != identity:
                raise UserError(f"{self.work}: holds an unfinished quantization of something else; remove it")
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        _replace(manifest, lambda path: path.write_text(json.dumps(identity)))

    def _layer(self, layer_id: int, x: np.ndarray, batch: int) -> np.ndarray:
        """Quantize a layer, unless that is done; return what leaves it."""
        weights, hidden = self._file(layer_id), self.work / f"hidden-{layer_id:05d}.npy"
        if weights.exists() and hidden.exists():
            return np.load(hidden)
        prefix = f"model.layers.{layer_id}."
        layer = self._read_layer(prefix, self.config.is_moe_layer(layer_id))
        quantized, x = quantize_layer(layer, self.config, x, batch, self.techniques, f"layer {layer_id}")
        self._write(weights, self._layer_tensors(prefix, quantized))
        _replace(hidden, lambda path: _save_array(path, x))
        return x

    def _mtp(self, x: np.ndarray) -> None:
        """The MTP module: its projection, then its layer, on what the model's last layer leaves."""
        layer_id = self.config.num_hidden_layers
        weights = self._file(layer_id)
        if weights.exists():
            return
        prefix, eps = f"model.layers.{layer_id}.", self.config.rms_norm_eps
        hidden = _rms_norm(x, self._read("model.norm.weight"), eps).reshape(*self.input_ids.shape, -1)[:, :-1]
        table = prefix + "embed_tokens.weight"
        embed = self._read(table if table in self.names else "model.embed_tokens.weight").astype(np.float32)
        enorm, hnorm = (self._read(f"{prefix}{name}.weight").astype(np.float32) for name in ("enorm", "hnorm"))
        eh_proj = self._read(prefix + "eh_proj.weight").astype(np.float32)
        following = embed[self.input_ids[:, 1:]]
        parts = [_rms_norm(following, enorm, eps), _rms_norm(hidden, hnorm, eps)]
        inputs = np.concatenate(parts, axis=-1).reshape(-1, eh_proj.shape[1])
        if self.techniques.scales:
            scale = search_scale(inputs[: self.techniques.search_rows], [eh_proj])
            half = len(enorm)
            enorm, hnorm, eh_proj = enorm / scale[:half], hnorm / scale[half:], eh_proj * scale
            inputs = inputs / scale
        projection = round_matrix(eh_proj, input_gram(inputs), self.techniques)
        x = quantized_rows(inputs) @ dequantize_host(projection, np.float32).T
        layer = self._read_layer(prefix, self.config.is_moe_layer(layer_id))
        quantized, _ = quantize_layer(layer, self.config, x, len(self.input_ids), self.techniques, "the MTP layer")
        tensors = {f"{prefix}enorm.weight": enorm, f"{prefix}hnorm.weight": hnorm}
        tensors |= stored_tensors(f"{prefix}eh_proj.weight", projection) | self._layer_tensors(prefix, quantized)
        for name in ("embed_tokens.weight", "shared_head.norm.weight", "shared_head.head.weight"):
            if prefix + name in self.names:
                tensors[prefix + name] = self._read(prefix + name)
        self._write(weights, tensors)

    def _rest(self) -> None:
        """Embedding, final norm and head, as they are."""
        names = [
            name for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight") if name in self.names
        ]
        self._write(self._file(self.config.num_cache_layers), {name: self._read(name) for name in names})

    def _finish(self) -> None:
        """Write index and config, and give the folder its name."""
        weight_map = {
            name: path.name for path in sorted(self.work.glob("model-*.safetensors")) for name in tensor_names(path)
        }
        for path in self.source.iterdir():
            # Tokenizer, templates, generation settings; index and config are written anew.
            if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copyfile(path, self.work / path.name)
        hf = self.hf | {"quantization_config": compressed_config(weight_map)}
        for name, values in ((INDEX_NAME, {"metadata": {}, "weight_map": weight_map}), ("config.json", hf)):
            (self.work / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        for path in [*self.work.glob("hidden-*.npy"), self.work / _MANIFEST]:
            path.unlink()
        if self.out.exists():
            self.out.rmdir()
        os.replace(self.work, self.out)

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _file(self, layer_id: int) -> Path:
        return self.work / f"model-{layer_id:05d}.safetensors"

    def _read(self, name: str) -> np.ndarray:
        """A tensor as floats; UserError where it is missing or holds what is no number."""
        if name not in self.names:
            raise UserError(f"{self.source}: missing tensor {name}")
        self.stored.check(self.tensors, name, self.tensors.shape(name), self.names)
        values = self.stored.read(self.tensors, name, self.names)
        assert isinstance(values, np.ndarray)  # int8 is refused at the start
        if not is_finite(values):
            raise UserError(f"{self.source}: tensor {name} holds NaN or infinity")
        return values

    def _read_layer(self, prefix: str, sparse: bool) -> LayerParams:
        """One layer as floats, without the axis of layers."""
        layer = build_layers(self.config, 1, sparse, np.dtype(np.float32), aligned_empty)
        for name, view in layer_slots(prefix, layer, 0, self.names):
            values = self._read(name)
            if values.shape != view.shape:
                raise UserError(
                    f"{self.source}: tensor {name} has shape {list(values.shape)}; the config wants {list(view.shape)}"
                )
            fill(view, values, name)
        return jax.tree.map(lambda leaf: leaf[0], layer)

    def _layer_tensors(self, prefix: str, layer: LayerParams) -> dict[str, np.ndarray]:
        stacked = jax.tree.map(lambda leaf: leaf[None], layer)
        tensors: dict[str, np.ndarray] = {}
        for name, view in layer_slots(prefix, stacked, 0, ()):
            tensors |= stored_tensors(name, view)
        return tensors

    def _write(self, path: Path, tensors: dict[str, np.ndarray]) -> None:
        _replace(path, lambda partial: write_safetensors(partial, tensors))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def _save_array(path: Path, values: np.ndarray) -> None:
    with open(path, "wb") as stream:
        np.save(stream, values)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + eps) * weight.astype(np.float32)
