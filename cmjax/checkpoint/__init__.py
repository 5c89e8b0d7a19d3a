"""Folders of models: safetensors in every number format, orbax checkpoints, tokenizers, quantizing one offline."""

from cmjax.checkpoint.formats import TensorSource
from cmjax.checkpoint.generation_config import GenerationConfig
from cmjax.checkpoint.load import ModelFormats, load
from cmjax.checkpoint.orbax import restore, save
from cmjax.checkpoint.quantize import Techniques
from cmjax.checkpoint.quantize_folder import quantize_folder
from cmjax.checkpoint.safetensors import SafetensorsFolder, write_safetensors
from cmjax.checkpoint.texts import CalibrationSettings, TextFile, calibration_ids, read_texts
from cmjax.checkpoint.weights import load_checkpoint, load_params, save_hf
from cmjax.text import Detokenizer, Tokenizer, read_json, starts_in, token_starts

__all__ = [
    "CalibrationSettings",
    "Detokenizer",
    "GenerationConfig",
    "ModelFormats",
    "SafetensorsFolder",
    "Techniques",
    "TensorSource",
    "TextFile",
    "Tokenizer",
    "calibration_ids",
    "load",
    "load_checkpoint",
    "load_params",
    "quantize_folder",
    "read_json",
    "read_texts",
    "restore",
    "save",
    "save_hf",
    "starts_in",
    "token_starts",
    "write_safetensors",
]
